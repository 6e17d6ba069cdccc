"""Packed rows hold every example once, and hardly a slot stays empty."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.data.rows import pack


@settings(max_examples=200)
@given(slots=st.lists(st.integers(2, 64), max_size=200))
def test_rows_hold_every_example_once_and_none_overflows(slots):
    order, offsets = pack(np.array(slots, dtype=np.int64), 64)
    assert sorted(order.tolist()) == list(range(len(slots)))
    assert offsets[0] == 0
    assert offsets[-1] == len(slots)
    sums = [sum(slots[e] for e in order[a:b]) for a, b in itertools.pairwise(offsets)]
    assert all(0 < total <= 64 for total in sums)
    # no two rows could be one: best fit would have joined the later one's first example
    assert all(a + b > 64 for a, b in zip(sorted(sums), sorted(sums)[1:], strict=False))


def test_the_row_that_is_filled_best_is_taken():
    order, offsets = pack(np.array([6, 5, 4, 3, 2]), 10)
    rows = [order[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert rows == [[0, 2], [1, 3, 4]]  # 6 + 4 and 5 + 3 + 2: full


def test_lengths_of_all_kinds_fill_the_rows():
    lengths = np.random.default_rng(0).integers(2, 513, 20_000)
    _, offsets = pack(lengths, 512)
    assert lengths.sum() / ((len(offsets) - 1) * 512) > 0.99
