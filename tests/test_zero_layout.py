"""The arithmetic of flat buffers cut into equal parts."""

from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.zero.layout import overlap


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 7))
def test_parts_of_a_flat_group_tile_every_parameter(sizes: list[int], ranks: int) -> None:
    part = -(-sum(sizes) // ranks)
    offset = 0
    for size in sizes:
        found = [overlap(offset, size, rank * part, (rank + 1) * part) for rank in range(ranks)]
        elements = [place for start, stop in found for place in range(start, stop)]
        assert elements == list(range(size))
        offset += size
