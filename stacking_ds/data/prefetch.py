"""Steps built ahead by worker processes, each of which hands them on through a pipe of its own.

    worker w    builds steps w, w + N, …  ── pipe ──>  a thread reads, and pins  ──>  main thread

A pipe needs no room in /dev/shm, no name in the file system and no further open files, and it ends
when its worker does: whatever becomes of a worker, who waits for its step learns of it.
"""

import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import BinaryIO

import psutil
import torch

from stacking_ds.data.batches import RankStep
from stacking_ds.errors import ConfigError, LoaderError, UserError
from stacking_ds.process.exit import end_with_parent
from stacking_ds.process.runtime import keep_freed_memory
from stacking_ds.process.stop_signals import STOP_SIGNALS

_LOOK_SECONDS = 1.0
# of the 30 that launchers give, for a worker that takes no processor time, and for any other
_SECONDS_TO_STOP, _MOST_SECONDS_TO_STOP = 10.0, 25.0
_SECONDS_TO_END = 5.0  # not for ever: what hangs in a file system cannot even be killed
Build = Callable[[int], RankStep]
"""Makes the step of any number."""

_MORE_MEMORY = "give the job more, or set data.loader_workers or the batch lower"


_REASONS: dict[int, str] = {
    signal.SIGKILL: f"as when memory runs out: {_MORE_MEMORY}",
    signal.SIGBUS: "as when a file of the token shards is cut off under it, or its disk fails: "
    "`stacking-ds data inspect` looks at the shards",
}


@dataclass(frozen=True)
class Patience:
    """The time that a step is waited for."""

    timeout_seconds: float = float("inf")
    """How long a worker that is waited for may take no processor time."""
    asked_to_stop: Callable[[], bool] = lambda: False
    """Once it is true, a step is given up that its worker does not get on with, or takes too long
    over for a launcher."""


class PrefetchedSteps(Iterator[RankStep]):
    """An iterator over steps, of which each worker is two ahead, or what a pipe holds of small
    ones. Close it."""

    def __init__(
        self,
        build: Build,
        numbers: Iterable[int],
        *,
        workers: int,
        pin_memory: bool,
        patience: Patience,
    ) -> None:
        """Raises ConfigError where the machine has no room for the processes."""
        self._patience = patience
        self._workers: list[_Worker] = []
        device = torch.cuda.current_device() if pin_memory else None
        try:
            for first in range(workers):
                share = itertools.islice(numbers, first, None, workers)
                self._workers.append(_Worker(build, share, device))
        except (OSError, RuntimeError) as error:
            self.close()
            raise ConfigError(
                f"{workers} loader processes (data.loader_workers) cannot be started ({error}): "
                f"raise the limits on processes, open files and memory, or set fewer; with 0 each "
                f"rank builds its batches itself"
            ) from error
        self._turns = zip(itertools.cycle(self._workers), numbers, strict=False)

    def __next__(self) -> RankStep:
        """Raises:
        LoaderError: the worker has ended, hangs, or does not hand over its step soon after the run
            was asked to stop.
        """
        worker, number = next(self._turns)
        return worker.take(number, self._patience)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.close()


class _Worker:
    """A process that builds its share of the steps, and the thread that reads them."""

    def __init__(self, build: Build, share: Iterable[int], device: int | None) -> None:
        """`device`: the GPU that steps are pinned for."""
        self._ready: queue.SimpleQueue[RankStep | Exception | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)
        self._closing = False
        reader, writer = os.pipe()
        self._pipe, theirs = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(build, share, theirs), daemon=True
        )
        self._reader = threading.Thread(
            target=self._read, args=(device,), name="loader", daemon=True
        )
        try:
            with theirs:  # closed here, so that the process's end ends the pipe
                self.process.start()
            self._reader.start()
        except BaseException:
            if self.process.pid is not None:
                self.process.kill()
            self._pipe.close()
            raise

    def take(self, number: int, patience: Patience) -> RankStep:
        """The next of its steps, which has this number."""
        waited, since_asked, idle, used = 0.0, 0.0, 0.0, -1.0
        while True:
            with suppress(queue.Empty):
                found = self._ready.get(timeout=_LOOK_SECONDS)
                break
            # looks are counted, not the clock: a suspended job is none that hangs
            waited += _LOOK_SECONDS
            before, (state, used) = used, self._looked_at()
            if used != before:
                waited = 0.0
            if waited >= patience.timeout_seconds:
                raise LoaderError(
                    f"a loader process (pid {self.process.pid}, {state}) has not handed over the "
                    f"batch of step {number + 1} and has not moved for {waited:.0f} s: it is "
                    f"stopped, or hangs in the file system of the token shards; --resume goes on "
                    f"from the last checkpoint"
                )
            if patience.asked_to_stop():
                since_asked += _LOOK_SECONDS
                idle += _LOOK_SECONDS if used == before else 0.0
            if idle >= _SECONDS_TO_STOP or since_asked >= _MOST_SECONDS_TO_STOP:
                raise LoaderError(
                    f"the run was asked to stop, and the loader has not handed over the batch of "
                    f"step {number + 1} within {since_asked:.0f} s, which the stop waits for; "
                    f"--resume goes on from the last checkpoint"
                )
        self._room.release()
        if isinstance(found, RankStep):
            return found
        raise LoaderError(self._ended(number)) if found is None else found

    def close(self) -> None:
        self._closing = True
        self._room.release()  # the thread may wait for it
        self.process.join(_SECONDS_TO_END)
        if not self.process.is_alive():
            self._reader.join()
            self._pipe.close()

    def _read(self, device: int | None) -> None:
        """The thread's: read steps until the pipe ends, one ahead of who takes them."""
        if device is not None:
            torch.cuda.set_device(device)
        try:
            while self._room.acquire() and not self._closing:
                found, length = pickle.load(self._pipe)
                if isinstance(found, RankStep):
                    pinned = device is not None
                    content = torch.empty(length, dtype=torch.int32, pin_memory=pinned)
                    if self._pipe.readinto(content.numpy().data) < content.nbytes:
                        raise EOFError
                    found = replace(found, content=content)
                self._ready.put(found)
        except (EOFError, pickle.UnpicklingError):
            self._ready.put(None)
        except Exception as error:  # noqa: BLE001 - raised where the step is waited for
            self._ready.put(error)

    def _looked_at(self) -> tuple[str, float]:
        """The state of the process, and the processor time that it has taken, in seconds."""
        with suppress(psutil.Error):
            process = psutil.Process(self.process.pid)
            times = process.cpu_times()
            return process.status(), float(times.user + times.system)
        return "gone", 0.0

    def _ended(self, number: int) -> str:
        self.process.join(_SECONDS_TO_END)
        code = self.process.exitcode
        how, why = f"ended with exit code {code}", "what it said stands above"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            why = _REASONS.get(-code, "which nothing here sends")
        return (
            f"a loader process (pid {self.process.pid}) {how} before it handed over the batch of "
            f"step {number + 1}, {why}; --resume goes on from the last checkpoint"
        )


def _send(pipe: BinaryIO, found: RankStep | Exception) -> None:
    if isinstance(found, RankStep):
        content = found.content.numpy()
        pickle.dump((replace(found, content=torch.empty(0)), len(content)), pipe)
        pipe.write(content.data)
    else:
        pickle.dump((found, 0), pipe)
    pipe.flush()


def _work(build: Build, share: Iterable[int], pipe: BinaryIO) -> None:
    """The worker's: build its steps."""
    # Ctrl-C, SLURM and a closed terminal signal every process; what a stop means is the rank's to
    # say, and a worker that dies of it would take the rank along
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)  # those of the parent's pool are not there after a fork
    # Memory given back after every batch comes anew page by page, a fifth of a worker's time.
    keep_freed_memory()
    try:
        for step in share:
            _send(pipe, build(step))
    except MemoryError:
        _send(pipe, LoaderError(f"a loader process has no memory for its batch: {_MORE_MEMORY}"))
    except UserError as error:
        _send(pipe, type(error)(str(error)))
    except Exception:  # noqa: BLE001 - raised where the step is waited for
        _send(pipe, RuntimeError(f"in a loader process:\n{traceback.format_exc()}"))
