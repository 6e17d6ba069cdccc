"""Masking: how many, where, and always the same for the same example and key."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.data.counter_random import derive_key
from stacking_ds.data.masking import MaskingVocabulary, mask_tokens
from stacking_ds.errors import DataError
from tests.masked_rows import (
    CLS,
    FIRST_PIECE,
    MASK,
    MODES,
    SEP,
    SIZE,
    SPECIAL,
    UNK,
    VOCABULARY,
    WORD_MODES,
    budget_of,
    mask,
    rows_of_words,
    words_of,
)

# What each way hides of one row, and behind which tokens.
PINNED = {
    "tokens": ([7, 13, 17, 30, 35, 37, 40, 49, 54], [11, 4, 4, 4, 4, 33, 4, 4, 57]),
    # without ## pieces this is the same as tokens
    "whole_words": ([7, 13, 17, 30, 35, 37, 40, 49, 54], [11, 4, 4, 4, 4, 33, 4, 4, 57]),
    "spans": ([13, 14, 15, 16, 17, 54, 55, 56, 57], [4, 4, 4, 4, 100, 4, 4, 4, 4]),
}

probabilities = st.floats(0.01, 1.0)
examples = st.lists(
    st.lists(st.integers(1, SIZE - 1).filter(lambda token: token != MASK), max_size=70), max_size=8
)


@given(rows=examples, seed=st.integers(0, 99), probability=probabilities)
def test_tokens_spend_exactly_the_budget(rows, seed, probability):
    _, _, offsets, positions, _ = mask(rows, probability=probability, seed=seed)
    counts = np.diff(np.searchsorted(positions, offsets)).tolist()
    maskable = [sum(token > MASK for token in row) for row in rows]
    assert counts == [budget_of(count, probability) for count in maskable]


@given(
    rows=examples,
    seed=st.integers(0, 99),
    probability=probabilities,
    masking=st.sampled_from(MODES),
)
def test_what_is_returned_is_what_stood_there(rows, seed, probability, masking):
    ids, after, _, positions, labels = mask(
        rows, masking=masking, probability=probability, seed=seed
    )
    assert positions.dtype == labels.dtype == np.int64
    assert (np.diff(positions) > 0).all()
    assert (ids[positions] > MASK).all()
    assert (labels == ids[positions]).all()
    assert (after[positions] >= MASK).all()
    untouched = np.ones(ids.size, dtype=bool)
    untouched[positions] = False
    assert (after[untouched] == ids[untouched]).all()


@given(
    rows=examples,
    seed=st.integers(0, 99),
    probability=probabilities,
    masking=st.sampled_from(WORD_MODES),
)
def test_words_are_whole_and_none_left_over_would_fit(rows, seed, probability, masking):
    _, _, offsets, positions, _ = mask(rows, masking=masking, probability=probability, seed=seed)
    for row, start, end in zip(rows, offsets, offsets[1:], strict=False):
        chosen = set((positions[(positions >= start) & (positions < end)] - start).tolist())
        room = budget_of(sum(token > MASK for token in row), probability) - len(chosen)
        assert room >= 0
        for word in words_of(row):
            assert chosen.issuperset(word) or chosen.isdisjoint(word)
            assert word[0] in chosen or len(word) > room


@given(
    rows=examples,
    padding=st.integers(0, 5),
    probability=probabilities,
    masking=st.sampled_from(MODES),
    data=st.data(),
)
def test_an_example_is_masked_by_its_key_and_tokens_alone(
    rows, padding, probability, masking, data
):
    order = data.draw(st.permutations(range(len(rows))))
    keys = derive_key(3, np.arange(len(rows)))
    settings = {"masking": masking, "probability": probability}
    _, after, offsets, positions, labels = mask(rows, keys=keys, **settings)
    shuffled = [rows[index] + [0] * padding for index in order]
    _, moved, moved_offsets, _, _ = mask(shuffled, keys=keys[order], **settings)
    for place, index in enumerate(order):
        row = after[offsets[index] : offsets[index + 1]]
        inside = (positions >= offsets[index]) & (positions < offsets[index + 1])
        _, alone, _, alone_positions, alone_labels = mask(
            [rows[index]], keys=keys[index : index + 1], **settings
        )
        assert row.tolist() == alone.tolist()
        assert (positions[inside] - offsets[index]).tolist() == alone_positions.tolist()
        assert labels[inside].tolist() == alone_labels.tolist()
        start = moved_offsets[place]
        assert row.tolist() == moved[start : start + len(row)].tolist()


@pytest.mark.parametrize("masking", MODES)
def test_a_large_batch_equals_its_examples_alone(masking):
    rows = rows_of_words(200, 100)
    keys = derive_key(8, np.arange(len(rows)))
    _, after, offsets, _, _ = mask(rows, masking=masking, keys=keys)
    for index, row in enumerate(rows):
        _, alone, _, _, _ = mask([row], masking=masking, keys=keys[index : index + 1])
        assert (after[offsets[index] : offsets[index + 1]] == alone).all()


@pytest.mark.parametrize("masking", MODES)
def test_equal_keys_repeat_the_masks_and_other_keys_do_not(masking):
    rows = rows_of_words(1, 200) * 50
    *_, positions, _ = mask(rows, masking=masking)
    width = len(rows[0])
    sets = {tuple(positions[positions // width == row] % width) for row in range(50)}
    assert len(sets) == 50
    *_, again, _ = mask(rows, masking=masking)
    *_, other, _ = mask(rows, masking=masking, seed=2)
    assert np.array_equal(positions, again)
    assert not np.array_equal(positions, other)


@given(words=st.integers(1, 80), seed=st.integers(0, 99), masking=st.sampled_from(MODES))
def test_a_larger_share_hides_what_a_smaller_one_hides_and_more(words, seed, masking):
    # The draws are one endless row, of which a larger budget takes a longer beginning.
    hidden: set[int] = set()
    for probability in (0.05, 0.2, 0.4, 0.49):
        *_, positions, _ = mask([[7] * words], masking=masking, probability=probability, seed=seed)
        assert hidden <= set(positions.tolist())
        hidden = set(positions.tolist())


@pytest.mark.parametrize("masking", MODES)
def test_masks_stay_what_they_were(masking):
    # A run that is resumed by a later version must see the masks it would have seen.
    row = [CLS, *range(5, 35), SEP, *range(35, 65), SEP]
    _, after, _, positions, _ = mask([row], masking=masking, keys=derive_key(2019, [5]))
    assert (positions.tolist(), after[positions].tolist()) == PINNED[masking]


@pytest.mark.parametrize("masking", WORD_MODES)
def test_a_piece_behind_a_barrier_begins_a_word(masking):
    row = [CLS, FIRST_PIECE, UNK, FIRST_PIECE, SEP, FIRST_PIECE]
    rows = [row, [FIRST_PIECE], [FIRST_PIECE]] * 50
    _, _, offsets, positions, _ = mask(rows, masking=masking, probability=0.3)
    assert (np.diff(np.searchsorted(positions, offsets)) == 1).all()
    assert {1, 3, 5} == set(positions[np.isin(positions % 8, [1, 3, 5])] % 8)


@pytest.mark.parametrize("masking", MODES)
def test_empty_and_tiny_and_large_examples(masking):
    *_, positions, labels = mask([], masking=masking)
    assert positions.size == labels.size == 0
    *_, positions, _ = mask([[], [CLS, SEP], [], [UNK]], masking=masking)
    assert positions.size == 0
    *_, positions, labels = mask([[], [9], [CLS, 8, SEP], []], masking=masking)
    assert (positions.tolist(), labels.tolist()) == ([0, 2], [9, 8])
    *_, positions, _ = mask([[9] * 70_000, [9] * 512], masking=masking)
    assert np.bincount(positions >= 70_000).tolist() == [10_500, 77]


@pytest.mark.parametrize("masking", WORD_MODES)
def test_words_longer_than_the_budget_are_never_chosen(masking):
    *_, positions, _ = mask([[5] + [FIRST_PIECE] * 9, [5, FIRST_PIECE, 5]], masking=masking)
    assert positions.tolist() == [12]


def test_offsets_that_do_not_fit_are_refused():
    def masked(offsets, keys=2):
        mask_tokens(
            np.full(6, 7),
            np.ones(6, dtype=bool),
            np.array(offsets),
            derive_key(np.arange(keys)),
            masking="tokens",
            mlm_probability=0.15,
            vocabulary=VOCABULARY,
        )

    with pytest.raises(ValueError, match="2 examples have 3 offsets, not 2"):
        masked([0, 6])
    for offsets in ([0, 3, 5], [1, 3, 6], [0, 7, 6]):
        with pytest.raises(ValueError, match="rise from 0 to the 6 tokens"):
            masked(offsets)


def test_vocabulary_names_ordinary_and_continuing_tokens():
    vocabulary = MaskingVocabulary.of(
        ["a", "[MASK]", "##b", "[PAD]", "[UNK]", "#", "[CLS]", "[SEP]"]
    )
    assert vocabulary.mask_id == 1
    assert vocabulary.ordinary_ids.tolist() == [0, 2, 5]
    assert np.flatnonzero(vocabulary.continues_word_V).tolist() == [2]
    with pytest.raises(DataError, match="5 tokens holds special tokens alone"):
        MaskingVocabulary.of(SPECIAL)
