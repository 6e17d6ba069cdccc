"""The neutral type: what a rank answers for, and views that are views."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.fragments import MASTER, Fragment


def _fragment(numel: int, *, replicated: bool) -> Fragment:
    views = {MASTER: torch.arange(float(numel))}
    return Fragment("w", (100,), 30, 30 + numel, views, replicated)


@given(st.integers(0, 60), st.integers(1, 70))
def test_owned_parts_of_a_replicated_fragment_tile_it_evenly(numel: int, ranks: int) -> None:
    whole = _fragment(numel, replicated=True)
    parts = [whole.owned_by(rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.views[MASTER] for part in parts]), whole.views[MASTER])
    assert [part.start for part in parts] == [30] + [part.stop for part in parts[:-1]]
    assert parts[-1].stop == 30 + numel
    sizes = [part.numel for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_fragment_of_ones_own_is_owned_whole() -> None:
    fragment = _fragment(5, replicated=False)
    assert fragment.owned_by(2, 3) is fragment


def test_writing_to_an_owned_part_writes_the_fragment() -> None:
    whole = _fragment(4, replicated=True)
    whole.owned_by(1, 2).views[MASTER].zero_()
    assert whole.views[MASTER].tolist() == [0, 1, 0, 0]
