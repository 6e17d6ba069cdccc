"""A thread that works gets on, and one that is stuck does not, whatever other processes do."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stacking_ds.distributed.lost_ranks import Progress


@contextmanager
def _thread(action: Callable[[threading.Event], None]) -> Iterator[threading.Thread]:
    over = threading.Event()
    thread = threading.Thread(target=action, args=(over,))
    thread.start()
    try:
        yield thread
    finally:
        over.set()
        thread.join()


def _work(over: threading.Event) -> None:
    while not over.is_set():
        sum(range(1000))


def _hang(over: threading.Event) -> None:
    over.wait()


def _looks(progress: Progress, thread: threading.Thread) -> list[int]:
    found = []
    for _ in range(4):
        found.append(progress.look(thread))
        time.sleep(0.15)
    return found


def _busy() -> None:
    while True:
        sum(range(1000))


def test_work_gets_on() -> None:
    with _thread(_work) as thread:
        found = _looks(Progress(), thread)
    assert found[-1] > found[0] >= 1


def test_what_hangs_does_not() -> None:
    with _thread(_hang) as thread:
        found = _looks(Progress(), thread)
    assert len(set(found[1:])) == 1
    assert found[-1] >= 1, "it is under way all the same"


def test_processes_that_were_there_before_do_not_count_and_those_started_for_it_do() -> None:
    context = multiprocessing.get_context("fork")
    before, after = (context.Process(target=_busy, daemon=True) for _ in range(2))
    progress = Progress()
    before.start()
    try:
        with _thread(_hang) as thread:
            assert len(set(_looks(progress, thread)[1:])) == 1
            after.start()
            found = _looks(progress, thread)
        assert found[-1] > found[0]
    finally:
        for process in (before, after):
            process.kill()
            process.join()


def test_there_is_none_without_work() -> None:
    progress = Progress()
    assert progress.look(None) == 0
    with _thread(_hang) as thread:
        assert progress.look(thread) >= 1
    assert progress.look(thread) == 0
