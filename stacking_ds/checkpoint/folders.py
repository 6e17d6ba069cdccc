"""Folders of a run's checkpoints: names, the newest, one to fall back on, publishing, pruning.

RUN_DIR/checkpoints/latest                     the name of the newest folder, changed last
                    step_00001000/             whole: renamed to this when all is on disk
                    .step_00002000.partial/    under way, or left by a save that was killed
                    .step_00000500.removed/    on its way out
"""

import os
import re
import shlex
import shutil
from collections.abc import Collection
from pathlib import Path

from stacking_ds.console import first_of, shortened
from stacking_ds.errors import CheckpointError, UnreadableError, unreadable
from stacking_ds.files import DamagedFileError, read_text, replace_folder, sync, write_whole

_NAME = re.compile(r"step_([0-9]{8,18})")
_HIDDEN = re.compile(rf"\.{_NAME.pattern}\.(?:partial|removed)")
_MOST_POINTER_BYTES = 256


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def partial_of(folder: Path) -> Path:
    """Hidden folder that gathers the files of the checkpoint `folder` until all are on disk."""
    return folder.with_name(f".{folder.name}.partial")


def _removed(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's folder is named by, also a hidden one; None if by none."""
    found = _NAME.fullmatch(folder.name) or _HIDDEN.fullmatch(folder.name)
    return int(found[1]) if found else None


def _steps_in(root: Path) -> list[int]:
    """Raises:
    UnreadableError: nobody knows what is in the folder.
    """
    try:
        steps = [step_of(path) for path in root.iterdir() if _NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # not as `glob`, to which such a folder is empty
        raise unreadable(UnreadableError, root, error) from None
    return sorted(step for step in steps if step is not None)


# --------------------------------------------------------------------------- looking


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of all checkpoints of a run, in order."""
    return _steps_in(run_dir / "checkpoints")


def named_by_latest(root: Path) -> str | None:
    """The name in `root`/latest; None before the run's first checkpoint.

    Raises:
        DamagedFileError: it is no text, or no regular file.
        OSError: it cannot be read.
    """
    if root.is_file():
        return None  # and no checkpoint can lie in it
    try:
        return read_text(root / "latest", _MOST_POINTER_BYTES).strip()
    except FileNotFoundError:
        return None


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run; None if it has none yet.

    Without `latest` (a run that was killed just before it was first written) it is the last folder,
    since a folder is there only when it is whole.

    Raises:
        UnreadableError: nobody knows which one it is.
        CheckpointError: `latest` is damaged, or names a folder that is not there.
    """
    root, steps = run_dir / "checkpoints", saved_steps(run_dir)
    try:
        name = named_by_latest(root)
        wrong = f"names {name!r}, which is not there"
    except DamagedFileError as damage:
        name, wrong = "", f"is damaged: {damage.reason}"
    except OSError as error:
        raise unreadable(UnreadableError, root / "latest", error) from None
    if name is None:
        return root / folder_name(steps[-1]) if steps else None
    folder = root / name
    if _NAME.fullmatch(name):
        if folder.is_dir():
            return folder
        if _removed(folder).is_dir():  # a save of the same step was killed between two renames
            return _removed(folder)
    if not steps:
        raise CheckpointError(
            f"{root / 'latest'} {wrong}, and there is no checkpoint: take that file away, and the "
            f"run starts anew"
        )
    others = first_of([folder_name(step) for step in steps])
    raise CheckpointError(
        f"{root / 'latest'} {wrong}; say from which checkpoint to go on with `stacking-ds "
        f"checkpoint use {shlex.quote(str(run_dir))} STEP` (there is: {others})"
    )


def fall_back(folder: Path) -> str:
    """Remedy where the checkpoint `folder` cannot be used: the end of an error's sentence."""
    root, step = folder.parent, step_of(folder)
    if root.name != "checkpoints" or step is None:
        return "bring it back from a copy, or use another checkpoint of its run"
    others = [
        other
        for other in _steps_in(root)
        if other != step and os.path.isfile(root / folder_name(other) / "manifest.json")
    ]
    if not others:
        return "there is no other checkpoint, so start the run again with another --run-dir"
    earlier = [other for other in others if other < step]
    nearest = root / folder_name(earlier[-1] if earlier else others[0])
    return f"go on from {nearest.name}: `{use_command(nearest)}`, and then --resume"


def use_command(folder: Path) -> str:
    """Command that a person types so that a run goes on from its checkpoint `folder`."""
    run_dir, step = folder.parent.parent, step_of(folder)
    name = folder.name if step is None else folder_name(step)
    return f"stacking-ds checkpoint use {shlex.quote(str(run_dir))} {name}"


# --------------------------------------------------------------------------- changing


def begin(folder: Path) -> None:
    """Make an empty folder in which to gather the files of the checkpoint `folder`."""
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    partial.mkdir(parents=True)


def publish(folder: Path, manifest: str) -> None:
    """All ranks' files are on disk: give them their manifest, their name, and `latest`.

    Whatever moment it is killed at, `latest` leads to a whole checkpoint.
    """
    partial, removed = partial_of(folder), _removed(folder)
    write_whole(partial / "manifest.json", manifest)
    sync(partial)
    # saved again, `latest` may name the one before, which stays readable until it is replaced
    replace_folder(partial, folder, removed)
    point_to(folder)
    shutil.rmtree(removed, ignore_errors=True)


def point_to(folder: Path) -> None:
    """Have `latest` name the checkpoint `folder`, which is on disk before this returns."""
    write_whole(folder.with_name("latest"), folder.name + "\n")
    sync(folder.parent)


def prune(run_dir: Path, *, keep_last: int, keep_steps: Collection[int]) -> None:
    """Remove all checkpoints but the newest `keep_last`, those of `keep_steps` (the boundaries)
    and the one `latest` names; and what killed saves left behind. For one rank, between saves."""
    root = run_dir / "checkpoints"
    newest = latest(run_dir)
    if newest is None:
        return
    newest_step = step_of(newest)
    if newest.name.startswith("."):  # what a save of the same step left under another name
        return
    assert newest_step is not None
    # what lies beyond `latest` was given up by whoever went back to an earlier checkpoint
    steps = [step for step in saved_steps(run_dir) if step <= newest_step]
    for step in steps[: max(0, len(steps) - keep_last)]:
        if step not in keep_steps:
            _remove(root / folder_name(step))
    for left_behind in [*root.glob(".step_*.partial"), *root.glob(".step_*.removed")]:
        shutil.rmtree(left_behind)


def _remove(folder: Path) -> None:
    # renamed first: a removal that is killed must not leave what looks like a checkpoint
    shutil.rmtree(_removed(folder), ignore_errors=True)
    folder.rename(_removed(folder))
    shutil.rmtree(_removed(folder))


# -------------------------------------------------------------------------- choosing


def choose(place: Path, name: str | None = None) -> Path:
    """The checkpoint `name` of the run `place`, or its newest; or `place` itself if it is one.

    A name is that of a folder, or just its step. It is there, but whether it is whole is not asked.

    Raises:
        CheckpointError: there is none; the message lists those that are there.
    """
    if is_checkpoint(place):
        if name is not None:
            raise CheckpointError(
                f"{place} is a checkpoint already; leave out {name}, or give its run"
            )
        return place
    require_run(place)
    if name is None:
        found = latest(place)
        if found is None:
            raise _none_yet(place)
        return found
    there = [folder_name(step) for step in saved_steps(place)]
    if re.fullmatch("[0-9]{1,18}", name):
        name = folder_name(int(name))
    if name not in there:
        raise CheckpointError(
            f"{place} has no checkpoint {shortened(repr(name))}; there is: "
            f"{first_of(there) or 'none'}"
        )
    return place / "checkpoints" / name


def choose_all(place: Path) -> list[Path]:
    """Every checkpoint of the run `place` by step, or `place` itself if it is one.

    Raises:
        CheckpointError: there is none.
    """
    if is_checkpoint(place):
        return [place]
    require_run(place)
    found = [place / "checkpoints" / folder_name(step) for step in saved_steps(place)]
    if not found:
        raise _none_yet(place)
    return found


def _none_yet(run_dir: Path) -> CheckpointError:
    return CheckpointError(f"{run_dir} has no checkpoint yet; train it first")


def is_checkpoint(place: Path) -> bool:
    """True for a checkpoint's folder, also a damaged one, and not for the run that has it."""
    named = step_of(Path(os.path.realpath(place))) is not None
    return place.is_dir() and (named or any(place.glob("rank_*.safetensors")))


def require_run(place: Path) -> None:
    """Raises:
    CheckpointError: `place` is not the directory of a run.
    """
    if not (place / "checkpoints").is_dir() and not (place / "config.yaml").is_file():
        raise CheckpointError(
            f"{place} holds no run and is no checkpoint; give the directory of a run, or of a "
            f"checkpoint in it"
        )
