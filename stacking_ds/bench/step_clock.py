"""How long a step takes: CPU time of one thread, or a GPU's time with the wall clock beside it."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from stacking_ds.bench.lamb_rivals import reason_of
from stacking_ds.bench.machine import one_thread
from stacking_ds.process.device import measure_matmul_peak

Step = Callable[[], Any]
Times = dict[str, float]

_PEAK_SIZE, _PEAK_PRODUCTS = 1024, 5


def threads_for(device: torch.device) -> AbstractContextManager[None]:
    """One on a CPU; for a GPU torch keeps its threads, which build the models."""
    return one_thread() if device.type == "cpu" else nullcontext()


def timed_on(device: torch.device) -> Callable[[Step], Times]:
    """The clock for steps on `device`."""
    return _on_gpu if device.type == "cuda" else _on_cpu


def statistic_of(device: torch.device) -> str:
    """What of many rounds is taken. Nothing makes CPU time less than it is, and much on a shared
    machine makes it more; a GPU's clock falls as it warms up."""
    return "median" if device.type == "cuda" else "minimum"


def how_timed(device_type: str, keeps_memory: bool) -> str:
    """For people: the clock, and what of many rounds is taken."""
    if device_type == "cuda":
        return "wall time from an idle device to the end of its work, median"
    memory = "what it frees stays its own" if keeps_memory else "new pages included"
    return f"process CPU time of one thread, {memory}, least"


def _on_cpu(step: Step) -> Times:
    started, system = time.process_time(), _system_seconds()
    step()
    ended = time.process_time()
    return {"seconds": ended - started, "system_seconds": _system_seconds() - system}


def _system_seconds() -> float:
    """The operating system's part, for new pages mostly."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def _on_gpu(step: Step) -> Times:
    """`seconds` are the wall's, from an idle device to the end of its work: the trainer waits for
    the loss in every step."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    started = time.perf_counter()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    wall = time.perf_counter() - started
    return {"seconds": wall, "device_seconds": begin.elapsed_time(end) / 1e3}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few matrix products: on a GPU as a run measures it, on the CPU by
    the clock that steps are timed with, since a product that had to wait for its core is slow."""
    if device.type == "cuda":
        return measure_matmul_peak(device, dtype)
    left, right = torch.randn(2, _PEAK_SIZE, _PEAK_SIZE).to(dtype)
    seconds = (_on_cpu(lambda: left @ right)["seconds"] for _ in range(_PEAK_PRODUCTS))
    return 2 * _PEAK_SIZE**3 / min(seconds)


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    clock: Callable[[Step], Times],
    must_run: Sequence[str] = (),
) -> tuple[dict[str, list[Times]], dict[str, str]]:
    """Each step once a round, so that what slows the machine down slows all.

    Returns:
        The times of each step in the order of the rounds, and why some were given up: for any
        error, but of those that `must_run` for want of memory alone.
    """
    alive, given_up = list(steps), {}
    times: dict[str, list[Times]] = {name: [] for name in steps}
    for index in range(rounds):
        turn = index % len(alive) if alive else 0
        for name in alive[turn:] + alive[:turn]:  # nobody always follows the same one
            try:
                times[name].append(clock(steps[name]))
            except torch.OutOfMemoryError:
                given_up[name] = "out of memory"
            except Exception as error:
                if name in must_run:
                    raise
                given_up[name] = reason_of(error)
        alive = [name for name in alive if name not in given_up]
    return {name: times[name] for name in alive}, given_up


def timing(times: Sequence[Times]) -> dict[str, dict[str, float]]:
    """Least and middle of each kind of time."""
    return {
        kind: {
            "minimum": min(one[kind] for one in times),
            "median": statistics.median(one[kind] for one in times),
        }
        for kind in times[0]
    }


def timing_of_parts(rounds: Sequence[Sequence[Times]]) -> dict[str, dict[str, float]]:
    """Of work in parts, each with its own least and middle: short parts find the machine quiet
    more often than the whole does."""
    parts = [timing(times) for times in zip(*rounds, strict=True)]
    return {
        kind: {which: sum(part[kind][which] for part in parts) for which in parts[0][kind]}
        for kind in parts[0]
    }
