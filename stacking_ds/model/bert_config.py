"""The sizes of a BERT, checked, and what follows from them by arithmetic."""

from dataclasses import dataclass
from typing import Literal, get_args

from stacking_ds.errors import ConfigError

LayerNormPosition = Literal["post", "pre"]


@dataclass(frozen=True)
class BertConfig:
    """A BERT of one depth. Names and meanings are those of Hugging Face's `BertConfig`.

    Raises:
        ConfigError: a size below 1, a probability outside [0, 1), heads that do not divide the
            hidden size, or an unknown LayerNorm position.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    layer_norm_position: LayerNormPosition = "post"
    """`post` normalises after each residual sum, as BERT does; `pre` normalises what enters a
    sub-layer, and once more after the last layer (Xiong et al. 2020)."""

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"model {name}={getattr(self, name)} must be at least 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"model {name}={getattr(self, name)} must be in [0, 1)")
        for name in ("layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"model {name}={getattr(self, name)} must be above 0")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}; change one of them"
            )
        if self.layer_norm_position not in get_args(LayerNormPosition):
            raise ConfigError(
                f"model layer_norm_position={self.layer_norm_position!r} must be one of "
                f"{get_args(LayerNormPosition)}"
            )

    @property
    def num_parameters(self) -> int:
        """Trained parameters; the tied decoder counts once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        norm = 2 * hidden
        tables = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        square = hidden * hidden + hidden
        layer = 4 * square + (2 * hidden * inner + inner + hidden) + 2 * norm
        heads = (square + norm + self.vocab_size) + square + (2 * hidden + 2)
        final_norm = norm if self.layer_norm_position == "pre" else 0
        return tables * hidden + norm + self.num_hidden_layers * layer + final_norm + heads

    def flops_per_token(self, attended_tokens: float, mlm_fraction: float) -> float:
        """Floating-point operations to train on one token: forward, and twice that backward.

        Matrix products only, two operations per multiply-add, as model-FLOP utilisation is
        counted (Chowdhery et al. 2022, appendix B): the layers' weights, the two products with
        the `attended_tokens` that a token attends to on average, and the MLM head on the
        `mlm_fraction` of tokens that it runs on. Pooler and NSP head are left out.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        weights = 4 * hidden * hidden + 2 * hidden * inner
        attention = 2 * attended_tokens * hidden
        head = mlm_fraction * (hidden * hidden + hidden * self.vocab_size)
        return 3 * 2 * (self.num_hidden_layers * (weights + attention) + head)
