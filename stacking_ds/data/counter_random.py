"""Random numbers as a pure function of a key and a counter, for whole arrays at once.

There is no state to save, to seek or to keep equal between ranks: the number that masks token 17
of sample 4711 in epoch 3 is computed from exactly these values. The mixing function is the
finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", figure 14, constants of Stafford's variant 13); counting upwards from a key by the
golden-ratio increment is SplitMix64 itself.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_FEISTEL_ROUNDS = 8


def _mix(words: Words) -> Words:
    """SplitMix64's finaliser, a bijection of 64-bit words; overwrites and returns `words`."""
    words ^= words >> np.uint64(30)
    words *= _MIX_1
    words ^= words >> np.uint64(27)
    words *= _MIX_2
    words ^= words >> np.uint64(31)
    return words


def _words(values: Any) -> Words:
    """Integers as 64-bit words, negative ones in two's complement."""
    if isinstance(values, int):
        return np.array([values & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return np.atleast_1d(np.asarray(values)).astype(np.uint64)


def derive_key(*parts: Any) -> Words:
    """The key of a stream: integers, or arrays of integers that broadcast, folded in one by one.

    Returns uint64 of the broadcast shape (at least one-dimensional). Different parts, or the same
    parts in another order, give unrelated keys.
    """
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix((key ^ _words(part)) + _GOLDEN)
    return key


def random_bits(key: Words, counters: Any) -> Words:
    """Uniform 64-bit words for `counters` under `key`; both broadcast.

    With `key` of shape [B, 1] and counters of shape [S] the result is [B, S].
    """
    return _mix(key + (_words(counters) + np.uint64(1)) * _GOLDEN)


def integers_below(bits: Words, limits: Any) -> Integers:
    """Integers in [0, limits) from the upper 32 bits of `bits`, for 0 < limits < 2**32.

    The multiply-and-shift of Lemire (2019, arXiv:1805.10941) without its rejection step: no value
    is likelier than another by more than limits / 2**32.
    """
    scaled = (bits >> np.uint64(32)) * _words(limits)
    return (scaled >> np.uint64(32)).astype(np.int64)


class KeyedPermutation:
    """A pseudo-random permutation of [0, size) that holds no list.

    A Feistel network (Luby and Rackoff 1988), its halves as equal as they can be, permutes the next
    power of two; an image outside [0, size) is permuted again until it falls inside ("cycle
    walking", Black and Rogaway 2002), which keeps the map a bijection and takes fewer than two
    turns on average.
    """

    def __init__(self, size: int, key: Words) -> None:
        if not 0 < size < 2**62:
            raise ValueError(f"a permutation needs a size from 1 to 2**62, not {size}")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        # the halves change places, and with them their widths, in each of an even number of rounds
        self._right_bits = np.uint64(bits // 2)
        self._right_mask = np.uint64((1 << bits // 2) - 1)
        self._masks = [np.uint64((1 << width) - 1) for width in (bits - bits // 2, bits // 2)]
        self._round_keys = random_bits(key, np.arange(_FEISTEL_ROUNDS))

    def __call__(self, indices: Any) -> Integers:
        """The images of `indices`, each in [0, size); shape [n]."""
        values = self._feistel(_words(indices))
        outside = np.flatnonzero(values >= np.uint64(self.size))
        while outside.size:
            values[outside] = self._feistel(values[outside])
            outside = outside[values[outside] >= np.uint64(self.size)]
        return values.astype(np.int64)

    def _feistel(self, values: Words) -> Words:
        left, right = values >> self._right_bits, values & self._right_mask
        for number, key in enumerate(self._round_keys):
            mask = self._masks[number % 2]
            left, right = right, left ^ (_mix(right * _GOLDEN + key) & mask)
        return (left << self._right_bits) | right
