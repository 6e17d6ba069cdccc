"""BERT's embeddings in Triton: gather, sum, LayerNorm and dropout in one pass each way.

    y = dropout(LayerNorm((word[id] + type[type id]) + position[position id]))

Backward gathers again, which reads what reading the sum would, so that the sum is in no memory.
Where an id is no row of its table the whole token becomes NaN: checking would wait for the device.

Shapes: T tokens, H hidden, V words, K token types (then K sums of each of P programs), P positions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language import constexpr, tensor

from stacking_ds.kernels.triton_norm import moments, norm_gradient, options, records, statistics
from stacking_ds.kernels.triton_parts import (
    WALKING,
    column_sums,
    draw_seed,
    dropped,
    jit,
    launch,
    walkers,
)

# --------------------------------------------------------------------------- on the device


@jit
def _gathered(
    ids_T: tensor, table: tensor, size: tensor, row: tensor, tokens: tensor,
    H: constexpr, BLOCK: constexpr,
) -> tensor:  # fmt: skip
    columns = tl.arange(0, BLOCK)[None, :]
    # a load of [ROWS, 1] would be one for each column that a thread has
    ids = tl.load(ids_T + row, mask=row < tokens, other=0)[:, None]
    known = (ids >= 0) & (ids < size)
    found = tl.load(
        table + ids.to(tl.int64) * H + columns, mask=known & (columns < H), other=0.0
    ).to(tl.float32)
    return tl.where(known, found, float("nan"))


@jit
def _summed(
    input_ids_T: tensor, token_type_ids_T: tensor, position_ids_T: tensor,
    word_VH: tensor, type_KH: tensor, position_PH: tensor,
    words: tensor, types: tensor, positions: tensor,
    row: tensor, tokens: tensor, H: constexpr, BLOCK: constexpr,
) -> tensor:  # fmt: skip
    """The sum of three embeddings of each of these rows."""
    h = _gathered(input_ids_T, word_VH, words, row, tokens, H, BLOCK)
    h += _gathered(token_type_ids_T, type_KH, types, row, tokens, H, BLOCK)
    h += _gathered(position_ids_T, position_PH, positions, row, tokens, H, BLOCK)
    return h


@jit
def embed_kernel(
    input_ids_T: tensor, token_type_ids_T: tensor, position_ids_T: tensor,
    word_VH: tensor, type_KH: tensor, position_PH: tensor,
    words: tensor, types: tensor, positions: tensor,
    weight_H: tensor, norm_bias_H: tensor, seed: tensor,
    mean_T: tensor, rstd_T: tensor, out_TH: tensor,
    tokens: tensor, eps: tensor, dropout_prob: tensor,
    H: constexpr, BLOCK: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    """One tile of whole rows. Without mean_T nothing is kept for a backward pass."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < H
    h = _summed(
        input_ids_T, token_type_ids_T, position_ids_T, word_VH, type_KH, position_PH,
        words, types, positions, row, tokens, H, BLOCK,
    )  # fmt: skip
    h = tl.where(in_row, h, 0.0)
    mean, rstd = statistics(h, in_row, eps, H)
    if mean_T is not None:
        tl.store(mean_T + row, mean, mask=row < tokens)
        tl.store(rstd_T + row, rstd, mask=row < tokens)
    weight = tl.load(weight_H + columns, mask=in_row, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_H + columns, mask=in_row, other=0.0).to(tl.float32)
    out = (h - mean[:, None]) * rstd[:, None] * weight + norm_bias
    if seed is not None:
        out = dropped(out, seed, rows, dropout_prob, BLOCK)
    at = rows.to(tl.int64) * H + columns
    tl.store(out_TH + at, out, mask=(rows < tokens) & in_row)


@jit
def embed_backward_kernel(
    d_out_TH: tensor, input_ids_T: tensor, token_type_ids_T: tensor, position_ids_T: tensor,
    word_VH: tensor, type_KH: tensor, position_PH: tensor,
    words: tensor, types: tensor, positions: tensor,
    weight_H: tensor, seed: tensor, mean_T: tensor, rstd_T: tensor,
    d_sum_TH: tensor, partial_2PH: tensor, tokens: tensor, dropout_prob: tensor,
    H: constexpr, BLOCK: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    """Every P-th tile. The sums are of the norm's weight and bias."""
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < H
    weight = tl.load(weight_H + columns, mask=in_row, other=0.0).to(tl.float32)
    d_weight = tl.zeros([1, BLOCK], tl.float32)
    d_norm_bias = tl.zeros([1, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        rows = row[:, None]
        inside = (rows < tokens) & in_row
        at = rows.to(tl.int64) * H + columns
        # the sum first: with the mask before it there are too few registers
        h = _summed(
            input_ids_T, token_type_ids_T, position_ids_T, word_VH, type_KH, position_PH,
            words, types, positions, row, tokens, H, BLOCK,
        )  # fmt: skip
        mean = tl.load(mean_T + row, mask=row < tokens, other=0.0)[:, None]
        rstd = tl.load(rstd_T + row, mask=row < tokens, other=0.0)[:, None]
        normal = (h - mean) * rstd
        d_out = tl.load(d_out_TH + at, mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            d_out = dropped(d_out, seed, rows, dropout_prob, BLOCK)
        d_weight += tl.sum(d_out * normal, 0, keep_dims=True)
        d_norm_bias += tl.sum(d_out, 0, keep_dims=True)
        tl.store(d_sum_TH + at, norm_gradient(d_out, normal, weight, rstd, H), mask=inside)
    line = partial_2PH + tl.program_id(0) * H + columns
    tl.store(line, d_weight, mask=in_row)
    tl.store(line + tl.num_programs(0) * H, d_norm_bias, mask=in_row)


# --------------------------------------------------------------------------- on the host


def embed(
    input_ids_T: torch.Tensor,
    token_type_ids_T: torch.Tensor,
    position_ids_T: torch.Tensor,
    word_VH: torch.Tensor,
    type_KH: torch.Tensor,
    position_PH: torch.Tensor,
    weight_H: torch.Tensor,
    norm_bias_H: torch.Tensor,
    eps: float,
    dropout_prob: float,
) -> torch.Tensor:
    """dropout(LayerNorm(word[ids] + type[types] + position[positions])), in word's dtype: T,H.

    A token with an id that is no row of its table becomes NaN. A probability of 0 draws nothing;
    `eps` is added to the variance.
    """
    given = input_ids_T, token_type_ids_T, position_ids_T, word_VH, type_KH, position_PH
    tensors = [tensor.contiguous() for tensor in (*given, weight_H, norm_bias_H)]
    assert input_ids_T.shape == token_type_ids_T.shape == position_ids_T.shape
    assert {tensor.shape[-1:] for tensor in tensors[3:]} == {weight_H.shape}
    if records(*tensors):
        made = _Embed.apply(*tensors, eps, dropout_prob)  # type: ignore[no-untyped-call]
        recorded_TH: torch.Tensor = made
        return recorded_TH
    return _forward(*tensors, eps=eps, dropout_prob=dropout_prob, record=False)[0]


def _forward(
    *tensors: torch.Tensor, eps: float, dropout_prob: float, record: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The result; with `record` also seed, mean_T and rstd_T."""
    tokens, (word_VH, type_KH, position_PH) = len(tensors[0]), tensors[3:6]
    out_TH = torch.empty(tokens, word_VH.shape[1], dtype=word_VH.dtype, device=word_VH.device)
    mean_T, rstd_T = moments(out_TH) if record else (None, None)
    seed = draw_seed(dropout_prob, out_TH.device)
    sizes, how = map(len, (word_VH, type_KH, position_PH)), options(word_VH.shape[1])
    made, numbers = (seed, mean_T, rstd_T, out_TH), (tokens, eps, dropout_prob)
    grid = (triton.cdiv(tokens, how["ROWS"]),)
    launch(embed_kernel, grid, *tensors[:6], *sizes, *tensors[6:], *made, *numbers, **how)
    return out_TH, (seed, mean_T, rstd_T)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        *tensors, eps, ctx.dropout_prob = arguments
        out_TH, recorded = _forward(*tensors, eps=eps, dropout_prob=ctx.dropout_prob, record=True)
        ctx.save_for_backward(*tensors[:7], *recorded)  # all but the norm's bias
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *given, weight_H, seed, mean_T, rstd_T = ctx.saved_tensors
        ids, tables = given[:3], given[3:]
        d_out_TH = d_out_TH.contiguous()
        d_sum_TH, (tokens, width) = torch.empty_like(d_out_TH), d_out_TH.shape
        device, how = d_out_TH.device, options(width)
        programs = walkers(device, triton.cdiv(tokens, how["ROWS"]))
        partial_2PH = torch.empty(2, programs, width, dtype=torch.float32, device=device)
        read = d_out_TH, *given, *map(len, tables), weight_H, seed, mean_T, rstd_T
        made, numbers = (d_sum_TH, partial_2PH), (tokens, ctx.dropout_prob)
        launch(embed_backward_kernel, (programs,), *read, *made, *numbers, **how, **WALKING)
        d_tables = (
            # an id that is no row has made its token NaN; here it would write into other memory
            torch.ops.aten.embedding_dense_backward(
                d_sum_TH, ids_T.clamp(0, len(table) - 1), len(table), -1, False
            )
            for ids_T, table in zip(ids, tables, strict=True)
        )
        sums = column_sums(partial_2PH, weight_H.dtype)
        return None, None, None, *d_tables, *sums, None, None
