"""Training examples, cut from documents: every token of a split is in exactly one.

    documents  |  s0  |  s1  |  s2  |    s3    |  s4  |     |   t0   |  t1  |  t2   | t3 |

    pairs      [CLS] A [SEP] B [SEP], with next-sentence prediction (Devlin et al. 2019, section
               3.1, task 2). All documents are cut in order: A ends at a sentence, B takes what room
               is left, and the next A goes on where B stopped. A coin chooses one half, and these
               exchange their Bs: in the order of their lengths each takes that of the one before.

               cut         A0 = s0 s1   B0 = s2 s3'     A1 = s3" s4    ...     A7 = t0   B7 = t1 t2
               exchanged   A0 = s0 s1   B7 = t1 t2                             A7 = t0   B3 = ...
    documents  [CLS] text [SEP], without it: a document is cut into pieces that fill the room.

So a random second is what a true one is: it follows an A somewhere, begins with a sentence, and is
as long. Cut by each document alone, it could be told by how it begins or by where A ends.

Shapes: E examples.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacking_ds.data.counter_random import Integers, Words, derive_key, random_bits
from stacking_ds.data.shards import TokenSplit
from stacking_ds.errors import DataError

MIN_SEQUENCE_LENGTH = 8

# [CLS] A [SEP] B [SEP] and [CLS] text [SEP]
_PAIR_FRAME, _TEXT_FRAME = 3, 2
_DRAWS_AT_ONCE = 2**14
# Of a few tokens nobody can say whether they follow: B has an eighth of the room where it can.
_LEAST_SECOND_SHARE = 8
# About so many lengths do the Bs that fill a row have, which loses a slot or two of long rows:
# where there are few of a length, more of the exchanged ones are a step shorter than true ones.
_MOST_LENGTHS = 125
_COIN, _LENGTH, _ORDER, _SHIFT = range(4)
# Seconds of the same document that are passed over in search of another's.
_MOST_LOOKED_AT = 64
_32_BITS = np.uint64(32)


@dataclass(frozen=True)
class Examples:
    """Stretches of the split's tokens. A `second_length_E` of 0: there is no second stretch;
    `is_random_E`: it does not follow the first."""

    first_start_E: Integers
    first_length_E: Integers
    second_start_E: Integers
    second_length_E: Integers
    is_random_E: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.first_start_E)

    @property
    def slots(self) -> Integers:
        """The slots of each example, [CLS] and [SEP] included. Shape [E]."""
        first_E = self.first_length_E.astype(np.int64)  # what is wrong in a file might overflow
        return first_E + self.second_length_E + 2 + (self.second_length_E > 0)

    def __getitem__(self, chosen: Integers) -> "Examples":
        return Examples(*(column[chosen] for column in self.columns))

    @property
    def columns(self) -> list[NDArray[Any]]:
        """The arrays, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


def ranges(starts: Integers, counts: Integers) -> Integers:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ..."""
    before = np.cumsum(counts) - counts
    found: Integers = np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
    return found


def empty_examples(count: int) -> Examples:
    """So many examples without a token."""
    nothing = np.zeros(count, dtype=np.int64)
    return Examples(nothing, nothing, nothing, nothing, nothing > 0)


def concatenate(parts: Iterable[Examples]) -> Examples:
    """One after the other, widened to int64; none of them give none."""
    columns = zip(*(part.columns for part in (empty_examples(0), *parts)), strict=True)
    return Examples(*map(np.concatenate, columns))


@dataclass(frozen=True)
class Passages:
    """The documents that count of some files of a split: where they lie in its tokens, and where
    their sentences end. Document d has the sentences [sentence_offsets[d], sentence_offsets[d+1]).
    """

    starts: Integers
    stops: Integers
    sentence_offsets: Integers
    sentence_ends: Integers


def read_passages(split: TokenSplit, shards: range) -> Passages:
    """The documents that count in the files numbered `shards`."""
    columns = []
    for shard in shards:
        arrays, counted, base = split.arrays[shard], split.counted(shard), split.token_bases[shard]
        offsets = base + arrays.token_offsets.astype(np.int64)
        sentences = np.diff(arrays.sentence_offsets)
        ends = base + np.cumsum(arrays.sentence_lengths, dtype=np.int64)
        ends = ends[np.repeat(counted, sentences)]
        columns.append((offsets[:-1][counted], offsets[1:][counted], sentences[counted], ends))
    starts, stops, counts, ends = map(np.concatenate, zip(*columns, strict=True))
    return Passages(starts, stops, np.concatenate([[0], np.cumsum(counts)]), ends)


def cut_documents(passages: Passages, sequence_length: int, key: Words | None) -> Examples:
    """Each document in pieces of `sequence_length` - 2 tokens and a rest. With a `key` the first
    piece of a longer document has a length drawn by it, so that other keys cut at other places."""
    _require_length(sequence_length)
    room = sequence_length - _TEXT_FRAME
    lengths = passages.stops - passages.starts
    shift = np.full(len(lengths), room)
    if key is not None:
        bits = random_bits(derive_key(key, _SHIFT), np.arange(len(lengths))) >> _32_BITS
        drawn = 1 + (bits * np.uint64(room) >> _32_BITS).astype(np.int64)
        shift = np.where(lengths > room, drawn, room)
    pieces = 1 + np.maximum(0, -(-(lengths - shift) // room))
    number = ranges(np.zeros_like(pieces), pieces)
    document = np.repeat(np.arange(len(lengths)), pieces)
    begin = np.where(number == 0, 0, shift[document] + (number - 1) * room)
    end = np.minimum(shift[document] + number * room, lengths[document])
    nothing = np.zeros_like(begin)
    return Examples(passages.starts[document] + begin, end - begin, nothing, nothing, nothing > 0)


def cut_pairs(passages: Passages, sequence_length: int, key: Words) -> Examples:
    """Sentence pairs of at most `sequence_length` tokens, one half of them random.

    Without a second stretch are: a rest of one sentence, the A whose B was the shortest to be
    exchanged, and the longest B, which stands alone. A pair stays true where no other document has
    a second to give for it.
    """
    _require_length(sequence_length)
    starts, middles, stops, documents = _cut_in_two(passages, sequence_length - _PAIR_FRAME, key)
    numbers = np.arange(len(starts))
    lengths = stops - middles
    coins = random_bits(derive_key(key, _COIN), numbers) >> np.uint64(63) == 0
    chosen = np.flatnonzero(coins & (lengths > 0))
    any_order = random_bits(derive_key(key, _ORDER), chosen)
    chosen = chosen[np.lexsort((any_order, lengths[chosen]))]
    giver = numbers.copy()
    giver[chosen] = _exchange(chosen, documents)
    given = np.zeros(len(numbers), dtype=np.bool_)
    given[giver[giver >= 0]] = True
    giver = np.where((giver < 0) & ~given, numbers, giver)
    gets = (giver >= 0) & (lengths[giver] > 0)
    left = np.flatnonzero(~np.isin(numbers, giver) & (lengths > 0))
    nothing = np.zeros(len(left), dtype=np.int64)
    pairs = Examples(
        starts,
        middles - starts,
        np.where(gets, middles[giver], 0),
        np.where(gets, lengths[giver], 0),
        gets & (giver != numbers),
    )
    return concatenate(
        [pairs, Examples(middles[left], lengths[left], nothing, nothing, nothing > 0)]
    )


def _cut_in_two(
    passages: Passages, room: int, key: Words
) -> tuple[Integers, Integers, Integers, Integers]:
    """All documents in examples [start, middle), [middle, stop), each document to its end: where
    these lie, and the number of the document. Four times [E]."""
    ends: list[int] = passages.sentence_ends.tolist()
    offsets: list[int] = passages.sentence_offsets.tolist()
    least_second = max(1, room // _LEAST_SECOND_SHARE)
    step = max(1, room // _MOST_LENGTHS)
    wanted = _fractions(derive_key(key, _LENGTH))
    found: list[int] = []
    documents = zip(passages.starts.tolist(), passages.stops.tolist(), strict=True)
    for number, (begin, end) in enumerate(documents):
        start = begin
        first, last = offsets[number], offsets[number + 1] - 1  # the last sentence ends it
        while start < end:
            want = next(wanted)
            low = bisect_right(ends, start, first, last)
            high = bisect_right(ends, start + room - least_second, low, last)
            if low < high:
                middle = ends[low + (want * (high - low) >> 32)]
            elif low < last and ends[low] < start + room:
                middle = ends[low]
            elif end - start < room:
                middle = end
            else:  # inside a sentence longer than the room
                middle = start + 1 + (want * (room - 1) >> 32)
            stop = min(end, start + room - (start + room - middle) % step)
            found += (start, middle, stop, number)
            start, first = stop, low
    starts, middles, stops, numbers = np.array(found, dtype=np.int64).reshape(-1, 4).T.copy()
    return starts, middles, stops, numbers


def _exchange(chosen: Integers, documents: Integers) -> Integers:
    """For each of the `chosen` examples, whose seconds are in rising order of length, the one whose
    second it gets: the longest before it that is of another document and not yet given, so that
    nothing overflows and, over all, less than one row is lost. -1 where there is none."""
    of = documents[chosen].tolist()
    waiting: list[int] = []
    givers: list[int] = []
    for place, document in enumerate(of):
        giver = -1
        for back in range(1, min(len(waiting), _MOST_LOOKED_AT) + 1):
            if of[waiting[-back]] != document:
                giver = waiting.pop(-back)
                break
        givers.append(giver)
        waiting.append(place)
    places = np.array(givers, dtype=np.int64)
    return np.where(places < 0, -1, chosen[places]) if len(chosen) else places


def _fractions(key: Words) -> Iterator[int]:
    """An endless row of 32-bit fractions."""
    first = 0
    while True:
        numbers = np.arange(first, first + _DRAWS_AT_ONCE)
        yield from (random_bits(key, numbers) >> _32_BITS).tolist()
        first += _DRAWS_AT_ONCE


def _require_length(sequence_length: int) -> None:
    if sequence_length < MIN_SEQUENCE_LENGTH:
        raise DataError(
            f"sequence_length is {sequence_length}; examples need at least {MIN_SEQUENCE_LENGTH}"
        )
