"""BERT with its two pre-training heads, written for speed and knowing no ranks.

Devlin et al. 2019, under Hugging Face's parameter names (`model/parameters.py` has the one
table of what differs). Rows come in and their padding is left behind: everything is computed on
the tokens of all rows, one example behind the other.

Shapes: B rows, S slots a row, T tokens, H hidden size, M masked positions of the whole batch,
E examples (B where rows are not packed), V vocabulary.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.cross_entropy import vocabulary_logits
from stacking_ds.kernels.operations import EmbeddingTables
from stacking_ds.kernels.registry import Compute
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.model.layer import Encoder, GatheredWhole, layer_norm, norm_of, weights_of
from stacking_ds.model.parameters import initialize_parameters
from stacking_ds.model.unpadding import Tokens, unpad


class _Embeddings(GatheredWhole):
    """Sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: BertConfig, compute: Compute) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = layer_norm(config)
        self._dropout = config.hidden_dropout_prob
        self._operations = compute.operations

    def forward(
        self, ids_T: torch.Tensor, types_T: torch.Tensor, positions_T: torch.Tensor
    ) -> torch.Tensor:
        tables = EmbeddingTables(
            self.word_embeddings.weight,
            self.token_type_embeddings.weight,
            self.position_embeddings.weight,
        )
        dropout = self._dropout if self.training else 0.0
        return self._operations.embed(
            ids_T, types_T, positions_T, tables, norm_of(self.LayerNorm), dropout
        )


class _Pooler(nn.Module):
    """A summary of each example, read from its first token, [CLS]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_EH: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(first_EH))


class _Bert(nn.Module):
    def __init__(self, config: BertConfig, compute: Compute) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config, compute)
        self.encoder = Encoder(config, compute)
        self.pooler = _Pooler(config)

    def forward(
        self,
        ids_T: torch.Tensor,
        types_T: torch.Tensor,
        positions_T: torch.Tensor,
        tokens: Tokens,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_TH = self.embeddings(ids_T, types_T, positions_T)
        hidden_TH = self.encoder(hidden_TH, tokens.sequences, tokens.slots)
        return hidden_TH, self.pooler(hidden_TH.index_select(0, tokens.first_tokens))


class _Transform(GatheredWhole):
    def __init__(self, config: BertConfig, compute: Compute) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = layer_norm(config)
        # heads stay in the run's precision, whatever the layers multiply in
        self._operations = replace(compute.operations, linear=functional.linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self._operations.linear_gelu(hidden, weights_of(self.dense))
        return self._operations.norm(inner, norm_of(self.LayerNorm))


class _Decoder(nn.Linear):
    """From hidden states to the vocabulary."""

    def forward(self, hidden_MH: torch.Tensor) -> torch.Tensor:
        return vocabulary_logits(hidden_MH, self.weight, self.bias)


class _MlmHead(nn.Module):
    """Logits over the vocabulary; the decoder's weight is the word embedding's."""

    def __init__(self, config: BertConfig, compute: Compute) -> None:
        super().__init__()
        self.transform = _Transform(config, compute)
        self.decoder = _Decoder(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def tie(self, word_embeddings: nn.Embedding) -> None:
        """Share the weight, and keep the bias one parameter under its two names."""
        self.decoder.weight = word_embeddings.weight
        self.bias = self.decoder.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.decoder(self.transform(hidden))
        return logits


class _Heads(nn.Module):
    def __init__(self, config: BertConfig, compute: Compute) -> None:
        super().__init__()
        self.predictions = _MlmHead(config, compute)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(
        self, hidden: torch.Tensor, pooled_EH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.predictions(hidden), self.seq_relationship(pooled_EH)


class BertForPreTraining(nn.Module):
    """BERT with the masked-language-model and next-sentence heads.

    Args:
        config: its sizes.
        seed: of the first values, which are made on the CPU. With None there are no values: the
            parameters stay on the meta device, shapes without memory.
        compute: the kernels it runs on.
    """

    def __init__(
        self, config: BertConfig, seed: int | None, compute: Compute | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.compute = compute or Compute()
        # without memory first: torch's own initialisation would cost time and global random state
        with torch.device("meta"):
            self.bert = _Bert(config, self.compute)
            self.cls = _Heads(config, self.compute)
        if seed is not None:
            self.to_empty(device="cpu")
        self.cls.predictions.tie(self.bert.embeddings.word_embeddings)
        if seed is not None:
            initialize_parameters(self, seed, config.initializer_range)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        token_type_ids_BS: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        mlm_positions_M: torch.Tensor | None = None,
        position_ids_BS: torch.Tensor | None = None,
        first_positions_E: torch.Tensor | None = None,
        token_positions_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the two tasks. Ids are not checked here: that would wait for the device.

        Args:
            input_ids_BS: token ids.
            token_type_ids_BS: 0 in the first sentence, 1 in the second.
            attention_mask_BS: true (or not 0) for tokens, false (or 0) for padding.
            mlm_positions_M: where MLM logits are wanted, as b * S + s; may be empty. Without it
                they are computed for every token.
            position_ids_BS: each token's place in its example, where rows are packed; without it,
                its place in the row.
            first_positions_E: where the examples begin, as b * S + s, ascending; without it, where
                the rows do. A token attends to its example.
            token_positions_T: where the tokens are, as b * S + s, ascending, at least one of each
                example; without it the host waits for the device to find them in the mask.

        Returns:
            mlm_logits_MV (mlm_logits_BSV without positions, 0 at padding) and nsp_logits_E2.

        Raises:
            ConfigError: the rows are longer than the position embeddings, or packed without a word
                on where their examples begin.
        """
        tokens, hidden_TH, pooled_EH = self.encode(
            input_ids_BS,
            token_type_ids_BS,
            attention_mask_BS,
            position_ids_BS,
            first_positions_E,
            token_positions_T,
        )
        if mlm_positions_M is None:
            logits_TV, nsp_logits_E2 = self.cls(hidden_TH, pooled_EH)
            return tokens.put(logits_TV), nsp_logits_E2
        masked_MH = hidden_TH.index_select(0, tokens.places_of(mlm_positions_M))
        mlm_logits_MV, nsp_logits_E2 = self.cls(masked_MH, pooled_EH)
        return mlm_logits_MV, nsp_logits_E2

    def encode(
        self,
        input_ids_BS: torch.Tensor,
        token_type_ids_BS: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        position_ids_BS: torch.Tensor | None = None,
        first_positions_E: torch.Tensor | None = None,
        token_positions_T: torch.Tensor | None = None,
    ) -> tuple[Tokens, torch.Tensor, torch.Tensor]:
        """The model without its heads; arguments and errors are those of `forward`.

        Returns:
            Where the tokens are, hidden_TH and pooled_EH.
        """
        length = input_ids_BS.shape[1]
        if length > self.config.max_position_embeddings:
            raise ConfigError(
                f"rows of {length} tokens do not fit max_position_embeddings="
                f"{self.config.max_position_embeddings}; shorten sequence_length or raise it"
            )
        if position_ids_BS is not None and first_positions_E is None:
            raise ConfigError(
                "packed rows (position_ids_BS) need first_positions_E, the slots where their "
                "examples begin; without it tokens would attend to other examples"
            )
        tokens = unpad(attention_mask_BS, first_positions_E, token_positions_T)
        if position_ids_BS is None:
            positions_T = tokens.slots_T % length
        else:
            positions_T = tokens.take(position_ids_BS)
        ids_T, types_T = tokens.take(input_ids_BS), tokens.take(token_type_ids_BS)
        return tokens, *self.bert(ids_T, types_T, positions_T, tokens)


def parameter_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order, without allocating any."""
    model = BertForPreTraining(config, seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
