"""The rows of a split: which examples stand in each, fixed once and memory-mapped.

A layout is a pure function of the shards and a `LayoutSpec`; `layout_store` makes and finds it.

    SHARDS/layouts/pairs-512-packed-0-train-…/{layout.json, part-00000.arrow, ...}

A part is one Arrow record batch, a row of it being a row of the layout: the column `examples`,
list<struct<first_start, first_length, second_start, second_length, is_random>>, see `Examples`.
It covers the documents of a few consecutive shards, and none of its rows holds others.

Shapes: R rows, E examples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from stacking_ds.data.arrow_numbers import numbers
from stacking_ds.data.examples import ExampleKind, Examples, concatenate
from stacking_ds.data.manifest import SplitName, file_sha256
from stacking_ds.errors import DataError

__all__ = [
    "LAYOUT_VERSION",
    "RECORD_NAME",
    "Layout",
    "LayoutRecord",
    "LayoutSpec",
    "PartRecord",
    "ranges",
]

LAYOUT_VERSION = 1
"""Part of what a run's data are known by. Raise it whenever other rows come out of the shards."""

RECORD_NAME = "layout.json"

Integers = NDArray[np.int64]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class LayoutSpec(_Record):
    """What a layout is made by."""

    examples: ExampleKind
    sequence_length: int
    """Slots of a row, [CLS] and [SEP] included."""
    packed: bool
    """Several examples share a row; else each has its own."""
    variant: int = 0
    """Another variant pairs and cuts the same documents otherwise."""

    def __str__(self) -> str:
        packed = "packed" if self.packed else "single"
        return f"{self.examples}-{self.sequence_length}-{packed}-{self.variant}"


class PartRecord(_Record):
    """One file of a layout."""

    name: str
    size_bytes: int
    sha256: str
    rows: int
    examples: int
    tokens: int
    true_pairs: int
    random_pairs: int
    squared_slots: int
    """The sum of the squares of the examples' slots: what attention is computed on."""


class LayoutRecord(_Record):
    """`layout.json`: what the layout was made by, of what, and what came out."""

    identity: str
    """Hash of the split's documents and of LAYOUT_VERSION."""
    spec: LayoutSpec
    split: SplitName
    parts: tuple[PartRecord, ...]


@dataclass(frozen=True)
class _Part:
    row_offsets: Integers
    examples: Examples


class Layout:
    """The rows of one split, opened for reading."""

    def __init__(self, folder: Path, record: LayoutRecord) -> None:
        self.folder, self.record = folder, record
        self._parts = [_map(folder, part) for part in record.parts]
        self._row_bases = np.cumsum([0, *(part.rows for part in record.parts)])

    @property
    def num_rows(self) -> int:
        return int(self._row_bases[-1])

    def total(self, count: str) -> int:
        """The sum of a count over the parts, by its name in `PartRecord`."""
        return sum(getattr(part, count) for part in self.record.parts)

    def verify(self) -> None:
        """Raises DataError, naming the file, where a byte is not what was written."""
        for part in self.record.parts:
            path = self.folder / part.name
            if file_sha256(path) != part.sha256:
                raise DataError(f"{path} is damaged: delete {self.folder}, it will be made again")

    @property
    def used_slots(self) -> int:
        """The slots that hold a token, [CLS] and [SEP] included."""
        pairs = self.total("true_pairs") + self.total("random_pairs")
        return self.total("tokens") + 2 * self.total("examples") + pairs

    @property
    def fill(self) -> float:
        """The share of the slots that hold a token."""
        return self.used_slots / (self.num_rows * self.record.spec.sequence_length)

    @property
    def mean_attended_slots(self) -> float:
        """How many tokens a token attends to, itself included, on average."""
        return self.total("squared_slots") / self.used_slots

    def examples_of(self, rows_R: Integers) -> tuple[Integers, Examples]:
        """The examples of these rows, one row after the other, and how many each has [R]."""
        part_R = np.searchsorted(self._row_bases, rows_R, side="right") - 1
        counts_R = np.zeros(len(rows_R), dtype=np.int64)
        found: list[tuple[Integers, Examples]] = []
        for number in np.unique(part_R):
            part, here = self._parts[number], np.flatnonzero(part_R == number)
            rows = rows_R[here] - self._row_bases[number]
            first = part.row_offsets[rows].astype(np.int64)
            counts_R[here] = part.row_offsets[rows + 1] - first
            found.append((here, part.examples[ranges(first, counts_R[here])]))
        if len(found) < 2:
            return counts_R, concatenate([examples for _, examples in found])
        # parts were visited one by one: back to the order of the rows
        row_E = np.concatenate([np.repeat(here, counts_R[here]) for here, _ in found])
        joined = concatenate([examples for _, examples in found])
        return counts_R, joined[np.argsort(row_E, kind="stable")]

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes map the files anew."""
        return (Layout, (self.folder, self.record))


def ranges(starts: Integers, counts: Integers) -> Integers:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ..."""
    before = np.cumsum(counts) - counts
    found: Integers = np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
    return found


def _map(folder: Path, record: PartRecord) -> _Part:
    path = folder / record.name
    try:
        column = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column("examples")
        fields = [numbers(field) for field in column.values.flatten()]
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged ({error}); delete {folder}") from error
    return _Part(numbers(column.offsets), Examples(*fields))
