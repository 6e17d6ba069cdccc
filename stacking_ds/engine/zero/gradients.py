"""The global norm of the gradient, whatever the ZeRO stage and precision."""

from typing import Any

import torch

from stacking_ds.engine.zero.compatibility import Masters, masters_of

__all__ = ["gradient_norm", "norm_before_step"]


def norm_before_step(engine: Any) -> float | None:
    """At ZeRO 0 in fp32, the norm of the reduced gradients; None elsewhere.

    There DeepSpeed keeps no norm, and after its step the gradients are clipped and gone; ask
    between the `backward` that reduced them and `engine.step()`. No communication: the reduced
    gradients are the same on every rank.
    """
    if masters_of(engine) is not Masters.MODULE:
        return None
    norms = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float64)
        for group in engine.optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def gradient_norm(engine: Any) -> float:
    """The 2-norm, before clipping and without loss scale, of the gradient of the step just taken.

    Infinite where the step was skipped because the gradient was not finite.
    """
    norm = engine.get_global_grad_norm()
    assert norm is not None, "no step was taken, or DeepSpeed keeps no norm (norm_before_step)"
    value = float(norm)
    if masters_of(engine) is Masters.UNFUSED:
        # this wrapper alone leaves the loss scale in
        value /= float(engine.optimizer.loss_scale_config.cur_scale)
    return value
