"""The learning rate as a pure function of the completed steps.

The whole-run curve does not know the stages: Gong et al. 2019 (section 4) keep the learning rate
at a switch. A boundary may dip below the curve and come back to it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from stacking_ds.errors import ConfigError, StageError

Shape = Literal["linear", "cosine", "constant", "wsd"]
AtBoundary = Literal["continue", "rewarm"]

_REWARM_START = 0.1
_PICTURE_COLUMNS, _PICTURE_ROWS = 60, 8

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


def learning_rate_at(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    shape: Shape,
    final_ratio: float,
    decay_steps: int | None = None,
    boundaries: Sequence[int] = (),
    at_boundary: AtBoundary = "continue",
    rewarm_steps: int = 0,
) -> float:
    """The learning rate of the step that starts after `step` completed steps.

    The arguments are those of `LearningRateSchedule`, which also validates them. Sources: linear
    warm-up and decay, Devlin et al. 2019, A.2; warmup-stable-decay, Hu et al. 2024 (MiniCPM),
    section 4, here with a linear decay.

    Raises:
        StageError: `step` is negative, or the run is over by then.
    """
    if not 0 <= step < total_steps:
        raise StageError(
            f"no learning rate at step {step}: the schedule has steps 0 to {total_steps - 1}"
        )
    if step < warmup_steps:
        ratio = (step + 1) / warmup_steps
    elif shape == "constant":
        ratio = 1.0
    else:
        last = total_steps - 1
        top = last - (decay_steps or 0) if shape == "wsd" else max(warmup_steps - 1, 0)
        progress = max(step - top, 0) / max(last - top, 1)
        fallen = (1 - math.cos(math.pi * progress)) / 2 if shape == "cosine" else progress
        ratio = 1.0 - (1.0 - final_ratio) * fallen
    if at_boundary == "rewarm":
        ratio *= _rewarm_ratio(step, boundaries, rewarm_steps)
    return peak * ratio


def _rewarm_ratio(step: int, boundaries: Sequence[int], rewarm_steps: int) -> float:
    since = min((step - boundary for boundary in boundaries if boundary <= step), default=None)
    if since is None or since >= rewarm_steps:
        return 1.0
    return _REWARM_START + (1.0 - _REWARM_START) * since / rewarm_steps


@dataclass(frozen=True)
class LearningRateSchedule:
    """A learning-rate schedule that can be trained.

    Raises:
        ConfigError: an unknown shape or boundary policy, a value out of range, or parts that do
            not fit into the run.
    """

    peak: float
    """Learning rate at the top of the curve."""
    total_steps: int
    """Steps of the whole run, all stages together."""
    warmup_steps: int
    """Steps of the rise to the peak; 0 starts at the peak."""
    shape: Shape
    final_ratio: float
    """Learning rate of the last step as a fraction of the peak; `constant` never uses it."""
    decay_steps: int | None = None
    """Steps of the final decay of `wsd`, and of `wsd` only."""
    boundaries: tuple[int, ...] = ()
    """Steps before which the model grows."""
    at_boundary: AtBoundary = "continue"
    """`continue` leaves the curve alone; `rewarm` climbs back to it from a tenth."""
    rewarm_steps: int = 0
    """Steps of that climb; for `rewarm` only."""
    later_peaks: tuple[tuple[int, float], ...] = ()
    """From which step on the peak is another one, since the phase has another batch."""

    def __post_init__(self) -> None:
        assert list(self.boundaries) == sorted({b for b in self.boundaries if b < self.total_steps})
        if self.shape not in get_args(Shape):
            raise ConfigError(f"schedule shape {self.shape!r} must be one of {get_args(Shape)}")
        if self.at_boundary not in get_args(AtBoundary):
            raise ConfigError(
                f"at_boundary={self.at_boundary!r} must be one of {get_args(AtBoundary)}"
            )
        if not (self.peak > 0 and 0 <= self.final_ratio <= 1 and self.total_steps >= 1):
            raise ConfigError(
                f"a schedule needs peak > 0, final_ratio from 0 to 1 and total_steps >= 1; got "
                f"peak={self.peak}, final_ratio={self.final_ratio}, total_steps={self.total_steps}"
            )
        self._check_parts()
        if self.at_boundary == "rewarm":
            self._check_rewarm()
        elif self.rewarm_steps:
            raise ConfigError(
                f"rewarm_steps={self.rewarm_steps} has no effect with at_boundary='continue'; "
                f"set at_boundary='rewarm' or remove it"
            )

    def _check_parts(self) -> None:
        decays = self.shape == "wsd"
        if decays != (self.decay_steps is not None):
            remedy = "set it" if decays else "remove it, or use shape='wsd'"
            raise ConfigError(
                f"decay_steps={self.decay_steps} does not fit shape={self.shape!r}; {remedy}"
            )
        decay_steps = self.decay_steps or 0
        if self.warmup_steps < 0 or decay_steps < int(decays):
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} must be at least 0, and "
                f"decay_steps={self.decay_steps} at least 1"
            )
        # the peak is the last step of the warm-up, or a step of its own where there is none
        if max(self.warmup_steps, 1) + decay_steps > self.total_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} and decay_steps={decay_steps} leave no step at "
                f"the peak within the {self.total_steps} steps of the run; shorten them or train "
                f"longer"
            )

    def _check_rewarm(self) -> None:
        if self.rewarm_steps < 1:
            raise ConfigError("at_boundary='rewarm' needs rewarm_steps of at least 1")
        ends = [*self.boundaries[1:], self.total_steps]
        for start, end in zip(self.boundaries, ends, strict=False):
            if start + self.rewarm_steps > end:
                raise ConfigError(
                    f"rewarm_steps={self.rewarm_steps} is longer than the {end - start} steps of "
                    f"the stage that starts at step {start}; shorten it or lengthen that stage"
                )

    def at(self, step: int) -> float:
        """The learning rate of the step that starts after `step` completed steps.

        Raises:
            StageError: `step` is negative, or the run is over by then.
        """
        changes = [peak for start_step, peak in self.later_peaks if start_step <= step]
        settings = asdict(self) | {"peak": [self.peak, *changes][-1]}
        del settings["later_peaks"]
        return learning_rate_at(step, **settings)

    def draw(self) -> str:
        """The curve as text: steps to the right, learning rate upwards, "|" where it grows."""
        columns = min(_PICTURE_COLUMNS, self.total_steps)
        # first and last column are the first and last step
        last = self.total_steps - 1
        steps = [round(column * last / max(columns - 1, 1)) for column in range(columns)]
        top = max([self.peak, *(peak for _, peak in self.later_peaks)])
        rows = [max(1, math.ceil(_PICTURE_ROWS * self.at(step) / top - 1e-9)) for step in steps]
        grows = {next(c for c in range(columns) if steps[c] >= b) for b in self.boundaries}
        lines = []
        for row in range(_PICTURE_ROWS, 0, -1):
            label = f"{top * row / _PICTURE_ROWS:9.2e}"
            cells = ["*" if rows[c] == row else "|" if c in grows else " " for c in range(columns)]
            lines.append(f"{label} |{''.join(cells)}".rstrip())
        lines.append(f"{'step':>9}  0" + (f"{last:>{columns - 1}}" if last else ""))
        return "\n".join(lines)
