"""Trials by all ranks together: the shared run directory and its locks, clocks, small and large
all-reduces, and matrix products; in a few seconds.

    PLACE/.stacking-ds-doctor-TOKEN/    made and removed by rank 0
        0                               what rank 0 writes, and every node looks for
        16                              what the first rank of another node writes, and rank 0 reads
        lock                            held by rank 0; another node must not get it

PLACE is the run directory, or where it is not there yet the nearest folder above it that is.
"""

import fcntl
import secrets
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stacking_ds.console import say_on_stderr
from stacking_ds.distributed.world import World
from stacking_ds.doctor.facts import WireRecord, nearest_existing
from stacking_ds.errors import EXIT_USER_ERROR
from stacking_ds.kernels.registry import DTYPES
from stacking_ds.process.device import measure_matmul_peak, seconds_now
from stacking_ds.process.exit import end_now

# network file systems show a new file a little later
_PATIENCE_SECONDS = 10.0
_LOCK = "lock"
_LARGE_BYTES = {"cuda": 64 << 20, "cpu": 16 << 20}
_SECONDS_EACH = 1.0
_MOST_ROUNDS = 200
# the first collective of thousands of ranks connects them all
_HANGING_SECONDS = 120.0


# ---------------------------------------------------------------------- run directory


class Answer(WireRecord, frozen=False):
    """The answer of the first rank of a node: what it has met there."""

    rank: int
    problem: str = ""
    lock: str = ""  # what is wrong with rank 0's; nothing where it holds or need not be tried


class Probing(WireRecord, frozen=False):
    """A probe: what rank 0 asks the nodes to look at, and knows in the end."""

    place: str
    token: str = ""
    levels_up: int = 0  # from the run directory to the place, also on nodes that have it elsewhere
    problem: str = ""  # why rank 0 itself cannot write
    lock_problem: str = ""
    answers: tuple[Answer, ...] = ()
    left: str = ""  # what could not be removed

    def folder(self, run_dir: Path) -> Path:
        absolute = run_dir.absolute()
        place = (absolute, *absolute.parents)[: self.levels_up + 1][-1]
        return place / f".stacking-ds-doctor-{self.token}"


def probe(world: World, run_dir: Path | None) -> Probing | None:
    """Try `run_dir` on all nodes, and leave nothing of it; the outcome on rank 0, None elsewhere or
    if it knows none. A collective."""
    with ExitStack() as held:
        begun = _begin(run_dir, held).model_dump() if world.is_first and run_dir else None
        begun = world.broadcast(begun)
        if begun is None:
            return None
        call = Probing.model_validate(begun)
        mine = None
        if world.speaks_for_node and not call.problem:
            mine = _answer(run_dir, call, world.rank).model_dump()
        sent = world.gather_on_first(mine)
        if run_dir is None or not world.is_first:
            return None
        folder = call.folder(run_dir)
        call.answers = tuple(Answer.read(sent))
        for answer in call.answers:
            if not answer.problem and not _appears(folder / str(answer.rank), call.token):
                answer.problem = f"writes into {call.place} what rank 0 does not see"
    call.left = str(folder) if folder.exists() else ""
    return call


def _begin(run_dir: Path, held: ExitStack) -> Probing:
    """Rank 0's part, undone when `held` is closed."""
    begun = Probing(token=secrets.token_hex(8), place=str(run_dir.absolute()))
    try:
        found, absolute = nearest_existing(run_dir), run_dir.absolute()
        begun.place = str(found.resolve())
        begun.levels_up = (absolute, *absolute.parents).index(found)
        folder = begun.folder(run_dir)
        folder.mkdir()
        held.callback(_remove, folder)
        (folder / "0").write_text(begun.token)
        lock = held.enter_context((folder / _LOCK).open("a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            begun.lock_problem = error.strerror or str(error)
    except OSError as error:
        begun.problem = error.strerror or str(error)
    return begun


def _answer(run_dir: Path | None, call: Probing, rank: int) -> Answer:
    answer = Answer(rank=rank)
    if run_dir is None:
        answer.problem = "cannot name the run directory: the recipe could not be read there"
        return answer
    folder = call.folder(run_dir)
    if not _appears(folder / "0", call.token):
        answer.problem = f"does not see what rank 0 has written into {call.place}"
    elif rank:  # a second lock of rank 0's own process tells nothing over NFS
        try:
            (folder / str(rank)).write_text(call.token)
            answer.lock = "" if call.lock_problem else _try_lock(folder / _LOCK)
        except OSError as error:
            answer.problem = f"cannot write into {folder.parent} ({error.strerror})"
    return answer


def _try_lock(path: Path) -> str:
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"no lock to be had ({error.strerror})"
    return "got a lock that rank 0 holds"


def _appears(path: Path, token: str) -> bool:
    for _ in _tries():
        with suppress(OSError):
            if path.read_text() == token:
                return True
    return False


def _remove(folder: Path) -> None:
    # a network file system keeps what another node has only just closed for a moment
    for _ in _tries():
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _tries() -> Iterator[None]:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    yield
    while time.monotonic() <= deadline:
        time.sleep(0.1)
        yield


# ------------------------------------------------------------------ clocks and speed


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
    found: dict[str, Any] = {"host": socket.gethostname(), "rank": world.rank, "dtype": name}
    try:
        found["flops_per_second"] = measure_matmul_peak(world.device, DTYPES[name])
    except Exception as error:  # noqa: BLE001 - the rank reports it; the others must not wait
        text = (str(error).splitlines() or [""])[0]
        found["problem"] = f"cannot compute ({type(error).__name__}: {text})"
    return Matmul(**found)


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
