"""An attempt of which a part has ended is noticed, and one that is whole is left alone."""

import time

import pytest

from stacking_ds.launch.hosts import ProcessCount
from stacking_ds.launch.runner import Timeouts
from stacking_ds.launch.supervise import PartEnded
from stacking_ds.launch.sweep import Found

TIMEOUTS = Timeouts(look_seconds=2, end_seconds=20, count_seconds=60)


class _Hosts:
    """A census of ranks that come and go, two a host, at the clock's seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.there, self.ended = 1000.0, {0, 1, 2, 3}, False
        self.silent: set[str] = set()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.watched = PartEnded(self, lambda: self.ended, TIMEOUTS)  # type: ignore[arg-type]

    def take(self) -> ProcessCount:
        silent = dict.fromkeys(self.silent, "no answer in 30 s")
        found = {"": Found(0, ())}
        for host, own in [("node1", {0, 1}), ("node2", {2, 3})]:
            if host not in silent:
                ranks = tuple(sorted(self.there & own))
                found[host] = Found(len(ranks), ranks)
        return ProcessCount(found, silent)

    def after(self, seconds: float) -> str | None:
        """What is said in so many seconds of looking."""
        for _ in range(round(seconds)):
            self.now += 1
            if (reason := self.watched.reason()) is not None:
                return reason
        return None


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> _Hosts:
    return _Hosts(monkeypatch)


def test_ranks_that_come_late_and_stay_are_let_run(hosts: _Hosts) -> None:
    hosts.there = {0}
    assert hosts.after(100) is None
    hosts.there = {0, 1, 2, 3}
    assert hosts.after(10_000) is None


def test_what_outlives_the_runs_end_is_not_waited_for(hosts: _Hosts) -> None:
    assert hosts.after(500) is None
    hosts.ended = True
    assert hosts.after(20) is None, "it is given time to end"
    assert hosts.after(5) == "the run has ended, and a part of its processes has not"


def test_ranks_that_are_gone_while_others_stay_are_noticed(hosts: _Hosts) -> None:
    assert hosts.after(100) is None
    hosts.there = {0, 1}
    assert hosts.after(60) is None, "they may all be ending"
    assert hosts.after(90) == "2 of 4 ranks have ended, rank 2 among them"


def test_ranks_that_a_host_missed_once_are_no_reason(hosts: _Hosts) -> None:
    assert hosts.after(100) is None
    hosts.there = {0, 1}
    assert hosts.after(61) is None
    hosts.there = {0, 1, 2, 3}
    assert hosts.after(1000) is None


def test_a_host_that_does_not_say_is_no_reason(hosts: _Hosts) -> None:
    assert hosts.after(100) is None
    hosts.silent = {"node2"}
    assert hosts.after(1000) is None
    hosts.silent = {"node1"}
    assert hosts.after(1000) is None
    hosts.silent = {"node1", "node2"}
    assert hosts.after(1000) is None


def test_hosts_that_say_are_heard_beside_one_that_does_not(hosts: _Hosts) -> None:
    assert hosts.after(100) is None
    hosts.silent = {"node1"}
    hosts.there = {0, 1, 3}
    assert hosts.after(150) == "1 of 4 ranks have ended, rank 2 among them"


def test_a_host_is_asked_twice_also_if_it_is_silent_in_between(hosts: _Hosts) -> None:
    assert hosts.after(100) is None
    hosts.there = {0, 1}
    assert hosts.after(60) is None
    hosts.silent = {"node2"}
    assert hosts.after(60) is None
    hosts.silent = set()
    assert hosts.after(60) is None
    assert hosts.after(60) == "2 of 4 ranks have ended, rank 2 among them"
