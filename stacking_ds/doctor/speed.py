"""Measures clocks, small and large all-reduces and matrix products, in a few seconds."""

import socket
import statistics
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stacking_ds.console import say_on_stderr
from stacking_ds.distributed.world import World
from stacking_ds.doctor.facts import WireRecord
from stacking_ds.errors import EXIT_USER_ERROR
from stacking_ds.kernels.registry import DTYPES
from stacking_ds.process.device import measure_matmul_peak, seconds_now
from stacking_ds.process.exit import end_now

_LARGE_BYTES = {"cuda": 64 << 20, "cpu": 16 << 20}
_SECONDS_EACH = 1.0
_MOST_ROUNDS = 200
# the first collective of thousands of ranks connects them all
_HANGING_SECONDS = 120.0


@dataclass(frozen=True)
class AllReduce:
    """On the default group, the one that gradients take."""

    ranks: int
    latency_seconds: float
    large_bytes: int
    large_seconds: float

    @property
    def bus_bytes_per_second(self) -> float:
        """The bytes that each rank's link carries, whatever the number of ranks: 2(n-1)/n times
        size over time (NVIDIA's nccl-tests, doc/PERFORMANCE.md, "AllReduce")."""
        factor = 2 * (self.ranks - 1) / self.ranks
        return factor * self.large_bytes / self.large_seconds


class Matmul(WireRecord):
    """The fastest of a few matrix products on one rank, while all ranks compute."""

    host: str
    rank: int
    dtype: str
    flops_per_second: float = 0.0
    problem: str = ""

    @property
    def flops(self) -> str:
        """The speed, for people."""
        value = self.flops_per_second
        return f"{value / 1e12:,.0f} TFLOP/s" if value >= 1e13 else f"{value / 1e9:,.0f} GFLOP/s"


def clock_offset(world: World) -> tuple[float, float]:
    """This rank's clock minus rank 0's, and how wrong that may be, in seconds. A collective.

    In each round rank 0 reads its clock after all have begun and before any can end: between two
    readings of this rank's clock. The round with the shortest trip says most.
    """
    trips = []
    for _ in range(8):
        begun = _clock()
        world.barrier()
        [first] = world.sum([_clock() if world.is_first else 0.0])
        ended = _clock()
        trips.append((ended - begun, (begun + ended) / 2 - first))
    trip, offset = min(trips)
    return (0.0, 0.0) if world.is_first else (offset, trip / 2)


def _clock() -> float:
    return time.time()


def measure_matmul(world: World, precision: str) -> Matmul:
    """In the recipe's precision on a GPU, in fp32 on the CPU, whose bf16 may be emulated."""
    name = precision if world.device.type == "cuda" else "fp32"
    flops, problem = 0.0, ""
    try:
        flops = measure_matmul_peak(world.device, DTYPES[name])
    except Exception as error:  # noqa: BLE001 - the rank reports it; the others must not wait
        text = (str(error).splitlines() or [""])[0]
        problem = f"cannot compute ({type(error).__name__}: {text})"
    return Matmul(
        host=socket.gethostname(),
        rank=world.rank,
        dtype=name,
        flops_per_second=flops,
        problem=problem,
    )


def measure_all_reduce(world: World) -> AllReduce | None:
    """Latency and bandwidth, medians over rounds; None for a single rank. A collective."""
    if world.size == 1:
        return None
    large_bytes = _LARGE_BYTES[world.device.type]
    small, large = (torch.zeros(size // 4, device=world.device) for size in (4, large_bytes))
    # NCCL waits for long inside a call that nothing interrupts
    timer = threading.Timer(_HANGING_SECONDS, _give_up)
    timer.daemon = True
    timer.start()
    try:
        _all_reduce_seconds(small)
        _all_reduce_seconds(large)
    finally:
        timer.cancel()
    return AllReduce(
        ranks=world.size,
        latency_seconds=_median_seconds(world, small),
        large_bytes=large_bytes,
        large_seconds=_median_seconds(world, large),
    )


def _median_seconds(world: World, tensor: torch.Tensor) -> float:
    once = _all_reduce_seconds(tensor)
    # all ranks take as many rounds as rank 0 has time for
    rounds = world.broadcast(max(3, min(_MOST_ROUNDS, int(_SECONDS_EACH / max(once, 1e-9)))))
    return statistics.median(_all_reduce_seconds(tensor) for _ in range(rounds))


def _all_reduce_seconds(tensor: torch.Tensor) -> float:
    begun = seconds_now(tensor.device)
    dist.all_reduce(tensor)
    return seconds_now(tensor.device) - begun


def _give_up() -> None:
    say_on_stderr(
        f"stacking-ds: error: [{socket.gethostname()}] an all-reduce over all ranks has not ended "
        f"in {_HANGING_SECONDS:.0f} s though they have met: see that no firewall is between the "
        f"nodes, set NCCL_SOCKET_IFNAME to the interface that joins them, and read what "
        f"NCCL_DEBUG=INFO says"
    )
    end_now(EXIT_USER_ERROR)
