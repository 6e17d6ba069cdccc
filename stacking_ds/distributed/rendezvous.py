"""Where ranks meet before they form a group: a store on rank 0's node, and a first agreement in it.

A rank that cannot take part says so here, and the others need not wait for it; who has not come is
named.
"""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from stacking_ds.errors import ConfigError, LostRankError
from stacking_ds.process.launcher_env import by_srun

_NAMED = 3
_FINE = "fine"
_SECONDS_TO_READ = 3.0


def connect(timeout: timedelta, *, is_server: bool = False) -> Any:
    """A connection of its own to the store at MASTER_ADDR:MASTER_PORT.

    Raises:
        torch.distributed.DistError: nobody is there, or the port is taken.
    """
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


def meet(rank: int, timeout: timedelta) -> Any:
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
    """Make sure that all ranks are there, can take part, and use the same backend.

    Args:
        refusal: why this rank cannot take part.
        patience: how long to wait for rank 0's word, which itself waits for the others as long as
            the store does.

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
    _let_all_read(store, rank, size)
    if kind == "lost":
        lost = LostRankError(text)
        lost.said_elsewhere = rank > 0
        raise lost
    error = ConfigError(text)
    error.on_all_ranks = True
    raise error


def _let_all_read(store: Any, rank: int, size: int) -> None:
    """The store with the verdict goes when rank 0 does."""
    deadline = time.monotonic() + _SECONDS_TO_READ
    with suppress(dist.DistError):
        read = store.add("read", 1)
        while rank == 0 and read < size and time.monotonic() < deadline:
            time.sleep(0.05)
            read = store.add("read", 0)


def _verdict(store: Any, size: int) -> str:
    keys = [f"rank/{rank}" for rank in range(size)]
    try:
        told = [one.decode().split(" ", 2) for one in store.multi_get(keys)]
    except dist.DistError:
        came = [rank for rank, key in enumerate(keys) if store.check([key])]
        return f"lost {_who_came(store, came, size)}"
    refusals = [(rank, host, text) for rank, (_, host, text) in enumerate(told) if text]
    if refusals:
        rank, host, text = refusals[0]
        more = f" ({len(refusals)} of {size} ranks)" if len(refusals) > 1 else ""
        return f"refused rank {rank} on {host}{more}: {text}"
    backend, first_host = told[0][:2]
    odd = [(rank, host) for rank, (other, host, _) in enumerate(told) if other != backend]
    if odd:
        seen, sees = ("no GPU", "one") if backend == "nccl" else ("a GPU", "none")
        return (
            f"refused rank {odd[0][0]} on {odd[0][1]} ({len(odd)} of {size} ranks in all) sees "
            f"{seen}, while rank 0 on {first_host} sees {sees}: mend the driver or torch there, "
            f"or hide all GPUs with CUDA_VISIBLE_DEVICES= to train on the CPUs"
        )
    return _FINE


def _who_came(store: Any, came: Sequence[int], size: int) -> str:
    hosts = dict.fromkeys(store.get(f"rank/{rank}").decode().split(" ")[1] for rank in came)
    absent = sorted(set(range(size)) - set(came))
    names = ", ".join(map(str, absent[:_NAMED])) + (" and more" if len(absent) > _NAMED else "")
    return (
        f"{len(absent)} of {size} ranks have not come in time: {names}; those that have are on "
        f"{', '.join(list(hosts)[:_NAMED])}{' and more' if len(hosts) > _NAMED else ''}. See what "
        f"the absent ones have said, or raise cluster.timeout_seconds"
    )
