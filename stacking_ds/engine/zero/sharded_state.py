"""Read and write the fp32 masters and moments of a live engine through `Fragment`s, and give its
optimizer what ZeRO has made of them, whatever the ZeRO stage and precision."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from stacking_ds.engine.zero.compatibility import ZERO_SUPPORTED_OPTIMIZERS, Masters, masters_of
from stacking_ds.engine.zero.flat_buffers import flat_tensors, pieces
from stacking_ds.engine.zero.lifecycle import ValueOf
from stacking_ds.optim.optimizers import state_names
from stacking_ds.sharding.fragments import MASTER, Fragment, Shard, Span


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


_SHARDED = (Masters.GROUPS, Masters.PARAMETERS)


def fragments(engine: Any) -> list[Fragment]:
    """The part of every trained parameter this rank's optimizer holds, as live fp32 views.

    Every rank lists the same parameters in the same order, with an empty fragment where it holds
    nothing. After writing masters call `refresh`, or the forward pass keeps the old weights.
    Moments are among the views once they exist (after the first step or `seed_moments`). No
    communication.
    """
    state, names = engine.basic_optimizer.state, state_names(engine.basic_optimizer)
    replicated = masters_of(engine) not in _SHARDED
    found = []
    for piece in pieces(engine):
        held = {MASTER: piece.flat, **state.get(piece.flat, {})}
        views = {key: piece.view(held[key]) for key in (MASTER, *names) if key in held}
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
    if masters_of(engine) is Masters.GROUPS:
        # DeepSpeed links its own view of the moments after the first group's first step, when the
        # other groups have none yet; its debugging functions then fail for those for ever
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def reset_moments(engine: Any) -> None:
    """Forget moments and step count, as if the optimizer had never stepped."""
    engine.basic_optimizer.state.clear()


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


# ---- What an optimizer that knows of ZeRO is bound to, and the norm of the gradient.


def accept_under_zero(kind: type[torch.optim.Optimizer]) -> None:
    """Tell DeepSpeed, for the life of the process, that optimizers of exactly this type are right
    on flat partitions; others it refuses, or warns of."""
    if kind not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(kind)


def shards(engine: Any) -> tuple[Shard, ...]:
    """The fp32 tensors the base optimizer steps on, and which parameters' elements lie in them.

    Every rank lists every parameter, with an empty span where it holds nothing of it. Low-precision
    copies are given where DeepSpeed calls `step` for one flat tensor after the other, and takes
    the copy of each before the next one's call.
    """
    spans: dict[torch.Tensor, list[Span]] = {}
    for index, piece in enumerate(pieces(engine)):
        span = Span(piece.name, index, piece.offset, piece.stop - piece.start)
        spans.setdefault(piece.flat, []).append(span)
    wrapper, masters = engine.optimizer, masters_of(engine)
    low: list[Any] = [None] * len(spans)
    if masters is Masters.GROUPS:
        ranks = [dist.get_rank(group=group) for group in wrapper.real_dp_process_group]
        parts = wrapper.parallel_partitioned_bit16_groups
        low = [of_group[rank].detach() for of_group, rank in zip(parts, ranks, strict=True)]
    elif masters is Masters.PARAMETERS:
        low = [copy.detach() for copy in wrapper.fp16_partitioned_groups_flat]
    return tuple(
        Shard(flat, tuple(of_flat), copy)
        for (flat, of_flat), copy in zip(spans.items(), low, strict=True)
    )


def adder_over_ranks(engine: Any) -> Callable[[torch.Tensor], None] | None:
    """Sums a tensor over the ranks in place; None at ZeRO 0, where all have everything."""
    if masters_of(engine) not in _SHARDED:
        return None

    def add(values: torch.Tensor) -> None:
        # offloaded state is summed on the host, which nccl cannot reach
        on_device = values.cuda() if dist.get_backend() == "nccl" else values
        dist.all_reduce(on_device)
        if on_device is not values:
            values.copy_(on_device)

    return add


def measure_at_once(engine: Any) -> None:
    """Make an update at ZeRO 1, 2 and 3 measure the gradient of all its parameter groups together:
    one norm, one all-reduce, one wait for the device.

    DeepSpeed 0.19.8 looks for infinities parameter by parameter, and then takes a norm, an
    all-reduce and a wait for each group, of which there are two a layer. The norm here is infinite
    where an element anywhere is not finite, on all ranks, and DeepSpeed then skips the step by
    itself. It is on the host, so that what each group derives of it waits for nothing.

    Offloaded gradients are left alone: DeepSpeed measures them as they arrive on the host.
    """
    wrapper, masters = engine.optimizer, masters_of(engine)
    if masters is Masters.GROUPS and not wrapper.cpu_offload:
        wrapper.has_overflow = lambda partition_gradients=True: False
        wrapper.scaled_global_norm = lambda norm_type=2: _norm_over_ranks(wrapper)
    elif masters is Masters.PARAMETERS and not wrapper.offload_optimizer:
        wrapper.has_overflow = lambda partition_gradients=True: False
        wrapper._get_norm_groups = lambda: [_norm_over_ranks(wrapper)]


def _norm_over_ranks(wrapper: Any) -> torch.Tensor:
    """The 2-norm of what all ranks hold of the gradient, in fp32 on the host."""
    held = [
        gradient.detach()
        for gradients in wrapper.averaged_gradients.values()
        for gradient in gradients
        if not getattr(gradient, "_zero_padding", False)
    ]
    norms = torch._foreach_norm(held, 2, torch.float64) if held else []
    # a rank of many may hold padding alone
    nothing = torch.zeros((), dtype=torch.float64, device=wrapper.device)
    squares = torch.stack([nothing, *norms]).square().sum()
    dist.all_reduce(squares, group=wrapper.dp_process_group)
    norm = squares.sqrt().float().cpu()
    return norm if norm.isfinite() else torch.tensor(torch.inf)


def gradient_norm_at_step(engine: Any) -> Callable[[], torch.Tensor] | None:
    """The global 2-norm of the gradients in the engine's present step, where they are not clipped,
    to be asked from within the base optimizer's `step`; None where that gets them all at once."""
    wrapper, masters = engine.optimizer, masters_of(engine)
    if masters is Masters.PARAMETERS:
        return lambda: torch.as_tensor(wrapper._global_grad_norm)
    if masters is not Masters.GROUPS:
        return None
    # In the step in which the dynamic loss scale grows, `_global_grad_norm` is by the old one, and
    # the gradients are by the new one.
    measure = wrapper.scaled_global_norm
    measured: list[Any] = []

    def keep(*arguments: Any, **options: Any) -> Any:
        measured[:] = [measure(*arguments, **options)]
        return measured[0]

    wrapper.scaled_global_norm = keep
    return lambda: torch.as_tensor(measured[0] / wrapper.loss_scale)


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
