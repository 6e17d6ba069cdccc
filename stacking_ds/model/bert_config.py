"""Sizes of a BERT and what follows from them by arithmetic, and the names of its layers."""

import re

from stacking_ds.config.sections import Depth, ModelSection, VocabularySize

_OF_LAYER = re.compile(r"(|.*\.)(encoder\.layer\.)(\d+)(\..*)")


def split_at_layer(name: str) -> tuple[str, int, str] | None:
    """The parts before and behind the layer's number, and the number; None outside the layers."""
    found = _OF_LAYER.fullmatch(name)
    return None if found is None else (f"{found[1]}{found[2]}", int(found[3]), found[4])


class BertConfig(ModelSection):
    """A BERT of one depth: the recipe's section, with the depth of a stage and the vocabulary of
    the data. Names and meanings are those of Hugging Face's `BertConfig`.

    Raises:
        ValidationError: sizes of which no BERT can be made.
    """

    vocab_size: VocabularySize
    num_hidden_layers: Depth

    @classmethod
    def of(cls, section: ModelSection, num_hidden_layers: int, vocab_size: int) -> "BertConfig":
        """The model of the recipe's section at a depth."""
        sizes = section.model_dump()
        return cls(vocab_size=vocab_size, num_hidden_layers=num_hidden_layers, **sizes)

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
