"""BERT with its two pre-training heads, written for speed and knowing no ranks.

Devlin et al. 2019, under Hugging Face's parameter names (`stacking_ds.model.names` has the one
table of what differs). Each parameter is used in the forward of a module that registers it, which
is where ZeRO 3 gathers it.

Shapes: B rows, S tokens a row, H hidden size, N attention heads, D = H / N, F intermediate size,
M masked positions of the whole batch, E examples (B where
rows are not packed), V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional

from stacking_ds.errors import ConfigError
from stacking_ds.model.config import BertConfig, LayerNormPosition
from stacking_ds.model.initialization import initialize_parameters

__all__ = ["BertForPreTraining", "parameter_shapes"]


def _layer_norm(config: BertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def _layer_norm_if(config: BertConfig, position: LayerNormPosition) -> nn.Module:
    return _layer_norm(config) if config.layer_norm_position == position else nn.Identity()


class _Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = _layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        token_type_ids_BS: torch.Tensor,
        position_ids_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        positions = position_ids_BS
        if positions is None:
            positions = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
        hidden_BSH: torch.Tensor = self.word_embeddings(input_ids_BS)
        hidden_BSH = hidden_BSH + self.token_type_embeddings(token_type_ids_BS)
        hidden_BSH = hidden_BSH + self.position_embeddings(positions)
        embedded_BSH: torch.Tensor = self.dropout(self.LayerNorm(hidden_BSH))
        return embedded_BSH


class _SelfAttention(nn.Module):
    """Every token looks at the tokens that the mask shows it: those of its own example."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BSH: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        context_BNSD = functional.scaled_dot_product_attention(
            self._split_heads(self.query(hidden_BSH)),
            self._split_heads(self.key(hidden_BSH)),
            self._split_heads(self.value(hidden_BSH)),
            attn_mask=mask,
            dropout_p=self.dropout_prob if self.training else 0.0,
        )
        return context_BNSD.transpose(1, 2).flatten(2)

    def _split_heads(self, projected_BSH: torch.Tensor) -> torch.Tensor:
        B, S, H = projected_BSH.shape
        return projected_BSH.view(B, S, self.num_heads, H // self.num_heads).transpose(1, 2)


class _Output(nn.Module):
    """The end of a sub-layer: project to H, drop out, add to the residual stream."""

    def __init__(self, config: BertConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = _layer_norm_if(config, "post")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inner: torch.Tensor, residual_BSH: torch.Tensor) -> torch.Tensor:
        hidden_BSH: torch.Tensor = self.LayerNorm(residual_BSH + self.dropout(self.dense(inner)))
        return hidden_BSH


class _Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.LayerNorm = _layer_norm_if(config, "pre")
        self.self = _SelfAttention(config)
        self.output = _Output(config, config.hidden_size)

    def forward(self, hidden_BSH: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        context_BSH = self.self(self.LayerNorm(hidden_BSH), mask)
        attended_BSH: torch.Tensor = self.output(context_BSH, hidden_BSH)
        return attended_BSH


class _Intermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.dense(hidden_BSH))


class _Layer(nn.Module):
    """The block that stacking copies."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.LayerNorm = _layer_norm_if(config, "pre")
        self.intermediate = _Intermediate(config)
        self.output = _Output(config, config.intermediate_size)

    def forward(self, hidden_BSH: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden_BSH = self.attention(hidden_BSH, mask)
        inner_BSF = self.intermediate(self.LayerNorm(hidden_BSH))
        output_BSH: torch.Tensor = self.output(inner_BSF, hidden_BSH)
        return output_BSH


class _Encoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.LayerNorm = _layer_norm_if(config, "pre")

    def forward(self, hidden_BSH: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            hidden_BSH = layer(hidden_BSH, mask)
        encoded_BSH: torch.Tensor = self.LayerNorm(hidden_BSH)
        return encoded_BSH


class _Pooler(nn.Module):
    """A summary of each example, read from its first token, [CLS]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_BSH: torch.Tensor, first_positions_E: torch.Tensor | None
    ) -> torch.Tensor:
        if first_positions_E is None:
            first_EH = hidden_BSH[:, 0]
        else:
            first_EH = hidden_BSH.flatten(0, 1).index_select(0, first_positions_E)
        return torch.tanh(self.dense(first_EH))


class _Bert(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.pooler = _Pooler(config)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        token_type_ids_BS: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        position_ids_BS: torch.Tensor | None = None,
        first_positions_E: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed = position_ids_BS is not None
        mask = _mask_of_packed(attention_mask_BS) if packed else _mask_of_rows(attention_mask_BS)
        hidden_BSH = self.embeddings(input_ids_BS, token_type_ids_BS, position_ids_BS)
        hidden_BSH = self.encoder(hidden_BSH, mask)
        return hidden_BSH, self.pooler(hidden_BSH, first_positions_E)


# Attending to nothing is NaN in some attention kernels, and a NaN row would reach every weight
# through its gradient, so padding attends to padding where there is nothing else.


def _mask_of_rows(attention_mask_BS: torch.Tensor) -> torch.Tensor:
    """Every token sees the tokens of its row. Shape [B, 1, 1, S]."""
    mask_BS = attention_mask_BS.bool()
    return (mask_BS | ~mask_BS.any(dim=1, keepdim=True))[:, None, None, :]


def _mask_of_packed(attention_mask_BS: torch.Tensor) -> torch.Tensor:
    """Every token sees the tokens of its example. Shape [B, 1, S, S]."""
    return (attention_mask_BS[:, :, None] == attention_mask_BS[:, None, :])[:, None]


class _Transform(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = _layer_norm(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        transformed: torch.Tensor = self.LayerNorm(functional.gelu(self.dense(hidden)))
        return transformed


class _MlmHead(nn.Module):
    """Logits over the vocabulary; the decoder's weight is the word embedding's."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = _Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def tie(self, word_embeddings: nn.Embedding) -> None:
        """Share the weight, and keep the bias one parameter under its two names."""
        self.decoder.weight = word_embeddings.weight
        self.bias = self.decoder.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.decoder(self.transform(hidden))
        return logits


class _Heads(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = _MlmHead(config)
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
    """

    def __init__(self, config: BertConfig, seed: int | None) -> None:
        super().__init__()
        self.config = config
        # without memory first: torch's own initialisation would cost time and global random state
        with torch.device("meta"):
            self.bert = _Bert(config)
            self.cls = _Heads(config)
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the two tasks. Ids are not checked here: that would wait for the device.

        Args:
            input_ids_BS: token ids.
            token_type_ids_BS: 0 in the first sentence, 1 in the second.
            attention_mask_BS: true (or 1) for tokens, false (or 0) for padding. In packed rows the
                tokens of the k-th example of a row have k, and see one another alone.
            mlm_positions_M: where MLM logits are wanted, as b * S + s; may be empty. Without it
                they are computed everywhere.
            position_ids_BS: each token's place in its example. Rows are packed if it is given;
                without it an example is a row.
            first_positions_E: where the examples begin, as b * S + s; without it, at s = 0.

        Returns:
            mlm_logits_MV (mlm_logits_BSV without positions) and nsp_logits_E2.

        Raises:
            ConfigError: the rows are longer than the position embeddings.
        """
        sequence_length = input_ids_BS.shape[1]
        if sequence_length > self.config.max_position_embeddings:
            raise ConfigError(
                f"rows of {sequence_length} tokens do not fit max_position_embeddings="
                f"{self.config.max_position_embeddings}; shorten sequence_length or raise it"
            )
        hidden, pooled_EH = self.bert(
            input_ids_BS, token_type_ids_BS, attention_mask_BS, position_ids_BS, first_positions_E
        )
        if mlm_positions_M is not None:
            hidden = hidden.flatten(0, 1).index_select(0, mlm_positions_M)
        mlm_logits, nsp_logits_E2 = self.cls(hidden, pooled_EH)
        return mlm_logits, nsp_logits_E2


def parameter_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order, without allocating any."""
    model = BertForPreTraining(config, seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
