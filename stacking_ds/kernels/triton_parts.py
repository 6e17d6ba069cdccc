"""Parts that the Triton kernels share: compiling, dropout masks, and sums over rows.

A mask is in no memory: it is drawn from its seed wherever it is needed. Sums come out the same
every time: a program of a backward pass walks its share of the rows and leaves one line of sums;
here those lines are added, always in the same order. No atomics: which came first would show in
the bits.

Shapes: K sums that were taken side by side, P programs, H columns.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language import constexpr, tensor


def jit(function: Callable[..., Any]) -> Any:
    """As `triton.jit`, but compiled once for all numbers of rows and of what they look up."""
    varying = ["tokens", "programs", "words", "types", "positions"]
    return triton.jit(function, do_not_specialize=varying)


def launch(
    kernel: Any, grid: tuple[int, ...], first: torch.Tensor, /, *rest: Any, **how: Any
) -> None:
    """Run a kernel on the device of its first argument, if there is anything to do."""
    if 0 not in grid:
        with torch.cuda.device(first.get_device()):
            kernel[grid](first, *rest, **how)


# The fewest with which Philox4x32 passes all of BigCrush (Salmon et al. 2011, table 2).
ROUNDS = constexpr(7)


@jit
def dropped(
    values: tensor, seed: tensor, rows: tensor, dropout_prob: tensor, BLOCK: constexpr
) -> tensor:
    """Each of the values 0 with probability `dropout_prob`, else divided by 1 - dropout_prob
    (Srivastava et al. 2014): [ROWS, BLOCK], in rows [ROWS, 1].

    Which ones is a function of seed, row and column alone. A count of Philox, (column / 4, row), is
    four random numbers: with one for each element a kernel would wait for multiplications, not for
    memory.
    """
    group = tl.arange(0, BLOCK // 4)[None, :]
    count = (group + rows * 0).to(tl.uint32)
    row, zero = (rows + group * 0).to(tl.uint32), count * 0
    r0, r1, r2, r3 = tl.philox(tl.load(seed), count, row, zero, zero, ROUNDS)
    bits = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    keep = tl.uint_to_uniform_float(bits) >= dropout_prob
    return tl.where(keep, values * (1.0 / (1.0 - dropout_prob)), 0.0)


def draw_seed(dropout_prob: float, device: torch.device) -> torch.Tensor | None:
    """Of a dropout mask, by torch's own generator: int64, shape [1]. None without dropout.

    It stays on the device, so that nothing waits and a CUDA graph draws another one each time.
    """
    assert 0.0 <= dropout_prob < 1.0, dropout_prob
    if dropout_prob == 0.0:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


# The lines are in L2, just written. With 32 columns a program reads whole lines of 128 bytes, and
# there are enough programs to hide that each one waits.
OPTIONS = {"COLUMNS": 32, "ROWS": 64, "num_warps": 4, "enable_fp_fusion": True}

# So many programs have enough loads on the way to keep memory busy (4 of 4 warps with 4 loads of
# 16 bytes a thread are 32 KiB, and 800 ns at an SM's share of 4 TB/s are 25), and their lines of
# sums are few beside a batch's rows.
_WALKERS_PER_SM = 4
_WALKERS_INTERPRETED = 3
# With these, 4 programs of 128 threads have all 65536 registers of an SM. ptxas by itself settles
# for fewer, and then spills for some widths.
WALKING = {"maxnreg": 128}


@jit
def column_sums_kernel(
    partial_KPH: tensor, out_KH: tensor, programs: tensor,
    H: constexpr, COLUMNS: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    which = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        at = (which * programs + rows) * H + columns[None, :]
        sums += tl.load(partial_KPH + at, mask=(rows < programs) & (columns < H)[None, :], other=0)
    tl.store(out_KH + which * H + columns, tl.sum(sums, 0), mask=columns < H)


def walkers(device: torch.device, tiles: int) -> int:
    """The number of programs that share so many `tiles` of rows: P."""
    if device.type != "cuda":
        return min(tiles, _WALKERS_INTERPRETED)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles, _WALKERS_PER_SM * processors)


def column_sums(partial_KPH: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The K sums over P, each of H, in `dtype`: zeros where P is 0."""
    sums, programs, width = partial_KPH.shape
    out_KH = torch.empty(sums, width, dtype=dtype, device=partial_KPH.device)
    grid = (triton.cdiv(width, OPTIONS["COLUMNS"]), sums)
    launch(column_sums_kernel, grid, partial_KPH, out_KH, programs, H=width, **OPTIONS)
    return out_KH.unbind()
