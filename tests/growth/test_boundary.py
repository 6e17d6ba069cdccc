"""What a boundary carries besides masters and moments: low-precision weights and the loss scale."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.checkpoint import load
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import advance, release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.errors import StageError
from stacking_ds.growth.operators import layer_map, source_name
from stacking_ds.growth.transfer import capture, install
from stacking_ds.sharding.fragments import MASTER, MOMENTS
from tests.checkpoints import contents, save_now
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_engine, whole_state
from tests.tiny import tiny_batch, tiny_loss

LAYERS = layer_map("stack", 2, 4)


def _weights_gone_wrong(world: World) -> str:
    engine = start_engine(world, 1, "bf16")
    train_engine(world, engine, range(1))
    state = capture(engine)
    release_engine(engine)
    if world.rank == 1:
        for weight in state.weights.values():
            weight.mul_(1.5)
    engine = start_engine(world, 1, "bf16", depth=4)
    with pytest.raises(StageError) as caught:
        install(state, engine, LAYERS, "carry", world)
    return str(caught.value)


def test_weights_that_are_not_the_masters_rounding_are_an_error_on_every_rank() -> None:
    first, second = run_ranks(_weights_gone_wrong, 2)
    assert "not the rounding of the masters, on another rank; do not train on" in first
    assert "not the rounding of the masters (first: bert." in second


def _grow_in_fp16(world: World, zero_stage: int) -> Any:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # a CPU can, slowly
    engine = start_engine(world, zero_stage, "fp16")
    sharded_state.set_loss_scale(engine, 256.0)
    train_engine(world, engine, range(1))
    for _ in range(2):  # DeepSpeed forgives the first overflow, and lowers its scale then
        engine.backward(1e30 * tiny_loss(engine, tiny_batch(1), slice(None)))
        advance(engine)
    assert engine.skipped_steps == 2
    before, scale = whole_state(world, engine), sharded_state.loss_scale(engine)
    state = capture(engine)
    release_engine(engine)
    engine = start_engine(world, zero_stage, "fp16", depth=4, seed=99)
    install(state, engine, LAYERS, "carry", world)
    assert sharded_state.loss_scale(engine) == scale < 256.0
    assert sharded_state.optimizer_step(engine) == 1
    after = whole_state(world, engine)
    weights = {name: weight.clone() for name, weight in sharded_state.whole_weights(engine).items()}
    train_engine(world, engine, range(2, 3))
    assert engine.skipped_steps == 0
    release_engine(engine)
    return before, after, weights


@pytest.mark.parametrize(("ranks", "zero_stage"), [(2, 0), (3, 1), (2, 2), (2, 3)])
def test_growth_in_fp16_is_exact_after_skipped_steps(ranks: int, zero_stage: int) -> None:
    before, after, weights = run_ranks(_grow_in_fp16, ranks, zero_stage)[0]
    for name, views in after.items():
        source = before[source_name(name, LAYERS)]
        assert views.keys() == {MASTER, *MOMENTS}
        assert all(torch.equal(views[key], source[key]) for key in views), name
    assert bool(weights) == (zero_stage in (1, 2))
    for name, weight in weights.items():
        assert torch.equal(weight, after[name][MASTER].half()), name


def _grow_after_restoring(world: World, run_dir: Path) -> Any:
    engine = start_engine(world, 2, "bf16")
    train_engine(world, engine, range(2))
    folder = save_now(run_dir, sharded_state.fragments(engine), world, contents(2))
    release_engine(engine)
    engine = start_engine(world, 1, "bf16", seed=99)
    sharded_state.seed_moments(engine, 2)
    load.load(folder, sharded_state.fragments(engine), world=world)
    sharded_state.refresh(engine)
    before = whole_state(world, engine)
    state = capture(engine)
    release_engine(engine)
    engine = start_engine(world, 1, "bf16", depth=4, seed=99)
    install(state, engine, LAYERS, "carry", world)
    weights = {name: weight.clone() for name, weight in sharded_state.whole_weights(engine).items()}
    release_engine(engine)
    return before, weights


def test_growth_right_after_a_restart_has_the_restored_weights(tmp_path: Path) -> None:
    before, weights = run_ranks(_grow_after_restoring, 2, tmp_path)[0]
    assert len(weights) > 60
    for name, weight in weights.items():
        assert torch.equal(weight, before[source_name(name, LAYERS)][MASTER].bfloat16()), name
