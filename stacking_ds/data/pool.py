"""Worker processes: `python -m stacking_ds.data.pool`, each of which does items of one task.

A worker is a program of its own, so that it loads neither the caller's main module nor torch. It
hears no stop signals, which schedulers and terminals send to every process: what a stop means is
for the parent to say. It ends when its parent does, however that ends: at once, since what is on
disk is whole at any time.
"""

import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from stacking_ds.process.exit import end_now
from stacking_ds.process.stop_signals import STOP_SIGNALS

Report = Callable[..., None]
Work = Callable[[Any, Report], Any]


class WorkerDiedError(Exception):
    """A worker ended without an answer while it did `item`; `how` says, for example, "was killed by
    SIGKILL, as when memory runs out"."""

    def __init__(self, status: int, item: Any) -> None:
        self.out_of_memory, self.item = status == -signal.SIGKILL, item
        self.how = f"exited ({status})"
        if status < 0:
            self.how = f"was killed by {signal.Signals(-status).name}"
        if self.out_of_memory:
            self.how += ", as when memory runs out"
        super().__init__(f"a worker {self.how}")


def do_in_workers(
    make_work: Callable[[], Work],
    items: Sequence[Any],
    workers: int,
    report: Report = lambda *_: None,
    tidy: Callable[[int], None] = lambda _: None,
) -> list[Any]:
    """Do `items` in up to `workers` processes, each item in one; the results in order.

    Each process calls `make_work`, which is pickled, and what that returns with an item and a
    function; what this is called with, `report` is called with, behind the item. `tidy` is called
    with the number of each process that has ended.

    Raises what the work raises, with its traceback as a note, and WorkerDiedError. Whatever
    happens, no worker is left.
    """
    processes: dict[Connection, subprocess.Popen[bytes]] = {}
    doing: dict[Connection, int] = {}
    todo, results = iter(enumerate(items)), dict[int, Any]()

    def deal(worker: Connection) -> None:
        if (following := next(todo, None)) is not None:
            doing[worker] = following[0]
            _send(worker, pickle.dumps(following[1]))

    try:
        for _ in range(min(workers, len(items))):
            answers, process = _start()
            processes[answers] = process
        for worker in processes:
            _send(worker, pickle.dumps(make_work))
            deal(worker)
        while doing:
            for worker in cast("list[Connection]", wait(list(doing))):
                try:
                    kind, content = worker.recv()
                except (EOFError, OSError):
                    raise WorkerDiedError(processes[worker].wait(), items[doing[worker]]) from None
                if kind == "error":
                    raise content
                if kind == "result":
                    results[doing.pop(worker)] = content
                    deal(worker)
                else:
                    report(items[doing[worker]], *content)
        return [results[index] for index in range(len(items))]
    finally:
        for process in processes.values():
            process.kill()
        for answers, process in processes.items():
            process.wait()
            answers.close()
            tidy(process.pid)


def _send(other: Connection, content: bytes) -> None:
    with contextlib.suppress(OSError):  # of one that is gone, what it does not answer tells
        other.send_bytes(content)


def _start() -> tuple[Connection, "subprocess.Popen[bytes]"]:
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours, theirs = socket.socketpair()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # which the worker inherits
    try:
        process = subprocess.Popen(
            # -P: what lies in the user's folder is no module of ours
            [sys.executable, "-P", "-m", "stacking_ds.data.pool"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "TOKENIZERS_PARALLELISM": "false",
            },
            stdin=theirs.fileno(),
            stdout=2,  # libraries print; standard output is the parent's
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return Connection(ours.detach()), process


def main() -> None:
    """Works as a worker, until standard input, where the parent writes, ends."""
    parent = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pa.set_cpu_count(1)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                requests.put(parent.recv_bytes())
        end_now(0)

    def answer(kind: str, content: Any) -> None:
        _send(parent, pickle.dumps((kind, content)))

    threading.Thread(target=listen, daemon=True).start()
    try:
        work = pickle.loads(requests.get())()
        while True:
            item = pickle.loads(requests.get())
            answer("result", work(item, lambda *content: answer("report", content)))
    except Exception as error:  # noqa: BLE001 - raised in the parent
        answer("error", _as_it_can_be_sent(error))
    signal.pause()


def _as_it_can_be_sent(error: Exception) -> Exception:
    """The error with its traceback as a note, or one of the same words."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever a foreign class raises
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(trace)
    return error


if __name__ == "__main__":
    main()
