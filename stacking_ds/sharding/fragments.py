"""The neutral view of sharded training state, and the arithmetic of moving it.

Growth, checkpoints, export and LAMB speak only this; how DeepSpeed lays the numbers out is known
to `engine/zero` alone.

    parameter   |0                            numel|      offset = 5, size = 12:
    cut         |   rank 0   | rank 1 | …  rank r|        rank 0 has [0, 7), rank 1 [7, 19), …
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """A cut of the `numel` elements of a flattened parameter among ranks.

    Rank r has [r * size - offset, (r + 1) * size - offset), as far as the parameter reaches. Both
    of DeepSpeed's ways to cut are of this form: ZeRO 3 cuts the parameter by itself (offset 0),
    ZeRO 1 and 2 a flat buffer in which the parameter starts at `offset`.
    """

    numel: int
    size: int
    offset: int = 0

    @classmethod
    def even(cls, numel: int, ranks: int) -> "Cut":
        """Equal parts; the last ranks may have less, or nothing."""
        return cls(numel, max(1, -(-numel // ranks)))

    def interval(self, rank: int) -> tuple[int, int]:
        """The [start, stop) of `rank`; empty as (n, n) where it has nothing."""
        low = rank * self.size - self.offset
        return self._inside(low), self._inside(low + self.size)

    def _inside(self, place: int) -> int:
        return min(max(place, 0), self.numel)

    def holders(self, start: int, stop: int) -> range:
        """The ranks that have elements of [start, stop)."""
        if start >= stop:
            return range(0)
        return range((start + self.offset) // self.size, (stop - 1 + self.offset) // self.size + 1)


@dataclass(frozen=True)
class Fragment:
    """The elements [start, stop) of one flattened parameter, as this rank holds them.

    `views` maps "master", "exp_avg", "exp_avg_sq" to 1-D fp32 tensors of `stop - start`
    elements. From a live engine they are views: writing to them writes the engine's state. The
    moments are absent before the optimizer's first step.

    Every rank lists every parameter, in the same order; where it holds nothing of one the
    fragment is empty. `cut` says what every other rank has. `replicated` is True where every rank
    holds all elements (ZeRO 0); the cut then says for which of them it answers.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    views: Mapping[str, torch.Tensor]
    cut: Cut
    replicated: bool = False

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def owned_by(self, rank: int) -> "Fragment":
        """The part of this fragment that `rank` answers for: all of it, or, where every rank
        holds the same elements, its share. Over all ranks the parts tile the parameter."""
        if not self.replicated:
            return self
        low, high = self.cut.interval(rank)
        views = {
            key: view[low - self.start : high - self.start] for key, view in self.views.items()
        }
        return Fragment(self.name, self.shape, low, high, views, self.cut)

    def on_host(self) -> "Fragment":
        """The same elements in host memory of their own, independent of any engine."""
        views = {
            key: torch.empty(view.shape, dtype=view.dtype, device="cpu").copy_(view.detach())
            for key, view in self.views.items()
        }
        return replace(self, views=views)


@dataclass(frozen=True)
class Span:
    """Elements [offset, offset + numel) of a flat tensor are elements of the parameter `name`.

    `index` is the parameter's place among all parameters, the same on every rank.
    """

    name: str
    index: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Shard:
    """One fp32 tensor that the optimizer steps on, and whose elements lie in it.

    What no span covers is padding, which may be uninitialised memory. `low` has as many elements
    as `flat` and is to follow it, rounded to its dtype; None where nothing has to.
    """

    flat: torch.Tensor
    spans: tuple[Span, ...]
    low: torch.Tensor | None = None


# --------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class Layout:
    """The elements that each rank has of every parameter; nothing grows with the number of
    ranks."""

    ranks: int
    cuts: Mapping[str, Cut]
    replicated: bool = False

    @classmethod
    def of(cls, fragments: Sequence[Fragment], ranks: int) -> "Layout":
        return cls(
            ranks,
            {fragment.name: fragment.cut for fragment in fragments},
            any(fragment.replicated for fragment in fragments),
        )

    def held(self, name: str) -> tuple[Integers, Integers]:
        """First element, and the one after the last, that each rank has of a parameter."""
        cut = self.cuts[name]
        if self.replicated:
            return np.zeros(self.ranks, np.int64), np.full(self.ranks, cut.numel, np.int64)
        bounds = np.arange(self.ranks + 1, dtype=np.int64) * cut.size - cut.offset
        bounds = bounds.clip(0, cut.numel)
        return bounds[:-1], bounds[1:]


class Moves(NamedTuple):
    """Columns of a table: the elements [start, stop) go from rank `source` to rank `target`.

    Where both are the same rank nothing has to leave it.
    """

    source: Integers
    target: Integers
    start: Integers
    stop: Integers


def plan_moves(old: Layout, old_name: str, new: Layout, new_name: str) -> Moves:
    """From where each rank gets its elements of the new parameter, which copies the old one.

    Every element that a rank needs has exactly one source: the rank itself where it has it.
    """
    cut = old.cuts[old_name]
    assert cut.numel == new.cuts[new_name].numel, f"{new_name} cannot copy {old_name}"
    ranks = np.arange(new.ranks, dtype=np.int64)
    starts, stops = new.held(new_name)
    if old.replicated:
        table = Moves(ranks % old.ranks, ranks, starts, stops)
        return Moves(*(column[starts < stops] for column in table))
    first = (starts + cut.offset) // cut.size
    last = (stops - 1 + cut.offset) // cut.size
    parts = np.where(starts < stops, last - first + 1, 0)
    target = np.repeat(ranks, parts)
    source = np.arange(len(target)) - np.repeat(np.cumsum(parts) - parts, parts) + first[target]
    low = source * cut.size - cut.offset
    return Moves(
        source,
        target,
        np.maximum(starts[target], low),
        np.minimum(stops[target], low + cut.size),
    )


@dataclass(frozen=True)
class Traffic:
    """Elements per rank: those it already has, those it sends and those it receives."""

    kept: Integers
    sent: Integers
    received: Integers


def traffic(old: Layout, new: Layout, source_of: Callable[[str], str]) -> Traffic:
    """Count what filling `new` from `old` moves; `source_of` names the old parameter of a new
    one."""
    ranks = max(old.ranks, new.ranks)
    kept, sent, received = (np.zeros(ranks, np.int64) for _ in range(3))
    for name in new.cuts:
        moves = plan_moves(old, source_of(name), new, name)
        numel = moves.stop - moves.start
        stays = moves.source == moves.target
        np.add.at(kept, moves.target[stays], numel[stays])
        np.add.at(sent, moves.source[~stays], numel[~stays])
        np.add.at(received, moves.target[~stays], numel[~stays])
    return Traffic(kept, sent, received)


class Window(NamedTuple):
    """The elements [start, stop) of the parameter `name`."""

    name: str
    start: int
    stop: int


def windows(numels: Mapping[str, int], limit: int) -> Iterator[list[Window]]:
    """All elements of all parameters in order, in lists of at most `limit` elements together."""
    batch: list[Window] = []
    room = limit
    for name, numel in numels.items():
        start = 0
        while start < numel:
            stop = min(numel, start + room)
            batch.append(Window(name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch
