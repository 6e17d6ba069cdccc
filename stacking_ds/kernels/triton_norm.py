"""The end of a sub-layer in Triton: bias, dropout, residual and LayerNorm in one pass each way.

    h = residual + dropout(inner + bias)        y = weight (h - mean) / std + norm_bias

LayerNorm is that of Ba, Kiros & Hinton 2016, statistics and all arithmetic in fp32. Backward reads
h, and draws the dropout mask again from its seed: the mask is in no memory.

Shapes: T tokens, H hidden, P programs that walk the rows, K sums of each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language import constexpr, tensor

from stacking_ds.kernels.triton_parts import (
    WALKING,
    column_sums,
    draw_seed,
    dropped,
    jit,
    launch,
    walkers,
)

# A program's tile: 16 elements a thread, so that with two tensors to read four loads of 16 bytes
# are on the way at once.
_TILE_ELEMENTS = 2048


# --------------------------------------------------------------------------- on the device


@jit
def statistics(h: tensor, in_row: tensor, eps: tensor, H: constexpr) -> tensor:
    """Mean and 1 / standard deviation of each row: [ROWS]. h is 0 where the row does not reach."""
    mean = tl.sum(h, 1) / H
    centered = tl.where(in_row, h - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centered * centered, 1) / H + eps)


@jit
def norm_gradient(
    d_out: tensor, normal: tensor, weight: tensor, rstd: tensor, H: constexpr
) -> tensor:
    """d_h of y = weight normal + norm_bias: what changes mean or variance has no effect."""
    d_normal = d_out * weight
    along = tl.sum(d_normal * normal, 1, keep_dims=True) / H
    return (d_normal - normal * along - tl.sum(d_normal, 1, keep_dims=True) / H) * rstd


@jit
def add_norm_kernel(
    inner_TH: tensor, bias_H: tensor, residual_TH: tensor, weight_H: tensor, norm_bias_H: tensor,
    seed: tensor, sum_TH: tensor, mean_T: tensor, rstd_T: tensor, out_TH: tensor,
    tokens: tensor, eps: tensor, dropout_prob: tensor,
    H: constexpr, BLOCK: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    """One tile of whole rows. What is None is left out; without weight there is no norm."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < H
    inside = (rows < tokens) & in_row
    at = rows.to(tl.int64) * H + columns
    h = tl.load(inner_TH + at, mask=inside, other=0.0).to(tl.float32)
    if bias_H is not None:
        h += tl.load(bias_H + columns, mask=in_row, other=0.0).to(tl.float32)
    if seed is not None:
        h = dropped(h, seed, rows, dropout_prob, BLOCK)
    if residual_TH is not None:
        h += tl.load(residual_TH + at, mask=inside, other=0.0).to(tl.float32)
    if sum_TH is not None:
        tl.store(sum_TH + at, h, mask=inside)
    if weight_H is not None:
        mean, rstd = statistics(h, in_row, eps, H)
        if mean_T is not None:
            tl.store(mean_T + row, mean, mask=row < tokens)
            tl.store(rstd_T + row, rstd, mask=row < tokens)
        weight = tl.load(weight_H + columns, mask=in_row, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_H + columns, mask=in_row, other=0.0).to(tl.float32)
        tl.store(out_TH + at, (h - mean[:, None]) * rstd[:, None] * weight + norm_bias, mask=inside)


@jit
def add_norm_backward_kernel(
    d_out_TH: tensor, sum_TH: tensor, mean_T: tensor, rstd_T: tensor, weight_H: tensor,
    seed: tensor, d_sum_TH: tensor, d_inner_TH: tensor, partial_KPH: tensor,
    tokens: tensor, dropout_prob: tensor,
    BIAS: constexpr, H: constexpr, BLOCK: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    """Every P-th tile. The sums are of norm's weight and bias, if there is one, then of bias."""
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < H
    d_weight = tl.zeros([1, BLOCK], tl.float32)
    d_norm_bias = tl.zeros([1, BLOCK], tl.float32)
    d_bias = tl.zeros([1, BLOCK], tl.float32)
    if weight_H is not None:
        weight = tl.load(weight_H + columns, mask=in_row, other=0.0).to(tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        rows = row[:, None]
        inside = (rows < tokens) & in_row
        at = rows.to(tl.int64) * H + columns
        d_h = tl.load(d_out_TH + at, mask=inside, other=0.0).to(tl.float32)
        if weight_H is not None:
            h = tl.load(sum_TH + at, mask=inside, other=0.0).to(tl.float32)
            # a load of [ROWS, 1] would be one for each column that a thread has
            mean = tl.load(mean_T + row, mask=row < tokens, other=0.0)[:, None]
            rstd = tl.load(rstd_T + row, mask=row < tokens, other=0.0)[:, None]
            normal = (h - mean) * rstd
            d_weight += tl.sum(d_h * normal, 0, keep_dims=True)
            d_norm_bias += tl.sum(d_h, 0, keep_dims=True)
            d_h = norm_gradient(d_h, normal, weight, rstd, H)
        if d_sum_TH is not None:
            tl.store(d_sum_TH + at, d_h, mask=inside)
        if seed is not None:
            d_h = dropped(d_h, seed, rows, dropout_prob, BLOCK)
        if d_inner_TH is not None:
            tl.store(d_inner_TH + at, d_h, mask=inside)
        if BIAS:
            d_bias += tl.sum(d_h, 0, keep_dims=True)
    line = partial_KPH + tl.program_id(0) * H + columns
    if weight_H is not None:
        tl.store(line, d_weight, mask=in_row)
        tl.store(line + tl.num_programs(0) * H, d_norm_bias, mask=in_row)
        line += 2 * tl.num_programs(0) * H
    if BIAS:
        tl.store(line, d_bias, mask=in_row)


# --------------------------------------------------------------------------- on the host


def options(width: int) -> dict[str, Any]:
    """The constants by which the kernels are compiled and cut, for rows of `width`."""
    block = max(16, triton.next_power_of_2(width))
    tile = {"H": width, "BLOCK": block, "ROWS": max(1, _TILE_ELEMENTS // block)}
    # wider rows have more warps, as more elements a thread need more registers than there are
    return {**tile, "num_warps": max(4, block // 256), "enable_fp_fusion": True}


def records(*tensors: torch.Tensor | None) -> bool:
    """True if a backward pass may follow."""
    required = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return required and torch.is_grad_enabled()


def moments(like_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate mean_T and rstd_T: two tensors, since the second half of one would be aligned for
    some numbers of tokens alone, and the kernels compiled for both."""
    mean_T = like_TH.new_empty(len(like_TH), dtype=torch.float32)
    return mean_T, torch.empty_like(mean_T)


def bias_dropout_add_norm(
    inner_TH: torch.Tensor,
    bias_H: torch.Tensor | None,
    residual_TH: torch.Tensor | None,
    weight_H: torch.Tensor,
    norm_bias_H: torch.Tensor,
    eps: float,
    dropout_prob: float,
) -> torch.Tensor:
    """LayerNorm(residual + dropout(inner + bias)), in inner's dtype: T,H.

    A bias or residual of None adds nothing, a probability of 0 draws nothing; `eps` is added to the
    variance.
    """
    return _add_norm(inner_TH, bias_H, residual_TH, weight_H, norm_bias_H, eps, dropout_prob)


def bias_dropout_add(
    inner_TH: torch.Tensor, bias_H: torch.Tensor, residual_TH: torch.Tensor, dropout_prob: float
) -> torch.Tensor:
    """residual + dropout(inner + bias), in inner's dtype: T,H. What pre-LN models need."""
    return _add_norm(inner_TH, bias_H, residual_TH, None, None, 0.0, dropout_prob)


def _add_norm(*arguments: Any) -> torch.Tensor:
    *given, eps, dropout_prob = arguments
    tensors: list[Any] = [None if tensor is None else tensor.contiguous() for tensor in given]
    inner_TH, bias_H, residual_TH, weight_H, norm_bias_H = tensors
    assert residual_TH is None or residual_TH.dtype == inner_TH.dtype
    assert residual_TH is None or residual_TH.shape == inner_TH.shape
    parameters = [one for one in (bias_H, weight_H, norm_bias_H) if one is not None]
    assert {parameter.shape for parameter in parameters} <= {inner_TH.shape[1:]}
    if records(*tensors):
        made = _AddNorm.apply(*tensors, eps, dropout_prob)  # type: ignore[no-untyped-call]
        recorded_TH: torch.Tensor = made
        return recorded_TH
    return _forward(*tensors, eps, dropout_prob, record=False)[0]


def _forward(*arguments: Any, record: bool) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The result; with `record` also sum_TH, mean_T, rstd_T and seed."""
    *given, eps, dropout_prob = arguments
    inner_TH, bias_H, residual_TH, weight_H, _ = given
    tokens, width = inner_TH.shape
    seed = draw_seed(dropout_prob, inner_TH.device)
    normed = weight_H is not None
    changed = not (bias_H is None and residual_TH is None and seed is None)
    sum_TH = torch.empty_like(inner_TH) if not normed or (record and changed) else None
    out_TH = torch.empty_like(inner_TH) if normed else None
    mean_T, rstd_T = moments(inner_TH) if normed and record else (None, None)
    how = options(width)
    made = sum_TH, mean_T, rstd_T, out_TH
    grid = (triton.cdiv(tokens, how["ROWS"]),)
    launch(add_norm_kernel, grid, *given, seed, *made, tokens, eps, dropout_prob, **how)
    if out_TH is None:
        assert sum_TH is not None
        return sum_TH, (None, None, None, seed)
    return out_TH, (sum_TH if changed else inner_TH, mean_T, rstd_T, seed)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        _, bias_H, residual_TH, weight_H, *_ = arguments
        out_TH, recorded = _forward(*arguments, record=True)
        ctx.save_for_backward(weight_H, *recorded)
        ctx.has_bias, ctx.has_residual = bias_H is not None, residual_TH is not None
        ctx.dropout_prob = arguments[-1]
        ctx.parameter_dtype = (weight_H if bias_H is None else bias_H).dtype
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight_H, sum_TH, mean_T, rstd_T, seed = ctx.saved_tensors
        d_out_TH = d_out_TH.contiguous()
        (tokens, width), device, how = d_out_TH.shape, d_out_TH.device, options(d_out_TH.shape[1])
        normed, dropped = weight_H is not None, seed is not None
        d_sum_TH = (
            torch.empty_like(d_out_TH) if normed and (ctx.has_residual or not dropped) else None
        )
        d_inner_TH = torch.empty_like(d_out_TH) if dropped else None
        programs = walkers(device, triton.cdiv(tokens, how["ROWS"]))
        shape = 2 * normed + ctx.has_bias, programs, width
        partial_KPH = torch.empty(shape, dtype=torch.float32, device=device)
        read = d_out_TH, sum_TH, mean_T, rstd_T, weight_H, seed
        made = d_sum_TH, d_inner_TH, partial_KPH
        numbers, how = (tokens, ctx.dropout_prob), {"BIAS": ctx.has_bias, **how, **WALKING}
        launch(add_norm_backward_kernel, (programs,), *read, *made, *numbers, **how)
        sums: list[torch.Tensor | None] = [*column_sums(partial_KPH, ctx.parameter_dtype)]
        d_weight_H, d_norm_bias_H = sums[:2] if normed else (None, None)
        d_sum_TH = d_sum_TH if normed else d_out_TH
        d_inner_TH = d_inner_TH if dropped else d_sum_TH
        d_bias_H = sums[-1] if ctx.has_bias else None
        d_residual_TH = d_sum_TH if ctx.has_residual else None
        return d_inner_TH, d_bias_H, d_residual_TH, d_weight_H, d_norm_bias_H, None, None
