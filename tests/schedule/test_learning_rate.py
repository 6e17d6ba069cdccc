"""The learning rate: exact values at exact steps, laid out like the picture, and its bounds."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stacking_ds.errors import ConfigError, StageError
from stacking_ds.schedule.learning_rate import LearningRateSchedule, ScheduleSection

OF_RUN = ("total_steps", "boundaries", "peak")
SETTINGS: dict[str, Any] = {
    **{"peak": 8.0, "total_steps": 10},
    **{"warmup_steps": 4, "shape": "linear", "final_ratio": 0.25},
}


def _schedule(**settings: Any) -> LearningRateSchedule:
    section = ScheduleSection(**{k: v for k, v in settings.items() if k not in OF_RUN})
    return LearningRateSchedule(
        section,
        settings["total_steps"],
        peaks=((0, settings["peak"]),),
        boundaries=settings.get("boundaries", ()),
    )


def _ten(**change: Any) -> LearningRateSchedule:
    return _schedule(**{**SETTINGS, **change})


TEN = _ten()


def _curve(schedule: LearningRateSchedule) -> list[float]:
    return [schedule.at(step) for step in range(schedule.total_steps)]


# fmt: off
CURVES: list[tuple[dict[str, Any], list[float]]] = [
    #                           W-1                  T-1
    ({},                         [2, 4, 6, 8, 7, 6, 5, 4, 3, 2]),
    ({"final_ratio": 1.0},       [2, 4, 6, 8, 8, 8, 8, 8, 8, 8]),
    ({"warmup_steps": 0, "final_ratio": 0.0, "peak": 9.0},
                                 [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
    ({"warmup_steps": 1, "final_ratio": 0.0, "peak": 9.0},
                                 [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
    ({"warmup_steps": 10},       [.8, 1.6, 2.4, 3.2, 4, 4.8, 5.6, 6.4, 7.2, 8]),
    ({"shape": "constant"},      [2, 4, 6, 8, 8, 8, 8, 8, 8, 8]),
    ({"shape": "wsd", "decay_steps": 4, "final_ratio": 0.0},
                                 [2, 4, 6, 8, 8, 8, 6, 4, 2, 0]),
    ({"shape": "wsd", "decay_steps": 6, "final_ratio": 0.25},
                                 [2, 4, 6, 8, 7, 6, 5, 4, 3, 2]),
    ({"shape": "wsd", "decay_steps": 1, "final_ratio": 0.5},
                                 [2, 4, 6, 8, 8, 8, 8, 8, 8, 4]),
    # from 8 to 2 by the cosine of 0, 30, 60, 90, 120, 150, 180 degrees
    ({"shape": "cosine"},        [2, 4, 6, 5 + 3, 5 + 3 * 0.75**0.5, 5 + 3 * 0.5, 5,
                                           5 - 3 * 0.5, 5 - 3 * 0.75**0.5, 5 - 3]),
]
# fmt: on


@pytest.mark.parametrize(("change", "curve"), CURVES)
def test_whole_run_curve(change: dict[str, Any], curve: list[float]) -> None:
    assert _curve(_ten(**change)) == pytest.approx(curve)


def test_continue_keeps_the_learning_rate_at_the_switch() -> None:
    assert _curve(_ten(boundaries=(2, 6))) == _curve(TEN)


def test_rewarm_climbs_from_a_tenth_back_to_the_curve() -> None:
    flat = _schedule(
        peak=1.0, total_steps=10, shape="constant",
        boundaries=(3, 7), at_boundary="rewarm", rewarm_steps=3,
    )  # fmt: skip
    # boundaries                           3              7
    assert _curve(flat) == pytest.approx([1, 1, 1, 0.1, 0.4, 0.7, 1, 0.1, 0.4, 0.7])


def test_rewarm_dips_below_the_curve_of_that_step() -> None:
    dipped = _ten(boundaries=(5,), at_boundary="rewarm", rewarm_steps=2)
    assert _curve(dipped) == pytest.approx([2, 4, 6, 8, 7, 0.1 * 6, 0.55 * 5, 4, 3, 2])


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_outside_the_run(step: int) -> None:
    with pytest.raises(StageError, match=rf"step {step}: the schedule has steps 0 to 9"):
        TEN.at(step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_steps": 11}, "warmup_steps=11 .* within the 10 steps"),
        ({"shape": "wsd", "decay_steps": 7}, "warmup_steps=4 and decay_steps=7 leave no"),
        ({"shape": "wsd", "decay_steps": 10, "warmup_steps": 0}, "leave no step at the peak"),
        (
            {"at_boundary": "rewarm", "rewarm_steps": 4, "boundaries": (2, 5)},
            "rewarm_steps=4 is longer than the 3 steps of the stage that starts at step 2",
        ),
        (
            {"at_boundary": "rewarm", "rewarm_steps": 4, "boundaries": (7,)},
            "rewarm_steps=4 is longer than the 3 steps of the stage that starts at step 7",
        ),
    ],
)
def test_impossible_schedules(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ten(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "poly"}, "shape\n.*'linear'"),
        ({"at_boundary": "jump"}, "at_boundary\n.*'rewarm'"),
        ({"final_ratio": 1.5}, "final_ratio"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"shape": "wsd"}, "shape=wsd needs decay_steps of at least 1; set it"),
        ({"shape": "wsd", "decay_steps": 0}, "decay_steps"),
        ({"decay_steps": 3}, "decay_steps=3 has no effect with shape=linear; delete it, or set"),
        ({"rewarm_steps": 3}, "rewarm_steps=3 has no effect with at_boundary=continue; delete it"),
        ({"at_boundary": "rewarm"}, "at_boundary=rewarm needs rewarm_steps of at least 1; set it"),
    ],
)
def test_impossible_sections(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _ten(**change)


@st.composite
def _schedules(draw: st.DrawFn) -> dict[str, Any]:
    total_steps = draw(st.integers(2, 60))
    shape = draw(st.sampled_from(["linear", "cosine", "constant", "wsd"]))
    decay_steps = draw(st.integers(1, total_steps - 1)) if shape == "wsd" else None
    boundaries = draw(st.lists(st.integers(1, 59), unique=True, max_size=3).map(sorted))
    return {
        "peak": draw(st.floats(1e-6, 1.0)),
        "total_steps": total_steps,
        "warmup_steps": draw(st.integers(0, total_steps - (decay_steps or 0))),
        "shape": shape,
        "final_ratio": draw(st.floats(0.0, 1.0)),
        "decay_steps": decay_steps,
        "boundaries": tuple(boundary for boundary in boundaries if boundary < total_steps),
    }


@given(_schedules())
def test_bounds_continuity_and_ends(settings: dict[str, Any]) -> None:
    schedule, peak = _schedule(**settings), settings["peak"]
    section, curve = schedule.section, _curve(schedule)
    assert max(curve) == pytest.approx(peak)
    assert curve[0] > 0
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in curve)
    rising = section.warmup_steps
    assert curve[:rising] == sorted(curve[:rising])
    falling = curve[max(rising - 1, 0) :]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(falling))
    # no step changes by more than the steepest slope of its part; a cosine is pi/2 steeper
    fall = section.decay_steps or max(schedule.total_steps - max(rising, 1), 1)
    steepest = max(1 / max(rising, 1) if rising else 0, 1.5708 / fall) * peak
    jumps = [abs(b - a) for a, b in pairwise(curve)]
    assert all(jump <= steepest * (1 + 1e-9) for jump in jumps)
    if section.shape != "constant" and rising < schedule.total_steps:
        assert curve[-1] == pytest.approx(section.final_ratio * peak)


@given(_schedules(), st.integers(1, 5))
def test_rewarm_only_ever_dips_and_only_after_a_boundary(
    settings: dict[str, Any], rewarm_steps: int
) -> None:
    schedule = _schedule(**settings)
    try:
        dipped = _schedule(**settings, at_boundary="rewarm", rewarm_steps=rewarm_steps)
    except ConfigError:
        return  # stages too short for it, which test_impossible_schedules covers
    for step in range(schedule.total_steps):
        after = any(0 <= step - boundary < rewarm_steps for boundary in schedule.boundaries)
        whole = schedule.at(step)
        assert dipped.at(step) == whole if not after else dipped.at(step) <= whole
        assert dipped.at(step) >= 0.1 * whole * (1 - 1e-12)


def test_the_picture_shows_the_curve_and_the_boundary() -> None:
    assert _ten(boundaries=(6,)).draw().splitlines() == [
        " 8.00e+00 |   *  |",
        " 7.00e+00 |    * |",
        " 6.00e+00 |  *  *|",
        " 5.00e+00 |      *",
        " 4.00e+00 | *    |*",
        " 3.00e+00 |      | *",
        " 2.00e+00 |*     |  *",
        " 1.00e+00 |      |",
        "     step  0        9",
    ]


def test_the_picture_of_one_step() -> None:
    lone = _schedule(peak=1.0, total_steps=1, shape="constant")
    assert lone.draw().splitlines()[0].endswith("|*")
    assert lone.draw().splitlines()[-1].split() == ["step", "0"]
