"""Attention on the tokens as they lie, by the FlashAttention 2 that comes with torch.

Shapes: T tokens, E sequences, N heads, D head size.
"""

import importlib.util
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention.sequences import Sequences, require_gpu_and_half

_LARGEST_HEAD = 256
_OPERATIONS = ("_flash_attention_forward", "_flash_attention_backward")


def attend_flash(qkv_T3ND: torch.Tensor, sequences: Sequences, dropout_prob: float) -> torch.Tensor:
    """`Attend` by FlashAttention 2 (Dao 2023) with dropout, which no public function of torch
    gives to sequences that lie one behind the other (pytorch/pytorch#179390 was turned down).

    The order in which the backward adds up is the same twice only under
    `torch.use_deterministic_algorithms(True)`.

    Raises:
        ConfigError: it cannot run on these tensors.
    """
    require_flash(qkv_T3ND.device, qkv_T3ND.dtype)
    _require_head_size("flash", qkv_T3ND.shape[-1])
    if qkv_T3ND.shape[0] == 0:
        return qkv_T3ND[:, 0]
    starts, longest = sequences.starts_E1, sequences.longest
    context_TND: torch.Tensor
    context_TND = _Flash.apply(qkv_T3ND, starts, longest, dropout_prob)  # type: ignore[no-untyped-call]
    return context_TND


def attend_varlen(
    qkv_T3ND: torch.Tensor, sequences: Sequences, dropout_prob: float
) -> torch.Tensor:
    """`Attend` by `torch.nn.attention.varlen`, the same kernels behind a public function.

    Raises:
        ConfigError: it cannot run on these tensors, or there is dropout, which it does not have.
    """
    require_varlen(qkv_T3ND.device, qkv_T3ND.dtype)
    _require_head_size("varlen", qkv_T3ND.shape[-1])
    if dropout_prob > 0.0:
        raise ConfigError(
            f"engine.attention=varlen has no dropout, but attention_probs_dropout_prob="
            f"{dropout_prob}; set that to 0, or engine.attention=flash"
        )
    if qkv_T3ND.shape[0] == 0:
        return qkv_T3ND[:, 0]
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = sequences.starts_E1, sequences.longest
    q, k, v = qkv_T3ND.unbind(1)
    context_TND = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(context_TND, torch.Tensor)  # a pair only where more is asked for
    return context_TND


def require_flash(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where torch's FlashAttention 2 cannot run."""
    require_gpu_and_half("flash", "FlashAttention 2", device, dtype)
    missing = [name for name in _OPERATIONS if not hasattr(torch.ops.aten, name)]
    if missing:
        raise ConfigError(
            f"engine.attention=flash needs torch.ops.aten.{missing[0]}, which torch "
            f"{torch.__version__} does not have; install torch 2.11 to 2.13, or set "
            f"engine.attention=padded"
        )


def require_varlen(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where `torch.nn.attention.varlen` is not there or cannot run."""
    require_gpu_and_half("varlen", "FlashAttention 2", device, dtype)
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise ConfigError(
            f"engine.attention=varlen needs torch.nn.attention.varlen, which torch "
            f"{torch.__version__} does not have; install torch 2.11 or later, or set "
            f"engine.attention=flash"
        )


def _require_head_size(name: str, head_size: int) -> None:
    if head_size % 8 or head_size > _LARGEST_HEAD:
        raise ConfigError(
            f"engine.attention={name} takes heads whose size is a multiple of 8 and at most "
            f"{_LARGEST_HEAD}, not {head_size}; change model.num_attention_heads, or set "
            f"engine.attention=padded"
        )


class _Flash(torch.autograd.Function):
    """Torch's two private operations, called as torch 2.11 and 2.13 both declare them.

    The five results and all arguments up to `return_debug_mask` are the same in both; what came
    later (2.13: `block_table`, `num_splits`) stands behind and has defaults.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv_T3ND: torch.Tensor,
        starts_E1: torch.Tensor,
        longest: int,
        dropout_prob: float,
    ) -> torch.Tensor:
        where = starts_E1, starts_E1, longest, longest
        attend = torch.ops.aten._flash_attention_forward
        context_TND, log_sum_exp_NT, rng_state, unused, _ = attend(
            *qkv_T3ND.unbind(1), *where, dropout_prob, False, False
        )
        ctx.save_for_backward(qkv_T3ND, context_TND, log_sum_exp_NT, starts_E1, rng_state, unused)
        ctx.longest, ctx.dropout_prob = longest, dropout_prob
        return context_TND  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TND: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        qkv_T3ND, context_TND, log_sum_exp_NT, starts_E1, rng_state, unused = ctx.saved_tensors
        where = starts_E1, starts_E1, ctx.longest, ctx.longest
        known = *qkv_T3ND.unbind(1), context_TND, log_sum_exp_NT, *where, ctx.dropout_prob
        attend_back = torch.ops.aten._flash_attention_backward
        grads_TND = attend_back(grad_TND, *known, False, rng_state, unused)
        # The operation makes three tensors of its own and writes into no others.
        return torch.stack(grads_TND, dim=1), None, None, None
