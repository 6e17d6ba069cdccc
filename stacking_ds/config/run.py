"""`RunConfig`: everything a run is; strict and frozen."""

import os
import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from stacking_ds.config.sections import (
    LARGEST_LEARNING_RATE,
    LISTS_TOO,
    BatchSection,
    CheckpointSection,
    ClusterSection,
    DataSection,
    EngineSection,
    EvaluationSection,
    GrowthSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    PhaseSection,
    StageSection,
)
from stacking_ds.config.yaml_text import leaves, write_yaml
from stacking_ds.errors import StageError
from stacking_ds.records import Record
from stacking_ds.schedule.learning_rate import LearningRateSchedule, ScheduleSection
from stacking_ds.schedule.phases import PhaseSchedule
from stacking_ds.schedule.run_schedule import RunSchedule
from stacking_ds.schedule.stages import StageSchedule


def _can_be_a_name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name) is None:
        raise ValueError(
            "it names a folder, so write at most 200 letters, digits, dots, dashes and underscores,"
            " the first of them a letter or a digit"
        )
    return name


class RunConfig(Record):
    """One run, completely."""

    name: Annotated[str, AfterValidator(_can_be_a_name)]
    """Where no --run-dir is given, the run lives in the folder of this name in runs/."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Of the first weights, the order of the data, the masks and dropout."""
    data: DataSection
    model: ModelSection
    stages: Annotated[tuple[StageSection, ...], LISTS_TOO, Field(min_length=1, max_length=1000)]
    growth: GrowthSection = GrowthSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection
    phases: Annotated[tuple[PhaseSection, ...], LISTS_TOO, Field(max_length=1000)] = ()
    """Later sequence lengths and batches; data and batch say what a run begins with."""
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        longest = self.model.max_position_embeddings
        for phase in self.phase_schedule().phases:
            if phase.sequence_length > longest:
                place = f"phases.{phase.index - 1}" if phase.index else "data"
                raise ValueError(
                    f"{place}.sequence_length={phase.sequence_length} does not fit "
                    f"model.max_position_embeddings={longest}: shorten the rows or raise the latter"
                )
            peak = self.optimizer.peak_learning_rate(phase.global_batch_size)
            if peak > LARGEST_LEARNING_RATE:
                raise ValueError(
                    f"optimizer.learning_rate={self.optimizer.learning_rate:g} for "
                    f"{self.optimizer.learning_rate_batch_size} rows is {peak:g} for "
                    f"{phase.global_batch_size}, above {LARGEST_LEARNING_RATE:g}: lower the one "
                    f"or raise optimizer.learning_rate_batch_size"
                )
        return self

    @model_validator(mode="after")
    def _can_export(self) -> Self:
        if self.checkpoint.export_at_end and self.model.layer_norm_position == "pre":
            raise ValueError(
                "Hugging Face's BERT has no pre-LN form, so a pre-LN model cannot be exported: "
                "set checkpoint.export_at_end=false, or model.layer_norm_position=post"
            )
        return self

    def phase_schedule(self) -> PhaseSchedule:
        """The sequence length and batch of every step. Raises `ConfigError`: phases that are not in
        the order of their steps."""
        data, batch = self.data, self.batch
        shapes = [(0, data.sequence_length, batch.global_batch_size, batch.micro_batch_size)]
        for phase in self.phases:
            _, tokens, rows, micro_rows = shapes[-1]
            shapes.append(
                (
                    phase.from_step,
                    phase.sequence_length or tokens,
                    phase.global_batch_size or rows,
                    phase.micro_batch_size or micro_rows,
                )
            )
        return PhaseSchedule.from_shapes(shapes)

    def stage_schedule(self) -> StageSchedule:
        """The stages in steps. Raises `StageError`: depths that do not grow, or a phase that starts
        after the last step."""
        phases = self.phase_schedule()
        pairs: list[tuple[int, int]] = []
        start = 0
        for stage in self.stages:
            steps = stage.steps or phases.steps_for_tokens(stage.tokens or 0, start)
            pairs.append((stage.num_hidden_layers, steps))
            start += steps
        if (last := phases.phases[-1].start_step) >= start:
            raise StageError(
                f"phases.{len(self.phases) - 1}.from_step={last} is not before the end of the run "
                f"at step {start}; lower it or leave the phase out"
            )
        return StageSchedule.from_depths(pairs)

    def learning_rates(self) -> LearningRateSchedule:
        """The learning rate of each step. Raises `StageError`: as `stage_schedule`; `ConfigError`:
        parts of the schedule that do not fit into the run."""
        stages = self.stage_schedule()
        peaks = tuple(
            (phase.start_step, self.optimizer.peak_learning_rate(phase.global_batch_size))
            for phase in self.phase_schedule().phases
        )
        return LearningRateSchedule(self.schedule, stages.total_steps, peaks, stages.boundaries)

    def run_schedule(self) -> RunSchedule:
        """Depth, rows and learning rate of each step.

        Raises:
            StageError, ConfigError: as `stage_schedule`, `phase_schedule` and `learning_rates`.
        """
        return RunSchedule(self.stage_schedule(), self.phase_schedule(), self.learning_rates())

    def with_absolute_paths(self) -> Self:
        """The same run, whatever the working directory it is looked at from."""
        # realpath and isfile, unlike a Path's, raise nothing on links in a circle or long names
        path, deepspeed = os.path.realpath(self.data.path), self.engine.deepspeed
        if os.path.isfile(deepspeed):
            deepspeed = os.path.realpath(deepspeed)
        return self.changed(
            data=self.data.changed(path=path), engine=self.engine.changed(deepspeed=deepspeed)
        )

    def to_yaml(self) -> str:
        return write_yaml(self.model_dump(mode="json"))


# What may differ between a run and its continuation without making it another run.
_MAY_CHANGE = (
    "data.path",
    "data.loader_workers",
    "optimizer.lamb.kernel",
    "engine.",
    "checkpoint.",
    "evaluation.",
    "logging.",
    "cluster.",
)


def changed_keys(before: RunConfig, now: RunConfig) -> list[str]:
    """The differences that make `now` another run than `before`, as "key: before -> now" lines."""
    old, new = (
        {".".join(place): leaf for place, leaf in leaves(config.model_dump(mode="json"))}
        for config in (before, now)
    )
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not key.startswith(_MAY_CHANGE)
        and not key.endswith(".micro_batch_size")
    ]
