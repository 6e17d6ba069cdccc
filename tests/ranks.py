"""Run a module-level function on N gloo ranks: fast, and unable to hang.

One fork server imports torch, DeepSpeed and the package once (it has no threads of its own, so
its forks are clean); every rank is then a fork of it and starts within a fraction of a second.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

__all__ = ["RankError", "RankTimeoutError", "run_ranks", "spawn_ranks"]

_GRACE_SECONDS = 2.0
_DIED = "died with exit code"
_REPOSITORY = Path(__file__).parents[1]
_PRELOAD = [
    # a name that cannot be imported is skipped
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "pytest",
    "stacking_ds.checkpoint.load",
    "stacking_ds.checkpoint.save",
    "tests.sharded",
]
_context = multiprocessing.get_context("forkserver")


class RankError(AssertionError):
    """A rank raised or died; the message ends with that rank's traceback."""


class RankTimeoutError(AssertionError):
    """The ranks did not end in time; the message says where each of them was."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120
) -> list[Any]:
    """`fn(world, *args)` on `world_size` ranks; the results in rank order.

    Raises:
        RankError: with the traceback of the first rank that failed; the others are killed.
        RankTimeoutError: after `timeout_seconds`, with the stacks of the ranks still running.
    """
    _start_server()
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [
            _Rank(rank, world_size, port, Path(folder), fn, args) for rank in range(world_size)
        ]
        try:
            _collect(ranks, time.monotonic() + timeout_seconds)
        finally:
            for rank in ranks:
                rank.kill()
    return [rank.result for rank in ranks]


@contextmanager
def spawn_ranks(
    fn: Callable[..., Any], world_size: int, folder: Path, *args: Any
) -> Iterator[list[ForkServerProcess]]:
    """`fn(world, *args)` on ranks that may come to harm: the processes, killed in the end. What
    each says is in `folder`/rank_N.log; an error ends it with exit code 1."""
    _start_server()
    port = _free_port()
    processes = [
        _context.Process(
            target=_spawned_main,
            args=(rank, world_size, port, folder / f"rank_{rank}.log", fn, args),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _spawned_main(
    rank: int, world_size: int, port: int, log: Path, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    _be_rank(rank, world_size, port)
    from stacking_ds.distributed import process_group

    try:
        fn(process_group.start(), *args)
        process_group.stop()
    except BaseException:  # noqa: BLE001 - shown in the log
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


class _Rank:
    def __init__(
        self,
        rank: int,
        world_size: int,
        port: int,
        folder: Path,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
    ) -> None:
        self.rank = rank
        self.stacks = folder / f"rank_{rank}.txt"
        self.result: Any = None
        self.reported = False
        self.connection: Connection
        self.connection, child_end = _context.Pipe(duplex=False)
        self.process: ForkServerProcess = _context.Process(
            target=_rank_main,
            args=(rank, world_size, port, str(self.stacks), child_end, fn, args),
            daemon=True,
        )
        self.process.start()
        child_end.close()

    def read(self) -> str | None:
        """Take this rank's report; the text of its failure if it failed."""
        self.reported = True
        try:
            failed, payload = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            self.process.join()
            return f"rank {self.rank} {_DIED} {self.process.exitcode}"
        if failed:
            return f"rank {self.rank} raised:\n{payload}"
        self.result = payload
        return None

    def dump_stacks(self) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _collect(ranks: list[_Rank], deadline: float) -> None:
    failure: str | None = None
    while open_ranks := [rank for rank in ranks if not rank.reported]:
        remaining = max(0.0, deadline - time.monotonic())
        ready = wait([rank.connection for rank in open_ranks], timeout=remaining)
        if not ready:
            break
        for rank in open_ranks:
            if rank.connection in ready:
                text = rank.read()
                if text is None:
                    continue
                if failure is None:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                # what others raise when one dies may be heard of first
                if failure is None or (_DIED in text and _DIED not in failure):
                    failure = text
    if failure is not None:
        raise RankError(failure)
    if open_ranks:
        raise RankTimeoutError(_where(open_ranks))


def _where(open_ranks: list[_Rank]) -> str:
    for rank in open_ranks:
        rank.dump_stacks()
    time.sleep(0.5)
    stacks = [f"rank {rank.rank}:\n{rank.stacks.read_text()}" for rank in open_ranks]
    names = ", ".join(str(rank.rank) for rank in open_ranks)
    return "\n".join([f"no report in time from rank {names}", *stacks])


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    stacks: str,
    connection: Connection,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    stream = Path(stacks).open("w")  # noqa: SIM115 - faulthandler needs it to the end
    faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)
    _be_rank(rank, world_size, port)
    import torch

    from stacking_ds.distributed import process_group

    # what the server imported is never garbage: full collections take milliseconds again
    gc.freeze()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        world = process_group.start()
        report = (False, fn(world, *args))
    except BaseException:  # noqa: BLE001 - handed to the test, which raises it
        report = (True, traceback.format_exc())
    try:
        payload = pickle.dumps(report)
    except Exception:  # noqa: BLE001 - a result that cannot be sent is the rank's failure
        payload = pickle.dumps((True, traceback.format_exc()))
    connection.send_bytes(payload)
    connection.close()
    if not report[0]:
        process_group.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _be_rank(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


_started = False


def _start_server() -> None:
    global _started  # noqa: PLW0603 - one server per test session
    if _started:
        return
    _context.set_forkserver_preload(_PRELOAD)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        # gloo ranks: also on a machine with fewer GPUs than ranks
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with _environment(environment):
        # the server takes its environment, and its preloaded modules, from its first moment
        multiprocessing.forkserver.ensure_running()
    _started = True


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
