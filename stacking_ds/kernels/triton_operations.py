"""The operations of a BERT with everything between two matrix products in one Triton kernel.

Here are those operations, and GELU of a projection and its bias: a read and a write forward, one
read more back.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language import constexpr, tensor

from stacking_ds.kernels.operations import EmbeddingTables, Norm, Operations, TokenIds, Weights
from stacking_ds.kernels.triton_cross_entropy import cross_entropy_sum
from stacking_ds.kernels.triton_embedding import embed
from stacking_ds.kernels.triton_norm import bias_dropout_add, bias_dropout_add_norm
from stacking_ds.kernels.triton_parts import column_sums, jit, launch, walkers

# A program's tile: 8 elements a thread, which are a load of 16 bytes. With 16 elements and half
# the warps ptxas spills for some GPUs.
_TILE_ELEMENTS = 2048
_WARPS = 8
_COLUMNS = 512  # a divisor of usual intermediate sizes: no lane is idle

SQRT_HALF = constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = constexpr(0.3989422804014327)


# --------------------------------------------------------------------------- on the device


@jit
def _normal_distribution(x: tensor) -> tensor:
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))


@jit
def gelu_kernel(
    inner_TF: tensor, bias_F: tensor, out_TF: tensor, tokens: tensor,
    F: constexpr, COLUMNS: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    """One tile; those beside one another in memory follow one another."""
    COLUMN_BLOCKS: constexpr = (F + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % COLUMN_BLOCKS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = tl.program_id(0) // COLUMN_BLOCKS * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (rows < tokens) & (columns < F)
    at = rows.to(tl.int64) * F + columns
    bias = tl.load(bias_F + columns, mask=columns < F, other=0.0).to(tl.float32)
    x = tl.load(inner_TF + at, mask=inside, other=0.0).to(tl.float32) + bias
    tl.store(out_TF + at, x * _normal_distribution(x), mask=inside)


@jit
def gelu_backward_kernel(
    d_out_TF: tensor, inner_TF: tensor, bias_F: tensor, d_inner_TF: tensor, partial_1PF: tensor,
    tokens: tensor, F: constexpr, COLUMNS: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    """One block of columns of every P-th block of rows."""
    COLUMN_BLOCKS: constexpr = (F + COLUMNS - 1) // COLUMNS
    walker, step = tl.program_id(0) // COLUMN_BLOCKS, tl.num_programs(0) // COLUMN_BLOCKS * ROWS
    columns = tl.program_id(0) % COLUMN_BLOCKS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bias = tl.load(bias_F + columns, mask=columns < F, other=0.0).to(tl.float32)
    d_bias = tl.zeros([1, COLUMNS], tl.float32)
    for start in range(walker * ROWS, tokens, step):
        rows = start + tl.arange(0, ROWS)[:, None]
        inside = (rows < tokens) & (columns < F)
        at = rows.to(tl.int64) * F + columns
        d_out = tl.load(d_out_TF + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(inner_TF + at, mask=inside, other=0.0).to(tl.float32) + bias
        density = INVERSE_SQRT_TWO_PI * tl.exp(-0.5 * x * x)
        d_inner = d_out * (_normal_distribution(x) + x * density)
        tl.store(d_inner_TF + at, d_inner, mask=inside)
        d_bias += tl.sum(d_inner, 0, keep_dims=True)
    tl.store(partial_1PF + walker * F + columns, d_bias, mask=columns < F)


# --------------------------------------------------------------------------- on the host


def options(width: int) -> dict[str, Any]:
    """The constants by which the kernels are compiled and cut, for rows of `width`."""
    columns = min(_COLUMNS, max(16, triton.next_power_of_2(width)))
    tile = {"F": width, "COLUMNS": columns, "ROWS": _TILE_ELEMENTS // columns}
    return {**tile, "num_warps": _WARPS, "enable_fp_fusion": True}


def bias_gelu(inner_TF: torch.Tensor, bias_F: torch.Tensor) -> torch.Tensor:
    """gelu(inner + bias), computed in fp32, in inner's dtype: T,F."""
    assert inner_TF.shape[1:] == bias_F.shape, (inner_TF.shape, bias_F.shape)
    made = _BiasGelu.apply(inner_TF.contiguous(), bias_F.contiguous())  # type: ignore[no-untyped-call]
    out_TF: torch.Tensor = made
    return out_TF


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner_TF: torch.Tensor, bias_F: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inner_TF, bias_F)
        (tokens, width), out_TF = inner_TF.shape, torch.empty_like(inner_TF)
        how = options(width)
        grid = (triton.cdiv(width, how["COLUMNS"]) * triton.cdiv(tokens, how["ROWS"]),)
        launch(gelu_kernel, grid, inner_TF, bias_F, out_TF, tokens, **how)
        return out_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TF: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inner_TF, bias_F = ctx.saved_tensors
        d_out_TF, d_inner_TF = d_out_TF.contiguous(), torch.empty_like(inner_TF)
        (tokens, width), device = inner_TF.shape, inner_TF.device
        how = options(width)
        column_blocks = triton.cdiv(width, how["COLUMNS"])
        tiles = column_blocks * triton.cdiv(tokens, how["ROWS"])
        programs = triton.cdiv(walkers(device, tiles), column_blocks)
        partial_1PF = torch.empty(1, programs, width, dtype=torch.float32, device=device)
        tensors = d_out_TF, inner_TF, bias_F, d_inner_TF, partial_1PF
        launch(gelu_backward_kernel, (column_blocks * programs,), *tensors, tokens, **how)
        return d_inner_TF, *column_sums(partial_1PF, bias_F.dtype)


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
        self, ids: TokenIds, tables: EmbeddingTables, norm: Norm, dropout_prob: float
    ) -> torch.Tensor:
        return embed(*ids, *tables, *norm, dropout_prob)

    def cross_entropy_sum(self, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        return cross_entropy_sum(logits_MV, labels_M)
