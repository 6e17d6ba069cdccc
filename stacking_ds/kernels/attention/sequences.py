"""Sequences that lie one behind the other in a batch's tokens, and their attention on the CPU.

There it is computed on a few batches of sequences of like length, so that little is padded. Torch's
own attention has one path with dropout there, a slow one in bf16, and none for sequences that lie
one behind the other. Two plain matrix products are faster, and as exact.

Shapes: T tokens, E sequences, N heads, D head size; of one group, G sequences and S slots each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.operations import keep_mask

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
        found = []
        step = max(1, -(-self.longest // _GROUPS))
        starts_E, lengths_E = self.starts_E1[:-1].long(), torch.diff(self.starts_E1).long()
        group_E = lengths_E.add(step - 1).div(step, rounding_mode="floor")
        for number in sorted(set(group_E[group_E > 0].tolist())):
            members = group_E == number
            lengths_G = lengths_E[members]
            slots_S = torch.arange(int(lengths_G.max()))
            real_GS = slots_S < lengths_G[:, None]
            tokens_GS = starts_E[members, None] + slots_S.where(real_GS, 0)
            found.append(Group(tokens_GS, None if bool(real_GS.all()) else real_GS))
        return found


Attend = Callable[[torch.Tensor, Sequences, float], torch.Tensor]
"""(qkv_T3ND, sequences, dropout_prob) -> context_TND: softmax(q k' / sqrt(D)) v within each
sequence, with probabilities dropped out (Vaswani et al. 2017 §3.2.1)."""


def require_gpu_and_half(name: str, library: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError unless `library`, the form called `name`, can compute there in `dtype`."""
    if device.type != "cuda":
        raise ConfigError(
            f"engine.attention={name}, but the model is on {device.type}: {library} needs an "
            f"NVIDIA GPU; leave the attention to auto"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"engine.attention={name} computes in bf16 and fp16, not in {dtype}; set "
            f"engine.precision=bf16, or engine.attention=padded"
        )


# ---- On the CPU.


def attend_loops(qkv_T3ND: torch.Tensor, sequences: Sequences, dropout_prob: float) -> torch.Tensor:
    """`Attend` on the CPU. Holds the S x S probabilities of every sequence until the backward."""
    arguments = qkv_T3ND, sequences.groups, dropout_prob
    context_TND: torch.Tensor = _Attention.apply(*arguments)  # type: ignore[no-untyped-call]
    return context_TND


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, qkv_T3ND: torch.Tensor, groups: list[Group], dropout_prob: float
    ) -> torch.Tensor:
        ctx.groups, ctx.scale, ctx.shape = groups, 1.0 / (1.0 - dropout_prob), qkv_T3ND.shape
        T, _, N, D = qkv_T3ND.shape
        context_TND = qkv_T3ND.new_empty(T, N, D)
        saved: list[torch.Tensor | None] = []
        for group in groups:
            q, k, v = qkv_T3ND[group.tokens_GS].unbind(2)
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            scores_GNSS = torch.matmul(q.mul_(D**-0.5), k.transpose(2, 3))
            if group.real_GS is not None:
                scores_GNSS.masked_fill_(~group.real_GS[:, None, None, :], float("-inf"))
            probs_GNSS = scores_GNSS.softmax(-1)
            keep = None
            if dropout_prob:
                keep = keep_mask(probs_GNSS.shape, dropout_prob, probs_GNSS.dtype)
            context_GNSD = torch.matmul(_dropped(probs_GNSS, keep, ctx.scale), v)
            _put(context_TND, group, context_GNSD.transpose(1, 2))
            saved += [q, k, v, probs_GNSS, keep]
        ctx.save_for_backward(*saved)
        return context_TND

    @staticmethod
    def backward(ctx, grad_TND: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[no-untyped-def]
        saved = iter(ctx.saved_tensors)
        grad_T3ND = grad_TND.new_empty(ctx.shape)
        for group in ctx.groups:
            q, k, v, probs_GNSS, keep = (next(saved) for _ in range(5))
            grad_GNSD = grad_TND[group.tokens_GS].transpose(1, 2)
            if group.real_GS is not None:
                grad_GNSD = grad_GNSD * group.real_GS[:, None, :, None]
            dropped_GNSS = _dropped(probs_GNSS, keep, ctx.scale)
            grad_v = torch.matmul(dropped_GNSS.transpose(2, 3), grad_GNSD)
            grad_probs = _dropped(torch.matmul(grad_GNSD, v.transpose(2, 3)), keep, ctx.scale)
            grad_scores = torch._softmax_backward_data(grad_probs, probs_GNSS, -1, probs_GNSS.dtype)
            grad_q = torch.matmul(grad_scores, k).mul_(q.shape[-1] ** -0.5)
            grad_k = torch.matmul(grad_scores.transpose(2, 3), q)  # q has the scale already
            grads_GS3ND = torch.stack([g.transpose(1, 2) for g in (grad_q, grad_k, grad_v)], dim=2)
            _put(grad_T3ND, group, grads_GS3ND)
        return grad_T3ND, None, None


def _put(values_T: torch.Tensor, group: Group, values_GS: torch.Tensor) -> None:
    real_GS = group.real_GS
    if real_GS is None:
        values_T[group.tokens_GS] = values_GS
    else:
        values_T[group.tokens_GS[real_GS]] = values_GS[real_GS]


def _dropped(probs: torch.Tensor, keep: torch.Tensor | None, scale: float) -> torch.Tensor:
    return probs if keep is None else (probs * keep).mul_(scale)
