"""The factor fp16 multiplies the loss by, so that small gradients do not vanish."""

from typing import Any

import torch

from stacking_ds.engine.zero.compatibility import Masters, masters_of

__all__ = ["loss_scale", "mend_loss_scaling", "set_loss_scale"]


def loss_scale(engine: Any) -> float:
    """The present factor; 1.0 in bf16 and fp32."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def set_loss_scale(engine: Any, scale: float) -> None:
    """Go on from a factor found earlier; without effect in bf16 and fp32."""
    if engine.fp16_enabled():
        engine.optimizer.loss_scale = scale


def mend_loss_scaling(engine: Any) -> None:
    """Make `engine.backward` multiply by the loss scale at ZeRO 0 with fp16 as well.

    There DeepSpeed 0.19.8 divides the gradients by the scale, but multiplies the loss by it at
    ZeRO 1, 2 and 3 only: the optimizer would see gradients 65,536 times too small.
    """
    if masters_of(engine) not in (Masters.UNFUSED, Masters.FUSED) or not engine.fp16_enabled():
        return
    unscaled_backward = engine.backward

    def backward(loss: torch.Tensor, **options: Any) -> torch.Tensor:
        scale = loss_scale(engine)
        scaled: torch.Tensor = unscaled_backward(loss * scale, **options)
        return scaled / scale

    engine.backward = backward
