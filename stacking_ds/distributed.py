"""Ranks, the process group, the stop flag and small host-side collectives.

Works under the deepspeed launcher, torchrun, srun wrappers that set the usual variables, and as a
plain single process. Under mpirun, mpi4py tells.
"""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from stacking_ds.errors import ConfigError, UserError

__all__ = ["StopFlag", "World", "start", "stop", "world_size_from_environment"]

_TIMEOUT = timedelta(minutes=10)
_added: set[str] = set()
# what Open MPI, and MPICH and its relatives, tell a process they started
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class World:
    """Who this process is, and the collectives it may call (on all ranks, in the same order)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in fp64."""
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return [float(value) for value in total]

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on at least one."""
        return self.sum([float(flag)])[0] > 0

    def all_to_all(
        self, outgoing: Sequence[torch.Tensor], incoming_sizes: Sequence[int]
    ) -> list[torch.Tensor]:
        """Send each rank its 1-D fp32 host tensor; what came from each, of the sizes expected."""
        received = torch.empty(sum(incoming_sizes))
        dist.all_to_all_single(
            received,
            torch.cat(list(outgoing)),
            list(incoming_sizes),
            [part.numel() for part in outgoing],
            group=self.host_group,
        )
        return list(torch.split(received, list(incoming_sizes)))

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_on_first(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on rank 0; nothing elsewhere."""
        values: list[Any] = [None] * self.size if self.is_first else []
        dist.gather_object(value, values if self.is_first else None, dst=0, group=self.host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The picklable `value` of rank 0, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 while the others wait; its result or its error on every rank."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_first:
            try:
                outcome = (action(), None)
            except Exception as error:  # noqa: BLE001 - handed to every rank, raised below
                outcome = (None, error)
        result, failure = self.broadcast(outcome)
        if isinstance(failure, UserError):
            failure.on_all_ranks = True
        if failure is not None:
            raise failure
        return result


def world_size_from_environment() -> int:
    """The number of ranks as the launcher says it; 1 where there is no launcher."""
    sizes = ("WORLD_SIZE", *_MPI_SIZES)
    return next((int(os.environ[name]) for name in sizes if name in os.environ), 1)


def start() -> World:
    """Join the process group (nccl on CUDA, gloo elsewhere) and return this process's place.

    Raises:
        ConfigError: a launcher's variables are incomplete, more ranks than GPUs share a node, or
            the ranks cannot meet.
    """
    environment = _complete_environment()
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank, local_size = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    on_cuda = torch.cuda.is_available()
    if on_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            f"start at most that many ranks per node (--num_gpus), or hide the GPUs with "
            f"CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # ranks that share the cores and each take all of them slow one another down
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    # DeepSpeed reads these too, and looks for an MPI where it misses one
    _added.update(name for name in environment if name not in os.environ)
    os.environ.update(environment)
    try:
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_TIMEOUT)
    except dist.DistNetworkError as error:
        raise ConfigError(
            f"rank {rank} cannot meet the others at {environment['MASTER_ADDR']}:"
            f"{environment['MASTER_PORT']} ({str(error).splitlines()[0]}); if another job uses "
            f"that port, give the launcher a free one (--master_port)"
        ) from None
    host_group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if on_cuda else None
    return World(rank, size, local_rank, local_size, device, host_group)


def stop() -> None:
    """Leave the process group, and take what `start` added from the environment."""
    if dist.is_initialized():
        dist.destroy_process_group()
    while _added:
        del os.environ[_added.pop()]


def _complete_environment() -> dict[str, str]:
    if "RANK" not in os.environ:
        if any(int(os.environ.get(name, "1")) > 1 for name in _MPI_SIZES):
            return _mpi_environment()
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise ConfigError(
                "srun started several tasks, and none of them knows its rank: start one task per "
                "node with `torchrun` or `deepspeed` in it, or use srun --mpi=pmix"
            )
        return {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    required = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in required if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the launcher set RANK but not {', '.join(missing)}; start with "
            f"`deepspeed train.py …` or `torchrun train.py …`, or unset RANK for a single process"
        )
    found = {name: os.environ[name] for name in required}
    # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE
    found["LOCAL_WORLD_SIZE"] = os.environ.get(
        "LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")
    )
    return found


def _mpi_environment() -> dict[str, str]:
    """Ranks and a meeting place under mpirun, which sets neither RANK nor MASTER_ADDR."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"started by MPI, but mpi4py cannot load an MPI library ({error}); install the one "
            f"that mpirun belongs to, or start with `deepspeed` or `torchrun`"
        ) from None
    everyone = MPI.COMM_WORLD
    node = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = everyone.bcast((socket.gethostbyname(socket.gethostname()), _free_port()))
    return {
        "RANK": str(everyone.rank),
        "WORLD_SIZE": str(everyone.size),
        "LOCAL_RANK": str(node.rank),
        "LOCAL_WORLD_SIZE": str(node.size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class StopFlag:
    """Remembers SIGINT and SIGTERM; all ranks ask `agreed` at each step boundary.

    A second SIGINT interrupts at once, as people expect of Ctrl-C.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopFlag":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)

    def agreed(self) -> bool:
        """True on every rank once any rank was asked to stop (a collective)."""
        return self._world.any(self._signal is not None)
