"""Checkpoints written while training goes on: of the right moment, one at a time, never half."""

import dataclasses
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from stacking_ds.checkpoint import folders as checkpoint_folders
from stacking_ds.checkpoint import load, save
from stacking_ds.checkpoint import manifest as checkpoint_manifest
from stacking_ds.checkpoint.save import BackgroundSave
from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.errors import AgreedError, CheckpointError, NonFiniteError, UserError
from stacking_ds.sharding.fragments import MASTER, Fragment
from stacking_ds.train import stage_engine
from stacking_ds.train.stage_engine import StageEngine
from stacking_ds.train.step import StepResult
from tests.checkpoints import Alone, contents, plain_fragments, rank_fragments, save_state
from tests.prose import tiny_shards
from tests.ranks import RankError, run_ranks
from tests.runs import around_steps, losses, parameters, small_recipe, train_small

slow = pytest.mark.slow
ONE_STAGE = ("stages.0.steps=12", "checkpoint.every_steps=4", "checkpoint.keep_last=9")


# ------------------------------------------------------------------ on one process


class _Gate:
    """A writer that waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        monkeypatch.setattr(save, "save_file", self._write)

    def _write(self, tensors: Any, path: Path) -> None:
        assert self.open.wait(60)
        save_file(tensors, path)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gate]:
    gate = _Gate(monkeypatch)
    yield gate
    gate.open.set()


def _on_host(fragments: Iterable[Fragment]) -> tuple[Fragment, ...]:
    return tuple(fragment.on_host() for fragment in fragments)


def _start(run_dir: Path, step: int, fragments: tuple[Fragment, ...] | None = None) -> Any:
    fragments = fragments or _on_host(plain_fragments(value=step))
    return BackgroundSave(run_dir, fragments, Alone(), contents(step))


def _first_value(run_dir: Path) -> float:
    folder = checkpoint_folders.latest(run_dir)
    assert folder is not None
    return float(next(load.read_parameters(folder))[1][0, 0])


def test_nothing_waits_for_the_writer(tmp_path: Path, gate: _Gate) -> None:
    saving = _start(tmp_path, 1)
    for _ in range(3):
        assert not saving.poll()
    assert not saving.over
    assert checkpoint_folders.latest(tmp_path) is None
    gate.open.set()
    saving.finish()
    assert saving.over
    assert saving.folder == checkpoint_folders.latest(tmp_path)
    assert load.problems(saving.folder) == []


def test_polling_alone_publishes(tmp_path: Path) -> None:
    saving = _start(tmp_path, 1)
    deadline = time.monotonic() + 60
    while not saving.poll():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert checkpoint_folders.latest(tmp_path) == saving.folder


def test_only_the_work_of_the_threads_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish_slowly(folder: Path, manifest: str) -> None:
        time.sleep(0.3)
        publish(folder, manifest)

    publish = save.publish
    monkeypatch.setattr(save, "publish", publish_slowly)
    monkeypatch.setattr(save, "save_file", save.save_file)  # put back in the end
    _write_slowly(0.2)
    saving = _start(tmp_path, 1)
    while not saving.over:
        time.sleep(2.0)  # a long step
        saving.poll()
    assert 0.5 <= saving.seconds < 1.5


@pytest.mark.parametrize("captured", [True, False])
def test_what_is_written_is_what_was_captured(tmp_path: Path, gate: _Gate, captured: bool) -> None:
    """Training changes the live state before it is written; without the copy that would show."""
    live = plain_fragments(value=1.0)
    saving = _start(tmp_path, 1, _on_host(live) if captured else tuple(live))
    for fragment in live:
        for view in fragment.views.values():
            view.add_(100)
    gate.open.set()
    saving.finish()
    assert _first_value(tmp_path) == (1.0 if captured else 101.0)


def test_the_captured_state_is_let_go_when_it_is_written(tmp_path: Path) -> None:
    captured = _on_host(plain_fragments())
    view = weakref.ref(captured[0].views[MASTER])
    saving = _start(tmp_path, 1, captured)
    del captured
    saving.finish()
    gc.collect()
    assert view() is None
    assert saving.over


def test_what_comes_afterwards_comes_after_publication(tmp_path: Path) -> None:
    found = []
    fragments = _on_host(plain_fragments())
    saving = BackgroundSave(
        tmp_path,
        fragments,
        Alone(),
        contents(1),
        lambda: found.append(checkpoint_folders.latest(tmp_path)),
    )
    saving.finish()
    assert found == [saving.folder]


def test_an_abandoned_save_stays_hidden(
    tmp_path: Path, gate: _Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.open.set()
    _start(tmp_path, 1).finish()
    gate.open.clear()
    monkeypatch.setattr(save, "_PATIENCE_SECONDS", 0.05)
    saving = _start(tmp_path, 2)
    started = time.monotonic()
    saving.abandon()
    assert time.monotonic() - started < 10
    assert saving.over
    assert _first_value(tmp_path) == 1.0
    assert checkpoint_folders.saved_steps(tmp_path) == [1]


def _no_rename(path: Path, target: Path) -> None:
    raise OSError(5, "Input/output error")


def test_a_failed_publication_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, 1, plain_fragments(value=1.0))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", _no_rename)
        saving = _start(tmp_path, 2)
        with pytest.raises(CheckpointError, match=r"rank 0: .*Input/output.*step_00000001 is unt"):
            saving.finish()
    assert saving.over
    assert _first_value(tmp_path) == 1.0
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "latest",
        "step_00000001",
    }


def test_a_save_that_cannot_begin_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    saving = _start(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step_00000001 was not saved \(rank 0: ") as caught:
        saving.finish()
    assert "there is no earlier checkpoint: make room" in str(caught.value)


# ------------------------------------------------------------------ full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    no_right = "a small file system needs the right to mount one"
    if not shutil.which("mount"):
        pytest.skip(no_right)
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip(no_right)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _message_of(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_full_disk_costs_nothing_but_the_checkpoint(small_disk: Path) -> None:
    """At every degree of fullness the save fails whole or succeeds whole."""
    outcomes = set()
    size = 4 * 3 * 2 * 20_000  # of a checkpoint: about half the disk
    save_state(small_disk, 1, plain_fragments(numel=20_000))
    fragments = plain_fragments(numel=20_000, value=2.0)
    free = shutil.disk_usage(small_disk).free
    for left in range(0, free + 1, 4096):
        if left % 32768 and not size - 8192 < left < size + 32768:
            continue  # look closely where the manifest or `latest` may not fit
        (small_disk / "filler").write_bytes(bytes(free - left))
        message = _message_of(lambda: save_state(small_disk, 2, fragments))
        if message:
            assert "No space left on device" in message
            assert "step_00000001 is untouched" in message
            assert not list((small_disk / "checkpoints").glob(".step*"))
        assert _first_value(small_disk) == (0.0 if message else 2.0)
        outcomes.add("failed" if message else "saved")
        for folder in (small_disk / "checkpoints").glob("step_*"):
            assert load.problems(folder) == []
        (small_disk / "filler").unlink()
        (small_disk / "checkpoints" / "latest").write_text("step_00000001\n")
        shutil.rmtree(small_disk / "checkpoints" / "step_00000002", ignore_errors=True)
    assert outcomes == {"failed", "saved"}


def _file_too_large(world: World, run_dir: Path) -> str:
    """The last rank may write no file of more than 64 KiB."""
    save_state(run_dir, 1, rank_fragments(world, 1.0, numel=50_000), world)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    fragments = rank_fragments(world, 2.0, numel=50_000)
    message = _message_of(lambda: save_state(run_dir, 2, fragments, world))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save_state(run_dir, 3, rank_fragments(world, 3.0, numel=50_000), world)
    return message


def test_one_ranks_full_disk_is_every_ranks_error(tmp_path: Path) -> None:
    for message in run_ranks(_file_too_large, 3, tmp_path):
        assert "step_00000002 was not saved (rank 2: " in message
        assert "File too large" in message
        assert "step_00000001 is untouched" in message
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000001", "step_00000003"}


# ------------------------------------------------------------------ in a run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def _write_slowly(seconds: float) -> list[int]:
    """Every file takes that long; how many are being written when one is begun."""
    writing: list[int] = []
    lock = threading.Lock()
    now = 0

    def write(tensors: Any, path: Path) -> None:
        nonlocal now
        with lock:
            now += 1
            writing.append(now)
        time.sleep(seconds)
        save_file(tensors, path)
        with lock:
            now -= 1

    save.save_file = write
    return writing


def _train_slowly(
    world: World, config: RunConfig, run_dir: Path, seconds: float, resume: bool = False
) -> list[int]:
    writing = _write_slowly(seconds)
    train_small(world, config, run_dir, resume)
    return writing


@pytest.mark.slow
def test_slow_writing_changes_nothing_of_a_run(shards: Path, tmp_path: Path) -> None:
    """Every checkpoint has the state of its step, of boundaries too, though training went on."""
    config = small_recipe(tmp_path, shards, "checkpoint.keep_last=9", "engine.deepspeed=zero1")
    plain, slow = tmp_path / "plain", tmp_path / "slow"
    run_ranks(train_small, 2, config, plain)
    writing = run_ranks(_train_slowly, 2, config, slow, 0.4)
    assert writing == [[1] * 6] * 2, "one save at a time, and all that were due"
    assert (
        checkpoint_folders.saved_steps(slow)
        == [3, 4, 6, 7, 9, 10]
        == checkpoint_folders.saved_steps(plain)
    )
    assert losses(slow) == losses(plain)
    for step in checkpoint_folders.saved_steps(slow):
        folders = [
            run / "checkpoints" / checkpoint_folders.folder_name(step) for run in (slow, plain)
        ]
        assert load.problems(folders[0]) == []
        ours, theirs = (_saved(folder) for folder in folders)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), step


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    """Masters and moments."""
    manifest = checkpoint_manifest.read_manifest(folder)
    targets = [
        Fragment(
            name,
            parameter.shape,
            0,
            parameter.cut.numel,
            {key: torch.empty(parameter.cut.numel) for key in manifest.keys},
            parameter.cut,
        )
        for name, parameter in manifest.parameters.items()
    ]
    load.load(folder, targets)
    return {f"{key}/{f.name}": view for f in targets for key, view in f.views.items()}


def _train_while_writing(world: World, config: RunConfig, run_dir: Path) -> list[str]:
    """The checkpoint of step 4 is not written before step 7 is done."""
    events: list[str] = []
    seventh = threading.Event()

    def step(completed: int, take: Callable[[], StepResult]) -> StepResult:
        result = take()
        events.append(f"step {completed + 1}")
        if completed + 1 == 7:
            seventh.set()
        return result

    def write(tensors: Any, path: Path) -> None:
        events.append(f"writing {path.parent.name}")
        assert seventh.wait(60)
        save_file(tensors, path)
        events.append(f"written {path.parent.name}")

    around_steps(step)
    save.save_file = write
    train_small(world, config, run_dir)
    return events


def _one_stage(folder: Path, shards: Path, *overrides: str) -> RunConfig:
    config = small_recipe(folder, shards, *ONE_STAGE, *overrides)
    return config.model_copy(update={"stages": config.stages[:1]})


def test_steps_are_taken_while_a_checkpoint_is_written(shards: Path, tmp_path: Path) -> None:
    config = _one_stage(tmp_path, shards)
    for events in run_ranks(_train_while_writing, 2, config, tmp_path / "run"):
        begun = events.index("writing .step_00000004.partial")
        done = events.index("written .step_00000004.partial")
        assert [e for e in events[begun:done] if "step " in e] == ["step 5", "step 6", "step 7"]
    assert checkpoint_folders.saved_steps(tmp_path / "run") == [4, 8, 12]


def _full_at(steps: tuple[int, ...]) -> None:
    """On this rank no checkpoint of `steps` can be written."""

    def write(tensors: Any, path: Path) -> None:
        if any(path.parent.name == f".step_{step:08d}.partial" for step in steps):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    save.save_file = write


def _train_with_a_full_disk(
    world: World, config: RunConfig, run_dir: Path, steps: tuple[int, ...], stop_at: int = -1
) -> tuple[str, str]:
    if world.rank == 1:
        _full_at(steps)

    def step(completed: int, take: Callable[[], StepResult]) -> StepResult:
        if completed + 1 == stop_at and world.is_first:
            os.kill(os.getpid(), signal.SIGTERM)
        return take()

    around_steps(step)
    try:
        train_small(world, config, run_dir)
    except UserError as error:
        return type(error).__name__, str(error) if isinstance(
            error, AgreedError
        ) else "one rank's error"
    return "done", ""


@pytest.mark.slow
def test_a_checkpoint_that_fails_costs_only_itself(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards, "checkpoint.keep_last=9")
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(train_small, 2, config, whole)
    # one at a boundary, one in a stage
    assert run_ranks(_train_with_a_full_disk, 2, config, run, (4, 9)) == [("done", "")] * 2
    assert checkpoint_folders.saved_steps(run) == [3, 6, 7, 10]
    assert not list((run / "checkpoints").glob(".step_*"))
    warnings = [
        line for line in (run / "train.log").read_text().splitlines() if "was not saved" in line
    ]
    for line, step, previous in zip(warnings, (4, 9), (3, 7), strict=True):
        assert f"step_0000000{step} was not saved (rank 1: [Errno 28] No space left" in line
        assert f"step_0000000{previous} is untouched" in line
        assert "training goes on until the next one is due" in line
    ours, theirs = parameters(run), parameters(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_run_that_can_save_nothing_ends(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards)
    run = tmp_path / "run"
    for kind, message in run_ranks(_train_with_a_full_disk, 2, config, run, (6, 7)):
        assert kind == "CheckpointError"
        assert "step_00000007 was not saved (rank 1: [Errno 28] No space left" in message
        assert "step_00000004 is untouched" in message
    assert run_ranks(train_small, 2, config, run, True) == [10, 10]


def _run_out_of_memory(world: World, config: RunConfig, run_dir: Path, at_step: int) -> str:
    def step(completed: int, take: Callable[[], StepResult]) -> StepResult:
        if completed + 1 == at_step:
            raise torch.OutOfMemoryError("the deeper model does not fit")
        return take()

    around_steps(step)
    _write_slowly(1.0)
    with pytest.raises(torch.OutOfMemoryError):
        train_small(world, config, run_dir)
    return (run_dir / "checkpoints" / "latest").read_text().strip()


def test_a_crash_in_the_first_step_of_a_stage_keeps_the_boundary(
    shards: Path, tmp_path: Path
) -> None:
    config = small_recipe(tmp_path, shards)
    assert run_ranks(_run_out_of_memory, 2, config, tmp_path / "run", 5) == ["step_00000004"] * 2


def _save_beside_a_slow_rank(world: World, run_dir: Path) -> str:
    impatient = dist.new_group(backend="gloo", timeout=timedelta(seconds=3))
    if world.rank == 1:
        _write_slowly(6.0)
    world = dataclasses.replace(world, host_group=impatient)
    return save_state(run_dir, 1, rank_fragments(world, 1.0), world).name


def _seconds_beside_a_slow_rank(world: World, run_dir: Path) -> float:
    if world.rank == 1:
        _write_slowly(1.0)
    captured = _on_host(rank_fragments(world, 1.0))
    saved = contents(1).model_copy(update={"optimizer_step": 0})  # there are no moments
    saving = BackgroundSave(run_dir, captured, world, saved)
    saving.finish()
    return saving.seconds


def test_the_slowest_rank_counts(tmp_path: Path) -> None:
    assert run_ranks(_seconds_beside_a_slow_rank, 2, tmp_path)[0] >= 1.0


def test_a_slow_rank_is_waited_for_longer_than_a_collective_may_last(tmp_path: Path) -> None:
    assert run_ranks(_save_beside_a_slow_rank, 2, tmp_path) == ["step_00000001"] * 2


def test_what_fails_after_publication_is_not_called_a_lost_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(folder: Path, manifest: str) -> None:
        publish(folder, manifest)
        raise OSError(5, "Input/output error")

    publish = save.publish
    monkeypatch.setattr(save, "publish", late)
    with pytest.raises(CheckpointError, match="was saved, but may not outlast a power failure"):
        save_state(tmp_path, 1, plain_fragments())
    assert load.problems(tmp_path / "checkpoints" / "step_00000001") == []


def test_a_failure_where_latest_cannot_be_read_is_still_one_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(root: Path) -> str:
        raise OSError(116, "Stale file handle")

    def full(tensors: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "named_by_latest", stale)
    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*latest cannot be read \(Stale"):
        save_state(tmp_path, 1, plain_fragments())


@pytest.mark.parametrize(
    ("full", "stop_at", "kept"), [(10, -1, 9), pytest.param(5, 5, 4, marks=slow)]
)
def test_the_last_checkpoint_must_be_written(
    shards: Path, tmp_path: Path, full: int, stop_at: int, kept: int
) -> None:
    """That of the run's end, and that of a stop."""
    config = small_recipe(tmp_path, shards)
    run = tmp_path / "run"
    for kind, message in run_ranks(_train_with_a_full_disk, 2, config, run, (full,), stop_at):
        assert kind == "CheckpointError"
        assert f"step_{full:08d} was not saved (rank 1: " in message
        assert f"step_{kept:08d} is untouched" in message
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{kept:08d}"
    assert run_ranks(train_small, 2, config, run, True) == [10, 10]


def _train_until(
    world: World, config: RunConfig, run_dir: Path, seconds: float, at_step: int, how: str
) -> str:
    """Something happens in `at_step`, when the checkpoint before it is still being written."""
    _write_slowly(seconds)

    def step(completed: int, take: Callable[[], StepResult]) -> StepResult:
        if completed + 1 == at_step:
            assert list((run_dir / "checkpoints").glob(".step_*")), "a save is under way"
            if how == "not finite":
                raise NonFiniteError("the loss is nan")
            if world.rank == world.size - 1:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("a broken rank")
        return take()

    around_steps(step)
    try:
        train_small(world, config, run_dir)
    except NonFiniteError as error:
        return str(error)
    return "done"


def test_a_loss_that_is_not_finite_does_not_cost_the_checkpoint_under_way(
    shards: Path, tmp_path: Path
) -> None:
    config = _one_stage(tmp_path, shards)
    run = tmp_path / "run"
    found = run_ranks(_train_until, 2, config, run, 1.0, 5, "not finite")
    assert found == ["the loss is nan"] * 2
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000004"
    assert load.problems(run / "checkpoints" / "step_00000004") == []


@pytest.mark.parametrize("how", ["killed", pytest.param("broken", marks=slow)])
def test_a_rank_that_dies_while_saving_costs_only_that_checkpoint(
    shards: Path, tmp_path: Path, how: str
) -> None:
    config = _one_stage(tmp_path, shards)
    run, whole = tmp_path / "run", tmp_path / "whole"
    run_ranks(train_small, 2, config, whole)
    message = "exit code -9" if how == "killed" else "a broken rank"
    with pytest.raises(RankError, match=message):
        run_ranks(_train_until, 2, config, run, 1.5, 9, how)
    assert checkpoint_folders.saved_steps(run) == [4]
    assert run_ranks(train_small, 2, config, run, True) == [12, 12]
    assert checkpoint_folders.saved_steps(run) == [4, 8, 12]
    assert not list((run / "checkpoints").glob(".step_*"))
    assert losses(run) == losses(whole)
    ours, theirs = parameters(run), parameters(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


_INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from stacking_ds.checkpoint import save
from stacking_ds.cli import main
from stacking_ds.train import loop

take_step = loop.training_step

def step(*arguments, world, **options):
    if world.pulse.step == 5:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    return take_step(*arguments, world=world, **options)

def write(tensors, path):
    if "00000004" in str(path):
        time.sleep(100)
    save_file(tensors, path)

save_file, save.save_file = save.save_file, write
loop.training_step = step
save._PATIENCE_SECONDS = 0.5
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_process_ends_though_a_save_is_under_way(
    shards: Path, tmp_path: Path
) -> None:
    config = _one_stage(tmp_path, shards)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    arguments = ["train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "run")]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 130, done.stderr
    assert time.monotonic() - started < 90
    assert checkpoint_folders.saved_steps(tmp_path / "run") == []


def _train_with_one_copy(world: World, config: RunConfig, run_dir: Path) -> None:
    grow = StageEngine.grow

    def refuse(engine: Any) -> None:
        raise AssertionError("the save has copied this already")

    def grow_without(*arguments: Any) -> None:
        before, stage_engine.capture = stage_engine.capture, refuse  # type: ignore[assignment]
        grow(*arguments)
        stage_engine.capture = before

    StageEngine.grow = grow_without  # type: ignore[method-assign]
    train_small(world, config, run_dir)


def test_a_boundary_uses_the_copy_that_its_save_made(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards, "engine.deepspeed=zero0")
    run_ranks(_train_with_one_copy, 1, config, tmp_path / "run")
    assert checkpoint_folders.saved_steps(tmp_path / "run") == [4, 7, 9, 10]
