"""Attention in rows of equal length, by torch's scaled_dot_product_attention, on any device.

Shapes: T tokens, E sequences, N heads, D head size; R rows of S slots each, one sequence a row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention.sequences import Sequences, require_gpu_and_half

_WITHOUT_CUDNN = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_CUDNN_DROPOUTS = 16
_ALIGNMENT = 8  # of a mask's rows, or the memory-efficient kernel copies the mask


def attend_padded(
    qkv_T3ND: torch.Tensor,
    sequences: Sequences,
    dropout_prob: float,
    backends: Sequence[SDPBackend] = _WITHOUT_CUDNN,
) -> torch.Tensor:
    """`Attend` by the first of torch's `backends` that can run. The host waits for nothing.

    Where all sequences have `longest` tokens there are neither copies nor a mask (but for lengths
    that cuDNN may refuse, such as 1). Elsewhere the rows hold R * S slots, whatever the tokens are;
    the mask hides the slots of padding.

    Raises:
        RuntimeError: none of the backends can run on these tensors.
    """
    T, _, N, D = qkv_T3ND.shape
    E = sequences.starts_E1.numel() - 1
    if T == 0:
        return qkv_T3ND[:, 0]
    for_cudnn = SDPBackend.CUDNN_ATTENTION in backends
    is_full = E * sequences.longest == T  # no sequence is longer, so none is shorter
    slots = None
    if is_full and not (for_cudnn and sequences.longest % _ALIGNMENT):
        rows_RS3ND = qkv_T3ND.view(E, sequences.longest, 3, N, D)
        q, k, v = rows_RS3ND.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        slots = _slots(sequences, T, for_cudnn)
        q, k, v = _Pad.apply(qkv_T3ND, slots)  # type: ignore[no-untyped-call]
    # Without set_priority the list only permits, and torch's own order decides.
    with sdpa_kernel(list(backends), set_priority=True):
        context_RNSD = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None if slots is None else slots.real_R11S, dropout_p=dropout_prob
        )
    if slots is None:
        return context_RNSD.transpose(1, 2).reshape(T, N, D)
    context_TND: torch.Tensor
    context_TND = _Unpad.apply(context_RNSD, slots)  # type: ignore[no-untyped-call]
    return context_TND


def attend_cudnn(qkv_T3ND: torch.Tensor, sequences: Sequences, dropout_prob: float) -> torch.Tensor:
    """`attend_padded` by cuDNN and nothing else.

    Raises:
        ConfigError: cuDNN cannot run on these tensors, or not with this dropout.
    """
    require_gpu_and_half("cudnn", "cuDNN", qkv_T3ND.device, qkv_T3ND.dtype)
    if not (dropout_prob * _CUDNN_DROPOUTS).is_integer():
        # Some of its kernels round the probability to a 16th; torch refuses that only since
        # pytorch/pytorch#174245, and would train with another dropout before.
        raise ConfigError(
            f"engine.attention=cudnn drops out with multiples of 1/{_CUDNN_DROPOUTS}, not with "
            f"attention_probs_dropout_prob={dropout_prob}; set that to 0.125 or 0, or leave the "
            f"attention to auto"
        )
    try:
        return attend_padded(qkv_T3ND, sequences, dropout_prob, (SDPBackend.CUDNN_ATTENTION,))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f"engine.attention=cudnn cannot run on {qkv_T3ND.shape[2]} heads of size "
            f"{qkv_T3ND.shape[3]} in {qkv_T3ND.dtype} ({error}); leave the attention to auto"
        ) from error


# ------------------------------------------------------------------ tokens into rows and back


class _Slots(NamedTuple):
    """Which token is in which slot."""

    token_RS: torch.Tensor
    """In padding, the sequence's own last token, so that nothing of another gets into the row."""
    slot_T: torch.Tensor
    """r * S + s, for each token."""
    real_R11S: torch.Tensor
    """False at padding. A row without any token shows its first slot: were all hidden, softmax
    would divide 0 by 0. Nobody reads what it computes."""


# All layers attend to the same sequences.
_known_slots: WeakKeyDictionary[Sequences, tuple[tuple[int, int, bool], _Slots]] = (
    WeakKeyDictionary()
)


def _slots(sequences: Sequences, tokens: int, for_cudnn: bool) -> _Slots:
    starts_E1 = sequences.starts_E1
    is_captured = starts_E1.is_cuda and torch.cuda.is_current_stream_capturing()
    if is_captured or torch.is_inference_mode_enabled() or starts_E1.is_inference():
        # A replayed graph must compute from what the starts are then, and what inference mode
        # makes cannot be used in training.
        return _place(starts_E1, sequences.longest, tokens, for_cudnn)
    key = (starts_E1._version, tokens, for_cudnn)
    found = _known_slots.get(sequences)
    if found is None or found[0] != key:
        found = key, _place(starts_E1, sequences.longest, tokens, for_cudnn)
        _known_slots[sequences] = found
    return found[1]


def _place(starts_E1: torch.Tensor, longest: int, tokens: int, for_cudnn: bool) -> _Slots:
    starts_R1 = starts_E1.long()
    E = starts_R1.numel() - 1
    if for_cudnn and (empty := _rounded_rows(E) - E):
        starts_R1 = torch.cat([starts_R1, starts_R1[-1:].expand(empty)])
    S = _row_length(longest)
    starts_R, ends_R = starts_R1[:-1, None], starts_R1[1:, None]
    slot_S = torch.arange(S, device=starts_R1.device)
    token_RS = torch.minimum(starts_R + slot_S, ends_R - 1).clamp_(min=0)
    real_RS = slot_S < (ends_R - starts_R).clamp_(min=1)
    token_T = torch.arange(tokens, device=starts_R1.device)
    row_T = torch.searchsorted(starts_R1, token_T, right=True) - 1
    slot_T = token_T - starts_R1[row_T] + row_T * S
    return _Slots(token_RS, slot_T, real_RS[:, None, None])


def _row_length(longest: int) -> int:
    """At least `longest`.

    With a mask, cuDNN's backward of torch 2.11 to 2.13 makes NaN of rows of 64 (modulo 128) slots
    on H100 and H200 where scores are far below 0 (pytorch/pytorch#196678).
    """
    length = -(-longest // _ALIGNMENT) * _ALIGNMENT
    return length + _ALIGNMENT if length % 128 == 64 else length


def _rounded_rows(sequences: int) -> int:
    """cuDNN plans for each number of rows anew, which takes longer than a training step: few
    numbers are few plans. At most an eighth of the rows is empty."""
    step = 1 << max(0, sequences.bit_length() - 4)
    return -(-sequences // step) * step


class _Pad(torch.autograd.Function):
    """qkv_T3ND -> q, k, v, each (R, N, S, D) in strides of (R, S, N, D), which kernels like."""

    @staticmethod
    def forward(
        ctx: Any, qkv_T3ND: torch.Tensor, slots: _Slots
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(slots.slot_T)
        flat = qkv_T3ND.index_select(0, slots.token_RS.flatten())
        rows_RS3ND = flat.view(*slots.token_RS.shape, *qkv_T3ND.shape[1:])
        q, k, v = rows_RS3ND.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_RNSD: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Nobody reads what a slot of padding attends to, and nobody attends to it: its gradients
        # are 0, so that each token's come from its own slot alone and nothing has to be added.
        (slot_T,) = ctx.saved_tensors
        _, N, _, D = grads_RNSD[0].shape
        grad_T3ND = grads_RNSD[0].new_empty(len(slot_T), 3, N, D)
        for index, grad_RNSD in enumerate(grads_RNSD):
            torch.index_select(_flat(grad_RNSD), 0, slot_T, out=grad_T3ND[:, index])
        return grad_T3ND, None


class _Unpad(torch.autograd.Function):
    """context_RNSD -> context_TND"""

    @staticmethod
    def forward(ctx: Any, context_RNSD: torch.Tensor, slots: _Slots) -> torch.Tensor:
        ctx.save_for_backward(slots.slot_T)
        ctx.rows = slots.token_RS.shape
        return _flat(context_RNSD).index_select(0, slots.slot_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TND: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slot_T,) = ctx.saved_tensors
        flat = grad_TND.new_zeros(ctx.rows.numel(), *grad_TND.shape[1:])
        flat.index_copy_(0, slot_T, grad_TND)
        return flat.view(*ctx.rows, *grad_TND.shape[1:]).transpose(1, 2), None


def _flat(values_RNSD: torch.Tensor) -> torch.Tensor:
    """Shape [R * S, N, D]."""
    return values_RNSD.transpose(1, 2).flatten(0, 1)
