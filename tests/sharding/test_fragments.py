"""The neutral type and the planner: what a rank answers for, and from where it gets the rest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_ds.growth.operators import layer_map, source_name
from stacking_ds.sharding.fragments import (
    MASTER,
    Cut,
    Fragment,
    Layout,
    plan_moves,
    traffic,
    windows,
)


def _replicated(numel: int, ranks: int) -> Fragment:
    views = {MASTER: torch.arange(float(numel))}
    return Fragment("w", (numel,), 0, numel, views, Cut.even(numel, ranks), replicated=True)


@given(st.integers(0, 60), st.integers(1, 70))
def test_owned_parts_of_a_replicated_fragment_tile_it_evenly(numel: int, ranks: int) -> None:
    whole = _replicated(numel, ranks)
    parts = [whole.owned_by(rank) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.views[MASTER] for part in parts]), whole.views[MASTER])
    assert [part.start for part in parts] == [0] + [part.stop for part in parts[:-1]]
    assert parts[-1].stop == numel
    assert max(part.numel for part in parts) <= -(-numel // ranks)


def test_a_fragment_of_ones_own_is_owned_whole() -> None:
    fragment = Fragment("w", (9,), 3, 6, {MASTER: torch.zeros(3)}, Cut(9, 3))
    assert fragment.owned_by(1) is fragment


def test_writing_to_an_owned_part_writes_the_fragment() -> None:
    whole = _replicated(4, ranks=2)
    whole.owned_by(1).views[MASTER].zero_()
    assert whole.views[MASTER].tolist() == [0, 1, 0, 0]


# --------------------------------------------------------------------------- planning

RANKS = st.one_of(st.integers(1, 9), st.integers(1, 4096))


@st.composite
def _layouts(draw: st.DrawFn, numels: dict[str, int]) -> Layout:
    """As ZeRO lays them out: replicated, each parameter by itself, or a flat buffer cut."""
    ranks = draw(RANKS)
    kind = draw(st.sampled_from(["replicated", "each", "flat"]))
    if kind != "flat":
        cuts = {name: Cut.even(numel, ranks) for name, numel in numels.items()}
        return Layout(ranks, cuts, kind == "replicated")
    size = max(1, -(-sum(numels.values()) // ranks))
    cuts, offset = {}, 0
    for name, numel in numels.items():
        cuts[name] = Cut(numel, size, offset)
        offset += numel
    return Layout(ranks, cuts)


@st.composite
def _two_layouts(draw: st.DrawFn) -> tuple[Layout, Layout]:
    numels = dict(
        zip("abcd", draw(st.lists(st.integers(0, 9000), min_size=1, max_size=4)), strict=False)
    )
    return draw(_layouts(numels)), draw(_layouts(numels))


@given(_two_layouts())
def test_a_cut_and_its_holders_agree(layouts: tuple[Layout, Layout]) -> None:
    layout = layouts[0]
    for name, cut in layout.cuts.items():
        if not layout.replicated:
            starts, stops = layout.held(name)
            rank = layout.ranks // 2
            assert cut.interval(rank) == (starts[rank], stops[rank])
        start, stop = cut.numel // 3, cut.numel - cut.numel // 4
        found = [cut.interval(rank) for rank in cut.holders(start, stop)]
        elements = sum(min(high, stop) - max(low, start) for low, high in found)
        assert elements == stop - start
        assert all(min(high, stop) > max(low, start) for low, high in found)


@settings(max_examples=200)
@given(_two_layouts())
def test_every_element_a_rank_needs_has_exactly_one_source(layouts: tuple[Layout, Layout]) -> None:
    old, new = layouts
    for name in new.cuts:
        moves = plan_moves(old, name, new, name)
        assert (moves.start < moves.stop).all()
        had_start, had_stop = old.held(name)
        # the source has what it sends …
        assert (moves.source < old.ranks).all()
        assert (had_start[moves.source] <= moves.start).all()
        assert (moves.stop <= had_stop[moves.source]).all()
        # … and what a rank gets is what it needs, without a hole and nothing twice
        need_start, need_stop = new.held(name)
        order = np.lexsort((moves.start, moves.target))
        target, start, stop = moves.target[order], moves.start[order], moves.stop[order]
        follows = target[1:] == target[:-1]
        assert (start[1:][follows] == stop[:-1][follows]).all()
        needing = np.flatnonzero(need_start < need_stop)
        first = np.r_[True, ~follows][: len(target)]
        last = np.r_[~follows, True][: len(target)]
        assert (target[first] == needing).all()
        assert (start[first] == need_start[needing]).all()
        assert (stop[last] == need_stop[needing]).all()


@settings(max_examples=200)
@given(_two_layouts())
def test_traffic_is_accounted_for_and_even(layouts: tuple[Layout, Layout]) -> None:
    old, new = layouts
    moved = traffic(old, new, lambda name: name)
    needed = sum((new.held(name)[1] - new.held(name)[0] for name in new.cuts), np.int64(0))
    got = moved.kept + moved.received
    assert (got[: new.ranks] == needed).all()
    assert not got[new.ranks :].any()
    assert moved.sent.sum() == moved.received.sum()
    total = sum(cut.numel for cut in new.cuts.values())
    if not new.replicated:
        # rounding up costs at most one element a parameter
        assert needed.max() <= -(-total // new.ranks) + len(new.cuts)
        if not old.replicated:
            assert moved.sent.max() <= -(-total // old.ranks) + len(old.cuts)


@given(_two_layouts(), st.sampled_from([(1, 2), (2, 3), (3, 12)]))
def test_same_layout_stacking_moves_nothing(
    layouts: tuple[Layout, Layout], depths: tuple[int, int]
) -> None:
    old_depth, new_depth = depths
    layout = layouts[0]

    def of_depth(depth: int) -> Layout:
        # every layer is cut by itself, as its own parameter groups see to
        cuts = {
            f"encoder.layer.{layer}.{name}": cut
            for layer in range(depth)
            for name, cut in layout.cuts.items()
        }
        return Layout(layout.ranks, {**cuts, "embeddings": Cut.even(77, layout.ranks)},
                      layout.replicated)  # fmt: skip

    for operator in ("stack", "interleave") if new_depth % old_depth == 0 else ("stack",):
        layers = layer_map(operator, old_depth, new_depth)
        moved = traffic(
            of_depth(old_depth), of_depth(new_depth), lambda name, m=layers: source_name(name, m)
        )
        assert not moved.sent.any()
        assert not moved.received.any()


def test_a_parameter_of_another_size_cannot_be_planned() -> None:
    with pytest.raises(AssertionError, match="b cannot copy a"):
        plan_moves(Layout(2, {"a": Cut(4, 2)}), "a", Layout(2, {"b": Cut(6, 3)}), "b")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 60))
def test_windows_tile_everything_in_order_and_are_bounded(numels: list[int], limit: int) -> None:
    named = {str(index): numel for index, numel in enumerate(numels)}
    found = list(windows(named, limit))
    sizes = [sum(window.stop - window.start for window in batch) for batch in found]
    assert all(size == limit for size in sizes[:-1])
    assert sum(sizes) == sum(numels)
    flat = [window for batch in found for window in batch]
    for name, numel in named.items():
        parts = [(window.start, window.stop) for window in flat if window.name == name]
        covered = [element for start, stop in parts for element in range(start, stop)]
        assert covered == list(range(numel))
    assert [window.name for window in flat] == sorted((window.name for window in flat), key=int)
