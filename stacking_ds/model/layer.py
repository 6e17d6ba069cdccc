"""The transformer layer that stacking copies, computed on tokens without padding.

Its submodules hold the parameters under Hugging Face's names and compute nothing: the operations
that a form fuses need the parameters of several at once.

Shapes: T tokens, H hidden size, N attention heads, D = H / N.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from stacking_ds.kernels.attention.sequences import Sequences
from stacking_ds.kernels.operations import Norm, Operations, Weights
from stacking_ds.kernels.registry import Compute
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.model.graphs import GraphedLayers


class GatheredWhole(nn.Module):
    """A module whose forward uses the parameters of its submodules itself: ZeRO 3 gathers them all
    before it, instead of each one when it is first used."""


def weights_of(linear: nn.Linear) -> Weights:
    return Weights(linear.weight, linear.bias)


def norm_of(layer_norm: nn.LayerNorm) -> Norm:
    return Norm(layer_norm.weight, layer_norm.bias, layer_norm.eps)


def layer_norm(config: BertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class _SelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def joined(self) -> Weights:
        """Of query, key and value, one behind the other: one product instead of three."""
        linears = (self.query, self.key, self.value)
        weight, bias = (
            torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias")
        )
        return Weights(weight, bias)


class _Output(nn.Module):
    """What a sub-layer ends with."""

    def __init__(self, config: BertConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        if config.layer_norm_position == "post":
            self.LayerNorm = layer_norm(config)


class _Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        if config.layer_norm_position == "pre":
            self.LayerNorm = layer_norm(config)
        self.self = _SelfAttention(config)
        self.output = _Output(config, config.hidden_size)


class _Intermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class Layer(GatheredWhole):
    def __init__(self, config: BertConfig, compute: Compute) -> None:
        super().__init__()
        self.attention = _Attention(config)
        if config.layer_norm_position == "pre":
            self.LayerNorm = layer_norm(config)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config, config.intermediate_size)
        self._config, self._compute = config, compute
        self._is_pre = config.layer_norm_position == "pre"
        self._rest = compute.operations.between_attentions(_after_attention)

    def forward(self, hidden_TH: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        operations, attention = self._compute.operations, self.attention
        if self._is_pre:
            inner_TH = operations.norm(hidden_TH, norm_of(attention.LayerNorm))
            norms = [norm_of(self.LayerNorm)]
        else:
            inner_TH = hidden_TH
            norms = [norm_of(attention.output.LayerNorm), norm_of(self.output.LayerNorm)]
        qkv_TC = operations.linear(inner_TH, *attention.self.joined())
        qkv_T3ND = qkv_TC.view(len(qkv_TC), 3, self._config.num_attention_heads, -1)
        attention_dropout = self._config.attention_probs_dropout_prob if self.training else 0.0
        context_TND = self._compute.attend(qkv_T3ND, sequences, attention_dropout)
        layer_TH: torch.Tensor = self._rest(
            operations,
            context_TND.flatten(1),
            hidden_TH,
            weights_of(attention.output.dense),
            weights_of(self.intermediate.dense),
            weights_of(self.output.dense),
            norms,
            self._config.hidden_dropout_prob if self.training else 0.0,
            self._is_pre,
        )
        return layer_TH


def _after_attention(
    operations: Operations,
    context_TH: torch.Tensor,
    hidden_TH: torch.Tensor,
    projection: Weights,
    up: Weights,
    down: Weights,
    norms: Sequence[Norm],
    dropout_prob: float,
    is_pre: bool,
) -> torch.Tensor:
    """From the attention's context on, each sum normalised (Devlin et al. 2019); in a pre-LN layer
    what enters is (Xiong et al. 2020)."""
    if is_pre:
        attended_TH = operations.linear_add(context_TH, projection, hidden_TH, dropout_prob)
        inner_TF = operations.linear_gelu(operations.norm(attended_TH, norms[0]), up)
        return operations.linear_add(inner_TF, down, attended_TH, dropout_prob)
    attended_TH = operations.linear_add_norm(
        context_TH, projection, hidden_TH, norms[0], dropout_prob
    )
    inner_TF = operations.linear_gelu(attended_TH, up)
    return operations.linear_add_norm(inner_TF, down, attended_TH, norms[1], dropout_prob)


class Encoder(nn.Module):
    """All layers, one after the other."""

    def __init__(self, config: BertConfig, compute: Compute) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, compute) for _ in range(config.num_hidden_layers))
        is_pre = config.layer_norm_position == "pre"
        self.LayerNorm = layer_norm(config) if is_pre else nn.Identity()
        self._recomputed = _RECOMPUTED[compute.activation_checkpointing]
        self._graphs = GraphedLayers(self.layer) if compute.cuda_graphs else None

    def forward(self, hidden_TH: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        encoded_TH = None
        if self._graphs is not None and self.training and torch.is_grad_enabled():
            encoded_TH = self._graphs(hidden_TH, sequences)
        if encoded_TH is None:
            encoded_TH = self._run_layers(hidden_TH, sequences)
        normed_TH: torch.Tensor = self.LayerNorm(encoded_TH)
        return normed_TH

    def _run_layers(self, hidden_TH: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        for layer in self.layer:
            if self._recomputed is None or not torch.is_grad_enabled():
                hidden_TH = layer(hidden_TH, sequences)
            else:
                hidden_TH = checkpoint(
                    layer, hidden_TH, sequences, use_reentrant=False, context_fn=self._recomputed
                )
        return hidden_TH


# ------------------------------------------------------------- activation checkpointing


_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
)


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    # Nothing that draws random numbers may be kept: what is drawn after it would then differ from
    # what the forward pass drew.
    kept = operation in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_RECOMPUTED: dict[str, Callable[[], Any] | None] = {
    "none": None,
    # attention and what is elementwise, but no matrix product
    "selective": partial(create_selective_checkpoint_contexts, _policy),
    # the whole layer (Chen et al. 2016)
    "full": noop_context_fn,
}
"""What the backward pass computes once more of a layer, by `activation_checkpointing`."""
