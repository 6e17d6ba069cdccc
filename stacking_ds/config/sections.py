"""The sections of a recipe, strict and frozen.

Every number has an upper bound: far above what anybody trains, and low enough that whatever is
computed from it is computed at once and fits its type.
"""

import math
import os
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from stacking_ds.records import Record
from stacking_ds.schedule.stages import Steps, StepsOrNone

LARGEST_LEARNING_RATE = 100.0

_MOST_ROWS = 2**22  # a step; times the most steps this fits 64 bits
_LONGEST_WAIT_SECONDS = 30 * 86_400.0
_LONGEST_PATH_BYTES = 4095  # Linux's PATH_MAX, without the zero at its end

Rows = Annotated[int, Field(ge=1, le=_MOST_ROWS)]
Depth = Annotated[int, Field(ge=1, le=10_000)]
VocabularySize = Annotated[int, Field(ge=1, le=2**31)]
Size = Annotated[int, Field(ge=1, le=2**20)]
SequenceLength = Annotated[int, Field(ge=8, le=2**20)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Factor = Annotated[float, Field(ge=0.0, le=1e9)]


def _can_be_a_path(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError("it is empty or holds a NUL character, as no path does")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("it holds half a character, as no path does") from None
    if len(encoded) > _LONGEST_PATH_BYTES:
        raise ValueError(f"it is longer than the {_LONGEST_PATH_BYTES:,} bytes of a path")
    # no shell does it behind the sign of --set data.path=~/shards, nor in a recipe
    return os.path.expanduser(path) if path.startswith("~/") else path


PathText = Annotated[str, AfterValidator(_can_be_a_path)]

LISTS_TOO = BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)
"""A tuple may be given as the list that YAML, and most of Python, writes."""


ExampleKind = Literal["pairs", "documents"]
MaskingName = Literal["tokens", "whole_words", "spans"]


class DataSection(Record):
    """The prepared token shards, and how examples are cut from them."""

    path: PathText
    """Folder that `stacking-ds prepare` wrote."""
    sequence_length: SequenceLength = 128
    """Tokens per row, [CLS] and [SEP] included."""
    examples: ExampleKind = "pairs"
    """`pairs`: [CLS] A [SEP] B [SEP] with next-sentence prediction; `documents`: [CLS] text [SEP]
    without it."""
    packing: bool = False
    """Several examples share a row where they fit; attention stays within each."""
    variants: Annotated[int, Field(ge=1, le=1000)] = 1
    """In how many ways documents are paired and cut; each epoch takes the next."""
    masking: MaskingName = "tokens"
    """What is hidden at once: a token, a word, or a span of words (Joshi et al. 2020 §3.1)."""
    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of an example's ordinary tokens that are predicted (Devlin et al. 2019 §3.1)."""
    loader_workers: Annotated[int, Field(ge=0, le=256)] = 1
    """Processes per rank that build batches ahead of the step; 0 builds them in the step."""


class ModelSection(Record):
    """The encoder without its depth (the stages say that) and vocabulary (the data says that)."""

    hidden_size: Size
    """Width of what passes from layer to layer."""
    num_attention_heads: Size
    """Heads that share the width; it has to be a multiple of them."""
    intermediate_size: Size
    """Width inside the feed-forward part of a layer, usually four times `hidden_size`."""
    max_position_embeddings: Size = 512
    """Tokens of the longest row that the model can ever take."""
    type_vocab_size: Annotated[int, Field(ge=2, le=2**20)] = 2
    """Segments that tokens can belong to: 2, the A and B of a pair."""
    hidden_dropout_prob: Probability = 0.1
    """Dropout of embeddings and of what a sub-layer adds to the residual sum."""
    attention_probs_dropout_prob: Probability = 0.1
    """Dropout of the attention's weights."""
    layer_norm_eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-12
    """Added to the variance in LayerNorm."""
    initializer_range: Annotated[float, Field(gt=0.0, le=100.0)] = 0.02
    """Standard deviation of the initial weights."""
    layer_norm_position: Literal["post", "pre"] = "post"
    """`post` normalises after each residual sum, as BERT does; `pre` what enters a sub-layer, and
    once more after the last layer (Xiong et al. 2020, and the code of Gong et al. 2019)."""

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}; change one of them"
            )
        return self


class StageSection(Record):
    """One growth stage: a depth, and how long to train at it, in steps or in token slots."""

    num_hidden_layers: Depth
    """Encoder layers; each stage has more than the one before."""
    steps: Steps | None = None
    """How long, in optimizer steps."""
    tokens: Annotated[int, Field(ge=1, le=10**18)] | None = None
    """How long, in token slots (rows x sequence_length of the phase), rounded up to whole steps."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        return self


Moments = Literal["reset", "carry"]


class GrowthSection(Record):
    """Layers and optimizer moments at a boundary: what becomes of them."""

    operator: Literal["stack", "interleave"] = "stack"
    """`stack`: new layer j copies old layer j mod L (Gong et al. 2019 §3.1); `interleave`: every
    layer is repeated where it stands."""
    moments: Moments = "reset"
    """`reset` starts Adam anew, as in the paper; `carry` copies the moments with the layers."""


LambKernelName = Literal["auto", "reference", "blocked", "triton", "apex"]


class LambSection(Record):
    """Options that LAMB has and AdamW has not; null for another optimizer."""

    always_adapt: bool = False
    """Take trust ratios for biases and LayerNorm too, instead of 1."""
    min_coeff: Factor = 0.0
    """Smallest trust ratio; 0 is no bound, as in You et al. 2020."""
    max_coeff: Annotated[float, Field(gt=0.0, le=1e9)] | None = None
    """Largest trust ratio; none by default, as in You et al. 2020."""
    grad_pre_normalization: bool = False
    """Divide the gradient by its global norm first (NVLAMB); clipping has to be off then."""
    kernel: LambKernelName = "auto"
    """Which form of the step runs: on a GPU triton, on the CPU blocked, unless another is named."""

    @model_validator(mode="after")
    def _bounds_and_kernel(self) -> Self:
        if self.max_coeff is not None and self.max_coeff < self.min_coeff:
            raise ValueError(f"min_coeff={self.min_coeff} is above max_coeff={self.max_coeff}")
        if self.kernel == "apex" and (self.min_coeff > 0 or self.max_coeff is not None):
            raise ValueError(
                "apex's LAMB does not bound the trust ratio: remove min_coeff and max_coeff, or "
                "leave the kernel to auto"
            )
        return self


class OptimizerSection(Record):
    """The optimizer and its numbers, the same at every depth."""

    name: Literal["adamw", "lamb"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019), or LAMB for large batches (You et al. 2020)."""
    learning_rate: Annotated[float, Field(gt=0.0, le=LARGEST_LEARNING_RATE)]
    """Peak of the learning-rate schedule."""
    learning_rate_batch_size: Rows | None = None
    """The batch that learning_rate is for. At another batch.global_batch_size the peak is scaled
    by the square root of their ratio (You et al. 2020, section 4)."""
    betas: Annotated[tuple[Probability, Probability], LISTS_TOO] = (0.9, 0.999)
    """What the running means of the gradient and of its square keep at each step."""
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    """Added to the root that the update is divided by."""
    weight_decay: Annotated[float, Field(ge=0.0, le=100.0)] = 0.01
    """Decoupled; biases and LayerNorm weights do not decay."""
    max_grad_norm: Factor = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    lamb: LambSection | None = Field(
        default_factory=lambda given: LambSection() if given.get("name") == "lamb" else None
    )
    """The options of name=lamb, each with a default; null for another optimizer."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
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


class BatchSection(Record):
    """Rows of a step, and how many of them at once."""

    global_batch_size: Rows
    """Rows per step over all ranks; the same at any number of ranks."""
    micro_batch_size: Rows
    """Most rows that one rank puts through the model at once."""


class PhaseSection(Record):
    """From which step on rows or batches have another size; what is left out stays."""

    from_step: Steps
    """The first step that is different, counted over the whole run from 0."""
    sequence_length: SequenceLength | None = None
    """As `data.sequence_length`."""
    global_batch_size: Rows | None = None
    """As `batch.global_batch_size`."""
    micro_batch_size: Rows | None = None
    """As `batch.micro_batch_size`."""

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if (self.sequence_length, self.global_batch_size, self.micro_batch_size) == (None,) * 3:
            raise ValueError(
                "say what changes: sequence_length, global_batch_size or micro_batch_size"
            )
        return self


Precision = Literal["fp32", "bf16", "fp16"]
KernelsName = Literal["auto", "torch", "triton", "compile", "apex"]
AttentionName = Literal["auto", "loops", "padded", "cudnn", "flash", "varlen"]
ActivationCheckpointing = Literal["none", "selective", "full"]


class EngineSection(Record):
    """The way it is computed. All of it may change between a run and its continuation."""

    deepspeed: PathText = "zero1"
    """A bundled DeepSpeed JSON (zero0 … zero3) or the path of one."""
    precision: Precision = "bf16"
    """What forward and backward compute in; masters and moments are fp32 at any."""
    kernels: KernelsName = "auto"
    """How a layer's operations run: `torch` plainly, `triton` fused on an NVIDIA GPU, `compile` by
    torch.compile, `apex` as `torch` with the LayerNorm of NVIDIA's apex. `auto`: on a GPU triton,
    on the CPU torch."""
    attention: AttentionName = "auto"
    """On a GPU `auto` measures, at each new shape, all that can run there and takes the fastest."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What a layer keeps for the backward pass: all; the results of its matrix products
    (`selective`); or its input alone (`full`). The rest is computed again."""
    fp8: bool = False
    """Compute matrix products of the layers in 8-bit floating point, on cards that have it."""
    cuda_graphs: bool = False
    """Make each layer one launch, for micro-batches so small that the host cannot keep a GPU busy.
    Micro-batches are filled up to their rows' slots, so pack the rows."""

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.fp8 and self.precision == "fp16":
            raise ValueError("fp8 goes with precision bf16 or fp32, not fp16: change one of them")
        if self.precision == "fp32" and self.attention in ("cudnn", "flash", "varlen"):
            raise ValueError(
                f"attention={self.attention} computes in bf16 and fp16, not in fp32: set it to "
                f"auto, or change the precision"
            )
        if self.cuda_graphs and self.activation_checkpointing != "none":
            raise ValueError(
                f"cuda_graphs keeps what a layer computes, so activation_checkpointing="
                f"{self.activation_checkpointing} cannot drop it: turn one of them off"
            )
        if self.cuda_graphs and self.kernels == "compile":
            raise ValueError("kernels=compile cannot be captured by cuda_graphs: turn one off")
        return self


class CheckpointSection(Record):
    """The steps at which the state is saved, what is kept, and the export at the end."""

    every_steps: Steps = 1000
    """Steps between checkpoints. One is also written at each boundary, at the end and when asked to
    stop. Training goes on meanwhile, except at the end and at a stop."""
    keep_last: Annotated[int, Field(ge=1, le=10**6)] = 2
    """Newest checkpoints to keep; older ones are deleted, those at boundaries excepted."""
    export_at_end: bool = True
    """Write the finished model as a Hugging Face folder into the run."""


class EvaluationSection(Record):
    """The loss on held-out rows."""

    every_steps: StepsOrNone = 0
    """Steps between evaluations; 0 evaluates at the end of each stage only, as is always done."""
    max_samples: Annotated[int, Field(ge=1, le=10**9)] = 1024
    """Most held-out rows of an evaluation; always the same ones."""


class ClusterSection(Record):
    """Times after which ranks are taken for lost. What is lost ends the job, which can go on from
    its checkpoint."""

    timeout_seconds: Annotated[float, Field(ge=5.0, le=_LONGEST_WAIT_SECONDS)] = 600.0
    """How long it may be that no rank moves; also the time-out of all collectives."""
    silence_seconds: Annotated[float, Field(ge=2.0, le=_LONGEST_WAIT_SECONDS)] = 45.0
    """How long a rank may be silent: its process is gone, stopped, or cut off the network."""


class LoggingSection(Record):
    """The steps at which metrics are written."""

    every_steps: Steps = 10
    """Steps between lines of metrics, each the mean over the steps since the line before. There is
    one at each evaluation and checkpoint too."""
