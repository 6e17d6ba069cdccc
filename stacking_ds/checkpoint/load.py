"""Fill an engine, or a reader's hands, from a checkpoint: only the intervals that are needed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from stacking_ds.checkpoint.folders import fall_back
from stacking_ds.checkpoint.manifest import (
    ELEMENT_BYTES,
    Count,
    Manifest,
    Positive,
    RankFile,
    checksum,
    read_manifest,
)
from stacking_ds.console import shortened
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError, UnreadableError, UserError, unreadable
from stacking_ds.files import DamagedFileError, open_regular
from stacking_ds.records import Record, first_problem
from stacking_ds.sharding.fragments import MASTER, Fragment

_LENGTH_BYTES = 8
"""Of the number that says how many bytes of header follow it."""
_MOST_HEADER_BYTES = 100_000_000
"""safetensors' own bound."""


class _Tensor(Record):
    """What the header of a file says of a tensor."""

    dtype: Literal["F32"]
    shape: tuple[Positive]
    data_offsets: tuple[Count, Count]


_HEADER = TypeAdapter(dict[str, _Tensor])


class FragmentReader:
    """Looks into a rank's file when an interval first needs it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._files: dict[int, _VerifiedFile] = {}

    def fill(self, view: torch.Tensor, key: str, name: str, start: int, stop: int) -> None:
        """Copy the elements [start, stop) of `name` into `view`, a 1-D tensor of as many.

        Raises:
            UnreadableError: a file is there and cannot be read.
            CheckpointError: it is missing, or damaged where it is read.
        """
        cut = self._manifest.parameters[name].cut
        for rank in cut.holders(start, stop):
            low, high = cut.interval(rank)
            first, last = max(start, low), min(stop, high)
            try:
                if rank not in self._files:
                    self._files[rank] = self._open(rank)
                saved = self._files[rank].read(f"{key}/{name}", high - low, first - low, last - low)
            except (DamagedFileError, OSError) as error:
                problem = self._problem(rank, error)
                if isinstance(problem, UnreadableError):
                    raise problem from None
                raise CheckpointError(f"{problem}; {fall_back(self._folder)}") from None
            view[first - start : last - start].copy_(saved)

    def problems(self) -> Iterator[CheckpointError]:
        """Read every byte of every file; an error for each that is not as it was written, and an
        `UnreadableError` for each of which nobody knows."""
        for rank in range(self._manifest.world_size):
            try:
                self._open(rank).verify_all(self._manifest.tensors_of(rank))
            except (DamagedFileError, OSError) as error:
                yield self._problem(rank, error)

    def _open(self, rank: int) -> "_VerifiedFile":
        return _VerifiedFile(self._folder, self._manifest.files[rank], self._manifest.chunk_bytes)

    def _problem(self, rank: int, error: DamagedFileError | OSError) -> CheckpointError:
        """The error without a remedy."""
        path = self._folder / self._manifest.files[rank].name  # not every error knows it
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

    def __init__(self, folder: Path, record: RankFile, chunk_bytes: int) -> None:
        self._path = folder / record.name
        self._record = record
        self._chunk_bytes = chunk_bytes
        self._last_chunk: tuple[int, bytes] = (-1, b"")
        with open_regular(self._path) as file:
            size = os.fstat(file.fileno()).st_size
        if size != record.size_bytes:
            raise self._damaged(f"it has {size} bytes instead of {record.size_bytes}")

    def read(self, tensor: str, numel: int, start: int, stop: int) -> torch.Tensor:
        """The elements [start, stop), at least one, of a 1-D fp32 tensor of `numel`."""
        place = self._find(tensor, numel)
        found = self._bytes(place + ELEMENT_BYTES * start, place + ELEMENT_BYTES * stop)
        return torch.frombuffer(found, dtype=torch.float32)

    def verify_all(self, tensors: Mapping[str, int]) -> None:
        """Every byte, and that it holds these tensors, of so many elements each, and no others."""
        count = len(self._record.checksums)
        with open_regular(self._path) as file:
            damaged = [i for i in range(count) if not self._is_whole(i, self._chunk(file, i))]
        if damaged:
            raise self._damaged(
                f"{len(damaged)} of {count} chunks are not those that were written, the first at "
                f"byte {damaged[0] * self._chunk_bytes}"
            )
        for tensor, numel in tensors.items():
            self._find(tensor, numel)
        if len(self._tensors) > len(tensors):
            raise self._damaged(f"it holds {len(self._tensors)} tensors instead of {len(tensors)}")

    def _find(self, tensor: str, numel: int) -> int:
        """The first byte of a tensor of `numel` elements."""
        place, found = self._tensors.get(tensor, (0, None))
        if found != numel:
            raise self._damaged(f"it does not hold the {numel} elements of {tensor}")
        return place

    @cached_property
    def _tensors(self) -> dict[str, tuple[int, int]]:
        """Name to first byte and number of elements, of tensors that fill the rest of the file and
        share no byte."""
        size = self._record.size_bytes
        end = _LENGTH_BYTES + int.from_bytes(self._bytes(0, min(_LENGTH_BYTES, size)), "little")
        if end > min(size, _LENGTH_BYTES + _MOST_HEADER_BYTES):
            raise self._damaged(f"its header would end at byte {end}")
        try:
            header = _HEADER.validate_json(self._bytes(_LENGTH_BYTES, end))
        except ValidationError as error:
            raise self._damaged(
                f"its header is not one of 1-D fp32 tensors: {first_problem(error)}"
            ) from None
        found, place = {}, end
        for name, tensor in sorted(header.items(), key=lambda entry: entry[1].data_offsets):
            [numel], (first, last) = tensor.shape, tensor.data_offsets
            if end + first != place or last - first != ELEMENT_BYTES * numel:
                raise self._damaged(
                    f"its header puts {shortened(name)} where another tensor or none is"
                )
            found[name], place = (place, numel), end + last
        if place != size:
            raise self._damaged(f"its tensors end at byte {place} instead of {size}")
        return found

    def _bytes(self, start: int, stop: int) -> bytearray:
        """The bytes [start, stop), whose chunks are verified."""
        found = bytearray(stop - start)
        with open_regular(self._path) as file:
            for index in range(start // self._chunk_bytes, -(-stop // self._chunk_bytes)):
                low = index * self._chunk_bytes
                if self._last_chunk[0] != index:  # small tensors share one
                    chunk = self._chunk(file, index)
                    if not self._is_whole(index, chunk):
                        raise self._damaged(
                            f"the bytes from {low} on are not those that were written"
                        )
                    self._last_chunk = (index, chunk)
                part = memoryview(self._last_chunk[1])[max(start - low, 0) : max(stop - low, 0)]
                first = max(low - start, 0)
                found[first : first + len(part)] = part
        return found

    def _chunk(self, file: BinaryIO, index: int) -> bytes:
        file.seek(index * self._chunk_bytes)
        return file.read(self._chunk_bytes)

    def _is_whole(self, index: int, chunk: bytes) -> bool:
        return checksum(chunk) == self._record.checksums[index]

    def _damaged(self, reason: str) -> DamagedFileError:
        return DamagedFileError(self._path, reason)


def load(folder: Path, targets: Sequence[Fragment], world: World | None = None) -> Manifest:
    """Fill the live fragments `targets` with the elements saved in `folder`.

    Works at any world size, ZeRO stage and precision: only the intervals that this rank needs are
    read, and verified. What a target has views for is filled; moments that were not there yet
    become zero. The caller seeds the moments before and refreshes the low-precision copies
    afterwards.

    Args:
        targets: every parameter of the model; the checkpoint must have these and no others.
        world: given, it is a collective, and an error on one rank is raised on all.

    Raises:
        CheckpointError: a file that is missing or damaged, the checkpoint of another model, or
            whatever else has kept it from being loaded.
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
