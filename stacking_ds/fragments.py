"""The neutral view of sharded training state: which part of which parameter this rank holds.

Growth, checkpoints, export and LAMB speak only this; how DeepSpeed lays the numbers out is
known to `stacking_ds.zero` alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["MASTER", "MOMENTS", "Fragment"]

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """The elements [start, stop) of one flattened parameter, as this rank holds them.

    `views` maps "master", "exp_avg", "exp_avg_sq" to 1-D fp32 tensors of `stop - start`
    elements. From a live engine they are views: writing to them writes the engine's state. The
    moments are absent before the optimizer's first step.

    Every rank lists every parameter, in the same order; where it holds nothing of one the
    fragment is empty. `replicated` is True where every rank holds the same elements (ZeRO 0).
    Elsewhere each element of a parameter is held by exactly one rank.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    views: Mapping[str, torch.Tensor]
    replicated: bool = False

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def owned_by(self, rank: int, world_size: int) -> "Fragment":
        """The part of this fragment that `rank` answers for: all of it, or, where every rank
        holds the same elements, an even share. Over all ranks the parts tile the parameter."""
        if not self.replicated:
            return self
        low = self.start + self.numel * rank // world_size
        high = self.start + self.numel * (rank + 1) // world_size
        views = {
            key: view[low - self.start : high - self.start] for key, view in self.views.items()
        }
        return Fragment(self.name, self.shape, low, high, views)
