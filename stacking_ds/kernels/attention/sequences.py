"""Where the sequences of a batch begin and end in its tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

_GROUPS = 8  # at most so many, so that at most an eighth of a sequence's slots is padding


@dataclass(frozen=True)
class Group:
    """G sequences of like length, in rows of S slots."""

    tokens_GS: torch.Tensor
    """Which token is in a slot; in a slot of padding, any."""
    real_GS: torch.Tensor | None
    """Slots that are not padding; None where none is."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """E sequences whose tokens lie one behind the other, T in all; none attends to another.

    Flash attention calls `starts_E1` cu_seqlens.
    """

    starts_E1: torch.Tensor
    """int32, ascending: where each sequence begins, and T at the end."""
    longest: int
    """No sequence has more tokens; known on the host, so that nothing waits for the device."""
    slots: int = 0
    """No batch of this kind has more tokens: what a CUDA graph is made for. 0 where that is not
    known, which is enough for attention."""

    @cached_property
    def groups(self) -> list[Group]:
        """All sequences that have tokens, those of like length together; for the CPU."""
        return list(self._groups())

    def _groups(self) -> Iterator[Group]:
        step = max(1, -(-self.longest // _GROUPS))
        starts_E, lengths_E = self.starts_E1[:-1].long(), torch.diff(self.starts_E1).long()
        group_E = lengths_E.add(step - 1).div(step, rounding_mode="floor")
        for number in sorted(set(group_E[group_E > 0].tolist())):
            members = group_E == number
            lengths_G = lengths_E[members]
            slots_S = torch.arange(int(lengths_G.max()))
            real_GS = slots_S < lengths_G[:, None]
            tokens_GS = starts_E[members, None] + slots_S.where(real_GS, 0)
            yield Group(tokens_GS, None if bool(real_GS.all()) else real_GS)


Attend = Callable[[torch.Tensor, Sequences, float], torch.Tensor]
"""(qkv_T3ND, sequences, dropout_prob) -> context_TND: softmax(q k' / sqrt(D)) v within each
sequence, with probabilities dropped out (Vaswani et al. 2017 §3.2.1)."""
