"""Masking: how many, where, and behind what."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.data.counter_random import derive_key
from stacking_ds.data.masking import mask_tokens

MASK = 4
SPECIAL = np.arange(5)
ORDINARY = np.arange(5, 105)


def masked(rows=64, width=128, *, seed=1, probability=0.15, keys=None, share=1.0):
    generator = np.random.default_rng(0)
    ids = generator.integers(5, 105, (rows, width))
    maskable = generator.random((rows, width)) < share
    ids[~maskable] = generator.integers(0, 4, (~maskable).sum())
    corrupted = ids.copy()
    keys = derive_key(seed, np.arange(rows)) if keys is None else keys
    positions, labels = mask_tokens(
        corrupted,
        maskable,
        keys,
        mlm_probability=probability,
        mask_id=MASK,
        ordinary_ids=ORDINARY,
    )
    return ids, maskable, corrupted, positions, labels


@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 200),
    seed=st.integers(0, 99),
    probability=st.floats(0.01, 0.9),
    share=st.floats(0, 1),
)
def test_each_row_hides_the_rounded_share_of_its_words(rows, width, seed, probability, share):
    ids, maskable, corrupted, positions, labels = masked(
        rows, width, seed=seed, probability=probability, share=share
    )
    counts = np.bincount(positions // width, minlength=rows)
    for row in range(rows):
        words = int(maskable[row].sum())
        wanted = max(1, int(probability * words + 0.5)) if words else 0
        assert counts[row] == wanted
    assert (np.diff(positions) > 0).all()
    assert maskable.reshape(-1)[positions].all()
    assert (labels == ids.reshape(-1)[positions]).all()
    untouched = np.ones(ids.size, dtype=bool)
    untouched[positions] = False
    assert (corrupted.reshape(-1)[untouched] == ids.reshape(-1)[untouched]).all()
    assert not np.isin(labels, SPECIAL).any()


def test_eighty_ten_ten_and_no_special_replacement():
    _, _, corrupted, positions, labels = masked(rows=3000)
    now = corrupted.reshape(-1)[positions]
    count = len(positions)
    is_mask, is_same = now == MASK, now == labels
    deviation = (0.8 * 0.2 / count) ** 0.5
    assert abs(is_mask.mean() - 0.8) < 5 * deviation
    # A random token is the old one in one of a hundred draws.
    assert abs(is_same.mean() - 0.101) < 5 * (0.1 * 0.9 / count) ** 0.5
    replaced = now[~is_mask & ~is_same]
    assert set(replaced.tolist()) == set(ORDINARY.tolist())
    counts = np.bincount(replaced, minlength=105)[5:]
    expected = counts.sum() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 5 * 14.1


def test_every_place_is_chosen_equally_often():
    rows, width = 6000, 32
    *_, positions, _ = masked(rows=rows, width=width)
    counts = np.bincount(positions % width, minlength=width)
    expected = counts.sum() / width
    assert ((counts - expected) ** 2 / expected).sum() < (width - 1) + 5 * (2 * width) ** 0.5
    first = (positions % width == 0).sum() + 0.0
    neighbours = np.isin(positions[positions % width == 0] + 1, positions).sum()
    assert abs(neighbours / first - 4 / 31) < 0.05


def test_a_row_is_masked_by_its_key_alone():
    ids, maskable, corrupted, positions, _ = masked(rows=8)
    alone = ids[5:6].copy()
    at, _ = mask_tokens(
        alone,
        maskable[5:6],
        derive_key(1, [5]),
        mlm_probability=0.15,
        mask_id=MASK,
        ordinary_ids=ORDINARY,
    )
    assert (alone == corrupted[5:6]).all()
    assert (at + 5 * 128 == positions[positions // 128 == 5]).all()
    other = masked(rows=8, seed=2)[3]
    assert not np.array_equal(other, positions)


def test_rows_beyond_the_position_bits_are_refused():
    with pytest.raises(ValueError, match="65537 tokens exceed"):
        masked(rows=1, width=2**16 + 1)
