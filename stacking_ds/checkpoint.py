"""The sharded training state on disk: whole or not there, and readable by any number of ranks.

    RUN_DIR/checkpoints/latest                      the name of the newest folder, changed last
    RUN_DIR/checkpoints/step_00001000/
        manifest.json                               what the run was, and which file has what
        rank_00000.safetensors …                    each rank's fragments: "master/NAME" and so on

A folder appears under its name only when every rank's file in it is on disk. A reader takes from
the files the intervals it needs, so another world size or ZeRO stage is an ordinary load.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stacking_ds.data.manifest import file_sha256
from stacking_ds.distributed import World
from stacking_ds.errors import CheckpointError
from stacking_ds.fragment_reader import FragmentReader
from stacking_ds.fragments import MASTER, Fragment
from stacking_ds.manifest import (
    FORMAT_VERSION,
    Interval,
    Manifest,
    RankFile,
    package_versions,
    read_manifest,
)

__all__ = [
    "Manifest",
    "latest",
    "load",
    "prune",
    "read_manifest",
    "read_parameters",
    "save",
    "saved_steps",
]

_NAME = re.compile(r"step_(\d{8,})")


# --------------------------------------------------------------------------- writing


def save(
    run_dir: Path,
    fragments: Sequence[Fragment],
    world: World,
    *,
    optimizer_step: int,
    train_state: Mapping[str, Any],
    config: Mapping[str, Any],
    num_hidden_layers: int,
    vocabulary_sha256: str,
    data_sha256: str,
    loss_scale: float = 1.0,
) -> Path:
    """Write the state of all ranks as the checkpoint of step `train_state["step"]`. A collective.

    Returns:
        The new folder, which `latest` now names.

    Raises:
        CheckpointError: on every rank, if one could not write; `latest` still names the previous
            checkpoint, which is untouched.
    """
    step = int(train_state["step"])
    root = run_dir / "checkpoints"
    partial = root / f".step_{step:08d}.partial"
    folder = root / f"step_{step:08d}"
    _on_first(world, folder, lambda: _new_folder(partial))
    written = _write_everywhere(partial, fragments, world, folder)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        package_versions=package_versions(),
        step=step,
        optimizer_step=optimizer_step,
        loss_scale=loss_scale,
        num_hidden_layers=num_hidden_layers,
        vocabulary_sha256=vocabulary_sha256,
        data_sha256=data_sha256,
        train_state=dict(train_state),
        config=dict(config),
        parameters={fragment.name: fragment.shape for fragment in fragments},
        files=tuple(written),
    )
    _on_first(world, folder, lambda: _publish(partial, folder, manifest))
    return folder


def _on_first(world: World, folder: Path, action: Callable[[], None]) -> None:
    def act() -> None:
        try:
            action()
        except OSError as error:
            raise CheckpointError(_not_saved(folder, str(error))) from error

    world.on_first(act)


def _not_saved(folder: Path, reasons: str) -> str:
    return (
        f"checkpoint {folder} was not saved: {reasons}; the previous checkpoint is untouched, make "
        f"room or mend the file system and resume from it"
    )


def _new_folder(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    partial.mkdir(parents=True)


def _write_everywhere(
    partial: Path, fragments: Sequence[Fragment], world: World, folder: Path
) -> list[RankFile]:
    """Write this rank's file; the records of all ranks' files, or one error on all ranks."""
    record, failure = None, None
    try:
        record = _write_file(partial / f"rank_{world.rank:05d}.safetensors", fragments, world)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must learn of it
        failure = f"rank {world.rank}: {error}"
    outcomes = world.gather((record, failure))
    failures = [reason for _, reason in outcomes if reason is not None]
    if failures:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise _on_all_ranks(CheckpointError(_not_saved(folder, "; ".join(failures))))
    return [record for record, _ in outcomes]


def _on_all_ranks(error: CheckpointError) -> CheckpointError:
    error.on_all_ranks = True
    return error


def _write_file(path: Path, fragments: Sequence[Fragment], world: World) -> RankFile:
    owned = [fragment.owned_by(world.rank) for fragment in fragments]
    owned = [fragment for fragment in owned if fragment.numel]
    tensors = {
        # copies: safetensors refuses views into one buffer
        f"{key}/{fragment.name}": view.detach().to("cpu", copy=True)
        for fragment in owned
        for key, view in fragment.views.items()
    }
    save_file(tensors, path)
    _sync(path)
    return RankFile(
        name=path.name,
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        intervals=tuple(
            Interval(name=f.name, start=f.start, stop=f.stop, keys=tuple(f.views)) for f in owned
        ),
    )


def _publish(partial: Path, folder: Path, manifest: Manifest) -> None:
    path = partial / "manifest.json"
    path.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    _sync(path)
    _sync(partial)
    if folder.exists():  # by a run that was killed before `latest` named it
        _remove(folder)
    partial.rename(folder)
    _sync(folder.parent)
    pointer = folder.parent / ".latest.partial"
    pointer.write_text(folder.name + "\n", encoding="utf-8")
    _sync(pointer)
    pointer.replace(folder.parent / "latest")
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Have the file's contents, or the folder's entries, on disk before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    # renamed first: a removal that is killed must not leave what looks like a checkpoint
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def prune(run_dir: Path, *, keep_last: int, keep_steps: Collection[int]) -> None:
    """Remove all checkpoints but the newest `keep_last`, those of `keep_steps` (the boundaries)
    and the one `latest` names; and what killed saves left behind. For one rank, between saves."""
    root = run_dir / "checkpoints"
    newest = latest(run_dir)
    if newest is None:
        return
    # what lies beyond `latest` was given up by whoever went back to an earlier checkpoint
    steps = [step for step in saved_steps(run_dir) if step <= _step_of(newest)]
    for step in steps[: max(0, len(steps) - keep_last)]:
        if step not in keep_steps:
            _remove(root / f"step_{step:08d}")
    for left_behind in [*root.glob(".step_*.partial"), *root.glob(".step_*.removed")]:
        shutil.rmtree(left_behind)


# --------------------------------------------------------------------------- reading


def _step_of(folder: Path) -> int:
    found = _NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1])


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of all checkpoints of a run, in order."""
    names = [_NAME.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step_*")]
    return sorted(int(name[1]) for name in names if name)


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run; None if it has none yet.

    Without `latest` (a run that was killed just before it was first written) it is the last folder,
    since a folder is there only when it is whole.

    Raises:
        CheckpointError: `latest` names a folder that is not there.
    """
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.exists():
        steps = saved_steps(run_dir)
        return pointer.parent / f"step_{steps[-1]:08d}" if steps else None
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not _NAME.fullmatch(folder.name) or not folder.is_dir():
        others = ", ".join(f"step_{step:08d}" for step in saved_steps(run_dir)) or "none"
        raise CheckpointError(
            f"{pointer} names {folder.name!r}, which is not there; write the name of another "
            f"checkpoint into it (there is: {others})"
        )
    return folder


@torch.no_grad()
def load(
    folder: Path,
    targets: Sequence[Fragment],
    name_map: Callable[[str], str] | None = None,
    world: World | None = None,
) -> Manifest:
    """Fill the live fragments `targets` with the elements saved in `folder`.

    Works at any world size and ZeRO stage: only the overlapping intervals are read. What a target
    has views for is filled; moments that were not there yet become zero. The caller seeds the
    moments before and refreshes the low-precision copies afterwards.

    Args:
        name_map: from a target's name to the saved one (growth from disk); None for the same.
        world: given, it is a collective, and an error on one rank is raised on all.

    Raises:
        CheckpointError: a file that is missing or damaged, or the checkpoint of another model.
    """
    failure: Exception | None = None
    manifest = None
    try:
        manifest = read_manifest(folder)
        reader = FragmentReader(folder, manifest)
        for target in targets:
            saved_name = name_map(target.name) if name_map else target.name
            reader.require(saved_name, target.shape)
            for key, view in target.views.items():
                if key != MASTER and not manifest.optimizer_step:
                    view.zero_()
                else:
                    reader.fill(view, key, saved_name, target.start, target.stop)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must learn of it
        failure = error
    if world is not None:
        failures = [reason for reason in world.gather(failure and str(failure)) if reason]
        if failures:
            raise _on_all_ranks(CheckpointError(failures[0])) from failure
    if failure is not None:
        raise failure
    assert manifest is not None
    return manifest


def read_parameters(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter's name and whole fp32 master, one at a time.

    Raises:
        CheckpointError: a file that is missing or damaged.
    """
    manifest = read_manifest(folder)
    reader = FragmentReader(folder, manifest)
    for name, shape in manifest.parameters.items():
        whole = torch.empty(shape, dtype=torch.float32)
        reader.fill(whole.view(-1), MASTER, name, 0, whole.numel())
        yield name, whole
