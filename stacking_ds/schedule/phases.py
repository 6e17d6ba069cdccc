"""Sequence-length and batch phases: the rows of each step, independent of the stages.

BERT trains 90 % of its steps on rows of 128 tokens and the rest on rows of 512 (Devlin et al. 2019,
A.2). Pure arithmetic, like `stages`.

    step        0                         900,000      1,000,000
    phase       |----------- 0 -----------|---- 1 ----|
    rows        of 128, 256 a step        of 512, 128 a step
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stacking_ds.errors import ConfigError, StageError


@dataclass(frozen=True)
class Phase:
    """The steps from `start_step` to the next phase's, all of one shape."""

    index: int
    start_step: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    rows_before: int
    """Rows of this sequence length that earlier phases have trained on."""

    @property
    def shape(self) -> str:
        """In words."""
        return f"{self.global_batch_size:,} rows of {self.sequence_length:,} tokens a step"

    @property
    def slots_per_step(self) -> int:
        """Token slots, padding included."""
        return self.global_batch_size * self.sequence_length

    def first_row(self, step: int) -> int:
        """The place at which the batch of `step` begins in the endless order of the rows of this
        length, so that a phase goes on where an earlier one of its length stopped."""
        return self.rows_before + (step - self.start_step) * self.global_batch_size


@dataclass(frozen=True)
class PhaseSchedule:
    """All phases, the last without an end. Build it with `from_shapes`."""

    phases: tuple[Phase, ...]

    @classmethod
    def from_shapes(cls, shapes: Sequence[tuple[int, int, int, int]]) -> "PhaseSchedule":
        """The schedule of these (start_step, sequence_length, global_batch_size,
        micro_batch_size), the first from step 0.

        Raises:
            ConfigError: a phase that starts no later than the one before.
        """
        phases: list[Phase] = []
        rows: dict[int, int] = {}
        for index, (start_step, length, batch_rows, micro_rows) in enumerate(shapes):
            if phases:
                last = phases[-1]
                if start_step <= last.start_step:
                    raise ConfigError(
                        f"phase {index} starts at step {start_step}, not after the "
                        f"{last.start_step} of the phase before; put the phases in order"
                    )
                steps = start_step - last.start_step
                rows[last.sequence_length] = last.rows_before + steps * last.global_batch_size
            before = rows.get(length, 0)
            phases.append(Phase(index, start_step, length, batch_rows, micro_rows, before))
        assert phases[0].start_step == 0
        return cls(tuple(phases))

    def at(self, step: int) -> Phase:
        """The phase of the step that starts after `step` completed steps."""
        return next(phase for phase in reversed(self.phases) if phase.start_step <= step)

    def between(self, start_step: int, end_step: int) -> Iterator[tuple[Phase, int]]:
        """The phases of the steps [start_step, end_step), each with its end among them."""
        for phase in self.phases:
            following = self.phases[phase.index + 1 : phase.index + 2]
            end = min([end_step, *(after.start_step for after in following)])
            if phase.start_step < end_step and end > start_step:
                yield phase, end

    def draw(self) -> str:
        """A line a phase."""
        return "\n".join(
            f"phase {phase.index} from step {phase.start_step:,}: {phase.shape}"
            for phase in self.phases
        )

    def slots(self, end_step: int) -> int:
        """Token slots, padding included, of the steps before `end_step`."""
        return sum(
            phase.slots_per_step * (end - phase.start_step)
            for phase, end in self.between(0, end_step)
        )

    def longest(self, end_step: int) -> int:
        """The longest rows, in tokens, of the steps before `end_step`; at step 0, of the first."""
        return max(phase.sequence_length for phase, _ in self.between(0, max(end_step, 1)))

    def rows(self, end_step: int, sequence_length: int) -> int:
        """Rows of this length in the steps before `end_step`."""
        return sum(
            phase.global_batch_size * (end - phase.start_step)
            for phase, end in self.between(0, end_step)
            if phase.sequence_length == sequence_length
        )

    def steps_for_tokens(self, tokens: int, start_step: int) -> int:
        """The fewest steps from `start_step` on that train on at least `tokens` token slots.

        Padding counts, since it costs as much.

        Raises:
            StageError: `tokens` is below 1.
        """
        if tokens < 1:
            raise StageError(f"tokens={tokens} must be at least 1")
        step = start_step
        while True:
            phase = self.at(step)
            steps = -(-tokens // phase.slots_per_step)
            following = self.phases[phase.index + 1 : phase.index + 2]
            if not following or step + steps <= following[0].start_step:
                return step + steps - start_step
            tokens -= (following[0].start_step - step) * phase.slots_per_step
            step = following[0].start_step
