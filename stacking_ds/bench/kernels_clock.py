"""Time forward and backward passes apart, those that are compared in turn, on their own device.

A CPU counts the process's own time on one thread, so that who else is on the machine matters less,
and the least of all rounds counts. A GPU counts by its own events, after the host has gone through
the pass and with nothing of it left in the L2 cache; the median of all rounds counts.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from stacking_ds.bench.lamb_rivals import reason_of

_SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "minimum": min,
    "median": statistics.median,
}
_WARM_UPS = 3
_FLUSH_BYTES = 1 << 28  # several times any L2
_COPY_BYTES_ON_GPU = 1 << 30
_CYCLES = 2_000_000  # a millisecond, longer than a host needs for a few dozen launches
_LONGEST_CYCLES = 1 << 28


class Clock(Protocol):
    summary: str
    """What of several rounds counts: "minimum" or "median"."""

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, and what the work returned."""

    def copy_bytes(self, working_set_bytes: int) -> int:
        """How much to copy for the speed that such a working set could have."""


class CpuClock:
    summary = "minimum"

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        started = time.process_time()
        result = work()
        return time.process_time() - started, result

    def copy_bytes(self, working_set_bytes: int) -> int:
        return max(1, working_set_bytes // 2)  # as much of it in cache


class GpuClock:
    summary = "median"

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._cycles = _CYCLES
        self.host_was_behind = 0
        """Times in which the device had to wait for the host: such a time is too long."""

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flushed.zero_()
        torch.cuda._sleep(self._cycles)  # type: ignore[no-untyped-call]
        begin.record()
        result = work()
        end.record()
        if begin.query():  # type: ignore[no-untyped-call]
            self.host_was_behind += 1
            self._cycles = min(2 * self._cycles, _LONGEST_CYCLES)  # for the next
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, result

    def copy_bytes(self, working_set_bytes: int) -> int:
        return _COPY_BYTES_ON_GPU


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Entrant:
    """What is to be timed: a forward pass, and the backward pass that follows it."""

    forward: Callable[[], torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    """What the backward pass has gradients of."""
    gradient: torch.Tensor
    """Of the forward pass's result."""
    prepare: Callable[[], Any] = _nothing
    """Puts back, before a forward pass, what the last backward pass overwrote."""

    def backward(self, result: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(result, self.inputs, self.gradient)


@dataclass
class Race:
    """Seconds by entrant and pass, and the copy's speed in the same rounds."""

    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    copy_bytes_per_second: float = 0.0


def race(
    entrants: Mapping[str, Entrant], clock: Clock, rounds: int, working_set_bytes: int
) -> Race:
    """All entrants once a round, so that what slows the machine down slows all. One that raises is
    left out, with its reason."""
    found, able = Race(), dict(entrants)
    for name, entrant in entrants.items():
        try:
            for _ in range(_WARM_UPS):
                entrant.prepare()
                entrant.backward(entrant.forward())
        except Exception as error:  # noqa: BLE001 - whatever one lacks here, the others are timed
            found.not_measured[name] = reason_of(error)
            del able[name]
    device = next(iter(entrants.values())).gradient.device
    size = clock.copy_bytes(working_set_bytes)
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in able}
    copies = []
    for _ in range(rounds):
        for name, entrant in able.items():
            times[name].append(_both(entrant, clock))
        copies.append(clock.time(lambda: target.copy_(source))[0])
    summary = _SUMMARIES[clock.summary]
    for name, rounds_of in times.items():
        found.seconds[name] = {
            way: summary([one[way] for one in rounds_of]) for way in ("forward", "backward")
        }
    found.copy_bytes_per_second = 2 * size / max(summary(copies), 1e-9)  # read and written
    return found


def _both(entrant: Entrant, clock: Clock) -> dict[str, float]:
    entrant.prepare()
    forward, result = clock.time(entrant.forward)
    backward, _ = clock.time(lambda: entrant.backward(result))
    return {"forward": forward, "backward": backward}
