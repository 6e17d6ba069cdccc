"""The learning rate as a pure function of the completed steps.

The whole-run curve does not know the stages: Gong et al. 2019 (section 4) keep the learning rate
at a switch. A boundary may dip below the curve and come back to it.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stacking_ds.errors import ConfigError, StageError
from stacking_ds.records import Record
from stacking_ds.schedule.stages import Steps, StepsOrNone

_REWARM_START = 0.1
_PICTURE_COLUMNS, _PICTURE_ROWS = 60, 8


class ScheduleSection(Record):
    """The learning rate over the whole run, and what a boundary does to it."""

    shape: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """The curve after the warm-up: down to `final_ratio` in a line or a cosine, level, or level and
    then down in a line (`wsd`)."""
    warmup_steps: StepsOrNone = 0
    """Steps of the rise to the peak; 0 starts at the peak."""
    decay_steps: Steps | None = None
    """Steps of the final decay; for `wsd` only."""
    final_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate of the last step as a fraction of the peak; `constant` never uses it."""
    at_boundary: Literal["continue", "rewarm"] = "continue"
    """`continue` leaves the curve alone; `rewarm` climbs back to it from a tenth."""
    rewarm_steps: StepsOrNone = 0
    """Steps of that climb; for `rewarm` only."""

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        for switch, chosen, key, steps in (
            ("shape", "wsd", "decay_steps", self.decay_steps),
            ("at_boundary", "rewarm", "rewarm_steps", self.rewarm_steps),
        ):
            if getattr(self, switch) == chosen and not steps:
                raise ValueError(f"{switch}={chosen} needs {key} of at least 1; set it")
            if getattr(self, switch) != chosen and steps:
                raise ValueError(
                    f"{key}={steps} has no effect with {switch}={getattr(self, switch)}; delete "
                    f"it, or set {switch}={chosen}"
                )
        return self


# One value per step; W warm-up steps, T steps in all, D decay steps, boundary b, R rewarm steps.
#
#   peak  |      . o .                    .  o - - - - - o .
#         |    .       .  linear        .     constant,      .
#         |  .           .            .       wsd until        .  wsd
#         | .              .         .        T-D-1              .
#   final |                  o                                     o
#         +-|------|---------|-       |------|-----------|---------|-
#           0     W-1       T-1       0     W-1        T-D-1      T-1
#
#   rewarm:  curve - - - .            . - - - o      at b: a tenth of the curve
#                         |         .                at b+R: the curve again
#                         |  .
#                       b-1 b                b+R
#
# The first step already moves (peak / W, never 0), step W-1 has the peak, step T-1 has
# final_ratio * peak. Cosine joins the same ends as linear.


@dataclass(frozen=True)
class LearningRateSchedule:
    """A recipe's curve over the steps of a run. Sources: linear warm-up and decay, Devlin et al.
    2019, A.2; warmup-stable-decay, Hu et al. 2024 (MiniCPM), section 4, here with a linear decay.

    Raises:
        ConfigError: parts that do not fit into the run.
    """

    section: ScheduleSection
    total_steps: int
    """Steps of the whole run, all stages together."""
    peaks: tuple[tuple[int, float], ...]
    """The learning rate at the top of the curve from a step on, the first from step 0: a phase with
    another batch may have another."""
    boundaries: tuple[int, ...] = ()
    """Steps before which the model grows."""

    def __post_init__(self) -> None:
        assert list(self.boundaries) == sorted({b for b in self.boundaries if b < self.total_steps})
        warmup_steps, decay_steps = self.section.warmup_steps, self.section.decay_steps or 0
        # the peak is the last step of the warm-up, or a step of its own where there is none
        if max(warmup_steps, 1) + decay_steps > self.total_steps:
            raise ConfigError(
                f"warmup_steps={warmup_steps} and decay_steps={decay_steps} leave no step at "
                f"the peak within the {self.total_steps} steps of the run; shorten them or train "
                f"longer"
            )
        ends = [*self.boundaries[1:], self.total_steps]
        for start, end in zip(self.boundaries, ends, strict=False):
            if start + self.section.rewarm_steps > end:
                raise ConfigError(
                    f"rewarm_steps={self.section.rewarm_steps} is longer than the {end - start} "
                    f"steps of the stage that starts at step {start}; shorten it or lengthen that "
                    f"stage"
                )

    def at(self, step: int) -> float:
        """The learning rate of the step that starts after `step` completed steps.

        Raises:
            StageError: `step` is negative, or the run is over by then.
        """
        if not 0 <= step < self.total_steps:
            raise StageError(
                f"no learning rate at step {step}: the schedule has steps 0 to "
                f"{self.total_steps - 1}"
            )
        peak = [peak for start_step, peak in self.peaks if start_step <= step][-1]
        return peak * (self._curve(step) * self._dip(step))

    def _curve(self, step: int) -> float:
        section, last = self.section, self.total_steps - 1
        if step < section.warmup_steps:
            return (step + 1) / section.warmup_steps
        if section.shape == "constant":
            return 1.0
        top = max(section.warmup_steps - 1, 0)
        if section.shape == "wsd":
            top = last - (section.decay_steps or 0)
        progress = max(step - top, 0) / max(last - top, 1)
        if section.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1.0 - (1.0 - section.final_ratio) * progress

    def _dip(self, step: int) -> float:
        since = [step - boundary for boundary in self.boundaries if boundary <= step]
        rewarm_steps = self.section.rewarm_steps
        if not since or since[-1] >= rewarm_steps:
            return 1.0
        return _REWARM_START + (1.0 - _REWARM_START) * since[-1] / rewarm_steps

    def draw(self) -> str:
        """The curve as text: steps to the right, learning rate upwards, "|" where it grows."""
        columns = min(_PICTURE_COLUMNS, self.total_steps)
        # first and last column are the first and last step
        last = self.total_steps - 1
        steps = [round(column * last / max(columns - 1, 1)) for column in range(columns)]
        top = max(peak for _, peak in self.peaks)
        rows = [max(1, math.ceil(_PICTURE_ROWS * self.at(step) / top - 1e-9)) for step in steps]
        grows = {next(c for c in range(columns) if steps[c] >= b) for b in self.boundaries}
        lines = []
        for row in range(_PICTURE_ROWS, 0, -1):
            label = f"{top * row / _PICTURE_ROWS:9.2e}"
            cells = ["*" if rows[c] == row else "|" if c in grows else " " for c in range(columns)]
            lines.append(f"{label} |{''.join(cells)}".rstrip())
        lines.append(f"{'step':>9}  0" + (f"{last:>{columns - 1}}" if last else ""))
        return "\n".join(lines)
