"""Which checkpoint a person means: a run's newest, one by its name or step, or a folder by its
path."""

import os
import re
from pathlib import Path

from stacking_ds.checkpoint.folders import folder_name, latest, saved_steps, step_of
from stacking_ds.console import first_of, shortened
from stacking_ds.errors import CheckpointError

__all__ = ["choose", "choose_all", "is_checkpoint", "require_run"]


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
    """Is it a checkpoint's folder, rather than the run that has it? A damaged one is one too."""
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
