"""The stage schedule, laid out like the picture in stages.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.errors import StageError
from stacking_ds.schedule.stages import Stage, StageSchedule

SCHEDULE = StageSchedule.from_depths([(2, 3), (4, 2), (8, 4)])

# fmt: off
STEPS  = [0, 1, 2, 3, 4, 5, 6, 7, 8]
DEPTHS = [2, 2, 2, 4, 4, 8, 8, 8, 8]
STAGES = [0, 0, 0, 1, 1, 2, 2, 2, 2]
# fmt: on


def test_every_step_has_the_pictured_stage_and_depth() -> None:
    assert list(range(SCHEDULE.total_steps)) == STEPS
    assert [SCHEDULE.at(step).num_hidden_layers for step in STEPS] == DEPTHS
    assert [SCHEDULE.at(step).index for step in STEPS] == STAGES


def test_stages_hold_their_steps() -> None:
    assert SCHEDULE.stages == (Stage(0, 2, 0, 3), Stage(1, 4, 3, 5), Stage(2, 8, 5, 9))
    assert [stage.steps for stage in SCHEDULE.stages] == [3, 2, 4]
    assert SCHEDULE.boundaries == (3, 5)


def test_around_the_boundary_and_the_end() -> None:
    boundary, last = 3, 8
    assert SCHEDULE.at(boundary - 1).index == 0
    assert SCHEDULE.at(boundary).index == 1
    assert SCHEDULE.at(boundary + 1).index == 1
    assert SCHEDULE.at(last).index == 2
    with pytest.raises(StageError, match=r"no stage trains step 9: .* 0 to 8"):
        SCHEDULE.at(last + 1)
    with pytest.raises(StageError, match="step -1"):
        SCHEDULE.at(-1)


LEFT_AFTER = [
    (0, [0, 1, 2]),
    (2, [0, 1, 2]),
    (3, [1, 2]),
    (4, [1, 2]),
    (5, [2]),
    (8, [2]),
    (9, []),
]


@pytest.mark.parametrize(("step", "left"), LEFT_AFTER)
def test_remaining_stages(step: int, left: list[int]) -> None:
    assert [stage.index for stage in SCHEDULE.remaining(step)] == left


@pytest.mark.parametrize("step", [-1, 10])
def test_remaining_refuses_steps_of_another_schedule(step: int) -> None:
    with pytest.raises(StageError, match=rf"^{step} completed steps .* of 9 steps"):
        SCHEDULE.remaining(step)


def test_cost_in_layer_steps() -> None:
    assert SCHEDULE.layer_steps == 2 * 3 + 4 * 2 + 8 * 4
    assert SCHEDULE.full_depth_layer_steps == 8 * 9


def test_the_papers_schedule() -> None:
    gong = StageSchedule.from_depths([(3, 50_000), (6, 70_000), (12, 280_000)])
    assert gong.boundaries == (50_000, 120_000)
    assert gong.layer_steps / gong.full_depth_layer_steps == pytest.approx(0.81875)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "no stage"),
        ([(2, 0)], "stage 0 has num_hidden_layers=2 and steps=0"),
        ([(0, 5)], "stage 0 has num_hidden_layers=0 and steps=5"),
        ([(2, 5), (4, -1)], "stage 1 has num_hidden_layers=4 and steps=-1"),
        ([(2, 5), (2, 7)], "stage 1 has num_hidden_layers=2 after the 2 of stage 0.*its 7 steps"),
        ([(2, 5), (4, 5), (3, 5)], "stage 2 has num_hidden_layers=3 after the 4 of stage 1"),
    ],
)
def test_impossible_schedules(stages: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(StageError, match=message):
        StageSchedule.from_depths(stages)


def test_the_picture() -> None:
    drawn = StageSchedule.from_depths([(2, 60), (4, 60), (12, 120)]).draw()
    assert drawn.splitlines() == [
        "layers",
        "    12 |" + " " * 30 + "=" * 30,
        "     4 |" + " " * 15 + "=" * 15,
        "     2 |" + "=" * 15,
        "  step  0              60             120                           240",
    ]


def test_the_picture_never_runs_two_numbers_together() -> None:
    drawn = StageSchedule.from_depths([(2, 10_000), (3, 1), (4, 1), (5, 1)]).draw()
    assert drawn.splitlines()[-1].split() == ["step", "0", "10000", "10001", "10002", "10003"]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=6).map(
        lambda rises: [
            (sum(rise for rise, _ in rises[: index + 1]), steps)
            for index, (_, steps) in enumerate(rises)
        ]
    )
)
def test_stages_tile_the_run(stages: list[tuple[int, int]]) -> None:
    schedule = StageSchedule.from_depths(stages)
    depths = [depth for depth, steps in stages for _ in range(steps)]
    assert [schedule.at(step).num_hidden_layers for step in range(len(depths))] == depths
    assert schedule.total_steps == len(depths)
    assert schedule.layer_steps == sum(depths)
    for step in range(len(depths)):
        assert next(schedule.remaining(step)) == schedule.at(step)
