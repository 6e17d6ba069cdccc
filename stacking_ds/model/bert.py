"""BERT with its two pre-training heads and their losses, written for speed and knowing no ranks.

Devlin et al. 2019, under Hugging Face's parameter names. Everything is computed on tokens without
padding, one example behind the other.

Shapes: T tokens, H hidden size, M masked positions, E examples, V vocabulary; of rows as Hugging
Face's models take them: B rows, S slots each.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention.sequences import Sequences
from stacking_ds.kernels.cross_entropy import IGNORE_INDEX, vocabulary_logits
from stacking_ds.kernels.operations import EmbeddingTables, Operations, TokenIds
from stacking_ds.kernels.registry import Compute
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.model.layer import Encoder, GatheredWhole, layer_norm, norm_of, weights_of
from stacking_ds.model.parameters import initialize_parameters


class PretrainingLoss(NamedTuple):
    """Summed cross-entropies in nats: fp32 scalars, exactly 0 where there is no target.

    Sums, because a mean over one rank's or one micro-step's targets would weigh targets unequally:
    the caller divides by the target counts of the global batch.
    """

    mlm_sum: torch.Tensor
    nsp_sum: torch.Tensor


def pretraining_loss(
    mlm_logits: torch.Tensor,
    mlm_labels: torch.Tensor,
    nsp_logits_E2: torch.Tensor,
    nsp_labels_E: torch.Tensor,
    operations: Operations | None = None,
) -> PretrainingLoss:
    """Masked-word and next-sentence cross-entropy (Devlin et al. 2019 §3.1), computed in fp32.

    Args:
        mlm_logits: (..., V), either at the M masked positions or at all B x S. The backward pass
            overwrites them with their gradient.
        mlm_labels: (...), vocabulary ids.
        nsp_logits_E2: next-sentence logits.
        nsp_labels_E: 0 where the second sentence follows the first, 1 where it does not.
        operations: the model's, for the form of the cross-entropy.

    A label of -100 is no target. Without any target a sum is 0 and has a gradient of 0, so a
    rank that holds padding rows only runs the same backward pass as the others.
    """
    return PretrainingLoss(
        mlm_sum=(operations or Operations()).cross_entropy_sum(
            mlm_logits.flatten(0, -2), mlm_labels.flatten()
        ),
        nsp_sum=functional.cross_entropy(
            nsp_logits_E2.float(), nsp_labels_E, ignore_index=IGNORE_INDEX, reduction="sum"
        ),
    )


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
            TokenIds(ids_T, types_T, positions_T), tables, norm_of(self.LayerNorm), dropout
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
        sequences: Sequences,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_TH = self.encoder(self.embeddings(ids_T, types_T, positions_T), sequences)
        return hidden_TH, self.pooler(hidden_TH.index_select(0, sequences.starts_E1[:-1]))


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
        input_ids_T: torch.Tensor,
        token_type_ids_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        sequences: Sequences,
        mlm_positions_M: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the two tasks. Ids are not checked here: that would wait for the device.

        Args:
            input_ids_T: token ids.
            token_type_ids_T: 0 in the first sentence, 1 in the second.
            position_ids_T: each token's place in its example.
            sequences: where the examples begin; a token attends to its example. `from_rows` makes
                all four of rows with padding.
            mlm_positions_M: which tokens MLM logits are wanted for; may be empty. Without it they
                are computed for every token.

        Returns:
            mlm_logits_MV (mlm_logits_TV without positions) and nsp_logits_E2.

        Raises:
            ConfigError: the rows are longer than the position embeddings.
        """
        if sequences.longest > self.config.max_position_embeddings:
            raise ConfigError(
                f"rows of {sequences.longest} tokens do not fit max_position_embeddings="
                f"{self.config.max_position_embeddings}; shorten sequence_length or raise it"
            )
        inputs = input_ids_T, token_type_ids_T, position_ids_T, sequences
        hidden_TH, pooled_EH = self.bert(*inputs)
        if mlm_positions_M is not None:
            hidden_TH = hidden_TH.index_select(0, mlm_positions_M)
        logits, nsp_logits_E2 = self.cls(hidden_TH, pooled_EH)
        return logits, nsp_logits_E2


def from_rows(
    input_ids_BS: torch.Tensor, token_type_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequences]:
    """The model's inputs, of rows as Hugging Face's models take them: one example each, its mask
    0 at padding. A row of padding alone has one token, the padding in its first slot.

    The host waits for the device to find the tokens. Of Hugging Face's results, those at
    `attention_mask_BS != 0` are the tokens' in this order.
    """
    B, S = attention_mask_BS.shape
    real_BS = attention_mask_BS != 0
    real_BS[:, 0] |= ~real_BS.any(dim=1)
    places_T = torch.arange(S, device=real_BS.device).expand(B, S)[real_BS]
    starts_E1 = functional.pad(real_BS.sum(dim=1).cumsum(0), (1, 0)).int()
    ids_T, types_T = input_ids_BS[real_BS], token_type_ids_BS[real_BS]
    return ids_T, types_T, places_T, Sequences(starts_E1, S, B * S)


def parameter_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order, without allocating any."""
    model = BertForPreTraining(config, seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


class Forward(NamedTuple):
    """A model's answers for a batch, and the sums of their losses."""

    sums: PretrainingLoss
    mlm_logits_MV: torch.Tensor
    nsp_logits_E2: torch.Tensor


def forward_loss(
    model: Any,
    inputs: Sequence[Any],
    mlm_labels_M: torch.Tensor,
    next_sentence_label_E: torch.Tensor,
) -> Forward:
    """Run `model` (a `BertForPreTraining`, or its DeepSpeed engine) on a batch on its device."""
    mlm_logits_MV, nsp_logits_E2 = model(*inputs)
    operations = getattr(model, "module", model).compute.operations
    sums = pretraining_loss(
        mlm_logits_MV, mlm_labels_M, nsp_logits_E2, next_sentence_label_E, operations
    )
    return Forward(sums, mlm_logits_MV, nsp_logits_E2)
