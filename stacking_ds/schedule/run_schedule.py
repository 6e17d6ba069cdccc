"""The schedule of a run: its stages, its phases and the learning rate of every step."""

from dataclasses import dataclass

from stacking_ds.schedule.learning_rate import LearningRateSchedule
from stacking_ds.schedule.phases import PhaseSchedule
from stacking_ds.schedule.stages import StageSchedule


@dataclass(frozen=True)
class RunSchedule:
    """Depth, rows and learning rate of each step."""

    stages: StageSchedule
    phases: PhaseSchedule
    learning_rates: LearningRateSchedule

    @property
    def total_steps(self) -> int:
        return self.stages.total_steps

    def draw(self) -> str:
        """Stages, phases and learning rate as text."""
        return f"{self.stages.draw()}\n{self.phases.draw()}\n{self.learning_rates.draw()}"

    def work(self, start_step: int) -> int:
        """Layers times token slots, summed over the steps from `start_step` to the end: what is
        left to do, as far as time grows with both."""
        return sum(
            stage.num_hidden_layers
            * (
                self.phases.slots(stage.end_step)
                - self.phases.slots(max(stage.start_step, start_step))
            )
            for stage in self.stages.remaining(start_step)
        )
