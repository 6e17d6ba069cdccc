"""Keys, counters and permutations: what is drawn must look random and never depend on when."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.data.counter_random import (
    KeyedPermutation,
    derive_key,
    integers_below,
    random_bits,
)


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum()


def test_first_outputs_are_those_of_splitmix64():
    # The reference outputs for seed 1234567 that every implementation of SplitMix64 is tested on.
    bits = random_bits(np.array([1234567], dtype=np.uint64), np.arange(3))
    assert bits.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_bits_depend_on_key_and_counter_alone():
    keys = derive_key(7, np.arange(5), 3)
    together = random_bits(keys[:, None], np.arange(100))
    alone = random_bits(derive_key(7, 2, 3), [41])
    assert together[2, 41] == alone[0]
    assert len(np.unique(together)) == together.size


def test_order_and_sign_of_key_parts_matter():
    keys = [derive_key(*parts)[0] for parts in [(1, 2), (2, 1), (1,), (1, 2, 0), (-1, 2)]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("axis", [0, 1])
def test_draws_are_even_along_keys_and_along_counters(axis):
    shape = (100_000, 1) if axis == 0 else (1, 100_000)
    keys = derive_key(11, np.arange(shape[0]))[:, None]
    drawn = integers_below(random_bits(keys, np.arange(shape[1])), 50).reshape(-1)
    # 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert chi_square(np.bincount(drawn, minlength=50)) < 49 + 5 * 9.9
    following = np.bincount(drawn[:-1] * 50 + drawn[1:], minlength=2500)
    assert chi_square(following) < 2499 + 5 * 70.7


def test_every_bit_is_set_half_of_the_time():
    bits = random_bits(derive_key(5), np.arange(40_000))
    shares = [((bits >> np.uint64(place)) & np.uint64(1)).mean() for place in range(64)]
    assert np.allclose(shares, 0.5, atol=0.0125)  # five standard deviations


def test_integers_stay_below_their_own_limits():
    limits = np.array([1, 2, 3, 1000, 2**32 - 1])
    drawn = integers_below(random_bits(derive_key(1), np.arange(5000).reshape(1000, 5)), limits)
    assert (drawn >= 0).all()
    assert (drawn < limits).all()
    assert drawn[:, 2].max() == 2


@given(size=st.integers(1, 3000), seed=st.integers(-(2**63), 2**63 - 1))
def test_permutation_hits_each_index_once(size, seed):
    images = KeyedPermutation(size, derive_key(seed))(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))


@given(size=st.integers(1, 2**40), seed=st.integers(0, 100), data=st.data())
def test_large_permutations_stay_inside_and_do_not_collide(size, seed, data):
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=50))
    images = KeyedPermutation(size, derive_key(seed))(np.array(sorted(indices)))
    assert ((images >= 0) & (images < size)).all()
    assert len(set(images.tolist())) == len(indices)


def test_permutations_of_different_keys_are_unrelated_and_spread():
    size = 1000
    tables = [KeyedPermutation(size, derive_key(3, epoch))(np.arange(size)) for epoch in range(200)]
    assert len({table.tobytes() for table in tables}) == 200
    # Where index 123 goes, and how often anything stays in place (one index in a thousand).
    quarters = np.bincount([table[123] * 4 // size for table in tables], minlength=4)
    assert chi_square(quarters) < 3 + 5 * 2.45
    fixed_points = sum((table == np.arange(size)).sum() for table in tables)
    assert 120 < fixed_points < 290


def test_permutation_of_three_is_fair():
    orders = [
        tuple(KeyedPermutation(3, derive_key(key))(np.arange(3)).tolist()) for key in range(3000)
    ]
    counts = np.array([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == 6
    assert chi_square(counts) < 5 + 5 * 3.2


def test_permutation_refuses_an_empty_range():
    with pytest.raises(ValueError, match="size from 1"):
        KeyedPermutation(0, derive_key(1))
