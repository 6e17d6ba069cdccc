"""The global norm of the gradient, whatever the ZeRO stage and precision."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from stacking_ds.engine.zero.compatibility import ZERO_SUPPORTED_OPTIMIZERS, Masters, masters_of
from stacking_ds.engine.zero.flat_buffers import flat_tensors, pieces
from stacking_ds.sharding.fragments import Shard, Span


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
    spans: dict[int, list[Span]] = {id(flat): [] for flat in flat_tensors(engine)}
    for index, piece in enumerate(pieces(engine)):
        span = Span(piece.name, index, piece.offset, piece.stop - piece.start)
        spans[id(piece.flat)].append(span)
    low = _low_precision(engine)
    return tuple(
        Shard(flat, tuple(spans[id(flat)]), low.get(id(flat))) for flat in flat_tensors(engine)
    )


def _low_precision(engine: Any) -> dict[int, torch.Tensor]:
    wrapper = engine.optimizer
    masters = masters_of(engine)
    if masters is Masters.GROUPS:
        ranks = [dist.get_rank(group=group) for group in wrapper.real_dp_process_group]
        parts = wrapper.parallel_partitioned_bit16_groups
        copies = [of_group[rank] for of_group, rank in zip(parts, ranks, strict=True)]
    elif masters is Masters.PARAMETERS:
        copies = wrapper.fp16_partitioned_groups_flat
    else:
        return {}
    pairs = zip(flat_tensors(engine), copies, strict=True)
    return {id(flat): copy.detach() for flat, copy in pairs}


def adder_over_ranks(engine: Any) -> Callable[[torch.Tensor], None] | None:
    """Sums a tensor over the ranks in place; None at ZeRO 0, where all have everything."""
    if masters_of(engine) not in (Masters.GROUPS, Masters.PARAMETERS):
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
