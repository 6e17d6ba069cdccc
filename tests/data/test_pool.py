"""Worker processes: each item in one of them, results in order, and nothing left of them."""

import os
import signal
from functools import partial

import psutil
import pytest

from stacking_ds.data.pool import WorkerDiedError, do_in_workers


def make_work(how):
    """What a worker does with a number, which it says with its process's number."""

    def work(item, report):
        report(os.getpid())
        if how == "raise" and item == 2:
            raise OSError(28, "No space left on device")
        if how == "die" and item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        print("a library's own words")
        return item * item

    return work


def test_results_come_in_the_order_of_the_items(capfd):
    told, ended = [], []
    report = lambda item, process: told.append((item, process))  # noqa: E731
    found = do_in_workers(partial(make_work, "well"), range(7), 3, report, ended.append)
    assert found == [item * item for item in range(7)]
    assert sorted(item for item, _ in told) == list(range(7))
    assert {process for _, process in told} <= set(ended)
    assert len(ended) == 3
    assert capfd.readouterr().out == "", "standard output is the parent's"


def test_what_a_worker_raises_is_raised_with_its_traceback():
    with pytest.raises(OSError, match="No space left on device") as raised:
        do_in_workers(partial(make_work, "raise"), range(4), 2)
    assert raised.value.errno == 28
    assert "in work" in raised.value.__notes__[0]


def test_a_worker_that_dies_is_told_of_with_what_it_did():
    ended = []
    with pytest.raises(
        WorkerDiedError, match="a worker was killed by SIGKILL, as when mem"
    ) as died:
        do_in_workers(partial(make_work, "die"), range(4), 2, tidy=ended.append)
    assert (died.value.item, died.value.out_of_memory) == (2, True)
    assert not any(map(psutil.pid_exists, ended))
