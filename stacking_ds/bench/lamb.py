"""Measure the time of the LAMB step on a CPU and on a GPU, beside its rivals.

Three times on a GPU, since a step is the work of two:

    device   what the GPU needs, by its own events; the host has gone through the step before
    host     what the host needs to go through the step, while the GPU is busy with something else
    wall     from an idle GPU to the end of its work, which is what a training step waits for: the
             trainer and DeepSpeed synchronise right before. It has of the host's what comes
             before the first kernel, and of the device's all

A step cannot be faster than its memory traffic. With fp32 gradients, masters and moments it is

    pass 1   reads g, w, m, v   writes m, v         24 bytes a parameter
    pass 2   reads w, m, v      writes w, bf16 w    18

so the floor is the time of 42 bytes a parameter, at the speed of a plain copy in the same run.
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from stacking_ds.bench.lamb_rivals import (
    Step,
    Tensors,
    apex_step,
    deepspeed_step,
    our_step,
    our_step_by_group,
    reason_of,
)
from stacking_ds.bench.machine import one_thread
from stacking_ds.config.mistakes import checked
from stacking_ds.errors import ConfigError
from stacking_ds.model.bert_config import BertConfig

BYTES_PER_PARAMETER = 42

_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_GPU_ROUNDS = 10  # for each round on the CPU
_WARM_UP_STEPS = 5
_LONGEST_CYCLES = 1 << 30  # half a second or so
_HEAD_SIZE = 64


@dataclass(frozen=True)
class Sizes:
    """Of the BERT whose parameters are stepped."""

    hidden_size: int
    layers: int
    vocab_size: int

    @property
    def config(self) -> BertConfig:
        """Raises:
        ConfigError: sizes of which no BERT can be made.
        """
        heads, rest = divmod(self.hidden_size, _HEAD_SIZE)
        return checked(
            BertConfig,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=1 if rest else heads,
            intermediate_size=4 * self.hidden_size,
        )


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"minimum": min(values), "median": statistics.median(values)}


def _copy(device: torch.device) -> Step:
    source, target = torch.ones(2, _COPY_BYTES[device.type] // 4, device=device)
    return lambda: target.copy_(source)


def _against(tensors: Tensors, copy_seconds: float) -> dict[str, Any]:
    """What was stepped on, and its floor."""
    device = tensors.shards[0].flat.device
    bytes_per_second = 2 * _COPY_BYTES[device.type] / copy_seconds  # read and written
    return {
        "parameters": tensors.numel,
        "parameter_tensors": len(tensors.shards),
        "copy_gb_per_second": bytes_per_second / 1e9,
        "floor_seconds": BYTES_PER_PARAMETER * tensors.numel / bytes_per_second,
    }


# ------------------------------------------------------------------------------ a CPU


def measure_cpu(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """The plain loop and the blocked form in turn on the same tensors: CPU time of one thread."""
    device = torch.device("cpu")
    with one_thread():
        tensors = Tensors.of(sizes.config, device, flat_groups=False)
        loop, loop_step = our_step(tensors, "reference")
        _, blocked_step = our_step(tensors, "blocked", beside=loop)
        for step in (loop_step, blocked_step):
            tensors.require_stepped(step)
        steps = {"loop": loop_step, "blocked": blocked_step, "copy": _copy(device)}
        # all of them once a round: what slows the machine down slows all
        times = [{name: _process_seconds(steps[name]) for name in steps} for _ in range(rounds)]
    seconds = {name: _cpu_spread([time_of[name] for time_of in times]) for name in steps}
    return {
        "rounds": rounds,
        "seconds": seconds,
        **_against(tensors, seconds["copy"]["minimum"]),
    }


def _process_seconds(step: Step) -> tuple[float, float]:
    """CPU time, and how much of it was the operating system's: new pages for what a step allocates
    can be a large part, and vary."""
    started, system = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
    step()
    ended = time.process_time()
    return ended - started, resource.getrusage(resource.RUSAGE_SELF).ru_stime - system


def _cpu_spread(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    return {**_spread([seconds for seconds, _ in times]), "system_of_minimum": min(times)[1]}


# ------------------------------------------------------------------------------ a GPU


def measure_gpu(sizes: Sizes, rounds: int, *, fused_lamb: bool) -> dict[str, Any]:
    """Our Triton form and its rivals in turn, each on tensors of its own.

    `fused_lamb`: DeepSpeed's too, which is compiled for a minute first.

    Raises:
        ConfigError: Triton is not installed, or the GPU's memory is too small.
    """
    device = _gpu()
    makers: dict[str, Callable[[Tensors], Step]] = {"apex": apex_step}
    absent: dict[str, str] = {}
    if fused_lamb:
        makers["deepspeed"] = deepspeed_step
    else:
        absent["deepspeed"] = "--deepspeed-fused-lamb asks for it, since it is compiled first"
    try:
        tensors = Tensors.of(sizes.config, device, flat_groups=False)
        by_group = Tensors.of(sizes.config, device, flat_groups=True)
        steps = {
            "triton": our_step(tensors, "triton")[1],
            "triton_by_group": our_step_by_group(by_group, "triton"),
        }
        tensors.require_stepped(steps["triton"])
        by_group.require_stepped(steps["triton_by_group"])
        for name, make in makers.items():
            theirs = _step_or_reason(make, Tensors.of(sizes.config, device, flat_groups=False))
            if isinstance(theirs, str):
                absent[name] = theirs
            else:
                steps[name] = theirs
        return _timed(steps, absent, tensors, rounds * _GPU_ROUNDS)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"the GPU's memory does not hold what is compared at --layers={sizes.layers} "
            f"--hidden-size={sizes.hidden_size}; choose less"
        ) from None


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _step_or_reason(make: Callable[[Tensors], Step], tensors: Tensors) -> Step | str:
    try:
        step = make(tensors)
        tensors.require_stepped(step)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a rival lacks here, ours is measured
        return reason_of(error)
    return step


def _timed(
    steps: Mapping[str, Step], absent: Mapping[str, str], tensors: Tensors, rounds: int
) -> dict[str, Any]:
    device = tensors.shards[0].flat.device
    clocks = {name: _Clock(step) for name, step in steps.items()}
    copying = _Clock(_copy(device))
    for _ in range(rounds):
        for clock in (*clocks.values(), copying):
            clock.measure()
    found = {name: {**clock.figures(), **_launches(clock.step)} for name, clock in clocks.items()}
    return {
        "device": torch.cuda.get_device_name(device),
        "rounds": rounds,
        "steps": found | {name: {"not_measured": reason} for name, reason in absent.items()},
        # at the end: a step that was broken off cannot be taken again
        "synchronisation": _synchronisation(steps["triton"]),
        **_against(tensors, copying.figures()["device_seconds"]["median"]),
    }


class _Clock:
    """Takes a step's device, host and wall time."""

    def __init__(self, step: Step) -> None:
        self.step = step
        for _ in range(_WARM_UP_STEPS):
            started = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        self._cycles = round(3e9 * seconds)  # no GPU's clock reaches 3 GHz
        self._device_seconds: list[float] = []
        self._host_seconds: list[float] = []
        self._wall_seconds: list[float] = []
        self._host_is_ahead = True

    def measure(self) -> None:
        """Once while the device is kept busy until the host has gone through the step, and once
        from an idle device."""
        device, host, ahead = self._once()
        while not ahead and self._host_is_ahead:
            self._cycles *= 2
            if self._cycles > _LONGEST_CYCLES:
                self._host_is_ahead, self._cycles = False, 1
            device, host, ahead = self._once()
        self._device_seconds.append(device)
        self._host_seconds.append(host)
        self._wall_seconds.append(self._from_idle())

    def _once(self) -> tuple[float, float, bool]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda._sleep(self._cycles)  # type: ignore[no-untyped-call]
        begin.record()
        started = time.perf_counter()
        self.step()
        host = time.perf_counter() - started
        end.record()
        ahead = not begin.query()  # type: ignore[no-untyped-call]
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, host, ahead

    def _from_idle(self) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def figures(self) -> dict[str, Any]:
        return {
            "device_seconds": _spread(self._device_seconds),
            "host_seconds": _spread(self._host_seconds),
            "wall_seconds": _spread(self._wall_seconds),
            "host_is_ahead": self._host_is_ahead,
        }


def _launches(step: Step) -> dict[str, int | None]:
    """Of one step, as torch.profiler sees the device."""
    for _ in range(2):  # what the first one sees is not complete
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
    return count_launches(seen.events())


def count_launches(events: Iterable[Any]) -> dict[str, int | None]:
    """Kernels and copies among a profile's events, None where it saw nothing of the device; what
    fills memory counts as a kernel."""
    # a span that somebody has named, such as "Optimizer.step", is shown on the device as well
    names = [
        event.name
        for event in events
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    if not names:
        return {"kernels": None, "copies": None}
    copies = sum(name.startswith("Memcpy") for name in names)
    return {"kernels": len(names) - copies, "copies": copies}


def _synchronisation(step: Step) -> str | None:
    """What torch says of a step that makes the host wait for the device; None if it does not."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return reason_of(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
