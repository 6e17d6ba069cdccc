"""Layouts on disk, made once for all processes of a node: beside the shards, or in the user's cache
where these cannot be written.

Shapes: E examples.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from stacking_ds.data.counter_random import derive_key
from stacking_ds.data.examples import Examples, cut_documents, cut_pairs, read_passages
from stacking_ds.data.pool import WorkerDiedError, do_in_workers
from stacking_ds.data.rows import (
    EXAMPLES,
    LAYOUT_VERSION,
    RECORD_NAME,
    Layout,
    LayoutRecord,
    LayoutSpec,
    PartRecord,
)
from stacking_ds.data.shard_files import write_arrow, write_file
from stacking_ds.data.shards import TokenSplit, require_whole
from stacking_ds.errors import DataError
from stacking_ds.files import DamagedFileError, read_bytes

Integers = NDArray[np.int64]


def pack(slots_E: Integers, sequence_length: int) -> tuple[Integers, Integers]:
    """Examples of `slots_E` slots, each at most `sequence_length`, put into rows of that length.

    Best-fit decreasing (Johnson 1973; for BERT's rows see Krell et al. 2021, arXiv:2107.02027):
    the longest first, each into the row that it fills best.

    Returns the order of the examples [E], and the offsets [rows + 1] at which its rows begin.
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
    found = (_read(root / _name(split, spec, identity), spec, identity) for root in _roots(split))
    return next((layout for layout in found if layout is not None), None)


def open_layout(split: TokenSplit, spec: LayoutSpec, workers: int = 1) -> Layout:
    """The layout of `split` by `spec`, made by up to `workers` processes if it is not there.

    Raises DataError for a sequence that is too short, for a split with too few documents, for
    shards that are not those of the manifest, and when the layout can be written nowhere.
    """
    require_documents(split, spec)
    return find_layout(split, spec) or _make(split, spec, workers)


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


def _name(split: TokenSplit, spec: LayoutSpec, identity: str) -> str:
    return f"{spec}-{split.name}-{identity[:16]}"


def _roots(split: TokenSplit) -> Iterator[Path]:
    yield split.shards.folder / "layouts"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # who has no home has no cache
        yield Path(cache) / "stacking_ds" / "layouts"


def _read(folder: Path, spec: LayoutSpec, identity: str) -> Layout | None:
    try:
        record = LayoutRecord.model_validate_json(read_bytes(folder / RECORD_NAME))
        for part in record.parts:
            require_whole(folder / part.name, part.size_bytes)
        is_it = (record.spec, record.identity) == (spec, identity)
        return Layout(folder, record) if is_it else None
    except (OSError, ValidationError, DamagedFileError, DataError):
        return None


def _make(split: TokenSplit, spec: LayoutSpec, workers: int) -> Layout:
    identity = rows_sha256(split)
    refused: list[str] = []
    for root in _roots(split):
        folder = root / _name(split, spec, identity)
        try:
            root.mkdir(parents=True, exist_ok=True)
            # the ranks of a node need the same one at the same time
            with filelock.FileLock(root / f"{folder.name}.lock"):
                _remove_unfinished(folder)
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


def _remove_unfinished(folder: Path) -> None:
    """What killed processes of this node have left; the lock may not reach others."""
    for left in folder.parent.glob(f"{_unfinished(folder)}*"):
        shutil.rmtree(left, ignore_errors=True)


def _write(
    folder: Path, split: TokenSplit, spec: LayoutSpec, identity: str, workers: int
) -> Layout:
    building = folder.with_name(_unfinished(folder) + uuid.uuid4().hex)
    try:
        building.mkdir()
        record = LayoutRecord(
            identity=identity,
            spec=spec,
            split=split.name,
            parts=tuple(_write_parts(building, split, spec, workers)),
        )
        text = json.dumps(record.model_dump(mode="json"), indent=2) + "\n"
        write_file(building / RECORD_NAME, text.encode(), building)
        return _publish(building, folder, record)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, folder: Path, record: LayoutRecord) -> Layout:
    try:
        os.replace(building, folder)
    except OSError:
        # another node was faster, or what is there is damaged
        if (found := _read(folder, record.spec, record.identity)) is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
    return Layout(folder, record)


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


def _groups(split: TokenSplit) -> list[range]:
    """Runs of consecutive files, each with enough documents for its pairs and packs."""
    groups: list[range] = []
    first = 0
    for stop in range(1, len(split.arrays) + 1):
        if split.token_bases[stop] - split.token_bases[first] >= _TOKENS_PER_PART:
            groups.append(range(first, stop))
            first = stop
    if first < len(split.arrays):
        # what is left over joins the last: alone it might be a single document
        before = groups.pop().start if groups else first
        groups.append(range(before, len(split.arrays)))
    return groups


def _write_part(
    folder: Path, split: TokenSplit, spec: LayoutSpec, group: _Group, report: object = None
) -> PartRecord:
    number, shards = group
    examples = _examples(split, spec, number, shards)
    offsets = np.arange(len(examples) + 1)
    if spec.packed:
        order, offsets = pack(examples.slots, spec.sequence_length)
        examples = examples[order]
    fields = list(EXAMPLES.value_type)
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


def _examples(split: TokenSplit, spec: LayoutSpec, number: int, shards: range) -> Examples:
    passages = read_passages(split, shards)
    key = derive_key(_KEY, spec.variant, spec.sequence_length, number)
    if spec.examples == "pairs":
        return cut_pairs(passages, spec.sequence_length, key)
    return cut_documents(passages, spec.sequence_length, key if spec.variant else None)
