"""What is counted: true sums, means and rates."""

import math

import pytest

from stacking_ds.schedule.phases import PhaseSchedule
from stacking_ds.train.metrics import Interval, TrainState, metrics_line
from stacking_ds.train.step import StepResult


def _result(mlm_loss: float, tokens: int, grad_norm: float = 1.0) -> StepResult:
    return StepResult(mlm_loss, 0.5, 30, tokens, grad_norm, 1e-3)


def test_a_state_counts_steps_and_starts_anew_at_a_boundary() -> None:
    state = TrainState()
    state.count(_result(3.0, 100), samples=8, seconds=2.0)
    state.count(_result(2.0, 50, math.inf), samples=8, seconds=1.0)
    assert (state.step, state.samples_seen, state.tokens_seen) == (2, 16, 150)
    assert (state.stage_tokens, state.stage_train_seconds, state.skipped_steps) == (150, 3.0, 1)
    state.enter(1, boundary_seconds=0.25)
    assert (state.stage_index, state.boundary_seconds) == (1, 0.25)
    assert (state.stage_tokens, state.stage_train_seconds) == (0, 0.0)
    assert (state.step, state.tokens_seen, state.skipped_steps) == (2, 150, 1)


def test_a_line_is_the_mean_of_its_steps() -> None:
    state, interval = TrainState(), Interval()
    for mlm_loss, tokens, seconds in ((4.0, 100, 1.0), (2.0, 300, 3.0)):
        result = _result(mlm_loss, tokens)
        state.count(result, samples=8, seconds=seconds)
        interval.count(result, seconds, waited_seconds=seconds / 8)
    line = metrics_line(
        state,
        interval,
        PhaseSchedule.from_shapes([(0, 8, 4, 4), (1, 16, 10, 4)]).phases[1],
        num_hidden_layers=2,
        flops_per_token=1e6,
        peak_flops_per_second=1e9,
        remaining_work=12 * 160,
        extra={"eval/mlm_loss": 5.0},
    )
    assert line["train/mlm_loss"] == 3.0
    assert line["train/loss"] == 3.5
    assert line["speed/tokens_per_second"] == 100.0
    assert line["speed/step_seconds"] == 2.0
    assert line["speed/model_flops_utilization"] == pytest.approx(0.1)
    assert line["speed/data_wait_share"] == 0.125
    assert (line["phase"], line["sequence_length"]) == (1, 16)
    # 4 seconds trained 2 steps of 2 layers: a second a layer, and 12 layers of such steps to go
    assert line["speed/remaining_seconds"] == 12.0
    assert line["eval/mlm_loss"] == 5.0
