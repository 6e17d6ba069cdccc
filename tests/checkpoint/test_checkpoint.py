"""Checkpoints: the state itself, at any world size and ZeRO stage; whole or not there."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from stacking_ds.checkpoint import folders, load, save
from stacking_ds.checkpoint import manifest as checkpoint_manifest
from stacking_ds.checkpoint.manifest import Parameter, RankFile, rank_file_name
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import release_engine
from stacking_ds.engine.zero import sharded_state
from stacking_ds.errors import EXIT_USER_ERROR, AgreedError, CheckpointError
from stacking_ds.process.exit import report_error
from stacking_ds.sharding.fragments import MASTER, MOMENTS
from tests.checkpoints import Alone, contents, plain_fragments, rank_fragments, save_state
from tests.ranks import run_ranks
from tests.sharded import start_engine, train_engine, whole_state
from tests.tiny import SAMPLES, tiny_model, tiny_optimizer, train_tiny

Place = tuple[int, str]  # a ZeRO stage and a precision

# ------------------------------------------------------------------ on one process


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    assert folders.latest(tmp_path) is None
    folder = save_state(tmp_path, 7, plain_fragments(value=0.5))
    assert folders.latest(tmp_path) == folder
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    manifest = checkpoint_manifest.read_manifest(folder)
    assert (manifest.step, manifest.optimizer_step, manifest.loss_scale) == (7, 7, 128.0)
    assert manifest.train_state == {"step": 7, "samples_seen": 448}
    assert manifest.package_versions["torch"] == importlib.metadata.version("torch")
    targets = plain_fragments()
    load.load(folder, targets)
    for target, source in zip(targets, plain_fragments(value=0.5), strict=True):
        for key in (MASTER, *MOMENTS):
            assert torch.equal(target.views[key], source.views[key])


@pytest.mark.parametrize("world", [None, Alone()])
def test_whatever_keeps_a_checkpoint_from_being_loaded_ends_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World | None
) -> None:
    def fill(*_: Any) -> None:
        raise torch.OutOfMemoryError("it does not fit")

    folder = save_state(tmp_path, 1, plain_fragments())
    monkeypatch.setattr(load.FragmentReader, "fill", fill)
    with pytest.raises(CheckpointError) as caught:
        load.load(folder, plain_fragments(), world=world)
    message = f"{folder} could not be loaded (OutOfMemoryError('it does not fit')); mend that and"
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, AgreedError) == (world is not None)
    assert report_error(caught.value) == EXIT_USER_ERROR


def test_parameters_are_read_whole_and_in_order(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, plain_fragments("ba"))
    found = list(load.read_parameters(folder))
    assert [name for name, _ in found] == ["b", "a"]
    assert found[1][1].tolist() == [[10, 11, 12], [13, 14, 15]]


def test_pruning_keeps_the_newest_the_boundaries_and_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save_state(tmp_path, step, plain_fragments())
    (tmp_path / "checkpoints" / ".step_00000006.partial").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000003\n")
    folders.prune(tmp_path, keep_last=1, keep_steps={2})
    # 1 is old; 4 and 5 lie beyond the one that somebody went back to, and do not count
    assert folders.saved_steps(tmp_path) == [2, 3, 4, 5]
    save_state(tmp_path, 4, plain_fragments())
    folders.prune(tmp_path, keep_last=1, keep_steps={2})
    assert folders.saved_steps(tmp_path) == [2, 4, 5]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000002", "step_00000004", "step_00000005"}


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save_state(tmp_path, 1, plain_fragments())
    folder = save_state(tmp_path, 1, plain_fragments(value=0.25))
    assert next(load.read_parameters(folder))[1][0, 0] == 0.25
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step_00000001"]


def test_a_file_is_one_of_safetensors(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, plain_fragments())
    with safe_open(folder / "rank_00000.safetensors", framework="pt") as file:
        assert file.get_tensor("exp_avg/b").tolist() == [20, 22, 24, 26, 28, 30]


def test_moments_that_were_not_there_yet_become_zero(tmp_path: Path) -> None:
    saved = plain_fragments()
    for fragment in saved:
        for key in MOMENTS:
            del fragment.views[key]  # type: ignore[attr-defined]
    folder = save_state(tmp_path, 0, saved)
    targets = plain_fragments(value=9.0)
    load.load(folder, targets)
    assert torch.equal(targets[1].views[MASTER], saved[1].views[MASTER])
    assert not any(targets[1].views[key].any() for key in MOMENTS)


def test_a_manifest_does_not_grow_with_ranks_times_parameters(tmp_path: Path) -> None:
    def size_bytes(ranks: int, parameters: int) -> int:
        one = Parameter(shape=(ranks, 2), size=2, offset=0)
        files = [
            RankFile(name=rank_file_name(rank), size_bytes=10**6, checksums=("c" * 32,))
            for rank in range(ranks)
        ]
        manifest = checkpoint_manifest.Manifest(
            **contents(1).model_dump(exclude={"optimizer_step"}),
            optimizer_step=0,
            package_versions={},
            world_size=ranks,
            chunk_bytes=1 << 20,
            keys=(MASTER,),
            parameters={f"p{index:04d}": one for index in range(parameters)},
            files=tuple(files),
        )
        return len(manifest.to_json())

    corner = size_bytes(100, 100)
    assert size_bytes(900, 900) - corner < 1.1 * (
        size_bytes(900, 100) - corner + size_bytes(100, 900) - corner
    )


def test_a_latest_that_leads_nowhere_names_the_others(tmp_path: Path) -> None:
    save_state(tmp_path, 1, plain_fragments())
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(CheckpointError, match=r"step_00000009.*there is: step_00000001"):
        folders.latest(tmp_path)


# ------------------------------------------------------------------ on ranks


def _save_trained(world: World, run_dir: Path, place: Place) -> Any:
    engine = start_engine(world, *place)
    train_engine(world, engine, range(3))
    state = whole_state(world, engine)
    save_state(
        run_dir, sharded_state.optimizer_step(engine), sharded_state.fragments(engine), world
    )
    return state


def _load_at(world: World, run_dir: Path, places: list[Place]) -> Any:
    states = []
    for place in places:
        engine = start_engine(world, *place, seed=99)
        folder = folders.latest(run_dir)
        assert folder is not None
        sharded_state.seed_moments(engine, checkpoint_manifest.read_manifest(folder).optimizer_step)
        load.load(folder, sharded_state.fragments(engine), world=world)
        sharded_state.refresh(engine)
        state = whole_state(world, engine)
        if SAMPLES % world.size == 0:
            train_engine(world, engine, range(3, 5))
        states.append((state, whole_state(world, engine), sharded_state.optimizer_step(engine)))
        release_engine(engine)
    return states if world.is_first else None


@pytest.mark.parametrize(
    ("saved_by", "saved_at", "loaded_by", "loaded_at"),
    [
        pytest.param(1, (0, "fp32"), 2, [(1, "fp32"), (3, "fp32")], marks=pytest.mark.slow),
        pytest.param(2, (1, "bf16"), 3, [(3, "bf16"), (0, "bf16")], marks=pytest.mark.slow),
        (3, (2, "fp32"), 2, [(0, "fp32"), (2, "fp32")]),
        pytest.param(3, (2, "fp32"), 1, [(3, "fp32")], marks=pytest.mark.slow),
        (2, (3, "fp32"), 3, [(1, "fp32"), (2, "bf16")]),
    ],
)
def test_any_layout_loads_what_any_other_saved(
    tmp_path: Path, saved_by: int, saved_at: Place, loaded_by: int, loaded_at: list[Place]
) -> None:
    saved = run_ranks(_save_trained, saved_by, tmp_path, saved_at)[0]
    states = run_ranks(_load_at, loaded_by, tmp_path, loaded_at)[0]
    _check_loaded(saved, states, went_on=True)
    if saved_at[1] == "fp32":
        _check_like_uninterrupted(states, loaded_at)


def _check_loaded(saved: Any, states: Any, went_on: bool) -> None:
    for state, later, step in states:
        assert state.keys() == saved.keys()
        for name, views in saved.items():
            for key in (MASTER, *MOMENTS):
                assert torch.equal(state[name][key], views[key]), (name, key)
            assert went_on != torch.equal(later[name][MASTER], views[MASTER])
        assert step == (5 if went_on else 3)


def _check_like_uninterrupted(states: Any, places: list[Place]) -> None:
    model = tiny_model(2)
    train_tiny(model, tiny_optimizer(model), range(5))
    for (_, later, _), (_, precision) in zip(states, places, strict=True):
        for name, parameter in model.named_parameters():
            tolerance = 2e-6 if precision == "fp32" else 2e-2
            torch.testing.assert_close(later[name][MASTER], parameter, rtol=0, atol=tolerance)


# ------------------------------------------------------------------ saving that fails


def _one_rank_cannot_write(world: World, run_dir: Path) -> str:
    save_state(run_dir, 1, rank_fragments(world, 1.0), world)

    def full(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if world.rank == 1:
        save.save_file = full
    try:
        save_state(run_dir, 2, rank_fragments(world, 2.0), world)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_one_ranks_failure_is_every_ranks_error_and_leaves_nothing(tmp_path: Path) -> None:
    for message in run_ranks(_one_rank_cannot_write, 3, tmp_path, timeout_seconds=60):
        assert "step_00000002 was not saved (rank 1: [Errno 28] No space left on device)" in message
        assert "step_00000001 is untouched" in message
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000001"}


def _save_after_a_crash(world: World, run_dir: Path) -> None:
    save_state(run_dir, 2, rank_fragments(world, 2.0), world)


def _one_rank_cannot_read(world: World, run_dir: Path) -> str:
    folder = folders.latest(run_dir)
    assert folder is not None
    try:
        load.load(folder, rank_fragments(world, 0.0), world=world)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_one_ranks_damaged_file_is_every_ranks_error(tmp_path: Path) -> None:
    run_ranks(_save_after_a_crash, 2, tmp_path)
    (tmp_path / "checkpoints" / "step_00000002" / "rank_00001.safetensors").unlink()
    for message in run_ranks(_one_rank_cannot_read, 2, tmp_path):
        assert "rank_00001.safetensors cannot be read" in message
