"""Masked language modelling: which tokens to hide, and behind what.

An example's budget is its share of maskable tokens, rounded. Three ways of spending it:

* tokens: single tokens, every set of them equally likely (Devlin et al. 2019, section 3.1, task 1);
* whole words: words in random order, a word that would exceed the budget being passed over
  (create_pretraining_data.py of BERT's release of 31 May 2019, `do_whole_word_mask`);
* spans: from random words on, lengths in words from a truncated geometric distribution (Joshi et
  al. 2020, SpanBERT, section 3.1).

Of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay; it is decided for every
token by itself, under `spans` once for the whole span.

A word is a run of maskable tokens of which all but the first continue a word (`##`). A token that
may not be masked ([CLS], [SEP], [UNK], padding) therefore belongs to no word and parts those beside
it, and no span crosses it.

Shapes: E examples, T tokens of all examples, N maskable tokens, W words, D draws, C candidates, M
masked tokens, V vocabulary. Bounds of the examples within a list have E + 1 entries and no letter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stacking_ds.config.sections import MaskingName
from stacking_ds.data.counter_random import (
    Integers,
    Words,
    derive_key,
    integers_below,
    random_bits,
)
from stacking_ds.data.examples import ranges
from stacking_ds.data.tokenizer import special_ids
from stacking_ds.errors import DataError

Flags = NDArray[np.bool_]

_WHICH, _HOW, _REPLACEMENT = range(3)

# SpanBERT's mean length of 3.8 words is that of the distribution cut off at 10 and rescaled; with
# every longer span counted as 10 it would be 4.5.
_SPAN_STOP, _LONGEST_SPAN = 0.2, 10


@dataclass(frozen=True)
class MaskingVocabulary:
    """The facts of a vocabulary that masking needs."""

    mask_id: int
    ordinary_ids: Integers  # all but the special tokens: what random replacements are drawn from
    continues_word_V: Flags  # whether the token of this id continues a word (begins with ##)

    @classmethod
    def of(cls, vocabulary: Sequence[str]) -> "MaskingVocabulary":
        """For `vocabulary` (token of id i at index i); DataError for special tokens alone."""
        special = special_ids(vocabulary)
        ordinary = np.setdiff1d(np.arange(len(vocabulary), dtype=np.int64), list(special))
        if not len(ordinary):
            raise DataError(
                f"the vocabulary of {len(vocabulary)} tokens holds special tokens alone; masking "
                "replaces tokens by ordinary ones, so take a vocabulary that has some"
            )
        continues = np.array([token.startswith("##") for token in vocabulary], dtype=np.bool_)
        return cls(special.mask, ordinary, continues)


def mask_tokens(
    ids_T: Integers,
    maskable_T: Flags,
    example_offsets: Integers,
    key_E: Words,
    *,
    masking: MaskingName,
    mlm_probability: float,
    vocabulary: MaskingVocabulary,
) -> tuple[Integers, Integers]:
    """Hides tokens in `ids_T`, in place; example e is [example_offsets[e], example_offsets[e + 1]).

    What happens in an example is a function of its key, its tokens and which of them are maskable;
    unmaskable tokens at its end change nothing. Its budget is round(mlm_probability * maskable
    tokens), half a token counting as a whole, and at least one token if any is maskable. `tokens`
    chooses exactly the budget. `whole_words` and `spans` choose at most the budget, and less only
    by a number of tokens that no word left over is short enough for: none at all where every word
    is longer than the budget.

    Returns the flat positions, ascending, and the tokens that stood there; both [M]. Raises
    ValueError when the offsets do not fit the keys and the tokens.
    """
    if len(example_offsets) != len(key_E) + 1:
        raise ValueError(
            f"{len(key_E)} examples have {len(key_E) + 1} offsets, not {len(example_offsets)}: "
            "give each its start, and the end of the last one"
        )
    ends = [int(example_offsets[0]), int(example_offsets[-1])]
    if ends != [0, len(ids_T)] or (np.diff(example_offsets) < 0).any():
        raise ValueError(
            f"example_offsets must rise from 0 to the {len(ids_T)} tokens given; they go from "
            f"{ends[0]} to {ends[1]}"
        )
    position_N = np.flatnonzero(maskable_T)
    bounds = np.searchsorted(position_N, example_offsets)
    maskable_E = np.diff(bounds)
    budget_E = np.floor(mlm_probability * maskable_E + 0.5).astype(np.int64).clip(1, maskable_E)
    which_E = derive_key(key_E, _WHICH)
    if masking == "tokens":
        positions_M = position_N[_choose_tokens(bounds, budget_E, which_E)]
    else:
        words = _find_words(vocabulary.continues_word_V[ids_T], maskable_T, example_offsets)
        chosen, draw = _choose_words(words, budget_E, which_E, by_span=masking == "spans")
        length = words.length(chosen)
        positions_M = ranges(words.edges[words.edge_W[chosen]], length)
    labels_M = ids_T[positions_M]
    example_M = _owners(np.searchsorted(positions_M, example_offsets))
    place_M = positions_M - example_offsets[example_M]
    decided_by_M = np.repeat(draw, length) if masking == "spans" else place_M
    how_M = integers_below(random_bits(derive_key(key_E, _HOW)[example_M], decided_by_M), 10)
    ids_T[positions_M] = np.where(how_M < 8, vocabulary.mask_id, labels_M)
    random_R = np.flatnonzero(how_M == 8)
    bits_R = random_bits(derive_key(key_E, _REPLACEMENT)[example_M[random_R]], place_M[random_R])
    ids_T[positions_M[random_R]] = vocabulary.ordinary_ids[
        integers_below(bits_R, len(vocabulary.ordinary_ids))
    ]
    return positions_M, labels_M


def _owners(bounds: Integers) -> Integers:
    """The example of each entry of a list that the examples share by `bounds`."""
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))


def _choose_tokens(bounds: Integers, budget_E: Integers, key_E: Words) -> Integers:
    """`budget_E` maskable tokens of each example, every set equally likely, as indices into N.

    They are the first different ones in an endless row of draws, so that a round draws as many as
    the rounds before it left missing. Where more than half is wanted, what to leave is drawn.
    """
    maskable_E = np.diff(bounds)
    leave_E = 2 * budget_E > maskable_E
    wanted_E = np.where(leave_E, maskable_E - budget_E, budget_E)
    drawn_N = np.zeros(bounds[-1], dtype=np.bool_)
    missing_E, drawn_E = wanted_E, np.zeros_like(wanted_E)
    while missing_E.any():
        example_D, draw_D = _next_draws(missing_E, drawn_E)
        bits_D = random_bits(key_E[example_D], draw_D)
        drawn_N[bounds[example_D] + integers_below(bits_D, maskable_E[example_D])] = True
        drawn_E += missing_E
        missing_E = wanted_E - np.diff(np.searchsorted(np.flatnonzero(drawn_N), bounds))
    if leave_E.any():
        drawn_N ^= np.repeat(leave_E, maskable_E)
    return np.flatnonzero(drawn_N)


@dataclass(frozen=True)
class _Words:
    """All words, in order. Word w is the tokens [edges[edge_W[w]], edges[edge_W[w] + 1]); the edges
    are where words begin, the unmaskable tokens, and T."""

    edges: Integers
    edge_W: Integers
    bounds: Integers

    def length(self, words: Integers) -> Integers:
        edge = self.edge_W[words]
        return self.edges[edge + 1] - self.edges[edge]


def _find_words(continues_T: Flags, maskable_T: Flags, offsets: Integers) -> _Words:
    is_edge = np.append(~continues_T | ~maskable_T, True)
    is_edge[1:-1] |= ~maskable_T[:-1]
    is_edge[offsets] = True
    edges = np.flatnonzero(is_edge)
    edge_W = np.flatnonzero(maskable_T[edges[:-1]])
    return _Words(edges, edge_W, np.searchsorted(edge_W, np.searchsorted(edges, offsets)))


def _choose_words(
    words: _Words, budget_E: Integers, key_E: Words, *, by_span: bool
) -> tuple[Integers, Integers]:
    """The chosen words, ascending, and the number of the draw each was chosen in.

    A draw is a word of the example, every one equally likely, or the span that begins there. What
    came in an earlier draw is ignored, which puts the words into a random order.
    """
    num_words, count_E = len(words.edge_W), np.diff(words.bounds)
    room_E, drawn_E = budget_E.copy(), np.zeros_like(count_E)
    seen_W, chosen_W = np.zeros(num_words, dtype=np.bool_), np.zeros(num_words, dtype=np.bool_)
    draw_W = np.empty(num_words, dtype=np.int64)
    # mostly enough; what is drawn in vain is as if it had not been drawn
    draws_E = np.where(count_E > 0, budget_E // 4 + 2 if by_span else budget_E, 0)
    while draws_E.any():
        example_D, draw_D = _next_draws(draws_E, drawn_E)
        bits_D = random_bits(key_E[example_D], draw_D)
        word_D = words.bounds[example_D] + integers_below(bits_D, count_E[example_D])
        if by_span:
            word_D, source = _extend(words, word_D, _span_lengths(bits_D), example_D)
            example_D, draw_D = example_D[source], draw_D[source]
        fresh = _see(word_D, seen_W)
        word_C, draw_C = word_D[fresh], draw_D[fresh]
        bounds_C = np.searchsorted(example_D[fresh], np.arange(len(count_E) + 1))
        taken = _fill_budgets(words.length(word_C), bounds_C, room_E)
        chosen_W[word_C[taken]] = True
        draw_W[word_C] = draw_C
        drawn_E += draws_E
        draws_E = np.where(_could_go_on(words, seen_W, room_E), drawn_E, 0)
    chosen = np.flatnonzero(chosen_W)
    return chosen, draw_W[chosen]


def _next_draws(draws_E: Integers, drawn_E: Integers) -> tuple[Integers, Integers]:
    """The example of each of the next `draws_E` draws, and its number in the example."""
    return np.repeat(np.arange(len(draws_E)), draws_E), ranges(drawn_E, draws_E)


def _span_lengths(bits_D: Words) -> Integers:
    """Lengths from 1 to 10 words from the lower 32 bits of `bits_D`."""
    longer = (1 - _SPAN_STOP) ** np.arange(1, _LONGEST_SPAN + 1)
    limits = (1 - longer[:-1]) / (1 - longer[-1]) * 2**32
    return 1 + np.searchsorted(limits.astype(np.uint32), bits_D.astype(np.uint32), side="right")


def _extend(
    words: _Words, first_D: Integers, length_D: Integers, example_D: Integers
) -> tuple[Integers, Integers]:
    """The words of the spans [first_D, first_D + length_D), each as far as neither an unmaskable
    token nor the end of the example comes between, and the index of the span of each."""
    source, place = _next_draws(length_D, np.zeros_like(length_D))
    first = first_D[source]
    word = np.minimum(first + place, words.bounds[example_D + 1][source] - 1)
    unbroken = np.flatnonzero(words.edge_W[word] - words.edge_W[first] == place)
    return word[unbroken], source[unbroken]


def _see(word_C: Integers, seen_W: Flags) -> Integers:
    """The indices at which a word stands for the first time; adds the words to `seen_W`."""
    index_C = np.arange(len(word_C))
    first_W = np.empty(len(seen_W), dtype=np.int64)
    # of an index that is repeated the last assignment stays
    first_W[word_C[::-1]] = index_C[::-1]
    fresh = np.flatnonzero((first_W[word_C] == index_C) & ~seen_W[word_C])
    seen_W[word_C] = True
    return fresh


def _could_go_on(words: _Words, seen_W: Flags, room_E: Integers) -> Flags:
    """Whether an example has a word not drawn yet that fits into its room; [E]."""
    unseen = np.flatnonzero(~seen_W & np.repeat(room_E > 0, np.diff(words.bounds)))
    room = room_E[_owners(np.searchsorted(unseen, words.bounds))]
    fitting = unseen[words.length(unseen) <= room]
    could_E: Flags = np.diff(np.searchsorted(fitting, words.bounds)) > 0
    return could_E


def _fill_budgets(length_C: Integers, bounds: Integers, room_E: Integers) -> Integers:
    """Which of the words, in the order given within each example, are taken: each one that still
    fits when its turn comes. Returns their indices and lowers `room_E`.

    What does not fit once never will, because the room only shrinks. So a round takes all words
    up to the first that does not fit, and drops that one and all others as long.
    """
    index_C = np.arange(len(length_C))
    taken = []
    while len(length_C):
        count_E = np.diff(bounds)
        total = np.concatenate(([0], np.cumsum(length_C)))
        before_E = total[bounds[:-1]]
        stop_E = np.searchsorted(total, before_E + room_E, side="right") - 1
        stop_E = np.minimum(stop_E, bounds[1:])
        room_E -= total[stop_E] - before_E
        takes_C = np.arange(len(length_C)) < np.repeat(stop_E, count_E)
        taken.append(index_C[takes_C])
        kept = np.flatnonzero(~takes_C & (length_C <= np.repeat(room_E, count_E)))
        index_C, length_C = index_C[kept], length_C[kept]
        bounds = np.searchsorted(kept, bounds)
    return np.concatenate(taken) if taken else index_C
