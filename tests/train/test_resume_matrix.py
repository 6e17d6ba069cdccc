"""What is saved at any ZeRO stage and world size is loaded at any other, bit for bit."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from stacking_ds.checkpoint import folders, load, manifest
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.sharding.fragments import MASTER, MOMENTS
from tests.checkpoints import save_state
from tests.ranks import run_ranks
from tests.sharded import State, start_engine, train_losses, whole_state
from tests.tiny import tiny_batch, tiny_loss, tiny_model, tiny_optimizer

RANKS = (1, 2, 3, 4)
STEPS, MORE_STEPS = 3, 2
# what the losses afterwards may be off by: the order of sums, and bf16's rounding
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}


class Place(NamedTuple):
    """Where state lives."""

    zero_stage: int
    ranks: int
    precision: str = "fp32"


class Saved(NamedTuple):
    """What an engine had when it was saved."""

    run_dir: Path
    state: State
    optimizer_step: int


class Loaded(NamedTuple):
    """What another engine had of it, and how it went on."""

    state: State
    optimizer_step: int
    losses: list[float]


SaveAt = Callable[[Place], Saved]


# ------------------------------------------------------------------ on ranks


def _save_at(world: World, root: Path, places: list[Place]) -> list[Saved]:
    found = []
    for place in places:
        engine = start_engine(world, place.zero_stage, place.precision)
        train_losses(world, engine, range(STEPS))
        run_dir = root / "-".join(map(str, place))
        found.append(
            Saved(run_dir, whole_state(world, engine), sharded_state.optimizer_step(engine))
        )
        save_state(
            run_dir, sharded_state.optimizer_step(engine), sharded_state.fragments(engine), world
        )
        release_engine(engine)
    return found


def _load_at(world: World, moves: list[tuple[Path, Place]]) -> list[Loaded] | None:
    found = []
    for run_dir, place in moves:
        engine = start_engine(world, place.zero_stage, place.precision, seed=99)
        folder = folders.latest(run_dir)
        assert folder is not None
        sharded_state.seed_moments(engine, manifest.read_manifest(folder).optimizer_step)
        load.load(folder, sharded_state.fragments(engine), world=world)
        sharded_state.refresh(engine)
        state, step = whole_state(world, engine), sharded_state.optimizer_step(engine)
        losses = train_losses(world, engine, range(STEPS, STEPS + MORE_STEPS))
        found.append(Loaded(state, step, losses))
        release_engine(engine)
    return found if world.is_first else None


# ------------------------------------------------------------------ and from outside


@pytest.fixture(scope="module")
def save_at(tmp_path_factory: pytest.TempPathFactory) -> SaveAt:
    """What was saved at a place; in fp32 all ZeRO stages of a world size are saved together."""
    root = tmp_path_factory.mktemp("saved")

    @functools.cache
    def save_together(places: tuple[Place, ...]) -> dict[Place, Saved]:
        saved = run_ranks(_save_at, places[0].ranks, root, list(places))[0]
        return dict(zip(places, saved, strict=True))

    def save(place: Place) -> Saved:
        if place.precision != "fp32":
            return save_together((place,))[place]
        return save_together(tuple(Place(stage, place.ranks) for stage in range(4)))[place]

    return save


def _check(save_at: SaveAt, ranks: int, moves: list[tuple[Place, Place]]) -> None:
    """Load each saved state on so many ranks; it is the same, and trains on as if never saved."""
    expected = _losses_of_plain_torch()
    starts = [save_at(old) for old, _ in moves]
    paths = [(start.run_dir, new) for start, (_, new) in zip(starts, moves, strict=True)]
    results = run_ranks(_load_at, ranks, paths, timeout_seconds=280)[0]
    for (old, new), start, loaded in zip(moves, starts, results, strict=True):
        assert loaded.state.keys() == start.state.keys()
        for name, views in start.state.items():
            assert views.keys() == loaded.state[name].keys() == {MASTER, *MOMENTS}
            for key, value in views.items():
                assert torch.equal(loaded.state[name][key], value), (old, new, name, key)
        assert loaded.optimizer_step == start.optimizer_step == STEPS
        tolerance = max(TOLERANCE[place.precision] for place in (old, new))
        assert loaded.losses == pytest.approx(expected, rel=tolerance), (old, new)


@functools.cache
def _losses_of_plain_torch() -> list[float]:
    model = tiny_model(2)
    optimizer = tiny_optimizer(model)
    losses = []
    for step in range(STEPS + MORE_STEPS):
        optimizer.zero_grad()
        loss: Any = tiny_loss(model, tiny_batch(step), slice(None))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[STEPS:]


# An orthogonal array: each two of the four numbers (ZeRO stage and world size, saved and loaded)
# occur in every combination. It is arithmetic in the field of four elements.
_TWICE = (0, 2, 3, 1)
PAIRWISE = [
    (Place(a, RANKS[m]), Place(a ^ m, RANKS[a ^ _TWICE[m]])) for a in range(4) for m in range(4)
]


@pytest.mark.parametrize(
    "ranks", [2, 4, *(pytest.param(other, marks=pytest.mark.slow) for other in (1, 3))]
)
def test_any_layout_loads_what_another_saved(save_at: SaveAt, ranks: int) -> None:
    _check(save_at, ranks, [(old, new) for old, new in PAIRWISE if new.ranks == ranks])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_every_layout_loads_what_every_other_saved(save_at: SaveAt, ranks: int) -> None:
    saved = [Place(stage, saved_by) for saved_by in RANKS for stage in range(4)]
    _check(save_at, ranks, [(old, Place(stage, ranks)) for old in saved for stage in range(4)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Place(1, 2), Place(3, 3, "bf16")),
        (Place(3, 3), Place(0, 2, "bf16")),
        (Place(2, 3, "bf16"), Place(0, 1)),
        (Place(0, 2, "bf16"), Place(3, 2)),
        (Place(3, 2, "bf16"), Place(1, 3, "bf16")),
    ],
)
def test_another_precision_loads_it_too(save_at: SaveAt, old: Place, new: Place) -> None:
    _check(save_at, new.ranks, [(old, new)])
