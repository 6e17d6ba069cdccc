"""Which tokens make a training sample: spans of whole sentences, and pairs for next-sentence
prediction (Devlin et al. 2019, section 3.1, task 2).

    document   | s0 | s1 | s2 |   s3   | s4 | s5 |
    spans      [ s0   s1   s2 ][ s3      s4 ][s5]     greedily, at most sequence_length - 3 tokens
    sample 0   true pair:   A = s0, B = s1 s2         cut at a sentence boundary drawn by key
               random pair: A = s0, B = sentences of another document, about as many tokens

Shapes: N samples, B rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stacking_ds.data.counter_random import integers_below, random_bits
from stacking_ds.data.shards import ShardArrays, TokenSplit
from stacking_ds.errors import DataError

__all__ = ["FRAME_TOKENS", "SampleIndex", "SentencePairs", "build_samples", "draw_pairs"]

# [CLS] A [SEP] B [SEP]
FRAME_TOKENS = 3
_MIN_SEQUENCE_LENGTH = 8
_REMEDY = {
    "train": "prepare more text (in .txt files a blank line ends a document)",
    "heldout": "prepare the data again with a higher --heldout-fraction, or with more documents in "
    "--heldout SOURCE",
}
_COIN, _CUT, _OTHER = range(3)

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class SampleIndex:
    """The spans of a split, in the order of its documents.

    `boundaries` holds, span after span, the offsets within the span at which a new sentence
    starts; those of sample k lie at [boundary_offsets_N[k], boundary_offsets_N[k + 1]).
    """

    max_tokens: int
    document_N: NDArray[np.int32]
    start_N: Integers
    length_N: NDArray[np.int32]
    boundary_offsets_N: Integers
    boundaries: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.start_N)


@dataclass(frozen=True)
class SentencePairs:
    """Two stretches of the split's tokens for each row; `is_random_B` says that the second does
    not follow the first."""

    first_start_B: Integers
    first_length_B: Integers
    second_start_B: Integers
    second_length_B: Integers
    is_random_B: NDArray[np.bool_]


def build_samples(split: TokenSplit, sequence_length: int) -> SampleIndex:
    """Packs consecutive sentences of each document into spans of `sequence_length` - 3 tokens.

    A sentence that is longer is cut into pieces; every token is in exactly one span. Raises
    DataError when the sequence is too short, or the split has fewer than two documents.
    """
    if sequence_length < _MIN_SEQUENCE_LENGTH:
        raise DataError(
            f"sequence_length is {sequence_length}; sentence pairs need at least "
            f"{_MIN_SEQUENCE_LENGTH}"
        )
    if split.num_documents < 2:
        raise DataError(
            f"the {split.name} split of {split.shards.folder} has {split.num_documents} "
            f"document(s); sentence pairs need at least 2: {_REMEDY[split.name]}"
        )
    max_tokens = sequence_length - FRAME_TOKENS
    parts = [_spans_of_shard(arrays, max_tokens) for arrays in split.arrays]
    documents = np.cumsum([0, *(len(arrays.token_offsets) - 1 for arrays in split.arrays)])
    tokens = np.cumsum([0, *(len(arrays.tokens) for arrays in split.arrays)])
    counts = np.concatenate([part.boundary_counts for part in parts])
    return SampleIndex(
        max_tokens=max_tokens,
        document_N=np.concatenate(
            [part.document + base for part, base in zip(parts, documents, strict=False)]
        ).astype(np.int32),
        start_N=np.concatenate(
            [part.start + base for part, base in zip(parts, tokens, strict=False)]
        ),
        length_N=np.concatenate([part.length for part in parts]).astype(np.int32),
        boundary_offsets_N=np.concatenate([[0], np.cumsum(counts)]),
        boundaries=np.concatenate([part.boundaries for part in parts]).astype(np.int32),
    )


def draw_pairs(index: SampleIndex, samples_B: Integers, key_B: NDArray[np.uint64]) -> SentencePairs:
    """The sentence pairs of `samples_B`, decided by `key_B` alone.

    One half (by a fair coin) are true continuations. In the other half B comes from a sample of
    another document; it is cut at the sentence boundary that brings the pair closest to the length
    of the true one, so that length does not tell them apart. A span of one token has no
    continuation and always takes a random one.
    """
    start_B, length_B = index.start_N[samples_B], index.length_N[samples_B].astype(np.int64)
    divisible_B = length_B > 1
    first_length_B = np.where(divisible_B, _cut(index, samples_B, random_bits(key_B, _CUT)), 1)
    is_random_B = (random_bits(key_B, _COIN) >> np.uint64(63)).astype(np.bool_) | ~divisible_B
    room_B = index.max_tokens - first_length_B
    rest_B = np.where(divisible_B, length_B - first_length_B, room_B)
    other_B = _other_document(index, samples_B, random_bits(key_B, _OTHER))
    return SentencePairs(
        first_start_B=start_B,
        first_length_B=first_length_B,
        second_start_B=np.where(is_random_B, index.start_N[other_B], start_B + first_length_B),
        second_length_B=np.where(is_random_B, _prefix(index, other_B, rest_B, room_B), rest_B),
        is_random_B=is_random_B,
    )


@dataclass(frozen=True)
class _ShardSpans:
    document: Integers
    start: Integers
    length: Integers
    boundary_counts: Integers
    boundaries: Integers


def _spans_of_shard(arrays: ShardArrays, max_tokens: int) -> _ShardSpans:
    """The spans of one file, counted from its first document and its first token."""
    lengths = arrays.sentence_lengths.astype(np.int64)
    pieces_per_sentence = -(-lengths // max_tokens)
    piece_stops = np.concatenate([[0], np.cumsum(pieces_per_sentence)])
    pieces = np.full(piece_stops[-1], max_tokens, dtype=np.int64)
    pieces[piece_stops[1:] - 1] = lengths - (pieces_per_sentence - 1) * max_tokens
    edges = np.concatenate([[0], np.cumsum(pieces)])
    first_pieces = piece_stops[arrays.sentence_offsets]

    reach = np.searchsorted(edges, edges[:-1] + max_tokens, side="right") - 1
    document_ends = np.repeat(first_pieces[1:], np.diff(first_pieces))
    following = np.minimum(reach, document_ends)
    starts = np.array(_chain(following.tolist()), dtype=np.int64)
    stops = following[starts]

    inner = np.ones(len(pieces), dtype=np.bool_)
    inner[starts] = False
    boundary_counts = stops - starts - 1
    return _ShardSpans(
        document=np.searchsorted(first_pieces, starts, side="right") - 1,
        start=edges[starts],
        length=edges[stops] - edges[starts],
        boundary_counts=boundary_counts,
        boundaries=edges[:-1][inner] - np.repeat(edges[starts], boundary_counts),
    )


def _chain(following: list[int]) -> list[int]:
    """0, following[0], following[following[0]], ... as long as there is a successor."""
    visited = []
    piece = 0
    while piece < len(following):
        visited.append(piece)
        piece = following[piece]
    return visited


def _cut(index: SampleIndex, samples_B: Integers, bits_B: NDArray[np.uint64]) -> Integers:
    """Where A ends: at a sentence boundary if the span has one, else at any token but the first
    and last edge. Meaningless for spans of one token."""
    offset_B = index.boundary_offsets_N[samples_B]
    count_B = index.boundary_offsets_N[samples_B + 1] - offset_B
    has_boundary_B = count_B > 0
    inner_tokens_B = np.maximum(index.length_N[samples_B].astype(np.int64) - 1, 1)
    drawn_B = integers_below(bits_B, np.where(has_boundary_B, count_B, inner_tokens_B))
    cut_B = drawn_B + 1
    here = np.flatnonzero(has_boundary_B)
    cut_B[here] = index.boundaries[offset_B[here] + drawn_B[here]]
    return cut_B


def _other_document(
    index: SampleIndex, samples_B: Integers, bits_B: NDArray[np.uint64]
) -> Integers:
    """A sample drawn evenly from those of all other documents."""
    document_B = index.document_N[samples_B]
    first_B = np.searchsorted(index.document_N, document_B, side="left")
    own_B = np.searchsorted(index.document_N, document_B, side="right") - first_B
    drawn_B = integers_below(bits_B, len(index) - own_B)
    return drawn_B + np.where(drawn_B >= first_B, own_B, 0)


def _prefix(
    index: SampleIndex, samples_B: Integers, wanted_B: Integers, room_B: Integers
) -> Integers:
    """How many of the samples' first tokens to take: whole sentences, as near to `wanted_B` as
    there are, never more than `room_B`; a part of the first sentence if it alone is too long."""
    offset_B = index.boundary_offsets_N[samples_B]
    count_B = index.boundary_offsets_N[samples_B + 1] - offset_B
    column = np.arange(int(count_B.max(initial=0)) + 1)
    at_BK = np.minimum(offset_B[:, None] + column, max(len(index.boundaries) - 1, 0))
    boundaries = index.boundaries if len(index.boundaries) else np.zeros(1, dtype=np.int32)
    length_B = index.length_N[samples_B].astype(np.int64)
    end_BK = np.where(column < count_B[:, None], boundaries[at_BK], length_B[:, None])
    distance_BK = np.where(
        end_BK <= room_B[:, None], np.abs(end_BK - wanted_B[:, None]), np.iinfo(np.int64).max
    )
    nearest_B = distance_BK.argmin(axis=1)
    chosen_B = end_BK[np.arange(len(samples_B)), nearest_B]
    return np.where(chosen_B <= room_B, chosen_B, np.minimum(wanted_B, room_B))
