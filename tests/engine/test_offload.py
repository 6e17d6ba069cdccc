"""Masters and moments in host memory: the same training, growth and checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.checkpoint import load
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import build_engine, release_engine
from stacking_ds.engine.ds_json import load_ds_config, resolve_ds_config
from stacking_ds.engine.ds_settings import problems_of
from stacking_ds.engine.zero import sharded_state
from stacking_ds.errors import ConfigError
from stacking_ds.growth.operators import layer_map, source_name
from stacking_ds.growth.transfer import capture, install
from stacking_ds.sharding.fragments import MASTER, MOMENTS
from tests.ranks import run_ranks
from tests.sharded import train_engine, whole_state
from tests.tiny import tiny_model, tiny_optimizer, train_tiny


def _offloaded(world: World, zero_stage: int, precision: Any, depth: int, seed: int = 0) -> Any:
    ds_json = load_ds_config(f"zero{zero_stage}")
    ds_json["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    settings = resolve_ds_config(
        ds_json,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=world.size,
        gradient_clipping=0.0,
        precision=precision,
    )
    model = tiny_model(depth, seed)
    return build_engine(model, tiny_optimizer(model), settings)


def _grow_offloaded(world: World, zero_stage: int, precision: str) -> Any:
    engine = _offloaded(world, zero_stage, precision, 2)
    assert all(f.views[MASTER].device.type == "cpu" for f in sharded_state.fragments(engine))
    train_engine(world, engine, range(3))
    before = whole_state(world, engine)
    state = capture(engine)
    release_engine(engine)
    engine = _offloaded(world, zero_stage, precision, 4, seed=99)
    install(state, engine, layer_map("stack", 2, 4), "carry", world)
    after = whole_state(world, engine)
    norms = train_engine(world, engine, range(3, 5))
    trained = whole_state(world, engine)
    release_engine(engine)
    return before, after, norms, trained


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "precision"),
    [
        pytest.param(2, 1, "bf16", marks=pytest.mark.slow),
        (2, 2, "fp32"),
        pytest.param(3, 2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, 3, "fp32", marks=pytest.mark.slow),
        (2, 3, "bf16"),
    ],
)
def test_growth_is_exact_and_training_goes_on(ranks: int, zero_stage: int, precision: str) -> None:
    before, after, norms, trained = run_ranks(_grow_offloaded, ranks, zero_stage, precision)[0]
    layers = layer_map("stack", 2, 4)
    for name, views in after.items():
        source = before[source_name(name, layers)]
        assert views.keys() == {MASTER, *MOMENTS}
        assert all(torch.equal(views[key], source[key]) for key in views), name
    model = tiny_model(4)
    model.load_state_dict({name: views[MASTER] for name, views in after.items()}, strict=False)
    optimizer = tiny_optimizer(model)
    for name, p in model.named_parameters():
        optimizer.state[p] = {"step": torch.tensor(3.0)}
        optimizer.state[p].update({key: after[name][key].clone() for key in MOMENTS})
    expected = train_tiny(model, optimizer, range(3, 5))
    if precision == "fp32":
        torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(trained[name][MASTER], p.detach(), rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(norms, expected, rtol=0.05, atol=0)


def _save_offloaded_load_plain(world: World, run_dir: Path) -> Any:
    from tests.checkpoints import save_state
    from tests.sharded import start_engine

    engine = _offloaded(world, 2, "bf16", 2)
    train_engine(world, engine, range(2))
    saved = whole_state(world, engine)
    folder = save_state(run_dir, 2, sharded_state.fragments(engine), world)
    release_engine(engine)
    engine = start_engine(world, 3, seed=99)
    sharded_state.seed_moments(engine, 2)
    load.load(folder, sharded_state.fragments(engine), world=world)
    return saved, whole_state(world, engine)


def test_a_checkpoint_of_offloaded_state_loads_without_offload(tmp_path: Path) -> None:
    saved, loaded = run_ranks(_save_offloaded_load_plain, 2, tmp_path)[0]
    for name, views in saved.items():
        assert all(torch.equal(views[key], loaded[name][key]) for key in (MASTER, *MOMENTS))


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_bundled_offload_jsons_can_be_used(name: str) -> None:
    settings = resolve_ds_config(
        load_ds_config(name),
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=2,
        gradient_clipping=1.0,
        precision="bf16",
    )
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert settings["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("stage", "offload", "what"),
    [
        (
            1,
            {"device": "nvme", "nvme_path": "/tmp"},
            'device" is "nvme": it must be "cpu" or "none", since growth',
        ),
        (3, {"device": "cpu", "ratio": 0.5}, r"ratio\" is 0\.5.*write 1\.0"),
        (3, {"device": "cpu", "super_offload": True}, 'super_offload" is true.*write false'),
        (0, {"device": "cpu"}, 'at ZeRO 0 DeepSpeed offloads nothing; write "stage": 1, 2 or 3'),
    ],
)
def test_other_offloading_is_refused(stage: int, offload: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        resolve_ds_config(
            {"zero_optimization": {"stage": stage, "offload_optimizer": offload}},
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            world_size=2,
            gradient_clipping=0.0,
            precision="bf16",
        )


def test_an_offload_to_nowhere_is_no_offload() -> None:
    for offload in (None, {"device": "none"}, {}):
        zero_optimization = {"stage": 0, "offload_optimizer": offload}
        assert problems_of({"zero_optimization": zero_optimization}) == []
