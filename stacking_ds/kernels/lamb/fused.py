"""The LAMB step in Triton: as many launches for a thousand tensors as for one.

Every program does one chunk of one span. Where that lies stands in a table made once; whose it is
and with which numbers, in a small one that each call sends ahead:

    accumulate   24 bytes a parameter                  moments, and each chunk's sums of squares
    reduce       a program for each parameter          adds its chunks' sums in order, no atomics
    apply        16 bytes a parameter, and the copy    the ratio is computed where it is used

Nothing waits for the device: tables are sent from pinned memory, and sums do not come back.

Shapes: I items, K columns of an item's row, C chunks, S parameters of a call, P all parameters.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from triton.language import constexpr, tensor

from stacking_ds.fragments import Span
from stacking_ds.kernels.lamb.contract import Hyper, Item

__all__ = ["CHUNK_ELEMENTS", "FORMS", "OPTIONS", "TYPES", "TritonLamb"]

# A program's share: so much that reading the tables is nothing beside it, and so little that the
# last ones to end leave the device idle for a small part of the time only.
CHUNK_ELEMENTS = 1 << 14
# With 8 warps a block is 4 elements a thread, and each load of fp32 one of 16 bytes.
OPTIONS = {"BLOCK": 1024, "num_warps": 8, "enable_fp_fusion": True}

# An item's row: addresses, then numbers, which are fp64 in the same 8 bytes (see `_numbers`).
GRADIENT, WEIGHT, EXP_AVG, EXP_AVG_SQ, LOW = map(constexpr, range(5))
BETA1, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2 = map(constexpr, range(5, 9))
SLOPE, FLOOR, WEIGHT_DECAY, LEARNING_RATE = map(constexpr, range(9, 13))
ADAPTS, MIN_COEFF, MAX_COEFF, COLUMNS = map(constexpr, range(13, 17))

LINE = constexpr(32)  # blocks start where 128 bytes of fp32 do


def _jit(function: Callable[..., Any]) -> Any:
    # every stage of growth has another number of parameters: no reason to compile anew
    return triton.jit(function, do_not_specialize=["parameters", "chunks"])


# --------------------------------------------------------------------------- on the device


@_jit
def _chunk(table_IK: tensor, chunks_4C: tensor, chunk: tensor) -> tensor:
    """The row of a chunk's item, and its parameter; the line the chunk starts in; counted from
    there, its first element and its end."""
    chunks = tl.num_programs(0)
    row = table_IK + tl.load(chunks_4C + chunk) * COLUMNS
    parameter = tl.load(chunks_4C + chunks + chunk)
    begin = tl.load(chunks_4C + 2 * chunks + chunk)
    end = tl.load(chunks_4C + 3 * chunks + chunk)
    line = begin // LINE * LINE
    return row, parameter, line, (begin - line).to(tl.int32), (end - line).to(tl.int32)


@_jit
def _number(row: tensor, COLUMN: constexpr, DTYPE: constexpr = tl.float32) -> tensor:
    return tl.load(row + COLUMN).to(tl.float64, bitcast=True).to(DTYPE)


@_jit
def _pointers(address: tensor, line: tensor, at: tensor, mask: tensor, DTYPE: constexpr) -> tensor:
    """No mask says that the address is a multiple of 16."""
    if mask is None:
        # The compiler notes this at the operation that makes the pointer. Arithmetic that changes
        # nothing makes that another one than the one below, and shows if ever it is not true.
        start = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
    else:
        start = address.to(tl.pointer_type(DTYPE))
    return start + line + at


@_jit
def _load(address: tensor, line: tensor, at: tensor, mask: tensor) -> tensor:
    pointers = _pointers(address, line, at, mask, tl.float32)
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


@_jit
def _store(address: tensor, line: tensor, at: tensor, mask: tensor, values: tensor) -> None:
    tl.store(_pointers(address, line, at, mask, values.dtype), values, mask=mask)


@_jit
def _update(w: tensor, m: tensor, v: tensor, slope: tensor, floor: tensor, decay: tensor) -> tensor:
    return tl.div_rn(m, tl.sqrt_rn(v) * slope + floor) + w * decay


@_jit
def accumulate_kernel(
    table_IK: tensor,
    chunks_4C: tensor,
    gradient_scale: tensor,
    partial_2C: tensor,
    BLOCK: constexpr,
) -> None:
    """Pass 1 of one chunk."""
    chunk = tl.program_id(0)
    row, _, line, first, stop = _chunk(table_IK, chunks_4C, chunk)
    gradient, weight = tl.load(row + GRADIENT), tl.load(row + WEIGHT)
    exp_avg, exp_avg_sq = tl.load(row + EXP_AVG), tl.load(row + EXP_AVG_SQ)
    aligned = (gradient | weight | exp_avg | exp_avg_sq) % 16 == 0
    beta1, one_minus_beta1 = _number(row, BETA1), _number(row, ONE_MINUS_BETA1)
    beta2, one_minus_beta2 = _number(row, BETA2), _number(row, ONE_MINUS_BETA2)
    slope, floor, decay = _number(row, SLOPE), _number(row, FLOOR), _number(row, WEIGHT_DECAY)
    scale = 1.0
    if gradient_scale is not None:
        scale = tl.load(gradient_scale)
    weight_squares = tl.full([BLOCK], 0.0, tl.float64)
    update_squares = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        covered = (at >= first) & (at < stop)
        whole = aligned & (start >= first) & (start + BLOCK <= stop)
        if whole:
            g = _load(gradient, line, at, None)
            w = _load(weight, line, at, None)
            m = _load(exp_avg, line, at, None)
            v = _load(exp_avg_sq, line, at, None)
        else:
            g = _load(gradient, line, at, covered)
            w = _load(weight, line, at, covered)
            m = _load(exp_avg, line, at, covered)
            v = _load(exp_avg_sq, line, at, covered)
        g = g * scale
        m = m * beta1 + g * one_minus_beta1
        v = v * beta2 + (g * one_minus_beta2) * g
        if whole:
            _store(exp_avg, line, at, None, m)
            _store(exp_avg_sq, line, at, None, v)
        else:
            _store(exp_avg, line, at, covered, m)
            _store(exp_avg_sq, line, at, covered, v)
        u = _update(w, m, v, slope, floor, decay)
        u = tl.where(covered, u, 0.0).to(tl.float64)  # what is not covered would be 0 / FLOOR
        weight_squares += w.to(tl.float64) * w.to(tl.float64)
        update_squares += u * u
    tl.store(partial_2C + chunk, tl.sum(weight_squares))
    tl.store(partial_2C + tl.num_programs(0) + chunk, tl.sum(update_squares))


@_jit
def reduce_kernel(
    segments_3S: tensor,
    partial_2C: tensor,
    chunks: tensor,
    squares_2P: tensor,
    parameters: tensor,
    BLOCK: constexpr,
) -> None:
    """Add the sums of one parameter's chunks, which lie side by side, always in the same order."""
    segment = tl.program_id(0)
    parameter = tl.load(segments_3S + segment)
    first = tl.load(segments_3S + tl.num_programs(0) + segment).to(tl.int32)
    stop = tl.load(segments_3S + 2 * tl.num_programs(0) + segment).to(tl.int32)
    weight_squares = tl.full([BLOCK], 0.0, tl.float64)
    update_squares = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(first, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weight_squares += tl.load(partial_2C + at, mask=at < stop, other=0.0)
        update_squares += tl.load(partial_2C + chunks + at, mask=at < stop, other=0.0)
    weight_sum = squares_2P + parameter
    update_sum = weight_sum + parameters
    tl.store(weight_sum, tl.load(weight_sum) + tl.sum(weight_squares))
    tl.store(update_sum, tl.load(update_sum) + tl.sum(update_squares))


@_jit
def _trust_ratio(weight_square: tensor, update_square: tensor, row: tensor) -> tensor:
    """`contract.trust_ratio`, in comparisons that leave alone what is not a number."""
    quotient = tl.sqrt(weight_square) / tl.sqrt(update_square)
    ratio = tl.where((weight_square > 0.0) & (update_square > 0.0), quotient, 1.0)
    lowest, highest = _number(row, MIN_COEFF, tl.float64), _number(row, MAX_COEFF, tl.float64)
    ratio = tl.where(ratio < lowest, lowest, ratio)
    ratio = tl.where(ratio > highest, highest, ratio)
    return tl.where(_number(row, ADAPTS) > 0.0, ratio, 1.0)


@_jit
def apply_kernel(
    table_IK: tensor,
    chunks_4C: tensor,
    squares_2P: tensor,
    parameters: tensor,
    LOW_DTYPE: constexpr,
    BLOCK: constexpr,
) -> None:
    """Pass 2 of one chunk: the last ones first, which pass 1 has left in cache."""
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    row, parameter, line, first, stop = _chunk(table_IK, chunks_4C, chunk)
    weight, low = tl.load(row + WEIGHT), tl.load(row + LOW)
    exp_avg, exp_avg_sq = tl.load(row + EXP_AVG), tl.load(row + EXP_AVG_SQ)
    aligned = (weight | exp_avg | exp_avg_sq) % 16 == 0
    slope, floor, decay = _number(row, SLOPE), _number(row, FLOOR), _number(row, WEIGHT_DECAY)
    weight_square = tl.load(squares_2P + parameter)
    update_square = tl.load(squares_2P + parameters + parameter)
    ratio = _trust_ratio(weight_square, update_square, row)
    step = (_number(row, LEARNING_RATE, tl.float64) * ratio).to(tl.float32)
    for start in range(0, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        covered = (at >= first) & (at < stop)
        whole = aligned & (start >= first) & (start + BLOCK <= stop)
        if whole:
            w = _load(weight, line, at, None)
            m = _load(exp_avg, line, at, None)
            v = _load(exp_avg_sq, line, at, None)
        else:
            w = _load(weight, line, at, covered)
            m = _load(exp_avg, line, at, covered)
            v = _load(exp_avg_sq, line, at, covered)
        w = w - step * _update(w, m, v, slope, floor, decay)
        if whole:
            _store(weight, line, at, None, w)
        else:
            _store(weight, line, at, covered, w)
        if LOW_DTYPE is not None:
            if whole & (low != 0) & (low % 16 == 0):
                _store(low, line, at, None, w.to(LOW_DTYPE))
            else:
                _store(low, line, at, covered & (low != 0), w.to(LOW_DTYPE))


# For compiling where there is no GPU: the arguments' types, and the kernels' constants by form.
TYPES = {"table_IK": "*i64", "chunks_4C": "*i64", "segments_3S": "*i64", "gradient_scale": "*fp32"}
TYPES |= {"partial_2C": "*fp64", "squares_2P": "*fp64", "chunks": "i32", "parameters": "i32"}
FORMS: list[tuple[Any, dict[str, Any]]] = [
    *((accumulate_kernel, constants) for constants in ({}, {"gradient_scale": None})),
    (reduce_kernel, {}),
    *((apply_kernel, {"LOW_DTYPE": copy}) for copy in (None, tl.bfloat16, tl.float16, tl.float32)),
]


# --------------------------------------------------------------------------- on the host


class _Plan(NamedTuple):
    """The chunks of some spans, those of one parameter side by side, and room for their sums."""

    chunks_4C: torch.Tensor
    segments_3S: torch.Tensor
    partial_2C: torch.Tensor

    @classmethod
    def of(cls, spans_I: Sequence[Sequence[Span]], device: torch.device) -> "_Plan":
        of_parameter: dict[int, list[tuple[int, int, int, int]]] = {}
        for item, span in ((i, s) for i, spans in enumerate(spans_I) for s in spans if s.numel):
            end = span.offset + span.numel
            # cut at multiples, so that no blocks but a span's first and last are partly covered
            cuts = range(span.offset // CHUNK_ELEMENTS * CHUNK_ELEMENTS, end, CHUNK_ELEMENTS)
            of_parameter.setdefault(span.index, []).extend(
                (item, span.index, max(cut, span.offset), min(cut + CHUNK_ELEMENTS, end))
                for cut in cuts
            )
        chunks = np.array([c for chunks in of_parameter.values() for c in chunks], np.int64)
        stops = np.cumsum([len(chunks) for chunks in of_parameter.values()], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), stops])[:-1]
        segments = np.stack([np.array(list(of_parameter), np.int64), starts, stops])
        partial = torch.empty(2, len(chunks), dtype=torch.float64, device=device)
        return cls(_sent(chunks.reshape(-1, 4).T, device), _sent(segments, device), partial)


class TritonLamb:
    """`LambKernel` on an NVIDIA GPU; with TRITON_INTERPRET=1, and slowly, on the CPU."""

    def __init__(self) -> None:
        self._plans: dict[object, _Plan] = {}

    def accumulate(
        self,
        items: Sequence[Item],
        gradients: Sequence[torch.Tensor],
        squares_2P: torch.Tensor,
        gradient_scale: torch.Tensor | None,
    ) -> None:
        chunks_4C, segments_3S, partial_2C = self._plan(items, squares_2P)
        chunks, parameters = chunks_4C.shape[1], squares_2P.shape[1]
        if not chunks:
            return
        assert gradient_scale is None or gradient_scale.dtype is torch.float32
        with torch.cuda.device(squares_2P.get_device()):
            table_IK = _table(items, gradients)
            pass_1 = accumulate_kernel[(chunks,)]
            pass_1(table_IK, chunks_4C, gradient_scale, partial_2C, **OPTIONS)
            reduce = reduce_kernel[(segments_3S.shape[1],)]
            reduce(segments_3S, partial_2C, chunks, squares_2P, parameters, **OPTIONS)

    def apply(self, items: Sequence[Item], squares_2P: torch.Tensor) -> None:
        chunks_4C, _, _ = self._plan(items, squares_2P)
        chunks, parameters = chunks_4C.shape[1], squares_2P.shape[1]
        if not chunks:
            return
        dtypes = {item.shard.low.dtype for item in items if item.shard.low is not None}
        assert len(dtypes) <= 1, f"one call cannot write copies of {dtypes}"
        low_dtype = getattr(tl, str(dtypes.pop()).removeprefix("torch.")) if dtypes else None
        with torch.cuda.device(squares_2P.get_device()):
            table_IK = _table(items, [None] * len(items))
            pass_2 = apply_kernel[(chunks,)]
            pass_2(table_IK, chunks_4C, squares_2P, parameters, LOW_DTYPE=low_dtype, **OPTIONS)

    def _plan(self, items: Sequence[Item], squares_2P: torch.Tensor) -> _Plan:
        assert squares_2P.dtype is torch.float64
        assert squares_2P.is_contiguous()
        spans_I, device = tuple(item.shard.spans for item in items), squares_2P.device
        if (device, spans_I) not in self._plans:
            self._plans[device, spans_I] = _Plan.of(spans_I, device)
        return self._plans[device, spans_I]


def _table(items: Sequence[Item], gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    device, index = items[0].shard.flat.device, items[0].shard.flat.get_device()
    addresses = []
    for item, gradient in zip(items, gradients, strict=True):
        flat, low = item.shard.flat, item.shard.low
        fits = (index, flat.numel(), True)
        tensors = (gradient, flat, item.exp_avg, item.exp_avg_sq, low)
        for one in tensors:
            assert one is None or (one.get_device(), one.numel(), one.is_contiguous()) == fits
            assert one is None or one is low or one.dtype is torch.float32
        addresses.append([0 if one is None else one.data_ptr() for one in tensors])
    numbers = np.array([_numbers(item.hyper) for item in items])
    return _sent(np.hstack([np.array(addresses, np.int64), numbers.view(np.int64)]), device)


def _numbers(hyper: Hyper) -> list[float]:
    """From BETA1 on. Both corrections of bias are in SLOPE and FLOOR, so that each element needs
    one division: u = m / (SLOPE sqrt(v) + FLOOR) + decay w."""
    correction = hyper.bias_correction1
    slope = correction / math.sqrt(hyper.bias_correction2)
    moments = [hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2]
    update = [slope, correction * hyper.eps, hyper.weight_decay, hyper.learning_rate]
    return [*moments, *update, float(hyper.layer_adaptation), hyper.min_coeff, hyper.max_coeff]


def _sent(table: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """On the device, without waiting: torch leaves pinned memory alone until it was copied."""
    host = torch.from_numpy(np.ascontiguousarray(table))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
