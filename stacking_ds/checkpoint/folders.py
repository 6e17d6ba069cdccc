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
from contextlib import suppress
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


# --------------------------------------------------------------------------- looking


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of all checkpoints of a run, in order; an `UnreadableError` if nobody knows."""
    root = run_dir / "checkpoints"
    try:
        names = [_NAME.fullmatch(path.name) for path in root.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # not as `glob`, to which such a folder is empty
        raise unreadable(UnreadableError, root, error) from None
    return sorted(int(name[1]) for name in names if name)


def saved(run_dir: Path) -> list[Path]:
    """All checkpoints of a run, by step."""
    return [run_dir / "checkpoints" / folder_name(step) for step in saved_steps(run_dir)]


def newest_first(run_dir: Path) -> list[Path]:
    """All checkpoints of a run from the one `latest` names, if it does, back to the first; then
    those beyond, which have been given up."""
    folders = saved(run_dir)[::-1]
    with suppress(CheckpointError):
        newest = latest(run_dir)
        if newest in folders:
            place = folders.index(newest)
            folders = folders[place:] + folders[:place]
    return folders


def named_by_latest(root: Path) -> str | None:
    """The name in `root`/latest, by `read_text`; None before the run's first checkpoint."""
    with suppress(FileNotFoundError, NotADirectoryError):  # in a file no checkpoint can lie
        return read_text(root / "latest", _MOST_POINTER_BYTES).strip()
    return None


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run; None if it has none yet. Raises `UnreadableError`: nobody
    knows which one it is; `CheckpointError`: `latest` is damaged, or names a folder that is not
    there.

    Without `latest` (a run that was killed just before it was first written) it is the last folder,
    since a folder is there only when it is whole.
    """
    root, there = run_dir / "checkpoints", saved(run_dir)
    try:
        name = named_by_latest(root)
        wrong = f"names {name!r}, which is not there"
    except DamagedFileError as damage:
        name, wrong = "", f"is damaged: {damage.reason}"
    except OSError as error:
        raise unreadable(UnreadableError, root / "latest", error) from None
    if name is None:
        return there[-1] if there else None
    if _NAME.fullmatch(name):
        # removed where a save of the same step was killed between two renames
        for folder in (root / name, _removed(root / name)):
            if folder.is_dir():
                return folder
    remedy = ", and there is no checkpoint: take that file away, and the run starts anew"
    if there:
        remedy = (
            f"; say from which checkpoint to go on with `{use_command(root / 'STEP')}` (there is: "
            f"{first_of([folder.name for folder in there])})"
        )
    raise CheckpointError(f"{root / 'latest'} {wrong}{remedy}")


def fall_back(folder: Path) -> str:
    """Remedy where the checkpoint `folder` cannot be used: the end of an error's sentence."""
    step = step_of(folder)
    if folder.parent.name != "checkpoints" or step is None:
        return "bring it back from a copy, or use another checkpoint of its run"
    others = [
        other
        for other in saved_steps(folder.parent.parent)
        if other != step and os.path.isfile(folder.with_name(folder_name(other)) / "manifest.json")
    ]
    if not others:
        return "there is no other checkpoint, so start the run again with another --run-dir"
    earlier = [other for other in others if other < step]
    nearest = folder.with_name(folder_name(earlier[-1] if earlier else others[0]))
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
    newest, folders = latest(run_dir), saved(run_dir)
    if newest not in folders:  # None, or what a save of the same step has left under another name
        return
    # what lies beyond `latest` was given up by whoever went back to an earlier checkpoint
    for folder in folders[: max(0, folders.index(newest) + 1 - keep_last)]:
        if step_of(folder) not in keep_steps:
            # renamed first: a removal that is killed must not leave what looks like a checkpoint
            shutil.rmtree(_removed(folder), ignore_errors=True)
            shutil.rmtree(folder.rename(_removed(folder)))
    for left_behind in run_dir.glob("checkpoints/.step_*"):
        if _HIDDEN.fullmatch(left_behind.name):
            shutil.rmtree(left_behind)


# -------------------------------------------------------------------------- choosing


def choose(place: Path, name: str | None = None) -> Path:
    """The checkpoint `name` of the run `place`, or its newest; or `place` itself if it is one.
    Raises `CheckpointError`: there is none; the message lists those that are there.

    A name is that of a folder, or just its step. It is there, but whether it is whole is not asked.
    """
    if is_checkpoint(place):
        if name is None:
            return place
        raise CheckpointError(f"{place} is a checkpoint already; leave out {name}, or give its run")
    require_run(place)
    if name is None:
        if newest := latest(place):
            return newest
        raise _none_yet(place)
    there = {folder.name: folder for folder in saved(place)}
    name = folder_name(int(name)) if re.fullmatch("[0-9]{1,18}", name) else name
    if name not in there:
        raise CheckpointError(
            f"{place} has no checkpoint {shortened(repr(name))}; there is: "
            f"{first_of(list(there)) or 'none'}"
        )
    return there[name]


def choose_all(place: Path) -> list[Path]:
    """Every checkpoint of the run `place` by step, or `place` itself if it is one; a
    `CheckpointError` where there is none."""
    if is_checkpoint(place):
        return [place]
    require_run(place)
    if found := saved(place):
        return found
    raise _none_yet(place)


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
