"""LAMB on engines beside LAMB that is never sharded, fed with the very same gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import build_engine, release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.growth.operators import layer_map, source_name
from stacking_ds.growth.transfer import capture, install
from stacking_ds.sharding.fragments import MASTER
from tests.sharded import State, train_engine, whole_state
from tests.tiny import tiny_model, tiny_optimizer, tiny_settings

__all__ = [
    "AFTER",
    "STEPS",
    "Cases",
    "follow_unsharded",
    "grown_by_hand",
    "lamb_engine",
    "largest_differences",
    "unsharded_lamb",
]

STEPS = 8
AFTER = 5  # steps after the growth that follows
Cases = list[tuple[int | str, str, str]]
"""ZeRO stage (or the rest of a bundled JSON's name after "zero"), precision, kernel."""


def lamb_engine(
    world: World,
    zero_stage: int | str,
    precision: str = "fp32",
    *,
    depth: int = 2,
    seed: int = 0,
    gas: int = 1,
    clipping: float = 0.0,
    **lamb: Any,
) -> Any:
    model = tiny_model(depth, seed)
    settings = tiny_settings(zero_stage, precision, world.size, gas, clipping)
    engine = build_engine(model, tiny_optimizer(model, **{"name": "lamb", **lamb}), settings)
    sharded_state.set_loss_scale(engine, 256.0)  # the initial one makes fp16 skip its first steps
    return engine


def unsharded_lamb(depth: int, **lamb: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = tiny_model(depth)
    return model, tiny_optimizer(model, **{"name": "lamb", "kernel": "reference", **lamb})


def grown_by_hand(model: Any, optimizer: torch.optim.Optimizer, depth: int, **lamb: Any) -> Any:
    """The unsharded pair, stacked by hand to twice its depth with its moments."""
    grown, theirs = unsharded_lamb(2 * depth, **lamb)
    before = dict(model.named_parameters())
    layers = layer_map("stack", depth, 2 * depth)
    for name, parameter in grown.named_parameters():
        source = before[source_name(name, layers)]
        parameter.data.copy_(source.data)
        theirs.state[parameter] = {k: v.clone() for k, v in optimizer.state[source].items()}
    return grown, theirs


# ------------------------------------------------------------------ given the same gradients


@contextmanager
def _gradients_seen(world: World, engine: Any) -> Iterator[dict[str, torch.Tensor]]:
    """While this lasts: the whole gradients that the optimizer is given, on every rank."""
    optimizer = engine.basic_optimizer
    shards = {id(shard.flat): shard for shard in sharded_state.shards(engine)}
    fragments = {fragment.name: fragment for fragment in sharded_state.fragments(engine)}
    parts: list[tuple[str, int, torch.Tensor]] = []
    whole: dict[str, torch.Tensor] = {}
    step = optimizer.step

    def watched() -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                for span in shards[id(flat)].spans:
                    values = flat.grad.view(-1)[span.offset : span.offset + span.numel]
                    parts.append((span.name, fragments[span.name].start, values.clone()))
        step()

    optimizer.step = watched
    yield whole
    del optimizer.step
    for part in world.gather(parts):
        for name, start, values in part:
            shape = fragments[name].shape
            target = whole.setdefault(name, torch.full(shape, torch.nan))
            target.view(-1)[start : start + values.numel()] = values
    assert not any(gradient.isnan().any() for gradient in whole.values())


def _follow(world: World, engine: Any, model: Any, optimizer: Any, steps: range) -> None:
    """Train the engine, and give the unsharded optimizer the very gradients it reduced."""
    parameters = dict(model.named_parameters())
    for step in steps:
        with _gradients_seen(world, engine) as gradients:
            train_engine(world, engine, range(step, step + 1))
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        optimizer.step()


def largest_differences(state: State, model: Any) -> tuple[float, float, float]:
    """Largest difference: of a tensor relative to its largest weight, of key biases, of all.

    The true gradient of a key bias is 0: what comes is noise, and there is no scale to it.
    """
    relative, key_bias, absolute = 0.0, 0.0, 0.0
    for name, parameter in model.named_parameters():
        assert state[name][MASTER].shape == parameter.shape
        far = float((state[name][MASTER] - parameter.detach()).abs().max())
        absolute = max(absolute, far)
        if name.endswith("key.bias"):
            key_bias = max(key_bias, far)
        else:
            relative = max(relative, far / float(parameter.detach().abs().max()))
    return relative, key_bias, absolute


def follow_unsharded(world: World, cases: Cases, **lamb: Any) -> list[Any]:
    """Some steps, and a few more after a growth with carried moments: the largest differences after
    both, for each case."""
    found = []
    # eps as in the field: the gradients are the same, noise included
    eps = {"eps": 1e-6, **lamb}
    for zero_stage, precision, kernel in cases:
        options: dict[str, Any] = {**eps, "kernel": kernel}
        engine = lamb_engine(world, zero_stage, precision, **options)
        model, optimizer = unsharded_lamb(2, **eps)
        _follow(world, engine, model, optimizer, range(STEPS))
        before = largest_differences(whole_state(world, engine), model)
        state = capture(engine)
        release_engine(engine)
        engine = lamb_engine(world, zero_stage, precision, depth=4, seed=99, **options)
        install(state, engine, layer_map("stack", 2, 4), "carry", world)
        model, optimizer = grown_by_hand(model, optimizer, 2, **eps)
        _follow(world, engine, model, optimizer, range(STEPS, STEPS + AFTER))
        statistics = engine.basic_optimizer.statistics()
        expected = optimizer.statistics()
        after = largest_differences(whole_state(world, engine), model)
        release_engine(engine)
        names = [name for name, _ in model.named_parameters()]
        order = [p for group in optimizer.param_groups for p in group["params"]]
        by_id = {id(p): name for name, p in model.named_parameters()}
        wanted = [one.trust_ratio for one in expected]
        ratios = dict(zip([by_id[id(p)] for p in order], wanted, strict=True))
        assert sorted(one.name for one in statistics) == sorted(names)
        for one in statistics:
            assert one.trust_ratio == pytest.approx(ratios[one.name], rel=1e-4), one.name
        found.append((before, after))
    return found
