"""Masked language modelling: which tokens to hide, and behind what (Devlin et al. 2019, section
3.1, task 1): 80 % become [MASK], 10 % a random token, 10 % stay.

Shapes: B rows, S positions, M masked positions.
"""

import numpy as np
from numpy.typing import NDArray

from stacking_ds.data.counter_random import derive_key, integers_below, random_bits

__all__ = ["mask_tokens"]

_WHICH, _HOW, _REPLACEMENT = range(3)
# The rank of a position is decided by the upper bits of a random word, its lower bits name it.
_POSITION_BITS = 16


def mask_tokens(
    input_ids_BS: NDArray[np.int64],
    maskable_BS: NDArray[np.bool_],
    key_B: NDArray[np.uint64],
    *,
    mlm_probability: float,
    mask_id: int,
    ordinary_ids: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hides tokens in `input_ids_BS`, in place, as a function of each row's key.

    In each row round(mlm_probability * maskable positions) of the maskable positions are chosen,
    at least one if there is any. Random tokens are drawn evenly from `ordinary_ids`.

    Returns the flat positions b * S + s, ascending, and the tokens that stood there; both [M].
    """
    num_rows, sequence_length = input_ids_BS.shape
    if sequence_length > 2**_POSITION_BITS:
        raise ValueError(f"rows of {sequence_length} tokens exceed {2**_POSITION_BITS}")
    column_S = np.arange(sequence_length, dtype=np.uint64)
    rank_BS = random_bits(derive_key(key_B, _WHICH)[:, None], column_S)
    rank_BS >>= np.uint64(_POSITION_BITS)
    rank_BS <<= np.uint64(_POSITION_BITS)
    rank_BS |= column_S
    rank_BS[~maskable_BS] = np.iinfo(np.uint64).max
    rank_BS.sort(axis=1)

    maskable_B = maskable_BS.sum(axis=1)
    wanted_B = np.maximum(np.floor(mlm_probability * maskable_B + 0.5), 1).astype(np.int64)
    wanted_B = np.minimum(wanted_B, maskable_B)
    chosen_BS = column_S < wanted_B[:, None].astype(np.uint64)
    columns = (rank_BS[chosen_BS] & np.uint64(2**_POSITION_BITS - 1)).astype(np.int64)
    rows = np.repeat(np.arange(num_rows), wanted_B)
    positions_M = np.sort(rows * sequence_length + columns)

    flat_ids = input_ids_BS.reshape(-1)
    labels_M = flat_ids[positions_M]
    row_M, column_M = np.divmod(positions_M, sequence_length)
    how_M = integers_below(random_bits(derive_key(key_B, _HOW)[row_M], column_M), 10)
    random_M = ordinary_ids[
        integers_below(
            random_bits(derive_key(key_B, _REPLACEMENT)[row_M], column_M), len(ordinary_ids)
        )
    ]
    flat_ids[positions_M] = np.where(how_M < 8, mask_id, np.where(how_M < 9, random_M, labels_M))
    return positions_M, labels_M
