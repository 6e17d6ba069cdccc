"""What a BERT computes besides attention, in the torch form, which defines it.

A form is chosen in `stacking_ds.kernels.registry`; the others derive from this one and replace what
they do faster. Matrix products belong to an operation with what follows them, so that each form
decides how much of that one pass over memory can do.

Shapes: T tokens, I inputs, O outputs, H hidden size, M masked positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch.nn import functional

from stacking_ds.kernels.cross_entropy import cross_entropy_sum
from stacking_ds.kernels.dropout import dropout, dropout_add

__all__ = ["EmbeddingTables", "LinearForm", "Norm", "Operations", "Weights"]

LinearForm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(x_TI, weight_OI, bias_O or None) -> T, O"""
Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


class Weights(NamedTuple):
    """Of a linear map."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor


class Norm(NamedTuple):
    """LayerNorm's parameters (Ba et al. 2016)."""

    weight_H: torch.Tensor
    bias_H: torch.Tensor
    eps: float


class EmbeddingTables(NamedTuple):
    """Of words, token types and positions: (rows, H) each."""

    word: torch.Tensor
    token_type: torch.Tensor
    position: torch.Tensor


@dataclass(frozen=True)
class Operations:
    """Plain torch operations; what follows a matrix product reads and writes memory anew.

    `linear` multiplies the layers' matrices; heads use torch's own.
    """

    linear: LinearForm = functional.linear

    name = "torch"

    def linear_gelu(self, x_TI: torch.Tensor, weights: Weights) -> torch.Tensor:
        """gelu(x W' + b), with the exact GELU (Hendrycks and Gimpel 2016). Shape [T, O]."""
        return functional.gelu(self.linear(x_TI, *weights))

    def linear_add(
        self,
        x_TI: torch.Tensor,
        weights: Weights,
        residual_TO: torch.Tensor,
        dropout_prob: float,
    ) -> torch.Tensor:
        """residual + dropout(x W' + b). Shape [T, O]."""
        return dropout_add(self.linear(x_TI, *weights), residual_TO, dropout_prob)

    def norm(self, x_TH: torch.Tensor, norm: Norm) -> torch.Tensor:
        return functional.layer_norm(x_TH, x_TH.shape[-1:], norm.weight_H, norm.bias_H, norm.eps)

    def linear_add_norm(
        self,
        x_TI: torch.Tensor,
        weights: Weights,
        residual_TH: torch.Tensor,
        norm: Norm,
        dropout_prob: float,
    ) -> torch.Tensor:
        """LayerNorm(residual + dropout(x W' + b)). Shape [T, H]."""
        return self.norm(self.linear_add(x_TI, weights, residual_TH, dropout_prob), norm)

    def embed(
        self,
        input_ids_T: torch.Tensor,
        token_type_ids_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        tables: EmbeddingTables,
        norm: Norm,
        dropout_prob: float,
    ) -> torch.Tensor:
        """dropout(LayerNorm(word + token type + position)). Shape [T, H]."""
        summed_TH = functional.embedding(input_ids_T, tables.word)
        summed_TH = summed_TH + functional.embedding(token_type_ids_T, tables.token_type)
        summed_TH = summed_TH + functional.embedding(position_ids_T, tables.position)
        return dropout(self.norm(summed_TH, norm), dropout_prob)

    def cross_entropy_sum(self, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        """As `stacking_ds.kernels.cross_entropy` has it: its backward overwrites the logits."""
        return cross_entropy_sum(logits_MV, labels_M)

    def between_attentions(self, function: Function) -> Function:
        """What a layer does after its attention, in the form this one runs it in."""
        return function
