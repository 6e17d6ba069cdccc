"""Bring to each rank the elements it needs and another rank has.

Both layouts are known everywhere, so every rank makes the same plan and nothing is asked. What
moves goes in buckets, so that no rank ever holds more than a bucket of what is not its own.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from stacking_ds.sharding.fragments import (
    Fragment,
    Integers,
    Layout,
    Moves,
    Window,
    plan_moves,
    traffic,
    windows,
)

# of all keys together, moved in one round: 64 MiB of fp32
_BUCKET_ELEMENTS = 1 << 24


class Ranks(Protocol):
    """The ranks, as far as installing needs to know them; `distributed.world.World` has it."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def sum(self, values: Sequence[float]) -> list[float]: ...
    def all_to_all(
        self, outgoing: Sequence[torch.Tensor], incoming_sizes: Sequence[int]
    ) -> list[torch.Tensor]: ...


def copy_own(target: Fragment, source: Fragment, keys: Sequence[str]) -> None:
    """Copy into `target` what this rank has of it."""
    low, high = max(target.start, source.start), min(target.stop, source.stop)
    if low < high:
        for key in keys:
            target.views[key][low - target.start : high - target.start].copy_(
                source.views[key][low - source.start : high - source.start]
            )


def exchange(
    targets: Sequence[Fragment],
    sources: Mapping[str, Fragment],
    keys: Sequence[str],
    world: Ranks,
) -> None:
    """Fill in what `copy_own` could not. A collective, unless nothing has to move at all.

    Args:
        targets: the fragments to fill, of every parameter.
        sources: for each target's name, this rank's fragment of the parameter that it copies.
    """
    if _same_cuts(sources, targets):
        return  # as between the stages of a run
    old = Layout.of(list(sources.values()), world.size)
    new = Layout.of(targets, world.size)
    if not traffic(old, new, lambda name: sources[name].name).sent.any():
        return
    live = {target.name: target for target in targets}
    numels = {name: cut.numel for name, cut in new.cuts.items()}
    planned: dict[str, Moves] = {}
    for bucket in windows(numels, max(1, _BUCKET_ELEMENTS // len(keys))):
        outgoing: list[list[torch.Tensor]] = [[] for _ in range(world.size)]
        incoming: list[list[torch.Tensor]] = [[] for _ in range(world.size)]
        for window in bucket:
            if window.name not in planned:
                # windows come in order: an earlier parameter's plan is not needed again
                source_name = sources[window.name].name
                planned = {window.name: plan_moves(old, source_name, new, window.name)}
            moves = _foreign(planned[window.name], window)
            _collect(moves.target, moves.source == world.rank, moves,
                     sources[window.name], keys, outgoing)  # fmt: skip
            _collect(moves.source, moves.target == world.rank, moves,
                     live[window.name], keys, incoming)  # fmt: skip
        _send_and_receive(outgoing, incoming, world)


def _same_cuts(sources: Mapping[str, Fragment], targets: Sequence[Fragment]) -> bool:
    return all(
        sources[target.name].cut == target.cut
        and sources[target.name].replicated == target.replicated
        for target in targets
    )


def _foreign(moves: Moves, window: Window) -> Moves:
    """The rows between two ranks, as far as they fall into the window."""
    start, stop = moves.start.clip(window.start), moves.stop.clip(None, window.stop)
    keep = (moves.source != moves.target) & (start < stop)
    return Moves(moves.source[keep], moves.target[keep], start[keep], stop[keep])


def _collect(
    peers: Integers,
    mine: npt.NDArray[np.bool_],
    moves: Moves,
    fragment: Fragment,
    keys: Sequence[str],
    views: list[list[torch.Tensor]],
) -> None:
    """Append, for each row that is mine, the views of its elements to the list of its peer."""
    for row in np.flatnonzero(mine):
        low, high = int(moves.start[row]) - fragment.start, int(moves.stop[row]) - fragment.start
        views[peers[row]] += [fragment.views[key][low:high] for key in keys]


def _send_and_receive(
    outgoing: list[list[torch.Tensor]], incoming: list[list[torch.Tensor]], world: Ranks
) -> None:
    nothing = torch.empty(0)
    received = world.all_to_all(
        [torch.cat(parts) if parts else nothing for parts in outgoing],
        [sum(view.numel() for view in views) for views in incoming],
    )
    for values, views in zip(received, incoming, strict=True):
        if views:
            parts = torch.split(values, [view.numel() for view in views])
            for view, part in zip(views, parts, strict=True):
                view.copy_(part)
