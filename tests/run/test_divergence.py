"""Has a run learned, or diverged: courses that were measured, and each kind that can be told."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from stacking_ds.run.metrics_file import Course

FLOOR = 6.415  # of word frequencies in the demo, with a vocabulary of 4,096


def _lines(
    heldout: Sequence[float | None],
    *,
    stages: Sequence[int] = (),
    train: Sequence[float] = (),
    floor: float = FLOOR,
    blind: float | None = math.log(4096),
) -> list[dict[str, Any]]:
    """An evaluation every 20 steps."""
    lines = []
    for index, loss in enumerate(heldout):
        stage = stages[index] if stages else 0
        line: dict[str, Any] = {"step": 20 * (index + 1), "stage": stage}
        line |= {"num_hidden_layers": 2 << stage, "eval/mlm_loss": loss}
        line |= {"eval/unigram_mlm_loss": floor, "eval/uniform_mlm_loss": blind}
        if train or loss is not None:
            line["train/mlm_loss"] = train[index] if train else loss
        lines.append(line)
    return lines


_TO_200 = [7.735, 6.601, 6.521, 6.448, 6.413, 6.323, 6.247, 6.209, 6.170, 6.132]
_STACKED = [6.143, 6.112, 6.094, 6.051, 6.035, 6.074, 6.039, 6.035, 6.007, 5.999]
_RANDOM = [6.631, 6.551, 6.524, 6.492, 6.478, 6.859, 6.515, 6.498, 6.483, 6.477]
_STAGES = [0] * 10 + [1] * 5 + [2] * 5


def _states(lines: Sequence[dict[str, Any]]) -> list[str]:
    course = Course()
    return [course.add(line).state for line in lines]


def test_a_run_that_grows_and_learns_is_never_called_diverged() -> None:
    # docs/results/growth_against_random.md, seed 1
    states = _states(_lines(_TO_200 + _STACKED, stages=_STAGES))
    assert states[:4] == ["no better than word frequencies"] * 4, "it has not left the plateau yet"
    assert states[5:] == ["learning"] * 15
    # docs/results/demo.md
    demo = _lines([6.039, 5.972, 5.753], stages=[0, 1, 2], train=[6.01, 5.94, 5.72])
    assert _states(demo) == ["learning"] * 3


def test_a_boundary_that_throws_a_run_back_is_named() -> None:
    # the same table: layers drawn anew at each boundary
    lines = _lines(_TO_200 + _RANDOM, stages=_STAGES)
    assert _states(lines)[10:] == ["diverged"] * 10
    found = Course(lines).judgement
    assert found.why == (
        "held-out MLM loss is 6.477 at step 400, and was 6.132 at step 200, before it grew from 2 "
        "to 8 layers; word frequencies alone give 6.415"
    )
    assert "lower optimizer.learning_rate" in found.sentence
    # 2 -> 8 layers at once at the demo's learning rate
    hop = Course(_lines([6.52, 6.31, 6.77, 6.77], stages=[0, 0, 1, 1])).judgement
    assert hop.state == "diverged"
    assert "was 6.310 at step 40, before it grew from 2 to 4 layers" in hop.why


def test_what_diverged_before_a_boundary_is_not_the_boundarys_doing() -> None:
    found = Course(_lines([6.2, 6.9, 6.8], stages=[0, 0, 1])).judgement
    assert found.state == "diverged"
    assert "6.800 at step 60, and was 6.200 at step 20; word frequencies" in found.why
    assert "grew" not in found.sentence


@pytest.mark.parametrize(
    ("lines", "state", "why"),
    [
        (_lines([46412.8, 62319.2]), "diverged", "62,319.200 at step 40, and a blind guess"),
        (_lines([9.4]), "diverged", "9.400 at step 20, and a blind guess"),
        (_lines([8.9]), "no better than word frequencies", "8.900"),  # fresh weights
        (_lines([6.2, None]), "diverged", "not finite at step 40"),
        (_lines([6.2, math.inf]), "diverged", "not finite at step 40"),
        # a high learning rate, docs/results/lamb_against_adamw.md
        (
            _lines([6.7663, 6.7417, 6.7302, 6.7263], floor=6.721),
            "no better than word frequencies",
            "6.726",
        ),
        (
            _lines([6.40, 6.43]),
            "no better than word frequencies",
            "6.430",
        ),  # to and fro on the plateau
        (_lines([2.5, 2.6], floor=7.3), "learning", "2.600"),
        (_lines([2.5, 5.2], floor=7.3, train=[2.4, 5.1]), "diverged", "5.200"),
        (_lines([2.5, 2.5], floor=7.3, train=[2.4, 4.5]), "diverged", "train MLM loss is 4.500"),
        (_lines([5.5, 8.0], train=[5.0, 0.4]), "overfitted", "train MLM loss 0.400"),
        (_lines([12.0], train=[0.1]), "overfitted", "train MLM loss 0.100"),
        # another sequence length has another floor
        ([*_lines([5.9], floor=6.4), *_lines([6.6], floor=7.1)], "learning", "6.600"),
        ([], "not evaluated", "no held-out loss"),
        ([{"step": 1}, {}, {"step": 2, "train/mlm_loss": "x"}], "not evaluated", "no held-out"),
        # lines of earlier versions
        (_lines([6.2, 6.9], blind=None), "diverged", "6.900"),
        (_lines([46412.8], blind=None), "no better than word frequencies", "46,412.800"),
    ],
)
def test_each_kind_is_told(lines: list[dict[str, Any]], state: str, why: str) -> None:
    found = Course(lines).judgement
    assert found.state == state
    assert why in found.why


def test_what_comes_back_has_recovered() -> None:
    assert _states(_lines([6.2, 6.9, 6.1])) == ["learning", "diverged", "learning"]
    lines = [
        {"step": step, "train/mlm_loss": loss} for step, loss in ((1, 6.0), (2, 9.0), (3, 6.1))
    ]
    assert _states(lines) == ["not evaluated", "diverged", "not evaluated"]
    [warning] = {Course(lines[:2]).judgement.warning}
    assert warning is not None
    assert warning.startswith("the run has diverged: train MLM loss is 9.000 at step 2, and was 6")
    assert Course(lines).judgement.warning is None
