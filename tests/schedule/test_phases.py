"""Phases: which rows a step reads, whatever stages there are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.errors import ConfigError, StageError
from stacking_ds.schedule.phases import PhaseSchedule

BERT = PhaseSchedule.from_shapes([(0, 128, 256, 32), (900, 512, 128, 8)])

shapes = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([16, 32, 64]), st.integers(1, 9)), max_size=5
).map(
    lambda later: [
        (0, 16, 4, 4),
        *(
            (sum(gap for gap, _, _ in later[: index + 1]), length, rows, rows)
            for index, (_, length, rows) in enumerate(later)
        ),
    ]
)


def test_a_step_has_the_shape_of_its_phase() -> None:
    assert [BERT.at(step).sequence_length for step in (0, 899, 900, 5000)] == [128, 128, 512, 512]
    assert BERT.at(899).first_row(899) == 899 * 256
    assert BERT.at(900).first_row(900) == 0, "rows of another length have an order of their own"
    assert BERT.draw().splitlines() == [
        "phase 0 from step 0: 256 rows of 128 tokens a step",
        "phase 1 from step 900: 128 rows of 512 tokens a step",
    ]


def test_the_longest_rows_are_those_that_were_trained() -> None:
    assert [BERT.longest(step) for step in (0, 1, 900, 901, 9000)] == [128, 128, 128, 512, 512]
    back = PhaseSchedule.from_shapes([(0, 64, 4, 4), (10, 32, 4, 4)])
    assert back.longest(20) == 64


def test_a_length_that_comes_back_goes_on_where_it_stopped() -> None:
    schedule = PhaseSchedule.from_shapes([(0, 16, 4, 4), (10, 32, 2, 2), (15, 16, 8, 4)])
    assert schedule.at(15).first_row(15) == 40
    assert schedule.at(16).first_row(16) == 48


@given(shapes=shapes, end=st.integers(1, 250))
def test_no_row_of_a_length_is_read_twice_or_left_out(shapes, end) -> None:
    schedule = PhaseSchedule.from_shapes(shapes)
    read: dict[int, list[int]] = {}
    slots = 0
    for step in range(end):
        phase = schedule.at(step)
        first = phase.first_row(step)
        rows = range(first, first + phase.global_batch_size)
        read.setdefault(phase.sequence_length, []).extend(rows)
        slots += phase.slots_per_step
    for rows in read.values():
        assert rows == list(range(len(rows)))
    assert schedule.slots(end) == slots
    for length in (16, 32, 64):
        assert schedule.rows(end, length) == len(read.get(length, []))
    # the phases between two steps tile them
    tiles = [(phase.start_step, stop) for phase, stop in schedule.between(0, end)]
    assert tiles[0][0] == 0
    assert tiles[-1][1] == end
    assert all(one[1] == other[0] for one, other in itertools.pairwise(tiles))


@given(shapes=shapes, start=st.integers(0, 100), tokens=st.integers(1, 20_000))
def test_steps_for_tokens_are_the_fewest(shapes, start, tokens) -> None:
    schedule = PhaseSchedule.from_shapes(shapes)
    steps = schedule.steps_for_tokens(tokens, start)
    assert schedule.slots(start + steps) - schedule.slots(start) >= tokens
    assert schedule.slots(start + steps - 1) - schedule.slots(start) < tokens


def test_phases_out_of_order_and_no_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="phase 2 starts at step 5, not after the 5"):
        PhaseSchedule.from_shapes([(0, 16, 4, 4), (5, 32, 4, 4), (5, 16, 4, 4)])
    with pytest.raises(StageError, match="tokens=0 must be at least 1"):
        BERT.steps_for_tokens(0, 0)
