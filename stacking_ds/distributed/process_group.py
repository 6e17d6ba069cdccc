"""Join the other ranks in a process group, and leave it."""

import os
import resource
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from stacking_ds.distributed.heartbeat import is_lost_contact
from stacking_ds.distributed.launchers import complete_environment, interface_for_gloo
from stacking_ds.distributed.rendezvous import agree, meet
from stacking_ds.distributed.world import World
from stacking_ds.errors import ConfigError, LostRankError

_TIMEOUT = timedelta(minutes=10)
# a watch, which names who is missing, is to speak before a collective gives up
_AFTER_THE_WATCH = timedelta(seconds=30)
_GROUP_TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")
_added: set[str] = set()
_timeouts_before: dict[str, Any] = {}


def start(timeout: timedelta = _TIMEOUT) -> World:
    """Join the process group (nccl on CUDA, gloo elsewhere) and return this process's place.

    Works under the deepspeed launcher, torchrun, srun, mpirun, and as a plain single process.

    Args:
        timeout: how long ranks wait for one another, here and in any collective of any group.

    Raises:
        ConfigError: a launcher's variables are incomplete, more ranks than GPUs share a node,
            some ranks have GPUs and others none, or the meeting place cannot be used.
        LostRankError: not all ranks have come, or they do not reach one another.
    """
    environment = complete_environment()
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank, local_size = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    # DeepSpeed reads these too, and looks for an MPI where it misses one
    _add(environment)
    _allow_many_files()
    on_cuda = torch.cuda.is_available()
    backend = "nccl" if on_cuda else "gloo"
    refusal = _refusal(local_rank, local_size, size)
    store = meet(rank, timeout)
    agree(store, rank, size, backend, refusal, timeout + _AFTER_THE_WATCH)
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # ranks that share the cores and each take all of them slow one another down
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    host_group = _form_groups(store, backend, rank, size, timeout + _AFTER_THE_WATCH)
    return World(rank, size, local_rank, local_size, device, host_group)


def _refusal(local_rank: int, local_size: int, size: int) -> str | None:
    """Why this rank cannot take part. The others are told, who would wait for it."""
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        return (
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            f"start at most that many ranks per node (--num_gpus), or hide the GPUs with "
            f"CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if local_size < size and "GLOO_SOCKET_IFNAME" not in os.environ:
        try:
            interface = interface_for_gloo()
        except ConfigError as error:
            return str(error)
        if interface is not None:
            _add({"GLOO_SOCKET_IFNAME": interface})
    return None


def _form_groups(
    store: Any, backend: str, rank: int, size: int, timeout: timedelta
) -> dist.ProcessGroup | None:
    # DeepSpeed makes groups of its own and gives them no time-out: they take these
    for name in _GROUP_TIMEOUTS:
        _timeouts_before.setdefault(name, getattr(distributed_c10d, name))
        setattr(distributed_c10d, name, timeout)
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        return dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
    except RuntimeError as error:
        stop()
        if not isinstance(error, dist.DistError) and not is_lost_contact(error):
            raise
        raise LostRankError(
            f"all {size} ranks have met, but rank {rank} cannot connect to the others "
            f"({str(error).splitlines()[0]}): see that no firewall stands between the nodes, and "
            f"that GLOO_SOCKET_IFNAME, or NCCL_SOCKET_IFNAME on GPUs, names the interface that "
            f"joins them"
        ) from None


def _add(environment: dict[str, str]) -> None:
    _added.update(name for name in environment if name not in os.environ)
    os.environ.update(environment)


def _allow_many_files() -> None:
    # rank 0 has a connection or more from each of the others
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def stop() -> None:
    """Leave the process group, and take what `start` added from the environment."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, before in _timeouts_before.items():
        setattr(distributed_c10d, name, before)
    _timeouts_before.clear()
    while _added:
        os.environ.pop(_added.pop(), None)
