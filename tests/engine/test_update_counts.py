"""What an update does, counted: device operations, collectives and waits, by the model's depth."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from stacking_ds.distributed.world import World
from stacking_ds.engine.build import advance
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_engine, whole_state
from tests.tiny import SAMPLES, tiny_batch, tiny_loss

# they launch nothing on a device
_VIEWS = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like"),
    *("empty_strided", "expand", "lift_fresh", "narrow", "new_empty", "new_empty_strided"),
    *("permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose"),
    *("unbind", "unsqueeze", "view"),
}


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = function._schema.name.split("::")[1]
        if name not in _VIEWS:
            self.count[name] += 1
        return function(*arguments, **(options or {}))


def _count(world: World, zero_stage: int, depths: list[int]) -> dict[int, tuple[int, int]]:
    """By depth, the operations of an update after the first, and its all-reduces."""
    found = {}
    for depth in depths:
        engine = start_engine(world, zero_stage, "bf16", depth=depth, clipping=1.0)
        train_engine(world, engine, range(2))
        engine.backward(tiny_loss(engine, tiny_batch(2), slice(0, SAMPLES)))
        with _Operations() as operations:
            advance(engine)
        reduced = operations.count["allreduce_"]
        found[depth] = (sum(operations.count.values()) - reduced, reduced)
    return found


@pytest.mark.parametrize(
    ("zero_stage", "a_layer"), [(1, 64), pytest.param(2, 60, marks=pytest.mark.slow), (3, 44)]
)
def test_an_update_takes_one_norm_and_few_operations_a_layer(zero_stage: int, a_layer: int) -> None:
    """Each layer has two parameter groups, which DeepSpeed steps one after the other. By itself it
    takes some 330 operations a layer at ZeRO 1 and 2, and an all-reduce a group."""
    [counts] = run_ranks(_count, 1, zero_stage, [3, 12, 24])
    assert {reduced for _, reduced in counts.values()} == {1}
    operations = [count for count, _ in counts.values()]
    assert operations[-1] < 1600
    assert (operations[-1] - operations[0]) / 21 < a_layer


def _norms(world: World, zero_stage: int, poisoned: int) -> tuple[float | None, bool]:
    """The norm of a step that one rank finds infinite, and whether masters or moments moved."""
    engine = start_engine(world, zero_stage, "bf16")
    train_engine(world, engine, range(1))
    before = whole_state(world, engine)
    share = SAMPLES // world.size
    loss = tiny_loss(engine, tiny_batch(1), slice(world.rank * share, (world.rank + 1) * share))
    engine.backward(loss * (torch.inf if world.rank == poisoned else 1.0))
    norm = advance(engine)
    after = whole_state(world, engine)
    return norm, any(
        not torch.equal(value, after[name][key])
        for name, values in before.items()
        for key, value in values.items()
    )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_what_one_rank_finds_infinite_moves_no_ranks_weights(zero_stage: int) -> None:
    assert run_ranks(_norms, 3, zero_stage, 2) == [(torch.inf, False)] * 3


def _waits(world: World) -> int:
    from deepspeed.accelerator import get_accelerator

    waits = []
    accelerator = get_accelerator()
    accelerator.synchronize = lambda *_: waits.append(dist.get_rank())
    engine = start_engine(world, 1, gas=2)
    train_engine(world, engine, range(3), gas=2)
    return len(waits)


def test_deepspeeds_timer_does_not_wait_for_the_device() -> None:
    assert run_ranks(_waits, 1) == [0]
