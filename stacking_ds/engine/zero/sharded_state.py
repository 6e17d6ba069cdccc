"""Read and write the fp32 masters and moments of a live engine through `Fragment`s."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from stacking_ds.engine.zero.compatibility import Masters, masters_of
from stacking_ds.engine.zero.flat_buffers import flat_tensors, pieces
from stacking_ds.engine.zero.lifecycle import ValueOf
from stacking_ds.optim.optimizers import state_names
from stacking_ds.sharding.fragments import MASTER, Fragment


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


_REPLICATED = (Masters.MODULE, Masters.UNFUSED, Masters.FUSED)


def fragments(engine: Any) -> list[Fragment]:
    """The part of every trained parameter this rank's optimizer holds, as live fp32 views.

    Every rank lists the same parameters in the same order, with an empty fragment where it holds
    nothing. After writing masters call `refresh`, or the forward pass keeps the old weights.
    Moments are among the views once they exist (after the first step or `seed_moments`). No
    communication.
    """
    state, names = engine.basic_optimizer.state, state_names(engine.basic_optimizer)
    replicated = masters_of(engine) in _REPLICATED
    found = []
    for piece in pieces(engine):
        own = state.get(piece.flat, {})
        views = {MASTER: piece.view(piece.flat)}
        views.update({key: piece.view(own[key]) for key in names if key in own})
        found.append(
            Fragment(piece.name, piece.shape, piece.start, piece.stop, views, piece.cut, replicated)
        )
    return found


def optimizer_step(engine: Any) -> int:
    """Adam's (or LAMB's) own step count, on which its bias correction depends; 0 before any."""
    for flat_state in engine.basic_optimizer.state.values():
        if "step" in flat_state:
            return int(flat_state["step"])
    return 0


@torch.no_grad()
def seed_moments(engine: Any, step: int) -> None:
    """Give the base optimizer zero moments and the step count `step`, so that moments can be
    written through `fragments` before the first step of a new engine."""
    optimizer = engine.basic_optimizer
    # torch keeps the count on the host, except where a fused or captured step reads it
    on_device = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
    for flat in flat_tensors(engine):
        # one tensor each: a shared one would be counted up once per flat tensor and step
        count = torch.tensor(float(step), device=flat.device if on_device else "cpu")
        optimizer.state[flat] = {
            "step": count,
            **{key: torch.zeros_like(flat) for key in state_names(optimizer)},
        }
    _relink(engine)


def reset_moments(engine: Any) -> None:
    """Forget moments and step count, as if the optimizer had never stepped."""
    engine.basic_optimizer.state.clear()


def _relink(engine: Any) -> None:
    """DeepSpeed links its own view of the moments after the first group's first step, when the
    other groups have none yet; its debugging functions then fail for those groups for ever."""
    if masters_of(engine) is Masters.GROUPS:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Make the weights of the forward pass the masters' rounding (a collective at ZeRO 1 and 2)."""
    wrapper = engine.optimizer
    masters = masters_of(engine)
    if masters is Masters.UNFUSED:
        for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for p, master in zip(group, masters, strict=True):
                p.data.copy_(master)
    elif masters is Masters.FUSED:
        for flat, master in zip(wrapper.fp16_groups_flat, wrapper.fp32_groups_flat, strict=True):
            flat.copy_(master)  # the module's parameters are views of it
    elif masters is Masters.GROUPS:
        wrapper.update_lp_params()
    elif masters is Masters.PARAMETERS:
        # gathered parameters hold old values: let go of them, the next forward gathers its own
        wrapper._partition_all_parameters()
        for sub_group in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)


@torch.no_grad()
def write_masters(engine: Any, value_of: ValueOf) -> None:
    """Set every master from whole parameters; each rank keeps its own elements.

    The low-precision copies are left alone: `refresh` afterwards unless they are already the
    rounding of these values.
    """
    for fragment in fragments(engine):
        if fragment.numel:
            whole = value_of(fragment.name, torch.Size(fragment.shape)).reshape(-1)
            fragment.views[MASTER].copy_(whole[fragment.start : fragment.stop])


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """At ZeRO 1 and 2, the weights of the forward pass, which every rank has whole; else nothing.

    They are the masters' rounding. Held by the caller they outlive the engine.
    """
    if masters_of(engine) is not Masters.GROUPS:
        return {}
    return {name: p.detach() for name, p in engine.module.named_parameters()}


@torch.no_grad()
def write_whole_weights(engine: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Set what `whole_weights` returns; instead of `refresh`, which gathers it from all ranks."""
    for name, weight in whole_weights(engine).items():
        weight.copy_(weights[name])


@contextmanager
def without_stepping(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While this lasts `optimizer.step()` does nothing.

    At ZeRO 0 with bf16 or fp16, `deepspeed.initialize` calls `optimizer.step()` with zero
    gradients to allocate the moments. That phantom step decays the weights once and is counted,
    before anything can be bound to the engine.
    """
    optimizer.step = lambda *arguments, **options: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del optimizer.step
