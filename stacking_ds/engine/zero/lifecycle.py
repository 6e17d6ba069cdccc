"""Start a DeepSpeed engine without sending what every rank has already, and give its memory back.

Stock `deepspeed.initialize` wants the whole model on every rank, broadcasts it (ZeRO 0, 1, 2), or
broadcasts, cuts and then gathers every parameter once more (ZeRO 3). Here every rank knows the
values, so nothing has to be sent, and at ZeRO 3 one parameter at a time is whole.

`engine.destroy()` removes the gradient hooks, without which nothing is ever freed. What else keeps
a dead engine alive in DeepSpeed 0.19.8: a module-level list of root modules that is appended to
and never popped, and a cache on a method of the ZeRO-3 coordinator, keyed by its instances. The
rest is one reference cycle, so the collector has to run.
"""

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from stacking_ds.engine.zero.compatibility import (
    DeepSpeedEngine,
    compiler,
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
)
from stacking_ds.engine.zero.flat_buffers import flat_tensors
from stacking_ds.model.layer import GatheredWhole
from stacking_ds.process.runtime import return_freed_memory

ValueOf = Callable[[str, torch.Size], torch.Tensor]
"""From a parameter's name and shape to its fp32 value."""


def import_muon() -> None:
    """Import DeepSpeed's Muon, which is of no use here, without torch's compiler.

    `deepspeed.initialize` imports it to ask whether it is the optimizer; its functions are
    decorated by `torch.compile`, which brings in Inductor: a second of every start.
    """
    decorator = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = decorator


@torch.no_grad()
def give_storage(
    model: torch.nn.Module,
    ds_config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    value_of: ValueOf | None,
) -> None:
    """Put every parameter of `model`, which may be on the meta device, on `device` as `dtype`.

    At ZeRO 3 each is cut among the ranks before the next one is made. Parameters keep their
    identity, so that an optimizer built on them, and ties, stay right. Without `value_of` their
    values are whatever the memory held. No communication.
    """
    assert not list(model.buffers()), "a model with buffers has to place them itself"
    cut: Any = None
    if ds_config.get("zero_optimization", {}).get("stage", 0) == 3:
        cut = partition_parameters.Init(config_dict_or_path=dict(ds_config), dtype=dtype)
    p: Any
    for name, p in model.named_parameters():
        if value_of is None:
            storage = torch.empty(p.shape, dtype=dtype, device=device)
        else:
            storage = value_of(name, p.shape).to(device, dtype)
        if p.is_meta:
            # assigning to .data cannot leave the meta device
            torch.utils.swap_tensors(p, torch.nn.Parameter(storage))  # type: ignore[no-untyped-call]
        else:
            p.data = storage
        del storage
        if cut is not None:
            cut._convert_to_deepspeed_param(p)
            p.partition()
    if cut is not None:
        _gather_with_their_users(model)


def _gather_with_their_users(model: torch.nn.Module) -> None:
    """ZeRO 3 gathers a module's own parameters before its forward; these use their children's.

    Without this DeepSpeed would find out in the first forward, and wait for one after the other.
    """
    for module in model.modules():
        if isinstance(module, GatheredWhole):
            own = {id(p) for p in module.parameters(recurse=False)}
            for parameter in module.parameters():
                if id(parameter) not in own:
                    partition_parameters.register_external_parameter(module, parameter)


@contextmanager
def without_traffic(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, `deepspeed.initialize` neither broadcasts nor gathers `model`.

    Gathering each ZeRO-3 parameter is left over from a time when a gradient hook needed its
    graph; with today's hooks nothing reads what is gathered.
    """
    cut: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
    before = [(p.all_gather, p.partition) for p in cut]
    broadcast = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = _nothing
    for p in cut:
        p.all_gather = p.partition = _nothing
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = broadcast
        for p, (all_gather, partition) in zip(cut, before, strict=True):
            p.all_gather, p.partition = all_gather, partition


def _nothing(*arguments: Any, **options: Any) -> None:
    pass


def release(engine: Any) -> int:
    """Destroy `engine` and return its memory; the engine and its module are unusable afterwards.

    What the caller still holds (the model, a loss with its graph) stays allocated until the
    caller lets go of it.

    Returns:
        The bytes of fp32 masters that did not come back, which should be 0.
    """
    masters = [(weakref.ref(flat), flat.nbytes) for flat in flat_tensors(engine)]
    engine.destroy()
    dead = {id(module) for module in engine.module.modules()}
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if id(module) not in dead]
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    name = "_PartitionedParameterCoordinator__params_to_release"
    _find_cache(getattr(coordinator, name, None))()
    _empty(engine)
    gc.collect()
    return_free_pages()
    return sum(size for master, size in masters if master() is not None)


def _empty(engine: Any) -> None:
    """Leave a shell: a caller that still holds the engine holds nothing else."""
    for p in engine.module.parameters():
        p.grad = None
    engine.basic_optimizer.state.clear()
    engine.basic_optimizer.param_groups.clear()
    engine._modules.clear()
    for name in list(vars(engine)):
        if not name.startswith("_"):
            vars(engine)[name] = None


def _find_cache(function: Any) -> Callable[..., None]:
    """`cache_clear` of the lru_cache inside the decorators around `function`, if there is one."""
    waiting, seen = [function], set()
    while waiting:
        candidate = waiting.pop()
        if id(candidate) in seen:
            continue
        seen.add(id(candidate))
        clear = getattr(candidate, "cache_clear", None)
        if callable(clear):
            return clear  # type: ignore[no-any-return]
        cells = getattr(candidate, "__closure__", None) or ()
        waiting.extend(cell.cell_contents for cell in cells)
    return _nothing


def return_free_pages() -> None:
    """Give memory that is free, but kept by an allocator, back to the machine."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_freed_memory()
