"""How a global batch is divided among ranks and micro-batches: pure arithmetic.

global_batch_size 10, world_size 3, micro_batch_size 3
rank 0        rank 1        rank 2          4 rows a rank: 2 micro-batches of 2, since 3 + 1
[0 1] [2 3]   [4 5] [6 7]   [8 9] [. .]     would leave more rows without weight
"""

from stacking_ds.errors import ConfigError

__all__ = ["rows_of_rank", "split_batch"]


def split_batch(global_batch_size: int, world_size: int, micro_batch_size: int) -> tuple[int, int]:
    """The micro-batch size to use, at most `micro_batch_size`, and the number of micro-batches
    that every rank runs in a step (DeepSpeed's gradient_accumulation_steps).

    Their product times `world_size` is at least `global_batch_size`; rows beyond it carry no
    weight. Raises ConfigError for values below one.
    """
    for name, value in (
        ("global_batch_size", global_batch_size),
        ("world_size", world_size),
        ("micro_batch_size", micro_batch_size),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    rows = -(-global_batch_size // world_size)
    gradient_accumulation_steps = -(-rows // micro_batch_size)
    return -(-rows // gradient_accumulation_steps), gradient_accumulation_steps


def rows_of_rank(
    global_batch_size: int, world_size: int, micro_batch_size: int, rank: int
) -> range:
    """The rows of the global batch that `rank` computes, contiguous; empty where ranks outnumber
    rows. Over the ranks the ranges tile [0, global_batch_size) in order."""
    size, count = split_batch(global_batch_size, world_size, micro_batch_size)
    start = min(rank * size * count, global_batch_size)
    return range(start, min(start + size * count, global_batch_size))
