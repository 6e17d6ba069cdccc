"""Checkpoints: the state itself, at any world size and ZeRO stage; whole or not there."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds import checkpoint, zero
from stacking_ds.distributed import World
from stacking_ds.engine import release_engine
from stacking_ds.errors import CheckpointError
from stacking_ds.fragments import MASTER, MOMENTS, Cut, Fragment
from stacking_ds.growth.operators import layer_map, source_name
from tests.ranks import RankError, run_ranks
from tests.sharded import start_engine, train_engine, whole_state
from tests.tiny import SAMPLES, tiny_model, tiny_optimizer, train_tiny

Place = tuple[int, str]  # a ZeRO stage and a precision

# ------------------------------------------------------------------ on one process


class _Alone(World):
    """A world of one that needs no process group."""

    def __init__(self) -> None:
        super().__init__(0, 1, 0, 1, torch.device("cpu"), None)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def _fragments(names: str = "ab", value: float = 0.0) -> list[Fragment]:
    found = []
    for index, name in enumerate(names):
        values = torch.arange(6.0) + 10 * index + value
        views = {MASTER: values, "exp_avg": values * 2, "exp_avg_sq": values * values}
        found.append(Fragment(name, (2, 3), 0, 6, views, Cut(6, 6)))
    return found


def _save(run_dir: Path, step: int, fragments: list[Fragment], world: World | None = None) -> Path:
    return checkpoint.save(
        run_dir,
        fragments,
        world or _Alone(),
        optimizer_step=step,
        train_state={"step": step, "samples_seen": 64 * step},
        config={"name": "test"},
        num_hidden_layers=2,
        vocabulary_sha256="v",
        data_sha256="d",
        loss_scale=128.0,
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    folder = _save(tmp_path, 7, _fragments(value=0.5))
    assert checkpoint.latest(tmp_path) == folder
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    manifest = checkpoint.read_manifest(folder)
    assert (manifest.step, manifest.optimizer_step, manifest.loss_scale) == (7, 7, 128.0)
    assert manifest.train_state == {"step": 7, "samples_seen": 448}
    assert manifest.package_versions["torch"] == importlib.metadata.version("torch")
    targets = _fragments()
    checkpoint.load(folder, targets)
    for target, source in zip(targets, _fragments(value=0.5), strict=True):
        for key in (MASTER, *MOMENTS):
            assert torch.equal(target.views[key], source.views[key])


def test_parameters_are_read_whole_and_in_order(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1, _fragments("ba"))
    found = list(checkpoint.read_parameters(folder))
    assert [name for name, _ in found] == ["b", "a"]
    assert found[1][1].tolist() == [[10, 11, 12], [13, 14, 15]]


def test_pruning_keeps_the_newest_the_boundaries_and_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, step, _fragments())
    (tmp_path / "checkpoints" / ".step_00000006.partial").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000003\n")
    checkpoint.prune(tmp_path, keep_last=1, keep_steps={2})
    # 1 is old; 4 and 5 lie beyond the one that somebody went back to, and do not count
    assert checkpoint.saved_steps(tmp_path) == [2, 3, 4, 5]
    _save(tmp_path, 4, _fragments())
    checkpoint.prune(tmp_path, keep_last=1, keep_steps={2})
    assert checkpoint.saved_steps(tmp_path) == [2, 4, 5]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000002", "step_00000004", "step_00000005"}


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    _save(tmp_path, 1, _fragments())
    folder = _save(tmp_path, 1, _fragments(value=0.25))
    assert next(checkpoint.read_parameters(folder))[1][0, 0] == 0.25
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step_00000001"]


def _cut(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _garble(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)


def _lose_elements(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][0]["intervals"][0]
    path.write_text(json.dumps(manifest))


def _another_version(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (_cut, r"rank_00000\.safetensors has \d+ bytes instead of \d+.*earlier checkpoint"),
        (_garble, r"rank_00000\.safetensors is damaged.*earlier checkpoint"),
        (lambda f: (f / "rank_00000.safetensors").unlink(), r"rank_00000.*No such file.*earlier"),
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json cannot be read.*earlier"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json is damaged.*earlier"),
        (_another_version, r"manifest\.json.*format_version.*earlier"),
        (_lose_elements, r"has 0 of the 6 elements \[0, 6\) of a's master.*earlier"),
    ],
)
def test_damage_is_named_in_one_sentence(tmp_path: Path, damage: Any, what: str) -> None:
    folder = _save(tmp_path, 1, _fragments())
    damage(folder)
    with pytest.raises(CheckpointError, match=what) as caught:
        checkpoint.load(folder, _fragments())
    assert "\n" not in str(caught.value)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1, _fragments())
    with pytest.raises(CheckpointError, match=r"another model: it has no c.*recipe"):
        checkpoint.load(folder, _fragments("abc"))
    wider = Fragment("a", (3, 3), 0, 9, {MASTER: torch.zeros(9)}, Cut(9, 9))
    with pytest.raises(CheckpointError, match=r"another model: it has a with shape \(2, 3\)"):
        checkpoint.load(folder, [wider])


def test_a_latest_that_leads_nowhere_names_the_others(tmp_path: Path) -> None:
    _save(tmp_path, 1, _fragments())
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(CheckpointError, match=r"step_00000009.*there is: step_00000001"):
        checkpoint.latest(tmp_path)


# ------------------------------------------------------------------ on ranks


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1, _fragments())
    path = folder / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is damaged.*earlier"):
        checkpoint.load(folder, _fragments())
    with pytest.raises(CheckpointError, match="is damaged"):
        dict(checkpoint.read_parameters(folder))


def _save_trained(world: World, run_dir: Path, place: Place) -> Any:
    engine = start_engine(world, *place)
    train_engine(world, engine, range(3))
    state = whole_state(world, engine)
    _save(run_dir, zero.optimizer_step(engine), zero.fragments(engine), world)
    return state


def _load_at(world: World, run_dir: Path, places: list[Place]) -> Any:
    states = []
    for place in places:
        engine = start_engine(world, *place, seed=99)
        folder = checkpoint.latest(run_dir)
        assert folder is not None
        zero.seed_moments(engine, checkpoint.read_manifest(folder).optimizer_step)
        checkpoint.load(folder, zero.fragments(engine), world=world)
        zero.refresh(engine)
        state = whole_state(world, engine)
        if SAMPLES % world.size == 0:
            train_engine(world, engine, range(3, 5))
        states.append((state, whole_state(world, engine), zero.optimizer_step(engine)))
        release_engine(engine)
    return states if world.is_first else None


@pytest.mark.parametrize(
    ("saved_by", "saved_at", "loaded_by", "loaded_at"),
    [
        (1, (0, "fp32"), 2, [(1, "fp32"), (3, "fp32")]),
        (2, (1, "bf16"), 3, [(3, "bf16"), (0, "bf16")]),
        (3, (2, "fp32"), 2, [(0, "fp32"), (2, "fp32")]),
        (3, (2, "fp32"), 1, [(3, "fp32")]),
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


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
def test_every_layout_loads_what_every_other_saved(
    tmp_path: Path, saved_by: int, zero_stage: int
) -> None:
    saved = run_ranks(_save_trained, saved_by, tmp_path, (zero_stage, "fp32"))[0]
    places: list[Place] = [(stage, "fp32") for stage in range(4)]
    for ranks in (1, 2, 3, 4):
        states = run_ranks(_load_at, ranks, tmp_path, places)[0]
        _check_loaded(saved, states, went_on=SAMPLES % ranks == 0)


def _grow_from_disk(world: World, run_dir: Path) -> Any:
    engine = start_engine(world, 3, depth=4, seed=99)
    zero.seed_moments(engine, 3)
    layers = layer_map("stack", 2, 4)
    folder = checkpoint.latest(run_dir)
    assert folder is not None
    checkpoint.load(
        folder, zero.fragments(engine), lambda name: source_name(name, layers), world=world
    )
    return whole_state(world, engine)


def test_a_name_map_grows_from_disk(tmp_path: Path) -> None:
    saved = run_ranks(_save_trained, 2, tmp_path, (1, "fp32"))[0]
    grown = run_ranks(_grow_from_disk, 3, tmp_path)[0]
    assert grown.keys() == dict(tiny_model(4).named_parameters()).keys()
    for name, views in grown.items():
        source = name.replace("layer.2.", "layer.0.").replace("layer.3.", "layer.1.")
        for key, value in views.items():
            assert torch.equal(value, saved[source][key])


# ------------------------------------------------------------------ saving that fails


def _rank_fragments(world: World, value: float) -> list[Fragment]:
    values = torch.full((3,), value + world.rank)
    cut = Cut(3 * world.size, 3)
    return [Fragment("w", (cut.numel,), *cut.interval(world.rank), {MASTER: values}, cut)]


def _one_rank_cannot_write(world: World, run_dir: Path) -> str:
    _save(run_dir, 1, _rank_fragments(world, 1.0), world)

    def full(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if world.rank == 1:
        checkpoint.save_file = full  # type: ignore[attr-defined]
    try:
        _save(run_dir, 2, _rank_fragments(world, 2.0), world)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_one_ranks_failure_is_every_ranks_error_and_leaves_nothing(tmp_path: Path) -> None:
    for message in run_ranks(_one_rank_cannot_write, 3, tmp_path, timeout_seconds=60):
        assert "step_00000002 was not saved: rank 1: " in message
        assert "No space left on device" in message
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000001"}


def _die_before(world: World, run_dir: Path, call: str) -> None:
    _save(run_dir, 1, _rank_fragments(world, 1.0), world)
    if world.is_first:
        setattr(Path, call, lambda *arguments: os._exit(9))
    _save(run_dir, 2, _rank_fragments(world, 2.0), world)


@pytest.mark.parametrize(("call", "left"), [("rename", [1]), ("replace", [1, 2])])
def test_a_save_that_is_killed_leaves_the_previous_checkpoint(
    tmp_path: Path, call: str, left: list[int]
) -> None:
    with pytest.raises(RankError, match="rank 0 died with exit code 9"):
        run_ranks(_die_before, 2, tmp_path, call)
    folder = checkpoint.latest(tmp_path)
    assert folder is not None
    assert folder.name == "step_00000001"
    assert dict(checkpoint.read_parameters(folder))["w"].tolist() == [1, 1, 1, 2, 2, 2]
    assert checkpoint.saved_steps(tmp_path) == left
    run_ranks(_save_after_a_crash, 2, tmp_path)  # over what the crash left behind
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000002"


def _save_after_a_crash(world: World, run_dir: Path) -> None:
    _save(run_dir, 2, _rank_fragments(world, 2.0), world)


def _one_rank_cannot_read(world: World, run_dir: Path) -> str:
    folder = checkpoint.latest(run_dir)
    assert folder is not None
    try:
        checkpoint.load(folder, _rank_fragments(world, 0.0), world=world)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_one_ranks_damaged_file_is_every_ranks_error(tmp_path: Path) -> None:
    run_ranks(_save_after_a_crash, 2, tmp_path)
    (tmp_path / "checkpoints" / "step_00000002" / "rank_00001.safetensors").unlink()
    for message in run_ranks(_one_rank_cannot_read, 2, tmp_path):
        assert "rank_00001.safetensors cannot be read" in message
