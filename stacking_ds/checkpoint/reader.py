"""Intervals of saved parameters, read from the files of the ranks that hold them, and verified.

    a rank's file          | length | header |    tensor    |    tensor    | …
    checksums of chunks    |     0     |     1     |     2     |     3     | …
    wanted                                            xxxxx

What is read is the header and the wanted elements. The chunks that they touch are verified, once
each; damage elsewhere in a file is for `FragmentReader.problems` to find.
"""

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from stacking_ds.checkpoint.folders import fall_back
from stacking_ds.checkpoint.manifest import Manifest, RankFile, checksum
from stacking_ds.errors import CheckpointError

__all__ = ["FragmentReader"]

_LENGTH_BYTES = 8  # of the number that says how many bytes of header follow it
_ELEMENT_BYTES = 4


class FragmentReader:
    """Maps a rank's file when an interval first needs it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._files: dict[int, _MappedFile] = {}

    def fill(self, view: torch.Tensor, key: str, name: str, start: int, stop: int) -> None:
        """Copy the elements [start, stop) of `name` into `view`, a 1-D tensor of as many.

        Raises:
            CheckpointError: a file is missing, or damaged where it is read.
        """
        cut = self._manifest.parameters[name].cut
        try:
            for rank in cut.holders(start, stop):
                low, high = cut.interval(rank)
                first, last = max(start, low), min(stop, high)
                if rank not in self._files:
                    self._files[rank] = self._map(rank)
                saved = self._files[rank].read(f"{key}/{name}", high - low, first - low, last - low)
                view[first - start : last - start].copy_(saved)
        except _DamageError as damage:
            raise CheckpointError(f"{damage}; {fall_back(self._folder)}") from None

    def problems(self) -> Iterator[str]:
        """Read every byte of every file; a sentence for each file that is not as it was written."""
        for rank in range(self._manifest.world_size):
            try:
                file = self._map(rank)
                file.verify_all()
                for name, parameter in self._manifest.parameters.items():
                    low, high = parameter.cut.interval(rank)
                    for key in self._manifest.keys if low < high else ():
                        file.find(f"{key}/{name}", high - low)
            except _DamageError as damage:
                yield str(damage)

    def _map(self, rank: int) -> "_MappedFile":
        return _MappedFile(self._folder, self._manifest.files[rank], self._manifest.chunk_bytes)


class _DamageError(Exception):
    """What is wrong with a file, without the remedy."""


class _MappedFile:
    """One rank's safetensors file: https://huggingface.co/docs/safetensors has the format."""

    def __init__(self, folder: Path, record: RankFile, chunk_bytes: int) -> None:
        self._path = folder / record.name
        self._checksums = record.checksums
        self._verified = [False] * len(record.checksums)
        self._chunk_bytes = chunk_bytes
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
            if size != record.size_bytes:
                raise self._damaged(f"it has {size} bytes instead of {record.size_bytes}")
            # torch's map keeps no file open, of which a process may have no more than a thousand
            self._mapped = torch.from_file(
                str(self._path), shared=False, size=size, dtype=torch.uint8
            )
        except OSError as error:
            raise _DamageError(f"{self._path} cannot be read ({error.strerror})") from None
        except RuntimeError as error:
            raise _DamageError(f"{self._path} cannot be read ({error})") from None
        self._bytes = self._mapped.numpy().data

    def read(self, tensor: str, numel: int, start: int, stop: int) -> torch.Tensor:
        """The elements [start, stop), at least one, of a 1-D fp32 tensor: a view of the file."""
        place = self.find(tensor, numel)
        first, last = place + _ELEMENT_BYTES * start, place + _ELEMENT_BYTES * stop
        self._verify(first, last)
        return self._mapped[first:last].view(torch.float32)

    def find(self, tensor: str, numel: int) -> int:
        """The first byte of a tensor of `numel` elements."""
        place, found = self._tensors.get(tensor, (0, None))
        if found != numel:
            raise self._damaged(f"it does not hold the {numel} elements of {tensor}")
        return place

    def verify_all(self) -> None:
        damaged = [index for index in range(len(self._checksums)) if not self._is_whole(index)]
        if damaged:
            raise self._damaged(
                f"{len(damaged)} of {len(self._checksums)} chunks are not those that were written, "
                f"the first at byte {damaged[0] * self._chunk_bytes}"
            )

    @cached_property
    def _tensors(self) -> dict[str, tuple[int, int]]:
        """Name to first byte and number of elements."""
        self._verify(0, _LENGTH_BYTES)
        end = _LENGTH_BYTES + int.from_bytes(self._bytes[:_LENGTH_BYTES], "little")
        self._verify(0, end)
        header = json.loads(bytes(self._bytes[_LENGTH_BYTES:end]))
        return {
            name: (end + entry["data_offsets"][0], entry["shape"][0])
            for name, entry in header.items()
        }

    def _verify(self, start: int, stop: int) -> None:
        for index in range(start // self._chunk_bytes, -(-stop // self._chunk_bytes)):
            if not self._is_whole(index):
                raise self._damaged(
                    f"the bytes from {index * self._chunk_bytes} on are not those that were written"
                )

    def _is_whole(self, index: int) -> bool:
        if not self._verified[index]:
            start = index * self._chunk_bytes
            found = checksum(self._bytes[start : start + self._chunk_bytes])
            self._verified[index] = found == self._checksums[index]
        return self._verified[index]

    def _damaged(self, reason: str) -> _DamageError:
        return _DamageError(f"{self._path} is damaged: {reason}")
