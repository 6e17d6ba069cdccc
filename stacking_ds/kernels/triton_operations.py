"""The operations of a BERT with everything between two matrix products in one Triton kernel."""

from dataclasses import dataclass

import torch

from stacking_ds.kernels.operations import EmbeddingTables, Norm, Operations, Weights
from stacking_ds.kernels.triton_cross_entropy import cross_entropy_sum
from stacking_ds.kernels.triton_embedding import embed
from stacking_ds.kernels.triton_gelu import bias_gelu
from stacking_ds.kernels.triton_norm import bias_dropout_add, bias_dropout_add_norm

__all__ = ["TritonOperations"]


@dataclass(frozen=True)
class TritonOperations(Operations):
    """On an NVIDIA GPU; with TRITON_INTERPRET=1, and slowly, on the CPU."""

    name = "triton"

    def linear_gelu(self, x_TI: torch.Tensor, weights: Weights) -> torch.Tensor:
        return bias_gelu(self.linear(x_TI, weights.weight_OI, None), weights.bias_O)

    def linear_add(
        self,
        x_TI: torch.Tensor,
        weights: Weights,
        residual_TO: torch.Tensor,
        dropout_prob: float,
    ) -> torch.Tensor:
        inner_TO = self.linear(x_TI, weights.weight_OI, None)
        return bias_dropout_add(inner_TO, weights.bias_O, residual_TO, dropout_prob)

    def norm(self, x_TH: torch.Tensor, norm: Norm) -> torch.Tensor:
        return bias_dropout_add_norm(x_TH, None, None, *norm, 0.0)

    def linear_add_norm(
        self,
        x_TI: torch.Tensor,
        weights: Weights,
        residual_TH: torch.Tensor,
        norm: Norm,
        dropout_prob: float,
    ) -> torch.Tensor:
        inner_TH = self.linear(x_TI, weights.weight_OI, None)
        return bias_dropout_add_norm(inner_TH, weights.bias_O, residual_TH, *norm, dropout_prob)

    def embed(
        self,
        input_ids_T: torch.Tensor,
        token_type_ids_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        tables: EmbeddingTables,
        norm: Norm,
        dropout_prob: float,
    ) -> torch.Tensor:
        ids = input_ids_T, token_type_ids_T, position_ids_T
        return embed(*ids, *tables, *norm, dropout_prob)

    def cross_entropy_sum(self, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        return cross_entropy_sum(logits_MV, labels_M)
