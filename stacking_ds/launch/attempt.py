"""One attempt: the hosts that answer, DeepSpeed's runner on them, and nothing left behind."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from stacking_ds.console import first_of, say_on_stderr
from stacking_ds.errors import ConfigError
from stacking_ds.launch.hosts import Answer, Host, read_hostfile, run_on_hosts
from stacking_ds.launch.request import PACKAGE_FOLDER, Patience, Request
from stacking_ds.launch.runner import prepare_local, prepare_on_hosts
from stacking_ds.launch.sweep import Action, Found, sweep
from stacking_ds.process.stop_signals import STOP_SIGNALS

# ---- Remembers that the launcher was asked to stop, and how urgently.


_SIGNAL_GLANCE_SECONDS = 0.1


class StopSignals:
    """SIGINT, SIGTERM, SIGUSR1 and, without nohup, SIGHUP ask to stop; a second SIGINT at once.

    For the main thread, which has to look: `asked_by` is None until asked, `at_once` False.
    """

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None
        self.at_once = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        assert threading.current_thread() is threading.main_thread()
        for number in STOP_SIGNALS:
            # nohup is meant to outlive the terminal
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked_by is signal.SIGINT:
            self.at_once = True
        if self.asked_by is not signal.SIGINT:
            self.asked_by = signal.Signals(number)

    def wait(self, seconds: float) -> bool:
        """Wait that long, or until asked; True if asked."""
        before, deadline = (self.asked_by, self.at_once), time.monotonic() + seconds
        while (self.asked_by, self.at_once) == before and time.monotonic() < deadline:
            time.sleep(min(_SIGNAL_GLANCE_SECONDS, seconds))
        return self.asked_by is not None


# ---- What is left of an attempt on all of its hosts and on this machine.


@dataclass(frozen=True)
class Count:
    """The marked processes by host (this machine is ""), and the hosts that did not say."""

    found: dict[str, Found]
    silent: dict[str, str]

    @property
    def processes(self) -> int:
        return sum(found.processes for found in self.found.values())

    @property
    def ranks(self) -> set[int]:
        return {rank for found in self.found.values() for rank in found.ranks}

    def places(self) -> str:
        """Where there are processes, for people."""
        return first_of(
            [host or "this machine" for host, found in self.found.items() if found.processes]
        )


class Census:
    """Asks the same hosts about the same marker again and again."""

    def __init__(
        self, hosts: Sequence[str], marker: str, *, port: int | None, seconds: float
    ) -> None:
        self._hosts, self._marker = list(hosts), marker
        self._port, self._seconds = port, seconds

    def take(self, action: Action = "count") -> Count:
        """Do `action` (see `sweep`) everywhere, at once; what was found before it."""
        found, silent = {}, {}
        if self._hosts:
            command = (
                f"env PYTHONPATH={PACKAGE_FOLDER} {sys.executable} -P -m stacking_ds.launch.sweep "
                f"{self._marker} --action {action}"
            )
            for answer in run_on_hosts(
                self._hosts, command, port=self._port, seconds=self._seconds
            ):
                heard = _read(answer)
                if heard is None:
                    silent[answer.host] = answer.trouble or f"it said {answer.output[:80]!r}"
                else:
                    found[answer.host] = heard
        # last, since a runner that is killed takes the way to the other hosts with it; and a rank
        # is asked to stop once, which it was already if this machine is one of the hosts
        asking = self._hosts and action in ("stop-ranks", "stop")
        found[""] = sweep(self._marker, "count" if asking else action)
        return Count(found, silent)


def _read(answer: Answer) -> Found | None:
    if answer.trouble is not None:
        return None
    try:
        # what a shell's start-up files print comes before
        raw = json.loads(answer.output.strip().splitlines()[-1])
        return Found(int(raw["processes"]), tuple(raw["ranks"]))
    except (ValueError, LookupError, TypeError):
        return None


# ---- Notices an attempt of which a part has ended, while the rest would wait for ever.


class PartEnded:
    """To be asked again and again while the runner runs."""

    def __init__(
        self, census: Census, run_has_ended: Callable[[], bool], patience: Patience
    ) -> None:
        """`run_has_ended`: whether the run's own records say so."""
        self._census, self._run_has_ended, self._patience = census, run_has_ended, patience
        now = time.monotonic()
        self._look_at, self._count_at = now + patience.look_seconds, now + patience.count_seconds
        self._ended_at: float | None = None
        self._seen: dict[str, set[int]] = {}
        self._gone_since: dict[int, float] = {}

    def reason(self) -> str | None:
        """Why the rest is not to be waited for any longer, for people; None while it is."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + self._patience.look_seconds
            if self._ended_at is None and self._run_has_ended():
                self._ended_at = now
        if self._ended_at is not None and now - self._ended_at > self._patience.end_seconds:
            return "the run has ended, and a part of its processes has not"
        if now < self._count_at:
            return None
        self._count_at = now + self._patience.count_seconds
        gone = sorted(self._gone_for_long(now))
        if not gone:
            return None
        ranks = len(set().union(*self._seen.values()))
        return f"{len(gone)} of {ranks} ranks have ended, rank {gone[0]} among them"

    def _gone_for_long(self, now: float) -> list[int]:
        """The ranks that their host, when it was asked twice, said it has no longer."""
        # by host: one that does not answer says nothing about its ranks
        gone: set[int] = set()
        for host, found in self._census.take().found.items():
            seen = self._seen.setdefault(host, set())
            gone |= seen - set(found.ranks)
            seen.update(found.ranks)
        self._gone_since = {rank: self._gone_since.get(rank, now) for rank in gone}
        long = self._patience.count_seconds
        return [rank for rank, since in self._gone_since.items() if now - since >= long]


_GLANCE_SECONDS = 0.2


def say(message: str) -> None:
    """A sentence for people, on stderr, even if a Ctrl-C has ended the `tee` that reads it."""
    say_on_stderr(f"stacking-ds launch: {message}")


def usable_hosts(request: Request) -> list[Host]:
    """The hosts of the request's hostfile that can take ranks now; none for ranks here.

    Raises:
        ConfigError: the hostfile cannot be used, or fewer hosts than `min_nodes` can.
    """
    if request.hostfile is None:
        return []
    hosts = read_hostfile(request.hostfile)
    least = len(hosts) if request.min_nodes is None else request.min_nodes
    if not 1 <= least <= len(hosts):
        raise ConfigError(
            f"--min-nodes {least} must be between 1 and the {len(hosts)} hosts of "
            f"{request.hostfile}"
        )
    folder = os.getcwd()
    answers = run_on_hosts(
        [host.name for host in hosts],
        f"cd {folder} && test -x {sys.executable}",
        port=request.ssh_port,
        seconds=request.patience.probe_seconds,
    )
    troubles = {answer.host: answer.trouble for answer in answers if answer.trouble is not None}
    usable = [host for host in hosts if host.name not in troubles]
    named = first_of([f"{host}: {trouble}" for host, trouble in troubles.items()], between="; ")
    if len(usable) < least:
        raise ConfigError(
            f"{len(troubles)} of {len(hosts)} hosts of {request.hostfile} cannot be used, and "
            f"{least} are needed ({named}); see that `ssh HOST` works without a password and finds "
            f"{folder} and {sys.executable}, or let fewer do with --min-nodes"
        )
    if troubles:
        say(f"going on without {len(troubles)} of {len(hosts)} hosts ({named})")
    return usable


def run_attempt(
    request: Request,
    command: Sequence[str],
    hosts: Sequence[Host],
    stop: StopSignals,
    run_has_ended: Callable[[], bool] = lambda: False,
) -> int:
    """Start `command` and wait until it, and every process of it, has ended; the runner's code.

    `run_has_ended` is asked now and then: what the run's own records say.

    Where `stop` asks for it, all ranks are asked to stop and have `stop_seconds` for it. What then
    is left, or what survives an attempt that ended by itself, is killed.

    Raises:
        ConfigError: the environment cannot be given to the hosts.
    """
    marker = secrets.token_hex(8)
    patience = request.patience
    census = Census(
        [host.name for host in hosts], marker, port=request.ssh_port, seconds=patience.sweep_seconds
    )
    with tempfile.TemporaryDirectory(prefix="stacking-ds-launch-") as folder:
        if hosts:
            arguments, environment = prepare_on_hosts(
                request, command, hosts, Path(folder), marker, os.environ
            )
            slots = [host.slots for host in hosts]
        else:
            arguments, environment = prepare_local(
                request, command, Path(folder), marker, os.environ
            )
            slots = [request.ranks or 1]
        ranks, places = sum(slots), f"{len(hosts)} hosts" if hosts else "this machine"
        say(
            f"starting {ranks} rank{'s' if ranks > 1 else ''} on {places}; DeepSpeed's launcher "
            f"and the ranks need some seconds for their imports"
        )
        process = subprocess.Popen(
            arguments, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            rest = PartEnded(census, run_has_ended, patience)
            why: str | None = None
            while process.poll() is None and not stop.asked_by and why is None:
                stop.wait(_GLANCE_SECONDS)
                why = rest.reason()
            if why is not None:
                say(f"{why}: ending what is left")
            elif stop.asked_by:
                seconds = request.stop_seconds
                seconds = 30.0 * max(slots) + 30.0 if seconds is None else seconds
                _stop(process, census, ranks, stop, seconds, patience.look_seconds)
            else:
                _wait_until_clear(census, stop, patience.survivors_seconds, patience.look_seconds)
        finally:
            _clear(process, census)
        return process.returncode


def _stop(
    process: subprocess.Popen[bytes],
    census: Census,
    ranks: int,
    stop: StopSignals,
    seconds: float,
    look_seconds: float,
) -> None:
    assert stop.asked_by is not None
    say(
        f"asked to stop ({stop.asked_by.name}): the ranks have {seconds:.0f} s to finish their "
        f"step and save; a second Ctrl-C kills them at once"
    )
    deadline = time.monotonic() + seconds
    # the ranks themselves, so that what they say while they save still has somewhere to go;
    # DeepSpeed's way would also stop the user's other jobs on these hosts, by the launcher's name
    asked = census.take("stop-ranks")
    if len(asked.ranks) < ranks:  # they are just being started, or a host does not answer
        _signal(process, signal.SIGTERM)
        census.take("stop")
    while process.poll() is None and time.monotonic() < deadline and not stop.at_once:
        stop.wait(_GLANCE_SECONDS)
    _wait_until_clear(census, stop, max(0.0, deadline - time.monotonic()), look_seconds)


def _wait_until_clear(
    census: Census, stop: StopSignals, seconds: float, look_seconds: float
) -> None:
    """Wait until nothing is left of the attempt anywhere, or for `seconds`."""
    deadline = time.monotonic() + seconds
    while not stop.at_once and census.take().processes:
        if time.monotonic() >= deadline:
            return
        stop.wait(min(look_seconds, max(0.0, deadline - time.monotonic())))


def _clear(process: subprocess.Popen[bytes], census: Census) -> None:
    """Kill what is left, and tell of the hosts that did not say whether something is."""
    left = census.take("kill")
    if left.processes:
        what = "process that was" if left.processes == 1 else "processes that were"
        say(f"killed {left.processes} {what} left on {left.places()}")
    for host, trouble in left.silent.items():
        say(
            f"{host} does not say what still runs there ({trouble}); see to it before it is used "
            f"again"
        )
    if process.poll() is None:
        _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:  # its group is its own for as long as it is not waited for
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
