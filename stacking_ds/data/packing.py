"""Which examples share a row, so that hardly a slot stays empty."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack"]

Integers = NDArray[np.int64]


def pack(slots_E: Integers, sequence_length: int) -> tuple[Integers, Integers]:
    """Examples of `slots_E` slots, each at most `sequence_length`, put into rows of that length.

    Best-fit decreasing (Johnson 1973; for BERT's rows see Krell et al. 2021, arXiv:2107.02027):
    the longest first, each into the row that it fills best.

    Returns the order of the examples [E], and the offsets [rows + 1] at which its rows begin.
    """
    longest_first = np.argsort(-slots_E, kind="stable")
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    rooms = 0  # bit r is set while some row has r slots free
    for example, slots in zip(longest_first.tolist(), slots_E[longest_first].tolist(), strict=True):
        fitting = rooms >> slots
        if fitting:
            room = slots + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
            rows[row].append(example)
        else:
            room, row = sequence_length, len(rows)
            rows.append([example])
        if room > slots:
            rows_with_room[room - slots].append(row)
            rooms |= 1 << (room - slots)
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    order = np.fromiter((example for row in rows for example in row), np.int64, len(slots_E))
    return order, np.concatenate([[0], np.cumsum(lengths)])
