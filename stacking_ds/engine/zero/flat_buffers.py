"""Flat buffers: the place of each parameter's fp32 elements in the tensors of DeepSpeed's
optimizer.

ZeRO 1, 2: the parameters of one group in a row, cut into equal parts, one per rank
    | weight .......... | bias | weight ..|pad|
    |  rank 0     |  rank 1    |  rank 2      |

ZeRO 3: each parameter cut by itself into ceil(numel / ranks) elements; rank 1's flat tensor
    | weight's 2nd part | bias's 2nd part | …   (the last rank's parts may end in padding)

ZeRO 0: whole parameters, the same on every rank
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from stacking_ds.engine.zero.compatibility import Masters, masters_of
from stacking_ds.sharding.fragments import Cut, Layout

# ZeRO 1 and 2 pad a flat group so that every part starts at a multiple of so many elements
_PART_ALIGNMENT = 2


@dataclass(frozen=True)
class Piece:
    """The elements [start, stop) of a parameter are `flat.view(-1)[offset : offset + numel]`.

    `flat` is the very tensor the base optimizer steps on, and the key of its state. `cut` says
    what the other ranks have.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    flat: torch.Tensor
    offset: int
    cut: Cut

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """This piece's elements of `tensor`, which has the shape of `flat`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


def pieces(engine: Any) -> list[Piece]:
    """This rank's piece of every trained parameter, padding left out, in the order of the groups.

    Every rank lists the same parameters in the same order; a piece is empty where the rank holds
    nothing. All ranks together hold each element once (ZeRO 0: each rank holds all). No
    communication.
    """
    walk = {
        Masters.MODULE: _module_pieces,
        Masters.UNFUSED: _unfused_pieces,
        Masters.FUSED: _fused_pieces,
        Masters.GROUPS: _group_pieces,
        Masters.PARAMETERS: _parameter_pieces,
    }[masters_of(engine)]
    return list(walk(engine))


def flat_tensors(engine: Any) -> list[torch.Tensor]:
    """The fp32 tensors the base optimizer steps on: the keys of its state."""
    return list(dict.fromkeys(piece.flat for piece in pieces(engine)))


def predicted_layout(
    zero_stage: int, groups: Sequence[Sequence[tuple[str, int]]], ranks: int
) -> Layout:
    """The layout that DeepSpeed will cut among `ranks`, without an engine and at any size.

    Args:
        groups: name and number of elements of every parameter, by parameter group, in order.
    """
    cuts = {}
    for group in groups:
        total = sum(numel for _, numel in group)
        size = -(-total // (_PART_ALIGNMENT * ranks)) * _PART_ALIGNMENT
        offset = 0
        for name, numel in group:
            if zero_stage in (1, 2):
                cuts[name] = Cut(numel, size, offset)
                offset += numel
            else:
                cuts[name] = Cut.even(numel, ranks)
    return Layout(ranks, cuts, replicated=zero_stage == 0)


def _whole(engine: Any, p: torch.Tensor, flat: torch.Tensor, offset: int = 0) -> Piece:
    cut = Cut.even(p.numel(), dist.get_world_size())
    return Piece(engine.param_names[p], tuple(p.shape), 0, p.numel(), flat, offset, cut)


def _module_pieces(engine: Any) -> Iterator[Piece]:
    for group in engine.optimizer.param_groups:
        for p in group["params"]:
            yield _whole(engine, p, p)


def _unfused_pieces(engine: Any) -> Iterator[Piece]:
    wrapper = engine.optimizer
    for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for p, master in zip(group, masters, strict=True):
            yield _whole(engine, p, master)


def _fused_pieces(engine: Any) -> Iterator[Piece]:
    wrapper = engine.optimizer
    for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
        offset = 0
        for p in group:
            yield _whole(engine, p, flat, offset)
            offset += p.numel()


def _group_pieces(engine: Any) -> Iterator[Piece]:
    wrapper = engine.optimizer
    for index, flat in enumerate(wrapper.single_partition_of_fp32_groups):
        size = int(wrapper.partition_size[index])
        rank = dist.get_rank(group=wrapper.real_dp_process_group[index])
        group = wrapper.round_robin_bit16_groups[index]
        offsets = wrapper.round_robin_bit16_offsets[index]
        for p, offset in zip(group, offsets, strict=True):
            cut = Cut(p.numel(), size, offset)
            start, stop = cut.interval(rank)
            place = offset + start - rank * size if start < stop else 0
            yield Piece(engine.param_names[p], tuple(p.shape), start, stop, flat, place, cut)


def _parameter_pieces(engine: Any) -> Iterator[Piece]:
    wrapper = engine.optimizer
    for group in wrapper.fp16_groups:
        for p in group:
            index, offset, size = wrapper.grad_position[wrapper.get_param_id(p)]
            cut = Cut(p.ds_numel, size)
            start, stop = cut.interval(wrapper._get_param_partition_rank(p))
            flat = wrapper.fp32_partitioned_groups_flat[index]
            yield Piece(engine.param_names[p], tuple(p.ds_shape), start, stop, flat, offset, cut)
