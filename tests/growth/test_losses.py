"""A grown run trains on as if it had never been sharded: its losses are those of plain torch."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import release_engine
from stacking_ds.growth.operators import layer_map
from stacking_ds.growth.transfer import Moments, capture, install
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_losses
from tests.tiny import tiny_batch, tiny_loss, tiny_model, tiny_optimizer

DEPTHS = (2, 4, 8)
STEPS = 5  # of every stage
TOLERANCE = 1e-6  # relative: an fp32 sum of a batch's losses is not known better
Cases = list[tuple[int, Moments]]


# ------------------------------------------------------------------ plain torch, one process


@functools.cache
def _reference(moments: Moments) -> list[float]:
    """The losses of all stages of a model that is never sharded, stacked by hand."""
    model = tiny_model(DEPTHS[0])
    optimizer = tiny_optimizer(model)
    losses = list(_train(model, optimizer, _steps(0)))
    for stage, depth in enumerate(DEPTHS[1:], 1):
        grown = tiny_model(depth, seed=1)
        theirs = tiny_optimizer(grown)
        before = dict(model.named_parameters())
        for name, parameter in grown.named_parameters():
            source = before[_halved(name, depth // 2)]
            parameter.data.copy_(source.data)
            if moments == "carry":
                state = optimizer.state[source]
                theirs.state[parameter] = {key: value.clone() for key, value in state.items()}
        model, optimizer = grown, theirs
        losses += _train(model, optimizer, _steps(stage))
    return losses


def _train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> Iterator[float]:
    for step in steps:
        optimizer.zero_grad()
        loss = tiny_loss(model, tiny_batch(step), slice(None))
        loss.backward()
        optimizer.step()
        yield loss.item()


def _steps(stage: int) -> range:
    return range(stage * STEPS, (stage + 1) * STEPS)


def _halved(name: str, old_depth: int) -> str:
    """bert.encoder.layer.5.… of 8 layers is a copy of bert.encoder.layer.1.… of 4."""
    parts = name.split(".")
    if "layer" in parts:
        place = parts.index("layer") + 1
        parts[place] = str(int(parts[place]) % old_depth)
    return ".".join(parts)


# ------------------------------------------------------------------ on engines


def _grow_and_train(world: World, cases: Cases) -> list[list[float]]:
    return [_losses(world, *case) for case in cases]


def _losses(world: World, zero_stage: int, moments: Moments) -> list[float]:
    engine = start_engine(world, zero_stage, depth=DEPTHS[0])
    losses = train_losses(world, engine, _steps(0))
    for stage, (old, new) in enumerate(itertools.pairwise(DEPTHS), 1):
        state = capture(engine)
        release_engine(engine)
        engine = start_engine(world, zero_stage, depth=new, seed=99)
        install(state, engine, layer_map("stack", old, new), moments, world)
        losses += train_losses(world, engine, _steps(stage))
    release_engine(engine)
    return losses


COVERING: list[tuple[int, Cases]] = [
    (2, [(2, "carry"), (3, "reset")]),
]


@pytest.mark.parametrize(("ranks", "cases"), COVERING)
def test_the_losses_after_growth_are_those_of_plain_torch(ranks: int, cases: Cases) -> None:
    found = run_ranks(_grow_and_train, ranks, cases)[0]
    for case, losses in zip(cases, found, strict=True):
        assert losses == pytest.approx(_reference(case[1]), rel=TOLERANCE), case


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_they_are_at_every_zero_stage(ranks: int) -> None:
    cases: Cases = [(stage, moments) for stage in range(4) for moments in ("carry", "reset")]
    test_the_losses_after_growth_are_those_of_plain_torch(ranks, cases)


def test_these_losses_tell_carried_moments_from_reset_ones() -> None:
    carried, reset = _reference("carry"), _reference("reset")
    # growth leaves the moments' mark on the second loss after it
    assert carried[: STEPS + 1] == reset[: STEPS + 1]
    for ours, theirs in zip(carried[STEPS + 1 :], reset[STEPS + 1 :], strict=True):
        assert abs(ours / theirs - 1) > 100 * TOLERANCE
