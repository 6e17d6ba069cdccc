"""Finishes the splits when all units are done: finds duplicates, and lists them in files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
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
    batches = {split: [_mapped(folder / shard.name) for shard in shards[split]] for split in SPLITS}
    first_train = sum(map(len, batches["heldout"]))
    every = [*batches["heldout"], *batches["train"]]
    repeated = _repeated(every, hashes_at_once)
    cut = np.searchsorted(repeated, first_train)
    duplicates = {"heldout": repeated[:cut], "train": repeated[cut:] - first_train}
    found = {}
    for split in SPLITS:
        path = folder / f"{split}-duplicates.arrow"
        documents = duplicates[split]
        column = pa.array(documents, pa.int64())
        size_bytes, sha256 = write_arrow(pa.record_batch({"document": column}), path, temporary)
        sentences = tokens = 0
        for first, batch in _numbered(batches[split]):
            low, high = np.searchsorted(documents, (first, first + len(batch)))
            rows = documents[low:high] - first
            lengths = numbers(batch.column("sentence_lengths").offsets)
            offsets = numbers(batch.column("tokens").offsets)
            sentences += int((lengths[rows + 1] - lengths[rows]).sum())
            tokens += int((offsets[rows + 1] - offsets[rows]).sum())
        gone = {"documents": len(documents), "sentences": sentences, "tokens": tokens}
        found[split] = SplitManifest(
            **{
                name: sum(getattr(one, name) for one in shards[split]) - gone[name] for name in gone
            },
            shards=tuple(shards[split]),
            duplicates=DuplicatesFile(name=path.name, size_bytes=size_bytes, sha256=sha256, **gone),
        )
    _check_apart(every, first_train, repeated, hashes_at_once)
    return found


def _mapped(path: Path) -> pa.RecordBatch:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is damaged ({error}); run the same prepare again, which makes it anew"
        ) from error


def _numbered(batches: Sequence[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Each batch with the number of its first document."""
    return zip(accumulate(map(len, batches), initial=0), batches, strict=False)


def _repeated(batches: Sequence[pa.RecordBatch], hashes_at_once: int) -> Documents:
    """The documents, numbered over held-out and then train, whose words occurred before; ascending.
    Only the hashes that share their first bits are in memory at a time."""
    found = []
    for hashes, documents in _buckets(batches, hashes_at_once):
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        found.append(documents[order[1:][ordered[1:] == ordered[:-1]]])
    return np.sort(np.concatenate(found))


def _buckets(
    batches: Sequence[pa.RecordBatch], hashes_at_once: int
) -> Iterator[tuple[Hashes, Documents]]:
    """The hashes of all documents and their numbers, ascending, by the hashes' first bits."""
    bits = (sum(map(len, batches)) // hashes_at_once).bit_length()
    for bucket in range(2**bits):
        hashes, documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for first, batch in _numbered(batches):
            here = numbers(batch.column("document_hash"))
            # in two steps, since nothing can be shifted by 64 bits
            chosen = np.flatnonzero(here >> np.uint64(1) >> np.uint64(63 - bits) == bucket)
            hashes.append(here[chosen])
            documents.append(chosen + first)
        yield np.concatenate(hashes), np.concatenate(documents)


def _check_apart(
    batches: Sequence[pa.RecordBatch], first_train: int, repeated: Documents, hashes_at_once: int
) -> None:
    for hashes, documents in _buckets(batches, hashes_at_once):
        is_train = documents >= first_train
        counts = ~np.isin(documents, repeated, assume_unique=True)
        both = np.intersect1d(hashes[is_train & counts], hashes[~is_train])
        if len(both):
            raise DataError(
                f"{len(both)} documents are in the training and in the held-out split; this must "
                "not happen, please report it"
            )


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
    if not train.documents and heldout.documents > 1 and not options.heldout_sources:
        return DataError(
            f"all {heldout.documents} documents fell into the held-out split; lower "
            f"--heldout-fraction (it is {options.heldout_fraction}), or {name_it}"
        )
    if not train.documents:
        gone = [f"{one.documents} left out, {one.reason}: {one.first[0]}" for one in rejected]
        if heldout.documents + train.duplicates.documents:
            gone = [f"{train.duplicates.documents} that are held out, or occur twice"]
        why = f" ({'; '.join(gone)})" if gone else ""
        return DataError(f"the sources hold no training document with any text{why}")
    batches = [_mapped(options.out_dir / shard.name) for shard in train.shards]
    lowest = min(int(numbers(batch.column("document_hash")).min()) for batch in batches)
    enough = math.ceil((lowest + 1) / 2**64 * 10_000) / 10_000
    raise_it = f"raise --heldout-fraction to {enough}, or " if enough <= 0.5 else ""
    return DataError(
        f"none of the {train.documents} documents fell into the held-out split, whose share is "
        f"--heldout-fraction {options.heldout_fraction}; {raise_it}{name_it}"
    )
