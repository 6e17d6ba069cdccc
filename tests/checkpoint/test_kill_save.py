"""A save killed before, and in the middle of, each of its file-system operations loses nothing."""

import io
import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.checkpoint import folders, load, save
from stacking_ds.distributed.world import World
from stacking_ds.sharding.fragments import Fragment
from tests.checkpoints import Alone, plain_fragments, rank_fragments, save_state
from tests.ranks import RankError, run_ranks

# everything that a save or a removal asks of the file system; pathlib and shutil call these
_OPERATIONS = [
    (os, "fsync"),
    (os, "mkdir"),
    (os, "open"),
    (os, "rename"),
    (os, "replace"),
    (os, "rmdir"),
    (os, "unlink"),
    (io, "open"),
]


class _Death:
    """Kills this process at the n-th operation from now on, as if the machine had lost it."""

    def __init__(self, moment: int) -> None:
        self._left = moment
        for owner, name in _OPERATIONS:
            original = getattr(owner, name)

            def operation(*arguments: Any, original: Any = original, **options: Any) -> Any:
                self._tick()
                return original(*arguments, **options)

            setattr(owner, name, operation)
        self._break(save, "save_file", _cut_off)
        self._break(Path, "write_text", _cut_off_text)

    def _break(self, owner: Any, name: str, half: Callable[..., None]) -> None:
        """Before it starts, and when half of it is written."""
        original = getattr(owner, name)

        def write(*arguments: Any, **options: Any) -> Any:
            self._tick()
            self._tick(lambda: half(original, *arguments, **options))
            return original(*arguments, **options)

        setattr(owner, name, write)

    def _tick(self, last_act: Callable[[], None] = lambda: None) -> None:
        if self._left == 0:
            self._left = -1  # the last act is not counted
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1


def _cut_off(write: Any, tensors: Any, path: Path) -> None:
    write(tensors, path)
    os.truncate(path, Path(path).stat().st_size // 2)


def _cut_off_text(write: Any, path: Path, text: str, **options: Any) -> None:
    write(path, text[: len(text) // 2], **options)


# ------------------------------------------------------------------ one process


def _save_and_prune(run_dir: Path, step: int, fragments: list[Fragment], world: World) -> None:
    save_state(run_dir, step, fragments, world)
    if world.is_first:
        folders.prune(run_dir, keep_last=1, keep_steps={2})


def _dies(run_dir: Path, step: int, moment: int) -> bool:
    """Save in a process that is killed at that operation; False if it had ended before."""
    child = os.fork()
    if child == 0:
        _Death(moment)
        _save_and_prune(run_dir, step, plain_fragments(value=step + 0.5), Alone())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def _state(folder: Path, targets: list[Fragment]) -> list[torch.Tensor]:
    load.load(folder, targets)
    return [view for target in targets for view in target.views.values()]


def _same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _values(value: float) -> list[torch.Tensor]:
    return [view for target in plain_fragments(value=value) for view in target.views.values()]


@pytest.mark.parametrize(
    ("before", "step"),
    [
        pytest.param([], 1, marks=pytest.mark.slow),  # the run's first
        ([1, 2, 3], 4),  # 1 and 3 are removed when 4 is there
        pytest.param(
            [2, 3], 3, marks=pytest.mark.slow
        ),  # once more the one that `latest` names, as after going back to it
    ],
)
def test_the_previous_or_the_new_one_is_whole(tmp_path: Path, before: list[int], step: int) -> None:
    for earlier in before:
        save_state(tmp_path / "before", earlier, plain_fragments(value=earlier))
    (tmp_path / "before").mkdir(exist_ok=True)
    outcomes = []
    for moment in itertools.count():
        run_dir = tmp_path / str(moment)
        shutil.copytree(tmp_path / "before", run_dir)
        if not _dies(run_dir, step, moment):
            break
        outcomes.append(_outcome(run_dir, before, step))
        _save_and_prune(run_dir, 5, plain_fragments(value=5.5), Alone())
        names = {path.name for path in (run_dir / "checkpoints").iterdir()}
        kept = {"step_00000002"} if 2 in before else set()
        assert names == kept | {"latest", "step_00000005"}, moment
    assert len(outcomes) > 20
    # once the new one is there nothing brings the old one back
    assert outcomes == sorted(outcomes, key=["old", "new"].index)
    assert set(outcomes) == {"old", "new"}


def _outcome(run_dir: Path, before: list[int], step: int) -> str:
    """Which checkpoint is the latest, after making sure that all that is there is whole."""
    folder = folders.latest(run_dir)
    for there in folders.saved_steps(run_dir):
        assert load.problems(run_dir / "checkpoints" / f"step_{there:08d}") == []
    if folder is None:
        assert not before
        return "old"
    assert load.problems(folder) == []
    state = _state(folder, plain_fragments())
    if _same(state, _values(step + 0.5)):
        return "new"
    assert _same(state, _values(before[-1]))
    return "old"


def test_latest_changes_when_all_else_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses power forgets what was not synced: contents of files, and names."""
    done: list[tuple[str, str]] = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def recording_sync(descriptor: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def recording_move(move: Any) -> Any:
        def moving(old: Path, new: Path) -> None:
            done.append(("move to", Path(new).name))
            move(old, new)

        return moving

    monkeypatch.setattr(os, "fsync", recording_sync)
    monkeypatch.setattr(os, "rename", recording_move(rename))
    monkeypatch.setattr(os, "replace", recording_move(replace))
    save_state(tmp_path, 1, plain_fragments())
    named, switched = done.index(("move to", "step_00000001")), done.index(("move to", "latest"))
    files = {"rank_00000.safetensors", ".manifest.json.partial"}
    complete = done.index(("move to", "manifest.json"))
    assert {("sync", name) for name in files} <= set(done[:complete])
    assert ("sync", ".step_00000001.partial") in done[complete:named]
    pointer = {("sync", "checkpoints"), ("sync", ".latest.partial")}
    assert pointer <= set(done[named:switched])
    assert ("sync", "checkpoints") in done[switched:]


# ------------------------------------------------------------------ several ranks


def _save_and_die(world: World, run_dir: Path, victim: int, moment: int) -> None:
    if world.rank == victim:
        _Death(moment)
    _save_and_prune(run_dir, 2, rank_fragments(world, 2.0), world)


def _save_whole(world: World, run_dir: Path, step: int) -> None:
    save_state(run_dir, step, rank_fragments(world, float(step)), world)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_and_so_it_is_when_one_of_the_ranks_dies(tmp_path: Path, victim: int) -> None:
    run_ranks(_save_whole, 2, tmp_path / "before", 1)
    found = []
    for moment in itertools.count():
        run_dir = tmp_path / str(moment)
        shutil.copytree(tmp_path / "before", run_dir)
        try:
            run_ranks(_save_and_die, 2, run_dir, victim, moment)
        except RankError:
            folder = folders.latest(run_dir)
            assert folder is not None
            assert load.problems(folder) == []
            value = float(folder.name.removeprefix("step_"))
            [(name, whole)] = load.read_parameters(folder)
            assert name == "w"
            assert whole.tolist() == [value] * 3 + [value + 1] * 3
            found.append(value)
        else:
            break
    assert found == sorted(found)
    assert len(found) > 4
    assert set(found) == ({1.0, 2.0} if victim == 0 else {1.0})
