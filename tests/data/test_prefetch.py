"""Whatever becomes of a worker, who waits for its step learns of it and goes on to the end."""

import faulthandler
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch

from stacking_ds.data import prefetch
from stacking_ds.data.batches import RankStep
from stacking_ds.data.prefetch import Patience, PrefetchedSteps
from stacking_ds.errors import ConfigError, DataError, LoaderError

SLOTS = 20_000  # of 4 bytes: more than a pipe holds
BAD = 5


class _Steps:
    """Step n is full of n; before the bad one the worker comes to harm."""

    def __init__(self, harm: Callable[[], Any] = lambda: None) -> None:
        self._harm = harm

    def __getitem__(self, step: int) -> RankStep:
        if step == BAD:
            self._harm()
        content = torch.full((SLOTS,), step, dtype=torch.int32)
        return RankStep(content, (), 0, 0, mlm_targets=step, nsp_targets=0, real_tokens=0)


@contextmanager
def _prefetched(
    harm: Callable[[], Any] = lambda: None, patience: Patience | None = None, workers: int = 2
) -> Iterator[PrefetchedSteps]:
    steps = PrefetchedSteps(
        _Steps(harm).__getitem__,
        range(2, 9),
        workers=workers,
        pin_memory=False,
        patience=patience or Patience(),
    )
    processes = [psutil.Process(worker.process.pid) for worker in steps._workers]
    try:
        yield steps
    finally:
        steps.close()
        assert not any(process.is_running() for process in processes)


def _kill(number: signal.Signals) -> Callable[[], None]:
    def kill() -> None:
        faulthandler.disable()  # pytest's own, which prints a page of stacks
        os.kill(os.getpid(), number)

    return kill


def _work(seconds: float) -> Callable[[], None]:
    def work() -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return work


def _fail(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_steps_arrive_whole_and_in_order(workers: int) -> None:
    with _prefetched(workers=workers) as steps:
        found = list(steps)
    assert [step.mlm_targets for step in found] == list(range(2, 9))
    assert all(bool((step.content == step.mlm_targets).all()) for step in found)
    assert {len(step.content) for step in found} == {SLOTS}


def test_workers_end_also_with_steps_that_nobody_takes() -> None:
    with _prefetched() as steps:
        next(steps)


@pytest.mark.parametrize(
    ("harm", "kind", "said"),
    [
        (_kill(signal.SIGKILL), LoaderError, "by SIGKILL before .* step 6, as when memory runs"),
        (_kill(signal.SIGBUS), LoaderError, "by SIGBUS .* a file of the token shards is cut off"),
        (lambda: os._exit(7), LoaderError, "ended with exit code 7 before"),
        (_fail(MemoryError()), LoaderError, "no memory for its batch: give the job more"),
        (_fail(DataError("train-0 is damaged")), DataError, "^train-0 is damaged$"),
        (_fail(KeyError("x")), RuntimeError, "in a loader process:\nTraceback(.|\n)*KeyError: 'x'"),
    ],
    ids=["killed", "bus", "exit", "memory", "user", "bug"],
)
def test_a_step_that_cannot_come_is_an_error(
    harm: Callable[[], None], kind: type[Exception], said: str
) -> None:
    with _prefetched(harm) as steps:
        assert [next(steps).mlm_targets for _ in range(3)] == [2, 3, 4]
        with pytest.raises(kind, match=said):
            next(steps)


def test_a_worker_that_is_stopped_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefetch, "_LOOK_SECONDS", 0.05)
    patience = Patience(timeout_seconds=0.5)
    with (
        _prefetched(_kill(signal.SIGSTOP), patience) as steps,
        pytest.raises(LoaderError, match=r"pid \d+, stopped\) has not handed over .* step 6"),
    ):
        list(steps)


def test_a_worker_that_gets_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_LOOK_SECONDS", 0.2)

    with _prefetched(_work(1.0), Patience(timeout_seconds=0.4)) as steps:
        assert len(list(steps)) == 7


def test_a_stop_does_not_wait_for_a_worker_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(prefetch, "_SECONDS_TO_STOP", 0.3)
    patience = Patience(asked_to_stop=lambda: True)
    with (
        _prefetched(_kill(signal.SIGSTOP), patience) as steps,
        pytest.raises(LoaderError, match="was asked to stop, and the loader has not handed over"),
    ):
        list(steps)


def test_a_stop_waits_for_a_batch_that_is_only_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(prefetch, "_SECONDS_TO_STOP", 1.0)
    patience = Patience(asked_to_stop=lambda: True)
    with _prefetched(_work(1.5), patience) as steps:
        assert len(list(steps)) == 7


def test_a_stop_does_not_wait_longer_than_launchers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(prefetch, "_MOST_SECONDS_TO_STOP", 0.5)
    patience = Patience(asked_to_stop=lambda: True)
    with (
        _prefetched(_work(60.0), patience) as steps,
        pytest.raises(LoaderError, match="was asked to stop, and the loader has not handed over"),
    ):
        list(steps)


def test_no_room_for_the_processes_is_a_sentence() -> None:
    before = psutil.Process().children()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.open(os.devnull, os.O_RDONLY))  # others may be free above it
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 4, hard))
    try:
        with (
            pytest.raises(ConfigError, match=r"2 loader processes .* Too many open files"),
            _prefetched(),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(psutil.Process().children()) <= set(before)


def _be_killed(answer: Connection) -> None:
    steps = PrefetchedSteps(
        _Steps().__getitem__, range(9), workers=2, pin_memory=False, patience=Patience()
    )
    next(steps)
    answer.send([worker.process.pid for worker in steps._workers])
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_do_not_outlive_a_rank_that_is_killed() -> None:
    context = multiprocessing.get_context("fork")
    answer, theirs = context.Pipe(duplex=False)
    rank = context.Process(target=_be_killed, args=(theirs,))
    rank.start()
    workers = answer.recv()
    rank.join()
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_steps_of_many_micro_batches_need_no_further_files() -> None:
    """Nor a short TMPDIR, nor room in /dev/shm: there is one pipe a worker, and nothing else."""
    with _prefetched() as steps:
        next(steps)
        files = len(os.listdir("/proc/self/fd"))
        kept = list(steps)
        # fewer where a file of an earlier test was still to be collected
        assert len(os.listdir("/proc/self/fd")) <= files
    assert len(kept) == 6
