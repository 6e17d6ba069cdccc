"""Finishes the splits when all units are done: finds duplicates, and lists them in files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stacking_ds.data.prepare.folder import SPLITS, PrepareOptions
from stacking_ds.data.shard_files import (
    DuplicatesFile,
    Rejected,
    ShardFile,
    SplitManifest,
    SplitName,
    write_arrow,
)
from stacking_ds.data.shards import numbers
from stacking_ds.errors import DataError

Documents = NDArray[np.int64]
Hashes = NDArray[np.uint64]
# So many hashes are sorted at a time: with their positions 1 GiB.
_HASHES_AT_ONCE = 2**25


@dataclass(frozen=True)
class _Split:
    """The shards of a split and where their documents stand among those of both splits."""

    folder: Path
    shards: Sequence[ShardFile]
    start: int

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Each shard, mapped, and the number of its first document within the split."""
        first = 0
        for shard in self.shards:
            path = self.folder / shard.name
            try:
                batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{path} is damaged ({error}); run the same prepare again, which makes it anew"
                ) from error
            yield first, batch
            first += len(batch)


def finish_splits(
    folder: Path,
    shards: Mapping[SplitName, Sequence[ShardFile]],
    temporary: Path,
    hashes_at_once: int = _HASHES_AT_ONCE,
) -> dict[SplitName, SplitManifest]:
    """Writes the lists of duplicates and returns what counts in each split.

    A document is a duplicate if its words occurred before, held-out documents coming first. Raises
    DataError if, in spite of this, a training document that counts is held out.
    """
    heldout = _Split(folder, shards["heldout"], 0)
    splits: dict[SplitName, _Split] = {
        "heldout": heldout,
        "train": _Split(folder, shards["train"], heldout.documents),
    }
    repeated = _repeated(splits, hashes_at_once)
    found = {}
    for name in SPLITS:
        split = splits[name]
        documents = repeated[
            np.searchsorted(repeated, split.start) : np.searchsorted(
                repeated, split.start + split.documents
            )
        ]
        found[name] = _split_manifest(split, name, documents - split.start, temporary)
    _check_apart(splits, repeated, hashes_at_once)
    return found


def _repeated(splits: dict[SplitName, _Split], hashes_at_once: int) -> Documents:
    """The documents, numbered over held-out and then train, whose words occurred before; ascending.
    Only the hashes that share their first bits are in memory at a time."""
    found = []
    for hashes, documents in _buckets(splits, hashes_at_once):
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        found.append(documents[order[1:][ordered[1:] == ordered[:-1]]])
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)


def _buckets(
    splits: dict[SplitName, _Split], hashes_at_once: int
) -> Iterator[tuple[Hashes, Documents]]:
    """The hashes of all documents and their numbers, ascending, by the hashes' first bits."""
    total = sum(split.documents for split in splits.values())
    bits = max(0, (total // hashes_at_once).bit_length())
    for bucket in range(2**bits):
        hashes, documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for name in SPLITS:
            split = splits[name]
            for first, batch in split.batches():
                here = numbers(batch.column("document_hash"))
                chosen = np.arange(len(here))
                if bits:
                    chosen = np.flatnonzero(here >> np.uint64(64 - bits) == bucket)
                hashes.append(here[chosen])
                documents.append(chosen + (split.start + first))
        yield np.concatenate(hashes), np.concatenate(documents)


def _check_apart(splits: dict[SplitName, _Split], repeated: Documents, hashes_at_once: int) -> None:
    first_train = splits["train"].start
    for hashes, documents in _buckets(splits, hashes_at_once):
        is_train = documents >= first_train
        counts = ~np.isin(documents, repeated, assume_unique=True)
        both = np.intersect1d(hashes[is_train & counts], hashes[~is_train])
        if len(both):
            raise DataError(
                f"{len(both)} documents are in the training and in the held-out split; this must "
                "not happen, please report it"
            )


def _split_manifest(
    split: _Split, name: SplitName, duplicates: Documents, temporary: Path
) -> SplitManifest:
    file_name = f"{name}-duplicates.arrow"
    size_bytes, sha256 = write_arrow(
        pa.record_batch({"document": pa.array(duplicates, pa.int64())}),
        split.folder / file_name,
        temporary,
    )
    sentences, tokens = _held_by(split, duplicates)
    return SplitManifest(
        documents=split.documents - len(duplicates),
        sentences=sum(shard.sentences for shard in split.shards) - sentences,
        tokens=sum(shard.tokens for shard in split.shards) - tokens,
        shards=tuple(split.shards),
        duplicates=DuplicatesFile(
            name=file_name,
            size_bytes=size_bytes,
            sha256=sha256,
            documents=len(duplicates),
            sentences=sentences,
            tokens=tokens,
        ),
    )


def _held_by(split: _Split, documents: Documents) -> tuple[int, int]:
    """The sentences and tokens of these documents of the split."""
    sentences = tokens = 0
    for first, batch in split.batches():
        low, high = np.searchsorted(documents, (first, first + len(batch)))
        rows = documents[low:high] - first
        lengths = numbers(batch.column("sentence_lengths").offsets)
        offsets = numbers(batch.column("tokens").offsets)
        sentences += int((lengths[rows + 1] - lengths[rows]).sum())
        tokens += int((offsets[rows + 1] - offsets[rows]).sum())
    return sentences, tokens


def empty_split(
    splits: Mapping[SplitName, SplitManifest],
    rejected: Sequence[Rejected],
    options: PrepareOptions,
    has_text_files: bool,
) -> DataError:
    """The error for a split in which nothing counts."""
    train, heldout = splits["train"], splits["heldout"]
    name_it = "name what to hold out by --heldout SOURCE"
    if has_text_files:
        name_it += f", or say where documents end by --documents (it is {options.documents})"
    if train.documents and options.heldout_sources:
        return DataError("the sources to hold out hold no document with any text")
    if train.documents + heldout.documents == 1 and not options.heldout_sources:
        return DataError(f"the sources hold one document, and two splits need two: {name_it}")
    if not train.documents and not heldout.documents + train.duplicates.documents:
        gone = [f"{one.documents} left out, {one.reason}: {one.first[0]}" for one in rejected]
        why = f" ({'; '.join(gone)})" if gone else ""
        return DataError(f"the sources hold no training document with any text{why}")
    if not train.documents:
        if heldout.documents > 1 and not options.heldout_sources:
            return DataError(
                f"all {heldout.documents} documents fell into the held-out split; lower "
                f"--heldout-fraction (it is {options.heldout_fraction}), or {name_it}"
            )
        return DataError(
            "the sources hold no training document with any text "
            f"({train.duplicates.documents} that are held out, or occur twice)"
        )
    batches = _Split(options.out_dir, train.shards, 0).batches()
    lowest = min(int(batch.column("document_hash").to_numpy().min()) for _, batch in batches)
    enough = math.ceil((lowest + 1) / 2**64 * 10_000) / 10_000
    raise_it = f"raise --heldout-fraction to {enough}, or " if enough <= 0.5 else ""
    return DataError(
        f"none of the {train.documents} documents fell into the held-out split, whose share is "
        f"--heldout-fraction {options.heldout_fraction}; {raise_it}{name_it}"
    )
