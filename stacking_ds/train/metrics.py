"""Metrics: counted while a run trains, and made into a line for the sinks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stacking_ds.schedule.phases import Phase
from stacking_ds.train.step import StepResult


@dataclass
class TrainState:
    """The state of a run besides its weights and moments; saved with every checkpoint."""

    step: int = 0
    """Completed steps; a step that fp16 loss scaling skips counts, since its batch is consumed."""
    stage_index: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    """Real tokens, padding excluded."""
    wall_seconds: float = 0.0
    """From `train`'s start to now, everything included but the time between interruptions."""
    stage_tokens: int = 0
    stage_train_seconds: float = 0.0
    """Time in this stage's steps alone."""
    boundary_seconds: float = 0.0
    """How long the boundary before this stage took."""
    skipped_steps: int = 0
    """Steps whose gradient overflowed fp16 and moved nothing."""
    empty_steps: int = 0
    """Steps whose batch had nothing to predict, and moved nothing either."""

    def enter(self, stage_index: int, boundary_seconds: float) -> None:
        """The boundary is done; the counts of the new stage begin."""
        self.stage_index, self.boundary_seconds = stage_index, boundary_seconds
        self.stage_tokens, self.stage_train_seconds = 0, 0.0

    def count(self, result: StepResult, samples: int, seconds: float) -> None:
        """One more completed step."""
        self.step += 1
        self.samples_seen += samples
        self.tokens_seen += result.tokens
        self.stage_tokens += result.tokens
        self.stage_train_seconds += seconds
        self.skipped_steps += not math.isfinite(result.grad_norm)
        self.empty_steps += result.loss is None


@dataclass
class Interval:
    """The steps since the last line of metrics."""

    results: list[StepResult] = field(default_factory=list)
    seconds: float = 0.0
    waited_seconds: float = 0.0
    """The part of them in which this rank waited for its batch."""

    def count(self, result: StepResult, seconds: float, waited_seconds: float = 0.0) -> None:
        self.results.append(result)
        self.seconds += seconds
        self.waited_seconds += waited_seconds

    @property
    def steps(self) -> int:
        return len(self.results)

    @property
    def tokens(self) -> int:
        """Of steps that computed something."""
        return sum(result.tokens for result in self.results if result.loss is not None)

    @property
    def mlm_targets(self) -> int:
        return sum(result.mlm_targets for result in self.results)

    def means(self) -> dict[str, float]:
        """The losses, each over the steps that have it; without those that no step has."""
        found: dict[str, float] = {}
        for name in ("loss", "mlm_loss", "nsp_loss"):
            values = [getattr(result, name) for result in self.results]
            there = [value for value in values if value is not None]
            if there:
                found[f"train/{name}"] = float(sum(there)) / len(there)
        return found


def metrics_line(
    state: TrainState,
    interval: Interval,
    phase: Phase,
    *,
    num_hidden_layers: int,
    flops_per_token: float,
    peak_flops_per_second: float,
    remaining_work: int,
    extra: Mapping[str, float],
) -> dict[str, Any]:
    """One line of `metrics.jsonl`.

    Args:
        flops_per_token: model FLOPs (forward and backward) of a real token.
        peak_flops_per_second: measured matmul peak of all ranks together.
        remaining_work: layers times slots, summed over the steps to come; a step's time is taken
            to grow with their product.
        extra: further metrics, e.g. of an evaluation.
    """
    tokens_per_second = interval.tokens / interval.seconds
    work = interval.steps * num_hidden_layers * phase.slots_per_step
    return {
        "step": state.step,
        "stage": state.stage_index,
        "num_hidden_layers": num_hidden_layers,
        "phase": phase.index,
        "sequence_length": phase.sequence_length,
        "samples_seen": state.samples_seen,
        "tokens_seen": state.tokens_seen,
        **interval.means(),
        "optim/learning_rate": interval.results[-1].learning_rate,
        "optim/grad_norm": interval.results[-1].grad_norm,
        "optim/skipped_steps": state.skipped_steps,
        "optim/empty_steps": state.empty_steps,
        "speed/tokens_per_second": tokens_per_second,
        "speed/step_seconds": interval.seconds / interval.steps,
        "speed/data_wait_share": interval.waited_seconds / interval.seconds,
        "speed/model_flops_utilization": flops_per_token
        * tokens_per_second
        / peak_flops_per_second,
        "speed/remaining_seconds": interval.seconds / work * remaining_work,
        "stage/tokens": state.stage_tokens,
        "stage/train_seconds": state.stage_train_seconds,
        "stage/boundary_seconds": state.boundary_seconds,
        "wall_seconds": state.wall_seconds,
        **extra,
    }
