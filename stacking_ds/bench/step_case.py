"""Which steps are measured: sizes of the model, rows and how far they are filled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stacking_ds.bench.lamb import Sizes
from stacking_ds.config.sections import Precision
from stacking_ds.errors import ConfigError
from stacking_ds.model.bert_config import BertConfig

CPU_FILL, GPU_FILL = 0.68, 0.65
BASE_LAYERS = (3, 6, 12)
ACCUMULATION = "accumulation"
"""The name, for `--only`, of the measurement that is not a case."""

_SMALL_ROWS = 16
_VOCAB_SIZE = 30522  # of bert-base-uncased
_GPU_LENGTHS = (128, 512)
_GPU_STEP_TOKENS = 1 << 17  # 256 rows of 512, as in Devlin et al. 2019, A.2
_GPU_MICRO_TOKENS = {"base": 1 << 15, "large": 1 << 14}


@dataclass(frozen=True)
class Model:
    """A BERT to measure with; `name` is what targets go by."""

    name: str
    hidden_size: int
    layers: int
    vocab_size: int = _VOCAB_SIZE

    def config(self, sequence_length: int) -> BertConfig:
        """Raises:
        ConfigError: sizes of which no BERT can be made.
        """
        config = Sizes(self.hidden_size, self.layers, self.vocab_size).config
        longest = max(config.max_position_embeddings, sequence_length)
        return config.changed(max_position_embeddings=longest)


SMALL = Model("small", hidden_size=256, layers=4)
BASE = Model("base-12L", hidden_size=768, layers=12)
TINY = Model("tiny", hidden_size=64, layers=2, vocab_size=512)


def chosen_model(usual: Model, hidden_size: int | None, layers: int | None) -> Model:
    """`usual`, with the sizes that are given instead of its own."""
    if hidden_size in (None, usual.hidden_size) and layers in (None, usual.layers):
        return usual  # under its own name, which the targets go by
    width = usual.hidden_size if hidden_size is None else hidden_size
    depth = usual.layers if layers is None else layers
    return replace(usual, name=f"{width}-{depth}L", hidden_size=width, layers=depth)


_GPU_MODELS = (
    *(Model(f"base-{layers}L", 768, layers) for layers in BASE_LAYERS),
    Model("large-24L", 1024, 24),
)


@dataclass(frozen=True)
class StepCase:
    """One optimizer step: `micro_steps` times `rows` rows of `sequence_length` slots."""

    model: Model
    sequence_length: int
    rows: int
    micro_steps: int
    fill: float
    """Share of the slots that are tokens."""
    precision: Precision
    with_plain_loop: bool = False
    with_dense_twin: bool = False
    """Measure full rows of as many tokens too."""

    @property
    def engine(self) -> tuple[Model, int, Precision]:
        """Cases that have it in common can be taken by the same engine."""
        return self.model, self.sequence_length, self.precision

    @property
    def is_full(self) -> bool:
        return self.fill == 1.0

    @property
    def name(self) -> str:
        rows = "full" if self.is_full else "filled"
        return f"{self.model.name}-{self.sequence_length}-{self.precision}-{rows}"

    @property
    def config(self) -> BertConfig:
        return self.model.config(self.sequence_length)


def cpu_cases(model: Model, sequence_length: int, rows: int = _SMALL_ROWS) -> list[StepCase]:
    """Small ones: full rows in fp32, and rows of real lengths in bf16."""
    full = StepCase(model, sequence_length, rows, 1, 1.0, "fp32", with_plain_loop=True)
    filled = replace(
        full, fill=CPU_FILL, precision="bf16", with_plain_loop=False, with_dense_twin=True
    )
    return [full, filled]


def gpu_cases(
    model: Model | None, sequence_length: int | None, step_tokens: int = _GPU_STEP_TOKENS
) -> list[StepCase]:
    """Full and filled rows of each length of each model, or of the given ones alone, in bf16."""
    models = _GPU_MODELS if model is None else (model,)
    lengths = _GPU_LENGTHS if sequence_length is None else (sequence_length,)
    cases = []
    for one in models:
        most = _GPU_MICRO_TOKENS["large" if one.hidden_size > 768 else "base"]
        for length in lengths:
            micro_tokens = min(most, step_tokens)
            rows = max(1, micro_tokens // length)
            micro_steps = step_tokens // micro_tokens
            full = StepCase(one, length, rows, micro_steps, 1.0, "bf16")
            cases += [full, replace(full, fill=GPU_FILL)]
    return cases


def chosen_cases(
    cases: Sequence[StepCase], only: str | None, *, with_accumulation: bool
) -> tuple[list[StepCase], bool]:
    """The cases whose names begin with one of `only`'s, and whether accumulation is measured.

    Raises:
        ConfigError: one of them is no name's beginning.
    """
    if only is None:
        return list(cases), with_accumulation
    asked = only.split(",")
    names = [case.name for case in cases] + ([ACCUMULATION] if with_accumulation else [])
    for start in asked:
        if not start or not any(name.startswith(start) for name in names):
            raise ConfigError(f"--only={only}: no case begins with {start!r}: {', '.join(names)}")
    chosen = [case for case in cases if case.name.startswith(tuple(asked))]
    return chosen, with_accumulation and ACCUMULATION.startswith(tuple(asked))
