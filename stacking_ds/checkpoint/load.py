"""Fill an engine, or a reader's hands, from a checkpoint: only the intervals that are needed."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from stacking_ds.checkpoint.folders import fall_back
from stacking_ds.checkpoint.manifest import Manifest, RankFile, checksum, read_manifest
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError, UnreadableError, unreadable
from stacking_ds.files import DamagedFileError, is_count, open_regular, parse_json
from stacking_ds.sharding.fragments import MASTER, Fragment

# ------------------------------------------------------------- the header of a file


LENGTH_BYTES = 8
"""Of the number that says how many bytes of header follow it."""

_ELEMENT_BYTES = 4
# safetensors' own bound
_MOST_HEADER_BYTES = 100_000_000


def header_end(length: bytes | bytearray, size_bytes: int) -> int:
    """The place in a file of `size_bytes` where the header ends, by its first bytes.

    Raises:
        ValueError: it would not end in the file.
    """
    end = LENGTH_BYTES + int.from_bytes(length, "little")
    if end > min(size_bytes, LENGTH_BYTES + _MOST_HEADER_BYTES):
        raise ValueError(f"its header would end at byte {end}")
    return end


def read_header(
    header: bytes | bytearray, start: int, size_bytes: int
) -> dict[str, tuple[int, int]]:
    """Name to first byte and number of elements, of 1-D fp32 tensors that fill the bytes from
    `start` to `size_bytes` and share none.

    Raises:
        ValueError: it says anything else.
    """
    entries = parse_json(header)
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    entries.pop("__metadata__", None)
    found = {name: _tensor(name, entry) for name, entry in entries.items()}
    place = start
    for name, (offset, numel) in sorted(found.items(), key=lambda entry: entry[1]):
        if start + offset != place:
            raise ValueError(f"its header puts {_shown(name)} where another tensor or none is")
        place += _ELEMENT_BYTES * numel
    if place != size_bytes:
        raise ValueError(f"its tensors end at byte {place} instead of {size_bytes}")
    return {name: (start + offset, numel) for name, (offset, numel) in found.items()}


def _tensor(name: str, entry: Any) -> tuple[int, int]:
    """The offset and the number of elements."""
    match entry:
        case {"dtype": "F32", "shape": [numel], "data_offsets": [begin, end]}:
            counts = all(map(is_count, (numel, begin, end)))
            if counts and numel > 0 and end - begin == _ELEMENT_BYTES * numel:
                return begin, numel
    raise ValueError(f"its header says of {_shown(name)} what is true of no 1-D fp32 tensor")


def _shown(name: str) -> str:
    return re.sub(r"[^\w./-]", "?", name)[:100]


# -------------------------------------------------------------- intervals, verified


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
        try:
            for rank in cut.holders(start, stop):
                low, high = cut.interval(rank)
                first, last = max(start, low), min(stop, high)
                if rank not in self._files:
                    self._files[rank] = self._open(rank)
                saved = self._files[rank].read(f"{key}/{name}", high - low, first - low, last - low)
                view[first - start : last - start].copy_(saved)
        except _DamageError as damage:
            raise CheckpointError(f"{damage}; {fall_back(self._folder)}") from None
        except OSError as error:
            raise self._unreadable(rank, error) from None

    def problems(self) -> Iterator[CheckpointError]:
        """Read every byte of every file; an error for each that is not as it was written, and an
        `UnreadableError` for each of which nobody knows."""
        for rank in range(self._manifest.world_size):
            try:
                file = self._open(rank)
                file.verify_all()
                file.require_only(self._manifest.tensors_of(rank))
            except _DamageError as damage:
                yield CheckpointError(str(damage))
            except OSError as error:
                yield self._unreadable(rank, error)

    def _open(self, rank: int) -> "_VerifiedFile":
        return _VerifiedFile(self._folder, self._manifest.files[rank], self._manifest.chunk_bytes)

    def _unreadable(self, rank: int, error: OSError) -> UnreadableError:
        path = self._folder / self._manifest.files[rank].name  # not every error knows it
        return unreadable(UnreadableError, path, error)


class _DamageError(Exception):
    """Damage of a file, without the remedy."""


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
        try:
            with self._file() as file:
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError as error:
            raise _DamageError(f"{self._path} cannot be read ({error.strerror})") from None
        if size != record.size_bytes:
            raise self._damaged(f"it has {size} bytes instead of {record.size_bytes}")

    def read(self, tensor: str, numel: int, start: int, stop: int) -> torch.Tensor:
        """The elements [start, stop), at least one, of a 1-D fp32 tensor of `numel`."""
        place = self.find(tensor, numel)
        found = self._bytes(place + _ELEMENT_BYTES * start, place + _ELEMENT_BYTES * stop)
        return torch.frombuffer(found, dtype=torch.float32)

    def find(self, tensor: str, numel: int) -> int:
        """The first byte of a tensor of `numel` elements."""
        place, found = self._tensors.get(tensor, (0, None))
        if found != numel:
            raise self._damaged(f"it does not hold the {numel} elements of {tensor}")
        return place

    def require_only(self, numel: Mapping[str, int]) -> None:
        """It holds these tensors, of so many elements each, and no others."""
        for tensor, expected in numel.items():
            self.find(tensor, expected)
        if len(self._tensors) > len(numel):
            raise self._damaged(f"it holds {len(self._tensors)} tensors instead of {len(numel)}")

    def verify_all(self) -> None:
        count = len(self._record.checksums)
        with self._file() as file:
            damaged = [i for i in range(count) if not self._is_whole(i, self._chunk(file, i))]
        if damaged:
            raise self._damaged(
                f"{len(damaged)} of {count} chunks are not those that were written, the first at "
                f"byte {damaged[0] * self._chunk_bytes}"
            )

    @cached_property
    def _tensors(self) -> dict[str, tuple[int, int]]:
        """Name to first byte and number of elements."""
        size_bytes = self._record.size_bytes
        try:
            end = header_end(self._bytes(0, min(LENGTH_BYTES, size_bytes)), size_bytes)
            return read_header(self._bytes(LENGTH_BYTES, end), end, size_bytes)
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _file(self) -> BinaryIO:
        try:
            return open_regular(self._path)
        except DamagedFileError as damage:
            raise self._damaged(damage.reason) from None

    def _bytes(self, start: int, stop: int) -> bytearray:
        """The bytes [start, stop), whose chunks are verified."""
        found = bytearray(stop - start)
        with self._file() as file:
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

    def _damaged(self, reason: str) -> _DamageError:
        return _DamageError(f"{self._path} is damaged: {reason}")


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
    if world is None:
        return _fill(folder, targets)
    manifest: Manifest = world.on_all(lambda: _fill(folder, targets))
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
