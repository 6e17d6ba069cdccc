"""Linear maps whose matrix products run in 8-bit floating point.

Each matrix is divided by a scale of its own, so that its largest element becomes the largest that
the format holds. Micikevicius et al. 2022, "FP8 formats for deep learning", §3: E4M3 for weights
and activations, E5M2, of wider range, for gradients; sums and what is not a product stay wider.

Shapes: T tokens, I inputs, O outputs.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from stacking_ds.errors import ConfigError

_MULTIPLE = 16  # of bytes, that is elements, in a row that tensor cores read
_CAPABILITY = (8, 9)  # NVIDIA's Ada generation; Hopper is 9.0
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # its inverse is finite: zeros stay zeros


def linear_fp8(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """x W' + b. Shape [T, O], in x's dtype; the backward's two products are in FP8 too.

    Scales are taken from the tensors at hand; the host waits for nothing. Where a number is not
    finite, no result of its product is.

    Raises:
        ConfigError: a size or a dtype that the products cannot have.
    """
    O, I = weight_OI.shape  # noqa: E741
    require_fp8_sizes(I, O)
    if x_TI.dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"engine.fp8 multiplies what is in bf16 or fp32, not in {x_TI.dtype}; set "
            f"engine.precision=bf16, or engine.fp8=false"
        )
    y_TO: torch.Tensor = _Linear.apply(x_TI, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return y_TO


def require_fp8_sizes(*sizes: int) -> None:
    """Raises ConfigError unless all are multiples of 16."""
    for size in sizes:
        if size % _MULTIPLE:
            raise ConfigError(
                f"engine.fp8 multiplies matrices whose sizes are multiples of {_MULTIPLE}, not "
                f"{size}; change model.hidden_size and model.intermediate_size, or set "
                f"engine.fp8=false"
            )


def require_fp8(device: torch.device, hidden_size: int, intermediate_size: int) -> None:
    """Raises ConfigError where `linear_fp8` cannot run; on the CPU it can, slowly."""
    require_fp8_sizes(hidden_size, intermediate_size)
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"engine.fp8 needs an NVIDIA GPU, but the model is on {device.type}; set "
            f"engine.fp8=false"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise ConfigError(
            f"engine.fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper or later), "
            f"but {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; set "
            f"engine.fp8=false"
        )


class _Scaled(NamedTuple):
    """values * scale is the matrix, nearly."""

    values: torch.Tensor
    scale: torch.Tensor


def _scaled(matrix: torch.Tensor, dtype: torch.dtype) -> _Scaled:
    largest = torch.linalg.vector_norm(matrix, math.inf).float()
    scale = (largest / torch.finfo(dtype).max).clamp_(min=_SMALLEST_SCALE)
    # The cast turns infinity into the largest number, but an infinite scale has the inverse 0,
    # and infinity times 0 is no number, as is 0 times infinity when the product is scaled.
    values = matrix * scale.reciprocal()
    return _Scaled(values.to(dtype, memory_format=torch.contiguous_format), scale)


def _product(
    left_MK: _Scaled, right_NK: _Scaled, dtype: torch.dtype, **options: Any
) -> torch.Tensor:
    """left right'. Shape [M, N]. Both lie as their letters say: cuBLAS takes no other order."""
    return torch._scaled_mm(
        left_MK.values,
        right_NK.values.t(),
        scale_a=left_MK.scale,
        scale_b=right_NK.scale,
        out_dtype=dtype,
        **options,
    )


def _transposed(matrix_RC: _Scaled) -> _Scaled:
    """(C, R), with zeros after the last row's up to a multiple of 16 of them."""
    rows, columns = matrix_RC.values.shape
    width = -(-rows // _MULTIPLE) * _MULTIPLE
    # As bytes, which have all the operations that FP8 may lack on a device; 0 is 0 in both.
    turned = matrix_RC.values.view(torch.uint8).new_empty(columns, width)
    turned[:, :rows] = matrix_RC.values.view(torch.uint8).t()
    turned[:, rows:] = 0
    return _Scaled(turned.view(matrix_RC.values.dtype), matrix_RC.scale)


class _Linear(torch.autograd.Function):
    """Keeps x and the weight in FP8 for the backward: a quarter to half of what a linear keeps."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        x = _scaled(x_TI, torch.float8_e4m3fn)
        weight = _scaled(weight_OI, torch.float8_e4m3fn)
        ctx.save_for_backward(*x, *weight)
        ctx.weight_dtype = weight_OI.dtype
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        # cuBLAS adds a bias of 16 bits alone, and none to a result in fp32. Fast accumulation
        # keeps fewer bits of a sum, which the gradients need (Hopper's tensor cores).
        multiply = partial(_product, x, weight, x_TI.dtype, use_fast_accum=True)
        if bias_O is None:
            return multiply()
        if x_TI.dtype == torch.float32:
            return multiply() + bias_O  # selective checkpointing may keep the product
        return multiply(bias=bias_O.to(x_TI.dtype))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TO: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x_values, x_scale, weight_values, weight_scale = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x_TI = grad_weight_OI = grad_bias_O = None
        if needs_x or needs_weight:
            grad = _scaled(grad_TO, torch.float8_e5m2)
        if needs_x:
            weight = _Scaled(weight_values, weight_scale)
            grad_x_TI = _product(grad, _transposed(weight), grad_TO.dtype)
        if needs_weight:
            x = _Scaled(x_values, x_scale)
            grad_weight_OI = _product(_transposed(grad), _transposed(x), ctx.weight_dtype)
        if needs_bias:
            grad_bias_O = grad_TO.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x_TI, grad_weight_OI, grad_bias_O
