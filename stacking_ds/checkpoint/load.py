"""Fill an engine, or a reader's hands, from a checkpoint: only the intervals that are needed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from stacking_ds.checkpoint.manifest import Manifest, read_manifest
from stacking_ds.checkpoint.reader import FragmentReader
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError
from stacking_ds.sharding.fragments import MASTER, Fragment

__all__ = ["load", "problems", "read_parameters", "require_shapes"]


def load(
    folder: Path,
    targets: Sequence[Fragment],
    world: World | None = None,
) -> Manifest:
    """Fill the live fragments `targets` with the elements saved in `folder`.

    Works at any world size, ZeRO stage and precision: only the intervals that this rank needs are
    read, and verified. What a target has views for is filled; moments that were not there yet
    become zero. The caller seeds the moments before and refreshes the low-precision copies
    afterwards.

    Args:
        targets: every parameter of the model; the checkpoint must have these and no others.
        world: given, it is a collective, and an error on one rank is raised on all.

    Raises:
        CheckpointError: a file that is missing or damaged, or the checkpoint of another model.
    """
    failure: Exception | None = None
    manifest = None
    try:
        manifest = read_manifest(folder)
        _fill(folder, manifest, targets)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must learn of it
        failure = error
    if world is not None:
        failures = [reason for reason in world.gather(failure and _text_of(failure)) if reason]
        if failures:
            damage = CheckpointError(failures[0])
            damage.on_all_ranks = True
            raise damage from failure
    if failure is not None:
        raise failure
    assert manifest is not None
    return manifest


def _text_of(error: Exception) -> str:
    return str(error) or type(error).__name__


@torch.no_grad()
def _fill(
    folder: Path,
    manifest: Manifest,
    targets: Sequence[Fragment],
) -> None:
    require_shapes(folder, manifest, {target.name: target.shape for target in targets})
    reader = FragmentReader(folder, manifest)
    for target in targets:
        for key, view in target.views.items():
            if key in manifest.keys:
                reader.fill(view, key, target.name, target.start, target.stop)
            else:
                view.zero_()


def require_shapes(folder: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises:
    CheckpointError: the parameters are not those of a model with these.
    """
    more = manifest.parameters.keys() - shapes.keys()
    if more:
        raise _of_another_model(folder, f"has {min(more)}, which this model lacks")
    for name, shape in shapes.items():
        saved = manifest.parameters.get(name)
        if saved is None or saved.shape != shape:
            found = f"has {name} with shape {saved.shape}" if saved else f"has no {name}"
            raise _of_another_model(folder, f"{found}, this model needs shape {shape}")


def _of_another_model(folder: Path, difference: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is of another model: it {difference}; resume with the recipe the run was "
        f"started with"
    )


def read_parameters(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter's name and whole fp32 master, one at a time.

    Raises:
        CheckpointError: a file that is missing or damaged.
    """
    manifest = read_manifest(folder)
    reader = FragmentReader(folder, manifest)
    for name, parameter in manifest.parameters.items():
        whole = torch.empty(parameter.shape, dtype=torch.float32)
        reader.fill(whole.view(-1), MASTER, name, 0, whole.numel())
        yield name, whole


def problems(folder: Path) -> list[CheckpointError]:
    """Everything that is wrong with a checkpoint, every byte of which is read: damage, and an
    `UnreadableError` for what cannot be read."""
    try:
        return list(FragmentReader(folder, read_manifest(folder)).problems())
    except CheckpointError as error:
        return [error]
