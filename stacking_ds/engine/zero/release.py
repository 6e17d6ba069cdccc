"""Give the memory of a DeepSpeed engine back.

`engine.destroy()` removes the gradient hooks, without which nothing is ever freed. What else keeps
a dead engine alive in DeepSpeed 0.19.8: a module-level list of root modules that is appended to
and never popped, and a cache on a method of the ZeRO-3 coordinator, keyed by its instances. The
rest is one reference cycle, so the collector has to run.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch

from stacking_ds.engine.zero.compatibility import (
    PartitionedParameterCoordinator,
    parameter_offload,
)
from stacking_ds.engine.zero.flat_buffers import flat_tensors
from stacking_ds.process.runtime import return_freed_memory


def release(engine: Any) -> int:
    """Destroy `engine` and return its memory; the engine and its module are unusable afterwards.

    What the caller still holds (the model, a loss with its graph) stays allocated until the
    caller lets go of it.

    Returns:
        The bytes of fp32 masters that did not come back, which should be 0.
    """
    masters = [(weakref.ref(flat), flat.nbytes) for flat in flat_tensors(engine)]
    engine.destroy()
    _forget_modules(engine)
    _clear_coordinator_cache()
    _empty(engine)
    gc.collect()
    return_free_pages()
    return sum(size for master, size in masters if master() is not None)


def _forget_modules(engine: Any) -> None:
    dead = {id(module) for module in engine.module.modules()}
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if id(module) not in dead]


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


def _clear_coordinator_cache() -> None:
    method = getattr(PartitionedParameterCoordinator, _CACHED_METHOD, None)
    cache = _find_cache(method) if method is not None else None
    if cache is not None:
        cache()


_CACHED_METHOD = "_PartitionedParameterCoordinator__params_to_release"


def _find_cache(function: Any) -> Callable[[], None] | None:
    """`cache_clear` of the lru_cache inside the decorators around `function`."""
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
    return None


def return_free_pages() -> None:
    """Give memory that is free, but kept by an allocator, back to the machine."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_freed_memory()
