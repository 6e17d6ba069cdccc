"""A dropout mask that is in no memory: drawn from its seed wherever it is needed.

Shapes: ROWS and BLOCK of a tile of whole rows.
"""

import torch
import triton
import triton.language as tl
from triton.language import constexpr, tensor

__all__ = ["draw_seed", "dropped"]

# The fewest with which Philox4x32 passes all of BigCrush (Salmon et al. 2011, table 2).
ROUNDS = constexpr(7)


@triton.jit  # type: ignore[untyped-decorator]
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
