"""Masking: how often which token is chosen, how long spans are, and behind what tokens are hidden.

The keys are fixed, and the bounds are five standard deviations.
"""

from collections import Counter

import numpy as np
import pytest

from tests.masked_rows import (
    CLS,
    FIRST_PIECE,
    MASK,
    MODES,
    SEP,
    SIZE,
    UNK,
    budget_of,
    mask,
    rows_of_words,
    words_of,
)

SPAN_LENGTHS = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)  # SpanBERT, figure 2: mean 3.8


def chi_square(counts, expected=None):
    """Standard deviations above what is expected of fair draws."""
    counts = np.asarray(counts, dtype=float)
    expected = np.full(len(counts), counts.mean()) if expected is None else expected
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


def assert_share(count, of, share, *, correlated=1):
    """`correlated`: how many outcomes at most were decided together."""
    assert abs(count / of - share) < 5 * (share * (1 - share) * correlated / of) ** 0.5


@pytest.mark.parametrize("masking", MODES)
def test_eighty_ten_ten_and_even_replacements(masking):
    _, after, _, positions, labels = mask(rows_of_words(2000, 100), masking=masking)
    now, count = after[positions], len(positions)
    # a span is at most 10 words of 4 pieces
    correlated = 40 if masking == "spans" else 1
    is_mask, is_same = now == MASK, now == labels
    assert_share(is_mask.sum(), count, 0.8, correlated=correlated)
    # a random token is the old one in one of a hundred draws
    assert_share(is_same.sum(), count, 0.101, correlated=correlated)
    replaced = now[~is_mask & ~is_same]
    assert chi_square(np.bincount(replaced, minlength=SIZE)[5:]) < 5
    assert (replaced.min(), replaced.max()) == (5, SIZE - 1)


def test_pieces_of_a_word_are_hidden_each_by_its_own_draw():
    rows = [[5, FIRST_PIECE] * 20] * 2000
    _, after, _, positions, _ = mask(rows, masking="whole_words")
    hidden = (after[positions] == MASK).reshape(-1, 2)
    assert (np.diff(positions.reshape(-1, 2)) == 1).all()
    assert_share(hidden.all(axis=1).sum(), len(hidden), 0.64)


@pytest.mark.parametrize("probability", [0.15, 0.5, 0.8])
def test_every_token_and_every_pair_is_chosen_equally_often(probability):
    rows, width = 6000, 20
    *_, positions, _ = mask([list(range(5, 25))] * rows, probability=probability)
    chosen = np.zeros((rows, width))
    chosen.reshape(-1)[positions] = 1
    wanted = budget_of(width, probability)
    pairs = (chosen.T @ chosen) / rows
    for first in range(width):
        assert_share(pairs[first, first], 1, wanted / width, correlated=1 / rows)
        for second in range(first):
            both = wanted * (wanted - 1) / width / (width - 1)
            assert_share(pairs[first, second], 1, both, correlated=1 / rows)


def literal_whole_words(words, budget, generator):
    """create_masked_lm_predictions of BERT's release of 31 May 2019, without the 80/10/10."""
    chosen = []
    for index in generator.permutation(len(words)):
        if len(chosen) >= budget:
            break
        if len(chosen) + len(words[index]) > budget:
            continue
        chosen.extend(words[index])
    return chosen


def literal_spans(words, budget, generator):
    """SpanBERT, section 3.1, word by word; `words` without unmaskable tokens between them."""
    chosen, passed_over = set(), set()
    while len(chosen) < budget and len(passed_over) + len(chosen) < sum(map(len, words)):
        start = generator.integers(len(words))
        length = generator.choice(10, p=SPAN_LENGTHS) + 1
        for word in words[start : start + length]:
            if len(chosen | set(word)) <= budget:
                chosen.update(word)
            else:
                passed_over.update(word)
    return sorted(chosen)


@pytest.mark.parametrize(
    ("masking", "literal"), [("whole_words", literal_whole_words), ("spans", literal_spans)]
)
def test_words_are_chosen_as_often_as_by_the_published_loops(masking, literal):
    row, repeats = rows_of_words(1, 40, seed=4)[0], 3000
    words = words_of(row)
    budget = budget_of(sum(map(len, words)), 0.15)
    *_, positions, _ = mask([row] * repeats, masking=masking)
    ours = np.zeros((repeats, len(row)))
    ours.reshape(-1)[positions] = 1
    generator = np.random.default_rng(6)
    theirs = np.zeros((repeats, len(row)))
    for one in theirs:
        one[literal(words, budget, generator)] = 1

    for place in range(len(row)):
        assert_same_share(ours[:, place], theirs[:, place])
    assert_same_share(ours.sum(axis=1) == budget, theirs.sum(axis=1) == budget)
    starts = [np.diff(each, axis=1).clip(0).sum(axis=1) for each in (ours, theirs)]
    for runs in range(1, budget + 1):
        assert_same_share(starts[0] == runs, starts[1] == runs)


def assert_same_share(ours, theirs):
    share = (ours.mean() + theirs.mean()) / 2
    assert abs(ours.mean() - theirs.mean()) <= 5 * (2 * share * (1 - share) / len(ours)) ** 0.5


def test_span_lengths_are_geometric_and_at_most_ten():
    # Ten tokens of 1,500 are hidden by spans that all but never touch: the lengths of the runs are
    # those of the spans, the last one cut off by the budget.
    expected = Counter()

    def spend(room, runs, probability):
        for length, share in enumerate(SPAN_LENGTHS, start=1):
            if length < room:
                spend(room - length, (*runs, length), probability * share)
            else:
                expected[tuple(sorted((*runs, room)))] += probability * share

    spend(10, (), 1.0)
    repeats, width = 2000, 1500
    *_, positions, _ = mask(
        [[CLS] + [7] * width] * repeats, masking="spans", probability=10 / width
    )
    runs = Counter()
    for chosen in positions.reshape(repeats, 10):
        breaks = np.flatnonzero(np.diff(chosen) != 1) + 1
        runs[tuple(sorted(np.diff([0, *breaks, 10]).tolist()))] += 1
    assert (positions % (width + 1) > 0).all()
    kinds = [kind for kind, share in expected.items() if share * repeats > 10]
    assert len(kinds) > 20
    seen = np.array([runs[kind] for kind in kinds] + [repeats - sum(runs[kind] for kind in kinds)])
    shares = np.array([expected[kind] for kind in kinds])
    assert chi_square(seen, repeats * np.append(shares, 1 - shares.sum())) < 5


def test_spans_begin_at_any_word():
    width, repeats = 25, 5000
    *_, positions, _ = mask([[7] * width] * repeats, masking="spans", probability=0.01)
    assert chi_square(np.bincount(positions % width, minlength=width)) < 5


def test_a_span_is_hidden_behind_one_kind():
    repeats, width = 2000, 1500
    _, after, _, positions, _ = mask(
        [[7] * width] * repeats, masking="spans", probability=10 / width
    )
    beside = np.flatnonzero(np.diff(positions) == 1)
    kinds = np.where(after[positions] == MASK, 0, np.where(after[positions] == 7, 1, 2))
    changes = (kinds[beside] != kinds[beside + 1]).sum()
    # what is left: spans that touch, and a random token that is the old one
    assert changes < 0.02 * len(beside)
    random = beside[(kinds[beside] == 2) & (kinds[beside + 1] == 2)]
    same = (after[positions[random]] == after[positions[random + 1]]).sum()
    assert_share(same, len(random), 1 / 99, correlated=2)


@pytest.mark.parametrize("barrier", [SEP, UNK])
def test_no_span_crosses_an_unmaskable_token(barrier):
    # All spans are of one word, so neighbours are together as often as in a fair draw of tokens.
    words, repeats = 30, 4000
    row = [token for _ in range(words) for token in (7, barrier)]
    *_, positions, _ = mask([row] * repeats, masking="spans", probability=0.1)
    chosen = positions.reshape(repeats, 3) % len(row) // 2
    neighbours = (np.diff(chosen, axis=1) == 1).sum()
    assert_share(neighbours, repeats, 3 * 2 / words, correlated=2)
