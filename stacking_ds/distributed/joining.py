"""Join the other ranks in a process group, and leave it."""

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from stacking_ds.distributed.addresses import interface_for_gloo
from stacking_ds.distributed.launchers import complete_environment
from stacking_ds.distributed.world import World
from stacking_ds.errors import ConfigError, LostRankError

__all__ = ["DEFAULT_TIMEOUT", "start", "stop"]

DEFAULT_TIMEOUT = timedelta(minutes=10)
# a watch, which names who is missing, is to speak before a collective gives up
_AFTER_THE_WATCH = timedelta(seconds=30)
_added: set[str] = set()


def start(timeout: timedelta = DEFAULT_TIMEOUT) -> World:
    """Join the process group (nccl on CUDA, gloo elsewhere) and return this process's place.

    Works under the deepspeed launcher, torchrun, srun, mpirun, and as a plain single process.

    Args:
        timeout: how long ranks wait for one another, here and in any collective of any group.

    Raises:
        ConfigError: a launcher's variables are incomplete, more ranks than GPUs share a node,
            some ranks have GPUs and others none, or the meeting place cannot be used.
        LostRankError: not all ranks have come.
    """
    environment = complete_environment()
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
    if local_size < size and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_for_gloo()
        if interface is not None:
            environment["GLOO_SOCKET_IFNAME"] = interface
    # DeepSpeed reads these too, and looks for an MPI where it misses one
    _added.update(name for name in environment if name not in os.environ)
    os.environ.update(environment)
    _meet("nccl" if on_cuda else "gloo", timeout + _AFTER_THE_WATCH, environment)
    host_group = (
        dist.new_group(backend="gloo", timeout=timeout + _AFTER_THE_WATCH) if on_cuda else None
    )
    return World(rank, size, local_rank, local_size, device, host_group)


def _meet(backend: str, timeout: timedelta, environment: dict[str, str]) -> None:
    # DeepSpeed makes groups of its own and gives them no time-out: they take these
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
        store.set_timeout(timeout)
        _require_same_backend(backend, rank, size, store)
        group = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=timeout)
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        if rank == 0 and "EADDRINUSE" in reason:
            raise ConfigError(
                f"rank 0 cannot be met at {place} ({reason}); if another job uses that port, give "
                f"the launcher a free one (--master_port), or set MASTER_PORT"
            ) from None
        raise LostRankError(
            f"rank {rank} cannot meet the others at {place} ({reason}); see that all nodes reach "
            f"one another (`stacking-ds doctor`), and what the other ranks have said"
        ) from None
    except dist.DistStoreError as error:
        raise LostRankError(
            f"not all {environment['WORLD_SIZE']} ranks came to {place} within "
            f"{timeout.total_seconds():.0f} s ({str(error).splitlines()[0]}); see what the "
            f"missing ones have said, or raise cluster.timeout_seconds"
        ) from None


def _require_same_backend(backend: str, rank: int, size: int, store: Any) -> None:
    # ranks of different ones would wait for each other until the time-out
    store.set(f"backend/{rank}", f"{backend} {socket.gethostname()}")
    if rank == 0:
        told = store.multi_get([f"backend/{other}" for other in range(size)])
        backends, hosts = zip(*(one.decode().split() for one in told), strict=True)
        odd = [other for other in range(size) if backends[other] != backend]
        verdict = "alike"
        if odd:
            seen, sees = ("no GPU", "one") if backend == "nccl" else ("a GPU", "none")
            verdict = (
                f"rank {odd[0]} on {hosts[odd[0]]} ({len(odd)} of {size} ranks in all) sees "
                f"{seen}, while rank 0 on {hosts[0]} sees {sees}: mend the driver or torch there, "
                f"or hide all GPUs with CUDA_VISIBLE_DEVICES= to train on the CPUs"
            )
        store.set("backends", verdict)
    verdict = store.get("backends").decode()
    if verdict != "alike":
        error = ConfigError(verdict)
        error.on_all_ranks = True
        raise error


def stop() -> None:
    """Leave the process group, and take what `start` added from the environment."""
    if dist.is_initialized():
        dist.destroy_process_group()
    while _added:
        del os.environ[_added.pop()]
