"""The LAMB step in Triton: as many launches for a thousand tensors as for one.

Every program does one chunk of one span. Where that lies stands in a table made once; at which
addresses and with which numbers, in a small one that each step sends ahead:

    accumulate   24 bytes a parameter                  moments, and each chunk's sums of squares
    reduce       a program for each parameter          adds its chunks' sums in order, no atomics
    apply        16 bytes a parameter, and the copy    the ratio is computed where it is used

Nothing waits for the device: tables are sent from pinned memory, and sums do not come back.

Shapes: I items, K columns of an item's row, C chunks, S parameters of a step, P all parameters.
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

from stacking_ds.kernels.triton_parts import launch
from stacking_ds.optim.lamb.contract import Hyper, Item

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
    table_IK: tensor, chunks_4C: tensor, gradient_scale: tensor, partial_2C: tensor,
    BLOCK: constexpr,
) -> None:  # fmt: skip
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
    segments_3S: tensor, partial_2C: tensor, chunks: tensor, squares_2P: tensor,
    parameters: tensor, BLOCK: constexpr,
) -> None:  # fmt: skip
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
    tl.store(squares_2P + parameter, tl.sum(weight_squares))
    tl.store(squares_2P + parameters + parameter, tl.sum(update_squares))


@_jit
def _trust_ratio(weight_square: tensor, update_square: tensor, row: tensor) -> tensor:
    """`contract.trust_ratio`, in comparisons that leave alone what is not a number."""
    ratio = tl.sqrt(weight_square) / tl.sqrt(update_square)
    lowest, highest = _number(row, MIN_COEFF, tl.float64), _number(row, MAX_COEFF, tl.float64)
    ratio = tl.where(ratio < lowest, lowest, ratio)
    ratio = tl.where(ratio > highest, highest, ratio)
    adapts = (weight_square > 0.0) & (update_square > 0.0) & (_number(row, ADAPTS) > 0.0)
    return tl.where(adapts, ratio, 1.0)


@_jit
def apply_kernel(
    table_IK: tensor, chunks_4C: tensor, squares_2P: tensor, parameters: tensor,
    LOW_DTYPE: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
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


# --------------------------------------------------------------------------- on the host


class _Plan(NamedTuple):
    """What stays as it is from step to step, while the tensors are the same."""

    like_I: list[tuple[int, int, bool, torch.dtype]]  # what each tensor but a copy must be
    rows_IK: npt.NDArray[np.int64]
    low_dtype: Any
    chunks_4C: torch.Tensor
    segments_3S: torch.Tensor
    partial_2C: torch.Tensor

    @classmethod
    def of(cls, items: Sequence[Item]) -> "_Plan":
        device, index = items[0].shard.flat.device, items[0].shard.flat.get_device()
        like_I = [(index, item.shard.flat.numel(), True, torch.float32) for item in items]
        rows_IK = np.zeros((len(items), COLUMNS.value), np.int64)
        for row, like, (shard, exp_avg, exp_avg_sq, *_) in zip(rows_IK, like_I, items, strict=True):
            tensors = (shard.flat, exp_avg, exp_avg_sq, shard.low)
            assert _like(shard.flat) == _like(exp_avg) == _like(exp_avg_sq) == like
            assert shard.low is None or _like(shard.low)[:3] == like[:3]
            row[WEIGHT.value : BETA1.value] = [0 if t is None else t.data_ptr() for t in tensors]
        dtypes = {item.shard.low.dtype for item in items if item.shard.low is not None}
        assert len(dtypes) <= 1, f"one step cannot write copies of {dtypes}"
        low_dtype = getattr(tl, str(dtypes.pop()).removeprefix("torch.")) if dtypes else None
        chunks_4C, segments_3S = (_sent(table, device) for table in _cut(items))
        partial_2C = torch.empty(2, chunks_4C.shape[1], dtype=torch.float64, device=device)
        return cls(like_I, rows_IK, low_dtype, chunks_4C, segments_3S, partial_2C)

    def table(self, items: Sequence[Item]) -> torch.Tensor:
        """A step's rows, on the device."""
        assert [_like(item.gradient) for item in items] == self.like_I
        self.rows_IK[:, GRADIENT.value] = [item.gradient.data_ptr() for item in items]
        hypers = {id(item.hyper): item.hyper for item in items}
        place = {key: number for number, key in enumerate(hypers)}
        numbers = np.array([_numbers(hyper) for hyper in hypers.values()]).view(np.int64)
        self.rows_IK[:, BETA1.value :] = numbers[[place[id(item.hyper)] for item in items]]
        return _sent(self.rows_IK, self.chunks_4C.device)


def _like(one: torch.Tensor) -> tuple[int, int, bool, torch.dtype]:
    return one.get_device(), one.numel(), one.is_contiguous(), one.dtype


def _cut(items: Sequence[Item]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The chunks of all spans, those of a parameter side by side, and where each one's are."""
    by_parameter: dict[int, list[tuple[int, int, int, int]]] = {}
    for item, span in ((i, s) for i, one in enumerate(items) for s in one.shard.spans if s.numel):
        end = span.offset + span.numel
        # cut at multiples, so that no blocks but a span's first and last are partly covered
        for cut in range(span.offset // CHUNK_ELEMENTS * CHUNK_ELEMENTS, end, CHUNK_ELEMENTS):
            chunk = item, span.index, max(cut, span.offset), min(cut + CHUNK_ELEMENTS, end)
            by_parameter.setdefault(span.index, []).append(chunk)
    chunks = np.array([c for chunks in by_parameter.values() for c in chunks], np.int64)
    counts = np.array([len(chunks) for chunks in by_parameter.values()], np.int64)
    parameters, stops = np.array(list(by_parameter), np.int64), np.cumsum(counts)
    return chunks.reshape(-1, 4).T, np.stack([parameters, stops - counts, stops])


class TritonLamb:
    """`LambKernel` on an NVIDIA GPU; with TRITON_INTERPRET=1, and slowly, on the CPU."""

    def __init__(self) -> None:
        # the tensors are kept alive, so that nothing else can have their identity
        self._known: tuple[list[tuple[int, int, int, int]], list[Any], _Plan] | None = None
        self._begun: Any = None  # between the passes: items, plan, table

    def accumulate(
        self, items: Sequence[Item], squares_2P: torch.Tensor, gradient_scale: torch.Tensor | None
    ) -> None:
        assert (squares_2P.dtype, squares_2P.is_contiguous()) == (torch.float64, True)
        assert gradient_scale is None or gradient_scale.dtype is torch.float32
        # a tensor can be the same and lie elsewhere: a module was moved
        same = [(id(s), id(m), id(v), s.flat.data_ptr()) for s, m, v, *_ in items]
        if self._known is None or self._known[0] != same:
            self._known = same, [item[:3] for item in items], _Plan.of(items)
        plan = self._known[2]
        table_IK = plan.table(items)
        self._begun = items, plan, table_IK
        (_, chunks), (_, segments) = plan.chunks_4C.shape, plan.segments_3S.shape
        work = plan.chunks_4C, gradient_scale, plan.partial_2C
        launch(accumulate_kernel, (chunks,), table_IK, *work, **OPTIONS)
        sums = plan.partial_2C, chunks, squares_2P, squares_2P.shape[1]
        launch(reduce_kernel, (segments,), plan.segments_3S, *sums, **OPTIONS)

    def apply(self, items: Sequence[Item], squares_2P: torch.Tensor) -> None:
        if not items:
            return
        (begun, plan, table_IK), self._begun = self._begun, None
        assert begun is items
        sums, how = (squares_2P, squares_2P.shape[1]), {"LOW_DTYPE": plan.low_dtype, **OPTIONS}
        grid = (plan.chunks_4C.shape[1],)
        launch(apply_kernel, grid, table_IK, plan.chunks_4C, *sums, **how)


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
