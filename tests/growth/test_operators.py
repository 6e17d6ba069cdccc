"""The layer maps, laid out like their pictures, and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.errors import StageError
from stacking_ds.growth.operators import OPERATORS, layer_map, source_name


def test_stack_is_the_encoder_again_on_top_of_itself() -> None:
    # fmt: off
    assert layer_map("stack", 3, 6)  == (0, 1, 2,
                                         0, 1, 2)
    assert layer_map("stack", 3, 8)  == (0, 1, 2,
                                         0, 1, 2,
                                         0, 1)
    assert layer_map("stack", 1, 4)  == (0, 0, 0, 0)
    assert layer_map("stack", 3, 4)  == (0, 1, 2, 0)
    # fmt: on


def test_interleave_repeats_every_layer_in_place() -> None:
    # fmt: off
    assert layer_map("interleave", 3, 6) == (0, 0,  1, 1,  2, 2)
    assert layer_map("interleave", 2, 6) == (0, 0, 0,  1, 1, 1)
    # fmt: on


@given(st.sampled_from(sorted(OPERATORS)), st.integers(1, 40), st.integers(2, 6))
def test_every_old_layer_is_copied_equally_often(
    operator: str, old_depth: int, copies: int
) -> None:
    layers = layer_map(operator, old_depth, old_depth * copies)
    assert sorted(layers) == sorted(list(range(old_depth)) * copies)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 6))
def test_stacking_in_two_leaps_is_stacking_in_one(old: int, more: int, copies: int) -> None:
    middle = old * copies
    first = layer_map("stack", old, middle)
    second = layer_map("stack", middle, middle + more)
    assert tuple(first[layer] for layer in second) == layer_map("stack", old, middle + more)


@pytest.mark.parametrize(("old_depth", "new_depth"), [(4, 4), (4, 2), (0, 2)])
def test_a_depth_that_does_not_grow_is_refused(old_depth: int, new_depth: int) -> None:
    with pytest.raises(StageError, match=f"{new_depth} layers cannot grow from one of {old_depth}"):
        layer_map("stack", old_depth, new_depth)


def test_interleave_names_the_depths_it_reaches() -> None:
    with pytest.raises(StageError, match=r"do not reach 8; make the depth 6 or 9.*stack"):
        layer_map("interleave", 3, 8)
    with pytest.raises(StageError, match="do not reach 4; make the depth 6, "):
        layer_map("interleave", 3, 4)


def test_an_unknown_operator_is_refused_with_the_nearest() -> None:
    with pytest.raises(StageError, match=r"'stak' does not exist.*nearest: stack"):
        layer_map("stak", 2, 4)


def test_names_follow_the_map_inside_the_layers_only() -> None:
    layers = layer_map("stack", 2, 12)
    inside = "bert.encoder.layer.11.attention.self.query.weight"
    assert source_name(inside, layers) == "bert.encoder.layer.1.attention.self.query.weight"
    assert source_name(inside, None) == inside
    assert source_name("bert.pooler.dense.bias", layers) == "bert.pooler.dense.bias"
    with pytest.raises(StageError, match=r"layer\.12\."):
        source_name("bert.encoder.layer.12.output.dense.bias", layers)
