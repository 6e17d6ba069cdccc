"""Fill an engine, or a reader's hands, from a checkpoint: only the intervals that are needed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch

from stacking_ds.checkpoint.folders import fall_back
from stacking_ds.checkpoint.manifest import ELEMENT_BYTES, Manifest, checksum, read_manifest
from stacking_ds.console import shortened
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError, UnreadableError, UserError, unreadable
from stacking_ds.files import DamagedFileError, open_regular, parse_json
from stacking_ds.sharding.fragments import MASTER, Fragment

_LENGTH_BYTES = 8
"""Of the number that says how many bytes of header follow it."""
_MOST_HEADER_BYTES = 100_000_000
"""safetensors' own bound."""


class FragmentReader:
    """Looks into a rank's file when an interval first needs it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._files: dict[int, _VerifiedFile] = {}

    def fill(self, view: torch.Tensor, key: str, name: str, start: int, stop: int) -> None:
        """Copy the elements [start, stop) of `name` into `view`, a 1-D tensor of as many. Raises
        `UnreadableError`: a file is there and cannot be read; `CheckpointError`: it is missing, or
        damaged where it is read."""
        cut = self._manifest.parameters[name].cut
        for rank in cut.holders(start, stop):
            low, high = cut.interval(rank)
            first, last = max(start, low), min(stop, high)
            try:
                if rank not in self._files:
                    self._files[rank] = _VerifiedFile(self._folder, self._manifest, rank)
                saved = self._files[rank].read(f"{key}/{name}", first - low, last - low)
            except (DamagedFileError, OSError) as error:
                problem = _problem(self._folder / self._manifest.files[rank].name, error)
                if isinstance(problem, UnreadableError):
                    raise problem from None
                raise CheckpointError(f"{problem}; {fall_back(self._folder)}") from None
            view[first - start : last - start].copy_(saved)


def _problem(path: Path, error: DamagedFileError | OSError) -> CheckpointError:
    """The error without a remedy; not every one knows the path."""
    if isinstance(error, DamagedFileError):
        return CheckpointError(str(error))
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} cannot be read ({error.strerror})")
    return unreadable(UnreadableError, path, error)


class _VerifiedFile:
    """One rank's safetensors file: https://huggingface.co/docs/safetensors has the format.

    It is not mapped: an error of the file system would end the process without a word. It is not
    kept open: there may be more ranks than a process may open files.
    """

    def __init__(self, folder: Path, manifest: Manifest, rank: int) -> None:
        record = manifest.files[rank]
        self._path, self._size_bytes = folder / record.name, record.size_bytes
        self._checksums, self._chunk_bytes = record.checksums, manifest.chunk_bytes
        self._manifest, self._rank = manifest, rank
        self._last_chunk: tuple[int, bytes] = (-1, b"")
        with open_regular(self._path) as file:
            found = os.fstat(file.fileno()).st_size
        if found != self._size_bytes:
            raise self._damaged(f"it has {found} bytes instead of {self._size_bytes}")

    def read(self, tensor: str, start: int, stop: int) -> torch.Tensor:
        """The elements [start, stop), at least one, of a 1-D fp32 tensor."""
        place = self._places[tensor]
        found = self._bytes(place + ELEMENT_BYTES * start, place + ELEMENT_BYTES * stop)
        return torch.frombuffer(found, dtype=torch.float32)

    def verify_all(self) -> None:
        """Every byte, and that it holds the tensors of its rank and no others."""
        count = len(self._checksums)
        with open_regular(self._path) as file:
            damaged = [i for i in range(count) if self._chunk(file, i) is None]
        if damaged:
            raise self._damaged(
                f"{len(damaged)} of {count} chunks are not those that were written, the first at "
                f"byte {damaged[0] * self._chunk_bytes}"
            )
        _ = self._places  # reading the header compares it

    @cached_property
    def _places(self) -> dict[str, int]:
        """The first byte of each tensor, of which the file has those that the manifest says."""
        length = self._bytes(0, min(_LENGTH_BYTES, self._size_bytes))
        start = _LENGTH_BYTES + int.from_bytes(length, "little")
        if start > min(self._size_bytes, _LENGTH_BYTES + _MOST_HEADER_BYTES):
            raise self._damaged(f"its header would end at byte {start}")
        try:
            found = parse_json(self._bytes(_LENGTH_BYTES, start))
        except ValueError as error:
            raise self._damaged(f"its header cannot be read: {error}") from None
        header = found if isinstance(found, dict) else {}
        numel, places, end = self._manifest.tensors_of(self._rank), {}, 0
        for name, entry in header.items():
            size, begin = numel.get(name, 0), end
            end += ELEMENT_BYTES * size
            if entry != {"dtype": "F32", "shape": [size], "data_offsets": [begin, end]}:
                raise self._damaged(f"its header says of {shortened(name)} what is not true of it")
            places[name] = start + begin
        if places.keys() != numel.keys() or start + end != self._size_bytes:
            raise self._damaged(
                f"its {len(places):,} tensors are not the {len(numel):,} that the manifest gives it"
            )
        return places

    def _bytes(self, start: int, stop: int) -> bytearray:
        """The bytes [start, stop), whose chunks are verified."""
        found = bytearray()
        with open_regular(self._path) as file:
            for index in range(start // self._chunk_bytes, -(-stop // self._chunk_bytes)):
                low = index * self._chunk_bytes
                if self._last_chunk[0] != index:  # small tensors share one
                    if (chunk := self._chunk(file, index)) is None:
                        raise self._damaged(
                            f"the bytes from {low} on are not those that were written"
                        )
                    self._last_chunk = (index, chunk)
                found += memoryview(self._last_chunk[1])[max(start - low, 0) : stop - low]
        return found

    def _chunk(self, file: BinaryIO, index: int) -> bytes | None:
        """None where it is not the one that was written."""
        file.seek(index * self._chunk_bytes)
        chunk = file.read(self._chunk_bytes)
        return chunk if checksum(chunk) == self._checksums[index] else None

    def _damaged(self, reason: str) -> DamagedFileError:
        return DamagedFileError(self._path, reason)


def load(folder: Path, targets: Sequence[Fragment], world: World | None = None) -> Manifest:
    """Fill the live fragments `targets`, every parameter of the model, with the elements saved in
    `folder`, which must have these and no others. With a `world` it is a collective, and an error
    on one rank is raised on all. Raises `CheckpointError`: a file that is missing or damaged, the
    checkpoint of another model, or whatever else has kept it from being loaded.

    Works at any world size, ZeRO stage and precision: only the intervals that this rank needs are
    read, and verified. What a target has views for is filled; moments that were not there yet
    become zero. The caller seeds the moments before and refreshes the low-precision copies
    afterwards.
    """

    def fill() -> Manifest:
        try:
            return _fill(folder, targets)
        except UserError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{folder} could not be loaded ({error!r}); mend that and resume again"
            ) from error

    if world is None:
        return fill()
    manifest: Manifest = world.on_all(fill)
    return manifest


@torch.no_grad()
def _fill(folder: Path, targets: Sequence[Fragment]) -> Manifest:
    manifest = read_manifest(folder)
    require_shapes(folder, manifest, {target.name: target.shape for target in targets})
    reader = FragmentReader(folder, manifest)
    for target in targets:
        for key, view in target.views.items():
            if key in manifest.keys:
                reader.fill(view, key, target.name, target.start, target.stop)
            else:
                view.zero_()
    return manifest


def require_shapes(folder: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises:
    CheckpointError: the parameters are not those of a model with these.
    """
    found = {name: parameter.shape for name, parameter in manifest.parameters.items()}
    if more := found.keys() - shapes.keys():
        difference = f"has {min(more)}, which this model lacks"
    elif differs := next((name for name in shapes if found.get(name) != shapes[name]), None):
        has = f"{differs} with shape {found[differs]}" if differs in found else f"no {differs}"
        difference = f"has {has}, this model needs shape {shapes[differs]}"
    else:
        return
    raise CheckpointError(
        f"{folder} is of another model: it {difference}; resume with the recipe the run was "
        f"started with"
    )


def read_parameters(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter's name and whole fp32 master, one at a time. Raises `CheckpointError`: a file
    that is missing or damaged."""
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
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [error]
    found = []
    for rank, file in enumerate(manifest.files):
        try:
            _VerifiedFile(folder, manifest, rank).verify_all()
        except (DamagedFileError, OSError) as error:
            found.append(_problem(folder / file.name, error))
    return found
