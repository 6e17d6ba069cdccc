"""Growth stages: which steps are trained at which depth, and where the boundaries are.

Pure arithmetic: the loop, the learning rate, the plan and the tests ask the same object.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from stacking_ds.errors import StageError

_PICTURE_COLUMNS = 60
_MOST_STEPS = 10**12

Steps = Annotated[int, Field(ge=1, le=_MOST_STEPS)]
StepsOrNone = Annotated[int, Field(ge=0, le=_MOST_STEPS)]


@dataclass(frozen=True)
class Stage:
    """The steps [start_step, end_step) of the run, all trained at one depth."""

    index: int
    num_hidden_layers: int
    start_step: int
    end_step: int

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step


# A schedule of (2 layers, 3 steps), (4 layers, 2 steps), (8 layers, 4 steps):
#
#   completed steps      0   1   2   3   4   5   6   7   8   9
#   trains next at       2   2   2   4   4   8   8   8   8   -
#                        |-- 0 -----|-- 1 --|-- 2 ---------|
#   boundaries                       3       5
#
# A number of completed steps also names the step that starts then. A boundary belongs to the
# deeper stage: at(2) is stage 0, at(3) is stage 1. Growth happens between the two, before the
# step that starts at 3. After 9 steps the run is over, and at(9) is an error, not stage 2.


@dataclass(frozen=True)
class StageSchedule:
    """All stages of a run, in order and without gaps. Build it with `from_depths`."""

    stages: tuple[Stage, ...]

    @classmethod
    def from_depths(cls, stages: Sequence[tuple[int, int]]) -> "StageSchedule":
        """The schedule of these (num_hidden_layers, steps) pairs.

        Raises:
            StageError: no stage, a stage without layers or steps, or a depth that does not grow.
        """
        if not stages:
            raise StageError("the schedule has no stage; give at least one depth and its steps")
        laid: list[Stage] = []
        for index, (num_hidden_layers, steps) in enumerate(stages):
            if num_hidden_layers < 1 or steps < 1:
                raise StageError(
                    f"stage {index} has num_hidden_layers={num_hidden_layers} and steps={steps}; "
                    f"both must be at least 1, so correct the stage or leave it out"
                )
            if laid and num_hidden_layers <= laid[-1].num_hidden_layers:
                raise StageError(
                    f"stage {index} has num_hidden_layers={num_hidden_layers} after the "
                    f"{laid[-1].num_hidden_layers} of stage {index - 1}; depths must grow, so "
                    f"raise it, or add its {steps} steps to stage {index - 1}"
                )
            start_step = laid[-1].end_step if laid else 0
            laid.append(Stage(index, num_hidden_layers, start_step, start_step + steps))
        return cls(tuple(laid))

    def __getitem__(self, index: int) -> Stage:
        return self.stages[index]

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end_step

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The steps before which the model grows, in order; empty for one stage."""
        return tuple(stage.start_step for stage in self.stages[1:])

    def at(self, step: int) -> Stage:
        """The stage that trains the step that starts after `step` completed steps.

        Raises:
            StageError: `step` is negative, or the run is over by then.
        """
        for stage in self.stages:
            if stage.start_step <= step < stage.end_step:
                return stage
        raise StageError(
            f"no stage trains step {step}: the schedule has steps 0 to {self.total_steps - 1}; "
            f"to train longer, start a run whose stages have more steps"
        )

    def remaining(self, step: int) -> Iterator[Stage]:
        """The stages with steps left after `step` completed ones; the first may be half done.

        Nothing remains after the last step.

        Raises:
            StageError: `step` is negative or more than the schedule's steps.
        """
        if not 0 <= step <= self.total_steps:
            raise StageError(
                f"{step} completed steps are outside the schedule of {self.total_steps} steps; "
                f"the state belongs to another schedule, so use the recipe it was trained with"
            )
        return (stage for stage in self.stages if step < stage.end_step)

    @property
    def layer_steps(self) -> int:
        """Encoder layers trained, summed over the steps: a depth-only measure of cost."""
        return sum(stage.num_hidden_layers * stage.steps for stage in self.stages)

    @property
    def full_depth_layer_steps(self) -> int:
        """The cost of as many steps, all at the last stage's depth."""
        return self.stages[-1].num_hidden_layers * self.total_steps

    def draw(self) -> str:
        """The schedule as a staircase of text, widths in proportion to steps.

        layers
             8 |                    =================
             4 |          ==========
             2 |==========
          step  0         60        120              220
        """
        margin = max(6, *(len(str(stage.num_hidden_layers)) for stage in self.stages))
        widths = [
            # never narrower than the number written under it
            max(
                len(str(stage.start_step)) + 1,
                round(_PICTURE_COLUMNS * stage.steps / self.total_steps),
            )
            for stage in self.stages
        ]
        lefts = [sum(widths[:index]) for index in range(len(widths))]
        rows = [
            f"{stage.num_hidden_layers:>{margin}} |{' ' * left}{'=' * width}"
            for stage, left, width in zip(self.stages, lefts, widths, strict=True)
        ]
        axis = "".join(
            f"{stage.start_step:<{width}}" for stage, width in zip(self.stages, widths, strict=True)
        )
        head = f"{'layers':>{margin}}"
        return "\n".join([head, *reversed(rows), f"{'step':>{margin}}  {axis}{self.total_steps}"])
