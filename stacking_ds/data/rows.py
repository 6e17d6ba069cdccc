"""The rows of a split: which examples stand in each, fixed once and memory-mapped.

A layout is a pure function of the shards and a `LayoutSpec`; `row_store` makes and finds it.

    SHARDS/layouts/pairs-512-packed-0-train-…/{layout.json, part-00000.arrow, ...}

A part is one Arrow record batch, a row of it being a row of the layout: the column `examples`,
list<struct<first_start, first_length, second_start, second_length, is_random>>, see `Examples`.
It covers the documents of a few consecutive shards, and none of its rows holds others.

Shapes: R rows, E examples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from stacking_ds.config.sections import DataSection, ExampleKind
from stacking_ds.data.examples import Examples, concatenate
from stacking_ds.data.shard_files import Count, FileName, Positive, Sha256, SplitName
from stacking_ds.data.shards import numbers, only_batch, reading, require_whole
from stacking_ds.records import Record

LAYOUT_VERSION = 1
"""Part of what a run's data are known by. Raise it whenever other rows come out of the shards."""

RECORD_NAME = "layout.json"

EXAMPLES = pa.list_(
    pa.struct(
        {
            "first_start": pa.int64(),
            "first_length": pa.int32(),
            "second_start": pa.int64(),
            "second_length": pa.int32(),
            "is_random": pa.uint8(),
        }
    )
)

Integers = NDArray[np.int64]


class LayoutSpec(Record):
    """The specification that a layout is made by."""

    examples: ExampleKind
    sequence_length: int
    """Slots of a row, [CLS] and [SEP] included."""
    packed: bool
    """Several examples share a row; else each has its own."""
    variant: int = 0
    """Another variant pairs and cuts the same documents otherwise."""

    @classmethod
    def of(cls, section: DataSection, variant: int = 0) -> "LayoutSpec":
        """The layout that a recipe's rows stand in."""
        return cls(
            examples=section.examples,
            sequence_length=section.sequence_length,
            packed=section.packing,
            variant=variant,
        )

    def __str__(self) -> str:
        packed = "packed" if self.packed else "single"
        return f"{self.examples}-{self.sequence_length}-{packed}-{self.variant}"


class PartRecord(Record):
    """One file of a layout."""

    name: FileName
    size_bytes: Positive
    sha256: Sha256
    rows: Positive
    examples: Positive
    tokens: Positive
    true_pairs: Count
    random_pairs: Count
    squared_slots: Positive
    """The sum of the squares of the examples' slots: what attention is computed on."""


class LayoutRecord(Record):
    """`layout.json`: what the layout was made by, of what, and what came out."""

    identity: str
    """Hash of the split's documents and of LAYOUT_VERSION."""
    spec: LayoutSpec
    split: SplitName
    parts: Annotated[tuple[PartRecord, ...], Field(min_length=1)]


@dataclass(frozen=True)
class _Part:
    row_offsets: Integers
    examples: Examples


class Layout:
    """The rows of one split, opened for reading."""

    def __init__(self, folder: Path, record: LayoutRecord) -> None:
        self.folder, self.record = folder, record
        self._remedy = f"delete {folder}, it will be made again"
        self._parts = [self._map(part) for part in record.parts]
        self._row_bases = np.cumsum([0, *(part.rows for part in record.parts)])

    @property
    def num_rows(self) -> int:
        return int(self._row_bases[-1])

    def total(self, count: str) -> int:
        """The sum of a count over the parts, by its name in `PartRecord`."""
        return sum(getattr(part, count) for part in self.record.parts)

    def verifying(self) -> Iterator[None]:
        """Reads a file at a time; raises DataError, naming it, where a byte is not what was
        written."""
        for part in self.record.parts:
            path = self.folder / part.name
            require_whole(path, part.size_bytes, part.sha256, self._remedy)
            yield

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
        """The tokens that a token attends to, itself included, on average."""
        return self.total("squared_slots") / self.used_slots

    def examples_of(self, rows_R: Integers) -> tuple[Integers, Examples]:
        """The examples of these rows, one row after the other, and how many each has [R]."""
        part_R = np.searchsorted(self._row_bases, rows_R, side="right") - 1
        counts_R = np.zeros(len(rows_R), dtype=np.int64)
        found: list[tuple[Integers, Examples]] = []
        for number in np.unique(part_R):
            part, here = self._parts[number], np.flatnonzero(part_R == number)
            rows = rows_R[here] - self._row_bases[number]
            first, last = part.row_offsets[rows], part.row_offsets[rows + 1]
            with reading(self.folder / self.record.parts[number].name, self._remedy):
                if not ((first >= 0) & (first < last) & (last <= len(part.examples))).all():
                    raise ValueError("its rows are not those of a layout")
                counts_R[here] = last - first
                examples = part.examples[ranges(first.astype(np.int64), counts_R[here])]
                self._require_room(examples, counts_R[here])
            found.append((here, examples))
        if len(found) < 2:
            return counts_R, concatenate([examples for _, examples in found])
        # parts were visited one by one: back to the order of the rows
        row_E = np.concatenate([np.repeat(here, counts_R[here]) for here, _ in found])
        joined = concatenate([examples for _, examples in found])
        return counts_R, joined[np.argsort(row_E, kind="stable")]

    def _require_room(self, examples: Examples, counts_R: Integers) -> None:
        """Raises ValueError where the examples of these rows do not fit into them: they would be
        written into the next one."""
        room = self.record.spec.sequence_length
        used_R = np.add.reduceat(examples.slots, np.cumsum(counts_R) - counts_R)
        has_text = (examples.first_length_E > 0) & (examples.second_length_E >= 0)
        if not has_text.all() or used_R.max() > room:
            raise ValueError("its examples are not those of a layout")

    def _map(self, record: PartRecord) -> "_Part":
        with reading(path := self.folder / record.name, self._remedy):
            column = only_batch(path, {"examples": (EXAMPLES,)}).column("examples")
            fields = [numbers(field) for field in column.values.flatten()]
            if (len(column), len(fields[0])) != (record.rows, record.examples):
                raise ValueError(f"it holds {len(column)} rows and {len(fields[0])} examples")
            return _Part(numbers(column.offsets), Examples(*fields))

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes map the files anew."""
        return (Layout, (self.folder, self.record))


def ranges(starts: Integers, counts: Integers) -> Integers:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ..."""
    before = np.cumsum(counts) - counts
    found: Integers = np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
    return found
