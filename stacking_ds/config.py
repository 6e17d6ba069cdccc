"""`RunConfig`: everything a run is; strict and frozen."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stacking_ds.stages import StageSchedule, steps_for_tokens

__all__ = [
    "BatchSection",
    "CheckpointSection",
    "DataSection",
    "EngineSection",
    "EvaluationSection",
    "GrowthSection",
    "LambKernelName",
    "LambSection",
    "ModelSection",
    "OptimizerSection",
    "RunConfig",
    "ScheduleSection",
    "StageSection",
    "changed_keys",
]

_LARGEST_LEARNING_RATE = 100.0

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class DataSection(_Section):
    """Which prepared token shards, and how examples are cut from them."""

    path: str
    """Folder that `stacking-ds prepare` wrote."""
    sequence_length: Annotated[int, Field(ge=8)] = 128
    """Tokens per row, [CLS] and [SEP] included."""
    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of a row's ordinary tokens that are predicted (Devlin et al. 2019 §3.1)."""
    loader_workers: Count = 1
    """Processes per rank that build batches ahead of the step; 0 builds them in the step."""


class ModelSection(_Section):
    """The encoder without its depth (the stages say that) and vocabulary (the data says that)."""

    hidden_size: Positive
    num_attention_heads: Positive
    intermediate_size: Positive
    max_position_embeddings: Positive = 512
    type_vocab_size: Annotated[int, Field(ge=2)] = 2
    hidden_dropout_prob: Probability = 0.1
    attention_probs_dropout_prob: Probability = 0.1
    layer_norm_eps: Annotated[float, Field(gt=0.0)] = 1e-12
    initializer_range: Annotated[float, Field(gt=0.0)] = 0.02
    layer_norm_position: Literal["post", "pre"] = "post"
    """`post` as in BERT; `pre` as in the code of Gong et al. 2019."""


class StageSection(_Section):
    """One growth stage: a depth, and how long to train at it, in steps or in token slots."""

    num_hidden_layers: Positive
    steps: Annotated[int, Field(ge=1, le=10**12)] | None = None
    tokens: Positive | None = None
    """Token slots (rows x sequence_length); rounded up to whole steps."""

    @model_validator(mode="after")
    def _one_length(self) -> "StageSection":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        return self


class GrowthSection(_Section):
    """What happens to layers and optimizer moments at a boundary."""

    operator: Literal["stack", "interleave"] = "stack"
    """`stack`: new layer j copies old layer j mod L (Gong et al. 2019 §3.1)."""
    moments: Literal["reset", "carry"] = "reset"
    """`reset` starts Adam anew, as in the paper; `carry` copies the moments with the layers."""


LambKernelName = Literal["auto", "reference", "blocked", "triton", "apex"]


class LambSection(_Section):
    """What LAMB has and AdamW has not."""

    always_adapt: bool = False
    """Take trust ratios for biases and LayerNorm too, instead of 1."""
    min_coeff: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest trust ratio; 0 is no bound, as in You et al. 2020."""
    max_coeff: Annotated[float, Field(gt=0.0)] | None = None
    """Largest trust ratio; none by default, as in You et al. 2020."""
    grad_pre_normalization: bool = False
    """Divide the gradient by its global norm first (NVLAMB); clipping has to be off then."""
    kernel: LambKernelName = "auto"
    """Which form of the step runs: on a GPU triton, on the CPU blocked, unless another is named."""

    @model_validator(mode="after")
    def _bounds_and_kernel(self) -> "LambSection":
        if self.max_coeff is not None and self.max_coeff < self.min_coeff:
            raise ValueError(f"min_coeff={self.min_coeff} is above max_coeff={self.max_coeff}")
        if self.kernel == "apex" and (self.min_coeff > 0 or self.max_coeff is not None):
            raise ValueError(
                "apex's LAMB does not bound the trust ratio: remove min_coeff and max_coeff, or "
                "leave the kernel to auto"
            )
        return self


class OptimizerSection(_Section):
    name: Literal["adamw", "lamb"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0.0, le=_LARGEST_LEARNING_RATE)]
    """Peak of the learning-rate schedule."""
    learning_rate_batch_size: Positive | None = None
    """The batch that learning_rate is for. At another batch.global_batch_size the peak is scaled
    by the square root of their ratio (You et al. 2020, section 4)."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    lamb: LambSection | None = Field(
        default_factory=lambda given: LambSection() if given.get("name") == "lamb" else None
    )
    """The options of name=lamb, each with a default; null for another optimizer."""

    @model_validator(mode="after")
    def _options_fit(self) -> "OptimizerSection":
        if (self.lamb is not None) != (self.name == "lamb"):
            remedy = "set lamb to {} for its defaults" if self.lamb is None else "delete lamb"
            raise ValueError(
                f"lamb={'null' if self.lamb is None else '...'} does not go with "
                f"name={self.name}: {remedy}, or change the name"
            )
        if self.lamb is not None and self.lamb.grad_pre_normalization and self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm:g} cannot clip what grad_pre_normalization "
                f"scales to norm 1: set max_grad_norm=0, or turn the latter off"
            )
        return self

    def peak_learning_rate(self, global_batch_size: int) -> float:
        """Of a run with so many rows a step."""
        base = self.learning_rate_batch_size or global_batch_size
        return self.learning_rate * math.sqrt(global_batch_size / base)


class ScheduleSection(_Section):
    """The learning rate over the whole run, and what a boundary does to it."""

    shape: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup_steps: Count = 0
    decay_steps: Positive | None = None
    """Length of the final decay; for `wsd` only."""
    final_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate of the last step as a fraction of the peak."""
    at_boundary: Literal["continue", "rewarm"] = "continue"
    rewarm_steps: Count = 0


class BatchSection(_Section):
    global_batch_size: Positive
    """Rows per step over all ranks; the same at any number of ranks."""
    micro_batch_size: Positive
    """Most rows that one rank puts through the model at once."""


class EngineSection(_Section):
    deepspeed: str = "zero1"
    """A bundled DeepSpeed JSON (zero0 … zero3) or the path of one."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"


class CheckpointSection(_Section):
    every_steps: Positive = 1000
    """A checkpoint is also written at each boundary, at the end and when asked to stop. Training
    goes on meanwhile, except at the end and at a stop."""
    keep_last: Positive = 2
    """Older checkpoints are deleted, those at boundaries excepted."""
    export_at_end: bool = True
    """Write the finished model as a Hugging Face folder into the run."""


class EvaluationSection(_Section):
    every_steps: Count = 0
    """0 evaluates at the end of each stage only; those evaluations are always made."""
    max_samples: Positive = 1024


class LoggingSection(_Section):
    every_steps: Positive = 10
    """A line of metrics is the mean over the steps since the line before. There is one after
    every so many steps, and at each evaluation and checkpoint."""


class RunConfig(_Section):
    """One run, completely."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Count = 0
    data: DataSection
    model: ModelSection
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]
    growth: GrowthSection = GrowthSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _rows_fit(self) -> "RunConfig":
        longest = self.model.max_position_embeddings
        if self.data.sequence_length > longest:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} does not fit "
                f"model.max_position_embeddings={longest}: shorten the rows or raise the latter"
            )
        return self

    @model_validator(mode="after")
    def _peak_is_a_learning_rate(self) -> "RunConfig":
        peak = self.optimizer.peak_learning_rate(self.batch.global_batch_size)
        if peak > _LARGEST_LEARNING_RATE:
            raise ValueError(
                f"optimizer.learning_rate={self.optimizer.learning_rate:g} for "
                f"{self.optimizer.learning_rate_batch_size} rows is {peak:g} for "
                f"{self.batch.global_batch_size}, above {_LARGEST_LEARNING_RATE:g}: lower the one "
                f"or raise optimizer.learning_rate_batch_size"
            )
        return self

    @model_validator(mode="after")
    def _can_export(self) -> "RunConfig":
        if self.checkpoint.export_at_end and self.model.layer_norm_position == "pre":
            raise ValueError(
                "Hugging Face's BERT has no pre-LN form, so a pre-LN model cannot be exported: "
                "set checkpoint.export_at_end=false, or model.layer_norm_position=post"
            )
        return self

    def stage_schedule(self) -> StageSchedule:
        """The stages in steps.

        Raises:
            StageError: depths that do not grow.
        """
        return StageSchedule.from_depths(
            [(stage.num_hidden_layers, self._steps_of(stage)) for stage in self.stages]
        )

    def _steps_of(self, stage: StageSection) -> int:
        if stage.steps is not None:
            return stage.steps
        assert stage.tokens is not None
        return steps_for_tokens(
            stage.tokens, self.batch.global_batch_size, self.data.sequence_length
        )

    def with_absolute_paths(self) -> "RunConfig":
        """The same run, whatever the working directory it is looked at from."""
        json = Path(self.engine.deepspeed)
        deepspeed = str(json.resolve()) if json.is_file() else self.engine.deepspeed
        path = str(Path(self.data.path).resolve())
        return self.model_copy(
            update={
                "data": self.data.model_copy(update={"path": path}),
                "engine": self.engine.model_copy(update={"deepspeed": deepspeed}),
            }
        )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# What may differ between a run and its continuation without making it another run.
_MAY_CHANGE = (
    "data.path",
    "data.loader_workers",
    "optimizer.lamb.kernel",
    "batch.micro_batch_size",
    "engine.",
    "checkpoint.",
    "evaluation.",
    "logging.",
)


def changed_keys(before: RunConfig, now: RunConfig) -> list[str]:
    """What makes `now` another run than `before`, as "key: before -> now" lines."""
    old, new = _flatten(before.model_dump(mode="json")), _flatten(now.model_dump(mode="json"))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_MAY_CHANGE)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(f"{prefix}{key}", child) for key, child in value.items()]
    elif isinstance(value, list):
        items = [(f"{prefix}{index}", child) for index, child in enumerate(value)]
    else:
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, child in items for key, leaf in _flatten(child, name + ".").items()}
