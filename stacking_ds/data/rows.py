"""The rows of a split: which examples stand in each, fixed once for all processes of a node and
memory-mapped; beside the shards, or in the user's cache where these cannot be written.

A layout is a pure function of the shards and a `LayoutSpec`.

    SHARDS/layouts/pairs-512-packed-0-train-…/{layout.json, part-00000.arrow, ...}

A part is one Arrow record batch, a row of it being a row of the layout: the column `examples`,
list<struct<first_start, first_length, second_start, second_length, is_random>>, see `Examples`.
It covers the documents of a few consecutive shards, and none of its rows holds others.

Shapes: R rows, E examples.
"""

import hashlib
import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import filelock
import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from stacking_ds.config.sections import DataSection, ExampleKind
from stacking_ds.data.counter_random import Integers, derive_key
from stacking_ds.data.examples import (
    Examples,
    concatenate,
    cut_documents,
    cut_pairs,
    ranges,
    read_passages,
)
from stacking_ds.data.pool import WorkerDiedError, do_in_workers
from stacking_ds.data.shard_files import (
    Count,
    Positive,
    RecordedFile,
    SplitName,
    write_arrow,
    write_file,
)
from stacking_ds.data.shards import TokenSplit, numbers, only_batch, reading, require_whole
from stacking_ds.errors import DataError
from stacking_ds.files import DamagedFileError, read_bytes
from stacking_ds.records import Record

LAYOUT_VERSION = 1
"""Part of what a run's data are known by. Raise it whenever other rows come out of the shards."""

RECORD_NAME = "layout.json"

_EXAMPLES = pa.list_(
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


class PartRecord(RecordedFile):
    """One file of a layout."""

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
            require_whole(self.folder, part, every_byte=True, remedy=self._remedy)
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
        found, row_E = [], [np.zeros(0, dtype=np.int64)]
        for number in np.unique(part_R):
            (row_offsets, part), here = self._parts[number], np.flatnonzero(part_R == number)
            rows = rows_R[here] - self._row_bases[number]
            first, last = row_offsets[rows], row_offsets[rows + 1]
            with reading(self.folder / self.record.parts[number].name, self._remedy):
                if not ((first >= 0) & (first < last) & (last <= len(part))).all():
                    raise ValueError("its rows are not those of a layout")
                counts_R[here] = last - first
                found.append(part[ranges(first.astype(np.int64), counts_R[here])])
                self._require_room(found[-1], counts_R[here])
            row_E.append(np.repeat(here, counts_R[here]))
        # parts were visited one by one: back to the order of the rows
        order = np.argsort(np.concatenate(row_E), kind="stable")
        return counts_R, concatenate(found)[order]

    def _require_room(self, examples: Examples, counts_R: Integers) -> None:
        """Raises ValueError where the examples of these rows do not fit into them: they would be
        written into the next one."""
        room = self.record.spec.sequence_length
        used_R = np.add.reduceat(examples.slots, np.cumsum(counts_R) - counts_R)
        has_text = (examples.first_length_E > 0) & (examples.second_length_E >= 0)
        if not has_text.all() or used_R.max() > room:
            raise ValueError("its examples are not those of a layout")

    def _map(self, record: PartRecord) -> tuple[Integers, Examples]:
        """Where the rows of a part begin [R + 1], and its examples."""
        with reading(path := self.folder / record.name, self._remedy):
            column = only_batch(path, {"examples": (_EXAMPLES,)}).column("examples")
            fields = [numbers(field) for field in column.values.flatten()]
            if (len(column), len(fields[0])) != (record.rows, record.examples):
                raise ValueError(f"it holds {len(column)} rows and {len(fields[0])} examples")
            return numbers(column.offsets), Examples(*fields)

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes map the files anew."""
        return (Layout, (self.folder, self.record))


# ---- Making a layout, and finding it.


def pack(slots_E: Integers, sequence_length: int) -> tuple[Integers, Integers]:
    """The order [E] in which examples of `slots_E` slots, each at most `sequence_length`, fill rows
    of that length, and the offsets [rows + 1] at which its rows begin.

    Best-fit decreasing (Johnson 1973; for BERT's rows see Krell et al. 2021, arXiv:2107.02027):
    the longest first, each into the row that it fills best.
    """
    longest_first = np.argsort(-slots_E, kind="stable")
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    rooms = 0  # bit r is set while some row has r slots free
    for example, slots in zip(longest_first.tolist(), slots_E[longest_first].tolist(), strict=True):
        fitting = rooms >> slots
        if fitting:
            room = slots + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
            rows[row].append(example)
        else:
            room, row = sequence_length, len(rows)
            rows.append([example])
        if room > slots:
            rows_with_room[room - slots].append(row)
            rooms |= 1 << (room - slots)
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    order = np.fromiter((example for row in rows for example in row), np.int64, len(slots_E))
    return order, np.concatenate([[0], np.cumsum(lengths)])


_TOKENS_PER_PART = 2**24
_KEY = 20190524
_Group = tuple[int, range]
_REMEDY = {
    "train": "prepare more text (in .txt files a blank line ends a document)",
    "heldout": "prepare the data again with a higher --heldout-fraction, or with more documents in "
    "--heldout SOURCE",
}


def find_layout(split: TokenSplit, spec: LayoutSpec) -> Layout | None:
    """The layout of `split` by `spec` if it is there, and whole."""
    identity = rows_sha256(split)
    found = (_read(folder, spec, identity) for folder in _folders(split, spec, identity))
    return next((layout for layout in found if layout is not None), None)


def open_layout(
    split: TokenSplit,
    spec: LayoutSpec,
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Layout:
    """The layout of `split` by `spec`, made by up to `workers` processes if it is not there, of
    which `say` is told first.

    Raises DataError for a sequence that is too short, for a split with too few documents, for
    shards that are not those of the manifest, and when the layout can be written nowhere.
    """
    require_documents(split, spec)
    if (found := find_layout(split, spec)) is not None:
        return found
    say(
        f"laying out the rows of {split.shards.folder}, {split.name} {spec}, once for all runs; "
        f"`stacking-ds data layout` does so ahead of a run"
    )
    return _make(split, spec, workers)


def require_documents(split: TokenSplit, spec: LayoutSpec) -> None:
    """Raises DataError when no row, or no random pair, can be made of the split."""
    documents = split.shards.manifest.split(split.name).documents
    least, what = (2, "sentence pairs") if spec.examples == "pairs" else (1, "examples")
    if documents < least:
        raise DataError(
            f"the {split.name} split of {split.shards.folder} has {documents} document(s); {what} "
            f"need at least {least}: {_REMEDY[split.name]}"
        )


def rows_sha256(split: TokenSplit) -> str:
    """The identity of a split's rows: its documents, and the way rows are made of them."""
    text = f"{split.shards.split_sha256(split.name)} layout {LAYOUT_VERSION}"
    return hashlib.sha256(text.encode()).hexdigest()


def _folders(split: TokenSplit, spec: LayoutSpec, identity: str) -> Iterator[Path]:
    name = f"{spec}-{split.name}-{identity[:16]}"
    yield split.shards.folder / "layouts" / name
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # who has no home has no cache
        yield Path(cache) / "stacking_ds" / "layouts" / name


def _read(folder: Path, spec: LayoutSpec, identity: str) -> Layout | None:
    try:
        record = LayoutRecord.model_validate_json(read_bytes(folder / RECORD_NAME))
        for part in record.parts:
            require_whole(folder, part, every_byte=False)
        is_it = (record.spec, record.identity) == (spec, identity)
        return Layout(folder, record) if is_it else None
    except (OSError, ValidationError, DamagedFileError, DataError):
        return None


def _make(split: TokenSplit, spec: LayoutSpec, workers: int) -> Layout:
    identity = rows_sha256(split)
    refused: list[str] = []
    for folder in _folders(split, spec, identity):
        root = folder.parent
        try:
            root.mkdir(parents=True, exist_ok=True)
            # the ranks of a node need the same one at the same time
            with filelock.FileLock(root / f"{folder.name}.lock"):
                # what killed processes of this node have left; the lock may not reach others
                for left in root.glob(f"{_unfinished(folder)}*"):
                    shutil.rmtree(left, ignore_errors=True)
                if (found := _read(folder, spec, identity)) is not None:
                    return found
                # rows of a damaged shard would outlive it
                split.shards.verify_once()
                return _write(folder, split, spec, identity, workers)
        except OSError as error:
            refused.append(f"{root}: {error.strerror or error}")
    raise DataError(
        f"the rows of {split.shards.folder} cannot be laid out, since nothing can be written "
        f"({'; '.join(refused)}); make room, or run `stacking-ds data layout` where it can"
    )


def _unfinished(folder: Path) -> str:
    return f"{folder.name}.tmp-{os.uname().nodename}-"


def _write(
    folder: Path, split: TokenSplit, spec: LayoutSpec, identity: str, workers: int
) -> Layout:
    building = folder.with_name(_unfinished(folder) + uuid.uuid4().hex)
    try:
        building.mkdir()
        parts = tuple(_write_parts(building, split, spec, workers))
        record = LayoutRecord(identity=identity, spec=spec, split=split.name, parts=parts)
        text = record.model_dump_json(indent=2) + "\n"
        write_file(building / RECORD_NAME, text.encode(), building)
        try:
            os.replace(building, folder)
        except OSError:
            # another node was faster, or what is there is damaged
            if (found := _read(folder, spec, identity)) is not None:
                return found
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(building, folder)
        return Layout(folder, record)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_parts(
    folder: Path, split: TokenSplit, spec: LayoutSpec, workers: int
) -> list[PartRecord]:
    groups = list(enumerate(_groups(split)))
    if workers == 1 or len(groups) == 1:
        return [_write_part(folder, split, spec, group) for group in groups]
    try:
        return do_in_workers(partial(partial, _write_part, folder, split, spec), groups, workers)
    except WorkerDiedError as died:
        raise DataError(
            f"a process that lays out rows {died.how}; run `stacking-ds data layout` with fewer "
            "--workers"
        ) from died


def _groups(split: TokenSplit) -> Iterator[range]:
    """Runs of consecutive files, each with enough documents for its pairs and packs."""
    bounds, last = [0], len(split.arrays)
    for stop in range(1, last + 1):
        if split.token_bases[stop] - split.token_bases[bounds[-1]] >= _TOKENS_PER_PART:
            bounds.append(stop)
    # what is left over joins the last: alone it might be a single document
    for group in itertools.pairwise([0, *bounds[1:-1], last]):
        yield range(*group)


def _write_part(
    folder: Path, split: TokenSplit, spec: LayoutSpec, group: _Group, report: object = None
) -> PartRecord:
    number, shards = group
    passages = read_passages(split, shards)
    key = derive_key(_KEY, spec.variant, spec.sequence_length, number)
    if spec.examples == "pairs":
        examples = cut_pairs(passages, spec.sequence_length, key)
    else:
        examples = cut_documents(passages, spec.sequence_length, key if spec.variant else None)
    offsets = np.arange(len(examples) + 1)
    if spec.packed:
        order, offsets = pack(examples.slots, spec.sequence_length)
        examples = examples[order]
    fields = list(_EXAMPLES.value_type)
    columns = zip(examples.columns, fields, strict=True)
    structs = pa.StructArray.from_arrays(
        [pa.array(column.astype(field.type.to_pandas_dtype())) for column, field in columns],
        fields=fields,
    )
    rows = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), structs)
    path = folder / f"part-{number:05d}.arrow"
    size_bytes, sha256 = write_arrow(pa.record_batch({"examples": rows}), path, folder)
    pairs = int((examples.second_length_E > 0).sum())
    random_pairs = int(examples.is_random_E.sum())
    return PartRecord(
        name=path.name,
        size_bytes=size_bytes,
        sha256=sha256,
        rows=len(offsets) - 1,
        examples=len(examples),
        tokens=int(examples.first_length_E.sum() + examples.second_length_E.sum()),
        true_pairs=pairs - random_pairs,
        random_pairs=random_pairs,
        squared_slots=int((examples.slots**2).sum()),
    )
