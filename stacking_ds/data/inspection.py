"""What a prepared folder holds: its documents, duplicates and sentences, and do its splits overlap.

Everything is read in pieces from the mapped files, so that memory does not grow with the text. The
results are plain records: `inspect_commands` prints them for people or as JSON.

Shapes: D documents, S sentences, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stacking_ds.data.counter_random import derive_key, random_bits
from stacking_ds.data.shard_manifest import MANIFEST_NAME, Rejected, SourceFile, SplitName
from stacking_ds.data.shards import TokenShards, TokenSplit
from stacking_ds.data.tokenizer import Normalization
from stacking_ds.errors import DataError

__all__ = [
    "REPEATS_FROM_TOKENS",
    "FolderFacts",
    "LengthBin",
    "Overlap",
    "SplitFacts",
    "find_overlap",
    "folder_facts",
    "split_facts",
]

REPEATS_FROM_TOKENS = 8
"""Shorter sentences ("he said.") come again in any text, and say nothing about duplicates."""

_TOKENS_AT_ONCE = 2**20
_SENTENCES_IN_SAMPLE = 2**20
_PLACES = 5

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class LengthBin:
    """How many things are `first` to `last` tokens long, both included."""

    first: int
    last: int
    count: int


# -------------------------------------------------------------------------- folder


@dataclass(frozen=True)
class FolderFacts:
    """What the manifest says of the folder as a whole. `size_bytes` counts shards, lists of
    duplicates and vocabulary files, and no layouts."""

    folder: str
    every_byte_verified: bool
    vocab_size: int
    vocabulary_sha256: str
    normalization: Normalization
    licence: str | None
    size_bytes: int
    text_bytes: int
    bytes_per_token: float
    """Of the text as it was read, duplicates included."""
    sources: tuple[SourceFile, ...]
    rejected: tuple[Rejected, ...]


def folder_facts(shards: TokenShards, every_byte_verified: bool) -> FolderFacts:
    """The facts of an opened folder."""
    manifest = shards.manifest
    splits = (manifest.train, manifest.heldout)
    files = [*manifest.vocabulary_files]
    size_bytes = sum(file.size_bytes for file in files)
    for split in splits:
        size_bytes += split.duplicates.size_bytes + sum(file.size_bytes for file in split.shards)
    tokens = sum(file.tokens for split in splits for file in split.shards)
    return FolderFacts(
        folder=str(shards.folder),
        every_byte_verified=every_byte_verified,
        vocab_size=manifest.vocab_size,
        vocabulary_sha256=manifest.vocabulary_sha256,
        normalization=manifest.request.normalization,
        licence=manifest.licence,
        size_bytes=size_bytes,
        text_bytes=manifest.text_bytes,
        bytes_per_token=manifest.text_bytes / max(tokens, 1),
        sources=manifest.sources,
        rejected=manifest.rejected,
    )


# ---------------------------------------------------------------------- documents


@dataclass(frozen=True)
class SplitFacts:
    """The documents of a split that count, and those that do not because they are duplicates.

    `repeated_share` is the share of sentences that repeat an earlier one token by token: over
    `sampled_sentences` sentences of at least 8 tokens, which are all whose hash falls into one of
    `one_in` classes, so that a sentence is in the sample with all of its copies or not at all.
    """

    split: SplitName
    documents: int
    sentences: int
    tokens: int
    files: int
    size_bytes: int
    duplicate_documents: int
    duplicate_tokens: int
    duplicate_share: float
    """Of all documents."""
    unknown_tokens: int
    document_lengths: tuple[LengthBin, ...]
    one_in: int
    sampled_sentences: int
    repeated_share: float


def split_facts(split: TokenSplit) -> SplitFacts:
    """Reads the whole split once.

    Raises DataError when other documents or tokens count than the manifest says.
    """
    record = split.shards.manifest.split(split.name)
    one_in = 1
    while record.sentences > one_in * _SENTENCES_IN_SAMPLE:
        one_in *= 2
    lengths_by_bits = np.zeros(64, dtype=np.int64)
    tokens = unknown = 0
    sampled: list[NDArray[np.uint64]] = []
    for shard, arrays in enumerate(split.arrays):
        lengths_D = np.diff(arrays.token_offsets)[split.counted(shard)].astype(np.int64)
        tokens += int(lengths_D.sum())
        # frexp's exponent is the number of bits, exact for any length
        lengths_by_bits += np.bincount(np.frexp(lengths_D)[1], minlength=64)
        for tokens_T, lengths_S in _counting_sentences(split, shard):
            unknown += int((tokens_T == split.shards.special_ids.unk).sum())
            sampled.append(_sample(tokens_T, lengths_S, one_in))
    documents = int(lengths_by_bits.sum())
    if (documents, tokens) != (record.documents, record.tokens):
        raise DataError(
            f"{split.shards.folder / MANIFEST_NAME} says that {record.documents:,} documents and "
            f"{record.tokens:,} tokens of the {split.name} split count, its files say "
            f"{documents:,} and {tokens:,}; delete the folder and prepare it again"
        )
    hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *sampled])
    return SplitFacts(
        split=split.name,
        documents=documents,
        sentences=record.sentences,
        tokens=tokens,
        files=len(record.shards),
        size_bytes=sum(file.size_bytes for file in record.shards),
        duplicate_documents=record.duplicates.documents,
        duplicate_tokens=record.duplicates.tokens,
        duplicate_share=record.duplicates.documents / max(split.num_documents, 1),
        unknown_tokens=unknown,
        document_lengths=_by_powers_of_two(lengths_by_bits),
        one_in=one_in,
        sampled_sentences=len(hashes),
        repeated_share=(len(hashes) - len(np.unique(hashes))) / max(len(hashes), 1),
    )


def _counting_sentences(
    split: TokenSplit, shard: int
) -> Iterator[tuple[NDArray[np.unsignedinteger], Integers]]:
    """The sentences of a file that count, about a million tokens at a time: their tokens one after
    the other [T], and their lengths [S]."""
    arrays = split.arrays[shard]
    counts_S = np.repeat(split.counted(shard), np.diff(arrays.sentence_offsets))
    offsets = np.concatenate([[0], np.cumsum(arrays.sentence_lengths, dtype=np.int64)])
    first = 0
    while first < len(counts_S):
        stop = int(np.searchsorted(offsets, offsets[first] + _TOKENS_AT_ONCE, side="right")) - 1
        stop = max(stop, first + 1)
        lengths_S, counting_S = np.diff(offsets[first : stop + 1]), counts_S[first:stop]
        tokens_T = arrays.tokens[offsets[first] : offsets[stop]]
        if not counting_S.all():
            tokens_T = tokens_T[np.repeat(counting_S, lengths_S)]
        yield tokens_T, lengths_S[counting_S]
        first = stop


def _sample(
    tokens_T: NDArray[np.unsignedinteger], lengths_S: Integers, one_in: int
) -> NDArray[np.uint64]:
    """The hashes of those sentences that are in the sample; `one_in` is a power of two."""
    if not len(lengths_S):
        return np.zeros(0, dtype=np.uint64)
    starts_S = np.cumsum(lengths_S) - lengths_S
    place_T = np.arange(len(tokens_T)) - np.repeat(starts_S, lengths_S)
    mixed_T = random_bits(derive_key(0), tokens_T.astype(np.int64) | place_T << 32)
    hashes_S = np.add.reduceat(mixed_T, starts_S)
    chosen_S = hashes_S & np.uint64(one_in - 1) == 0
    chosen: NDArray[np.uint64] = hashes_S[chosen_S & (lengths_S >= REPEATS_FROM_TOKENS)]
    return chosen


def _by_powers_of_two(counts: Integers) -> tuple[LengthBin, ...]:
    """1, 2-3, 4-7, ... from the shortest to the longest that there are; `counts` by bits."""
    there = np.flatnonzero(counts).tolist()
    bits = range(there[0], there[-1] + 1) if there else range(0)
    return tuple(LengthBin(2 ** (bit - 1), 2**bit - 1, int(counts[bit])) for bit in bits)


@dataclass(frozen=True)
class Overlap:
    """Documents of the training split that count and whose words are a held-out document's."""

    documents: int
    first: tuple[str, ...]
    """Where the first few lie, as `train-00000-000.arrow:17` (row 17 of the file, from 0)."""


def find_overlap(shards: TokenShards) -> Overlap:
    """Compares the documents of the two splits by their hashes."""
    train, heldout = shards.split("train"), shards.split("heldout")
    hashes = [np.zeros(0, dtype=np.uint64), *(arrays.document_hashes for arrays in heldout.arrays)]
    held_out = np.unique(np.concatenate(hashes))
    found = 0
    places: list[str] = []
    for shard, arrays in enumerate(train.arrays):
        both_D = np.isin(arrays.document_hashes, held_out) & train.counted(shard)
        rows = np.flatnonzero(both_D)
        found += len(rows)
        name = shards.manifest.train.shards[shard].name
        places += [f"{name}:{row}" for row in rows[: _PLACES - len(places)]]
    return Overlap(found, tuple(places))
