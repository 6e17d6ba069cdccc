"""Process group: the rendezvous of ranks in a store on rank 0's node, the group, and leaving it.

A rank that cannot take part says so in the store, and the others need not wait for it; who has not
come is named.
"""

import os
import re
import resource
import socket
import time
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from stacking_ds.console import first_of
from stacking_ds.distributed.world import World
from stacking_ds.errors import ConfigError, LostRankError, LostRankToldError, agreed
from stacking_ds.process.launchers import by_srun, complete_environment, interface_for_gloo

_TIMEOUT = timedelta(minutes=10)
# a failure detector, which names who is missing, is to speak before a collective gives up
_AFTER_THE_WATCH = timedelta(seconds=30)
_to_undo = ExitStack()
_NAMED = 3
_FINE = "fine"
_SECONDS_TO_READ = 3.0


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
    rank, size, local_rank, local_size = (
        int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    # DeepSpeed reads these too, and looks for an MPI where it misses one
    _add(environment)
    # rank 0 has a connection or more from each of the others
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    on_cuda = torch.cuda.is_available()
    backend = "nccl" if on_cuda else "gloo"
    refusal = _refusal(local_rank, local_size, size)
    store = join_store(rank, timeout)
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
    """The reason why this rank cannot take part, for the others, who would wait for it."""
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
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        _to_undo.callback(setattr, distributed_c10d, name, getattr(distributed_c10d, name))
        setattr(distributed_c10d, name, timeout)
    own = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
    try:
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)
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
    for name in environment.keys() - os.environ.keys():
        _to_undo.callback(os.environ.pop, name, None)
    os.environ.update(environment)


def stop() -> None:
    """Leave the process group, and take what `start` added from the environment."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _to_undo.close()


# what gloo and NCCL say when the other end is gone or late
_SIGN_OF_LOST_CONTACT = re.compile(
    r"(closed|reset) by peer|broken pipe|timed out waiting|connection refused|no route to host|"
    r"remote process exited|connectfullmesh",
    re.IGNORECASE,
)


def is_lost_contact(error: BaseException) -> bool:
    """True where the error says no more than that another rank does not answer."""
    if isinstance(error, LostRankError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and bool(_SIGN_OF_LOST_CONTACT.search(str(error)))


# ---------------------------------------------------------------------- rendezvous


def connect(timeout: timedelta, *, is_server: bool = False) -> Any:
    """A connection of its own to the store at MASTER_ADDR:MASTER_PORT; torch's DistError where
    nobody is there, or the port is taken."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_server,
        timeout=timeout,
        wait_for_workers=False,
    )
    # torchrun's agent keeps one store for all of its attempts; and under srun another job's rank 0
    # may have taken the port, whose ranks these are not
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    job = os.environ.get("SLURM_JOB_ID", "")
    return dist.PrefixStore(f"stacking_ds/{job}/{attempt}", store)  # type: ignore[attr-defined]


def join_store(rank: int, timeout: timedelta) -> Any:
    """The store through which the ranks form their group; rank 0 serves it, or torchrun's agent.

    Raises:
        ConfigError: another program has the port.
        LostRankError: rank 0 is not there.
    """
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        return connect(timeout, is_server=rank == 0 and not by_agent)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" not in reason:
            raise LostRankError(
                f"rank {rank} on {socket.gethostname()} cannot meet rank 0 at {place} ({reason}); "
                f"see what rank 0 has said, and that all nodes reach one another "
                f"(`stacking-ds doctor`)"
            ) from None
        taken = (
            f"rank 0 cannot be met at {place} ({reason}); if another job uses that port, give the "
            f"launcher a free one (--master_port), or set MASTER_PORT"
        )
        # under srun the port comes of the job's number and attempt: the next one has another
        raise (LostRankError(taken) if by_srun() else ConfigError(taken)) from None


def agree(
    store: Any, rank: int, size: int, backend: str, refusal: str | None, patience: timedelta
) -> None:
    """Make sure that all ranks are there, can take part, and use the same backend. `refusal`: why
    this one cannot; `patience`: for how long rank 0, which waits for the others, is waited for.

    Raises:
        ConfigError: on every rank, if one cannot.
        LostRankError: on every rank that is there, if one is not.
    """
    store.set(f"rank/{rank}", f"{backend} {socket.gethostname()} {refusal or ''}")
    if rank == 0:
        store.set("agreed", _verdict(store, size))
    try:
        store.wait(["agreed"], patience)
        kind, _, text = store.get("agreed").decode().partition(" ")
    except dist.DistError:
        raise LostRankError(
            f"rank {rank} on {socket.gethostname()} has come, and rank 0 does not answer; see what "
            f"it has said"
        ) from None
    if kind == _FINE:
        return
    # the store goes when rank 0 does: until all have read the verdict in it
    deadline = time.monotonic() + _SECONDS_TO_READ
    with suppress(dist.DistError):
        read = store.add("read", 1)
        while rank == 0 and read < size and time.monotonic() < deadline:
            time.sleep(0.05)
            read = store.add("read", 0)
    if kind == "lost":
        raise LostRankToldError(text) if rank else LostRankError(text)
    raise agreed(ConfigError(text))


def _verdict(store: Any, size: int) -> str:
    keys = [f"rank/{rank}" for rank in range(size)]
    try:
        told = [one.decode().split(" ", 2) for one in store.multi_get(keys)]
    except dist.DistError:
        came = dict.fromkeys(key for key in keys if store.check([key]))
        hosts = list(dict.fromkeys(store.get(key).decode().split(" ")[1] for key in came))
        absent = [rank for rank, key in enumerate(keys) if key not in came]
        return (
            f"lost {len(absent)} of {size} ranks have not come in time: "
            f"{first_of(absent, _NAMED)}; those that have are on {first_of(hosts, _NAMED)}. See "
            f"what the absent ones have said, or raise cluster.timeout_seconds"
        )
    backend, first_host, _ = told[0]
    refusing = [rank for rank, (_, _, text) in enumerate(told) if text]
    odd = [rank for rank, (other, _, _) in enumerate(told) if other != backend]
    if refusing:
        rank = refusing[0]
        more = f" ({len(refusing)} of {size} ranks)" if len(refusing) > 1 else ""
        return f"refused rank {rank} on {told[rank][1]}{more}: {told[rank][2]}"
    if odd:
        rank = odd[0]
        seen, sees = ("no GPU", "one") if backend == "nccl" else ("a GPU", "none")
        return (
            f"refused rank {rank} on {told[rank][1]} ({len(odd)} of {size} ranks in all) sees "
            f"{seen}, while rank 0 on {first_host} sees {sees}: mend the driver or torch there, "
            f"or hide all GPUs with CUDA_VISIBLE_DEVICES= to train on the CPUs"
        )
    return _FINE
