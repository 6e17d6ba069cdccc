"""A recipe as an object: `RunConfig` and its sections."""

from stacking_ds.config.run import RunConfig, changed_keys
from stacking_ds.config.sections import (
    ActivationCheckpointing,
    AttentionName,
    BatchSection,
    CheckpointSection,
    DataSection,
    EngineSection,
    EvaluationSection,
    GrowthSection,
    KernelsName,
    LambKernelName,
    LambSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    PhaseSection,
    ScheduleSection,
    StageSection,
)

__all__ = [
    "ActivationCheckpointing",
    "AttentionName",
    "BatchSection",
    "CheckpointSection",
    "DataSection",
    "EngineSection",
    "EvaluationSection",
    "GrowthSection",
    "KernelsName",
    "LambKernelName",
    "LambSection",
    "LoggingSection",
    "ModelSection",
    "OptimizerSection",
    "PhaseSection",
    "RunConfig",
    "ScheduleSection",
    "StageSection",
    "changed_keys",
]
