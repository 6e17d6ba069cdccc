"""Supervises attempts at a command, one after the other, for as long as another is worth it: the
hosts that answer, DeepSpeed's runner on them, and nothing left behind."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from stacking_ds.console import first_of, plural, say_on_stderr
from stacking_ds.errors import ConfigError, UserError
from stacking_ds.launch import restart_policy
from stacking_ds.launch.environment import parse_assignments, secret_names
from stacking_ds.launch.hosts import Census, Host, read_hostfile, run_on_hosts
from stacking_ds.launch.runner import LaunchRequest, Timeouts, prepare
from stacking_ds.process.stop_signals import STOP_SIGNALS
from stacking_ds.run import attempts

_FAILURE = 1
_GLANCE_SECONDS = 0.2
_SIGNAL_GLANCE_SECONDS = 0.1


def _say(message: str) -> None:
    """A sentence for people, on stderr, even if a Ctrl-C has ended the `tee` that reads it."""
    say_on_stderr(f"stacking-ds launch: {message}")


class StopSignals:
    """SIGINT, SIGTERM, SIGUSR1 and, without nohup, SIGHUP ask to stop; a second SIGINT at once.

    For the main thread, which has to look: `asked_by` is None until asked, `at_once` False.
    """

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None
        self.at_once = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
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


class PartEnded:
    """Notices an attempt of which a part has ended, while the rest would wait for ever: to be asked
    again and again while the runner runs."""

    def __init__(
        self, census: Census, run_has_ended: Callable[[], bool], timeouts: Timeouts
    ) -> None:
        """`run_has_ended`: whether the run's own records say so."""
        self._census, self._run_has_ended, self._timeouts = census, run_has_ended, timeouts
        now = time.monotonic()
        self._look_at, self._count_at = now + timeouts.look_seconds, now + timeouts.count_seconds
        self._ended_at: float | None = None
        self._seen: dict[str, set[int]] = {}
        self._gone_since: dict[int, float] = {}

    def reason(self) -> str | None:
        """The reason not to wait for the rest any longer, for people; None while it is waited
        for."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + self._timeouts.look_seconds
            if self._ended_at is None and self._run_has_ended():
                self._ended_at = now
        if self._ended_at is not None and now - self._ended_at > self._timeouts.end_seconds:
            return "the run has ended, and a part of its processes has not"
        if now < self._count_at:
            return None
        self._count_at = now + self._timeouts.count_seconds
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
        long = self._timeouts.count_seconds
        return [rank for rank, since in self._gone_since.items() if now - since >= long]


class _Attempt:
    """Runner of an attempt and all processes it has started: waited for, asked to stop, cleared."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        census: Census,
        stop: StopSignals,
        look_seconds: float,
    ) -> None:
        self._process, self._census, self._stop = process, census, stop
        self._look_seconds = look_seconds

    def wait(self, rest: PartEnded) -> str | None:
        """Until the runner has ended or it is asked to stop; why a part is not waited for."""
        while self._process.poll() is None and not self._stop.asked_by:
            self._stop.wait(_GLANCE_SECONDS)
            if (why := rest.reason()) is not None:
                return why
        return None

    def ask_to_stop(self, ranks: int, seconds: float) -> None:
        """Ask all ranks to save and end, and wait `seconds` for it."""
        assert self._stop.asked_by is not None
        _say(
            f"asked to stop ({self._stop.asked_by.name}): the ranks have {seconds:.0f} s to finish "
            f"their step and save; a second Ctrl-C kills them at once"
        )
        deadline = time.monotonic() + seconds
        # the ranks themselves, so that what they say while they save still has somewhere to go;
        # DeepSpeed's way would also stop the user's other jobs on these hosts, by the launcher's
        # name
        asked = self._census.take("stop-ranks")
        if len(asked.ranks) < ranks:  # they are just being started, or a host does not answer
            self._signal(signal.SIGTERM)
            self._census.take("stop")
        while (
            self._process.poll() is None and time.monotonic() < deadline and not self._stop.at_once
        ):
            self._stop.wait(_GLANCE_SECONDS)
        self.wait_until_clear(max(0.0, deadline - time.monotonic()))

    def wait_until_clear(self, seconds: float) -> None:
        """Wait until nothing is left of the attempt anywhere, or for `seconds`."""
        deadline = time.monotonic() + seconds
        while not self._stop.at_once and self._census.take().processes:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._stop.wait(min(self._look_seconds, left))

    def clear(self) -> None:
        """Kill what is left, and tell of the hosts that did not say whether something is."""
        left = self._census.take("kill")
        if left.processes:
            what = "process that was" if left.processes == 1 else "processes that were"
            _say(f"killed {left.processes} {what} left on {left.places()}")
        for host, trouble in left.silent.items():
            _say(
                f"{host} does not say what still runs there ({trouble}); see to it before it is "
                f"used again"
            )
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:  # its group is its own until it is waited for
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def _run_attempt(
    request: LaunchRequest,
    command: Sequence[str],
    stop: StopSignals,
    hosts: Sequence[Host],
    run_has_ended: Callable[[], bool] = lambda: False,
) -> int:
    """Start `command` and wait until it, and every process of it, has ended; the runner's code.

    `run_has_ended` is asked now and then: what the run's own records say.

    Where `stop` asks for it, all ranks are asked to stop and have `stop_seconds` for it. What then
    is left, or what survives an attempt that ended by itself, is killed.

    Raises:
        ConfigError: the environment cannot be given to the hosts.
    """
    marker, timeouts = secrets.token_hex(8), request.timeouts
    names = [host.name for host in hosts]
    slots = [host.slots for host in hosts] or [request.ranks or 1]
    census = Census(names, marker, port=request.ssh_port, seconds=timeouts.sweep_seconds)
    with tempfile.TemporaryDirectory(prefix="stacking-ds-launch-") as folder:
        arguments, environment = prepare(request, command, hosts, Path(folder), marker, os.environ)
        places = f"{len(hosts)} hosts" if hosts else "this machine"
        _say(
            f"starting {plural(sum(slots), 'rank')} on {places}; DeepSpeed's launcher and the "
            f"ranks need some seconds for their imports"
        )
        process = subprocess.Popen(
            arguments, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        attempt = _Attempt(process, census, stop, timeouts.look_seconds)
        try:
            why = attempt.wait(PartEnded(census, run_has_ended, timeouts))
            if why is not None:
                _say(f"{why}: ending what is left")
            elif stop.asked_by:
                seconds = request.stop_seconds
                default = 30.0 * max(slots) + 30.0
                attempt.ask_to_stop(sum(slots), default if seconds is None else seconds)
            else:
                attempt.wait_until_clear(timeouts.survivors_seconds)
        finally:
            attempt.clear()
        return process.returncode


# ------------------------------------------------------------------ one attempt after another


def supervise(request: LaunchRequest) -> int:
    """Run what `request` asks for; the exit code.

    A run (`train`) is judged by its records and started again while they say that it is worth it
    and restarts are left: 0 only if it is complete, or was asked to stop and has saved. Any other
    command is started once, and its code is what its runner says.

    Raises:
        UserError: an option, the hostfile or the environment cannot be used, too few hosts answer,
            or the run's records cannot be read or written.
    """
    request.check()
    run_dir = request.run_dir
    _warn_of_secrets(request)
    with StopSignals() as stop:
        if run_dir is None:
            if request.restarts:
                _say(f"`{request.command[0]}` leaves no records to judge by, so it is started once")
            code = _run_attempt(request, request.command, stop, _usable_hosts(request))
            return _exit_code(code) if code else 0
        return _train(request, run_dir, stop)


def _warn_of_secrets(request: LaunchRequest) -> None:
    if request.hostfile is None:
        return  # ranks on this machine inherit the environment
    names = secret_names(parse_assignments(request.env), os.environ)
    if names:
        _say(
            f"warning: {', '.join(names)} would be on command lines, which `ps` shows to every "
            f"user of every host; put the secret into a file that only you can read (Hugging "
            f"Face: HF_TOKEN_PATH names one)"
        )


def _train(request: LaunchRequest, run_dir: Path, stop: StopSignals) -> int:
    command, left = request.command, request.restarts
    while True:
        since = len(attempts.read_records(run_dir))
        hosts = _usable_hosts(request)
        if stop.asked_by:
            _say("asked to stop before the ranks were started")
            return 0
        code = _run_attempt(request, command, stop, hosts, partial(_has_ended, run_dir, since))
        if stop.asked_by:
            return _after_stop(run_dir, since, code)
        decision = restart_policy.judge(run_dir, code, since=since)
        if decision.outcome == "complete":
            _say(decision.why)
            return 0
        if decision.outcome == "stopped":
            _say(f"not started again, since {decision.why} with --resume")
            return 0
        if not decision.again:
            _say(decision.why)
            return _exit_code(code)
        if left == 0:
            _say(f"{decision.why}, but no restarts are left (--restarts {request.restarts})")
            return _exit_code(code)
        left -= 1
        seconds = request.timeouts.pause_seconds
        _say(f"{decision.why}; starting again in {seconds:.0f} s ({left} restarts left after that)")
        if stop.wait(seconds):
            _say("asked to stop before the next attempt; --resume goes on")
            return 0
        command = with_resume(command)


def _has_ended(run_dir: Path, since: int) -> bool:
    try:
        return attempts.outcome_since(run_dir, since) not in (None, "killed")
    except UserError:
        # a file system that does not answer for a moment is no reason to end ranks that train
        return False


def _after_stop(run_dir: Path, since: int, code: int) -> int:
    outcome = attempts.outcome_since(run_dir, since)
    if outcome in ("complete", "stopped"):
        _say("the run is complete" if outcome == "complete" else "stopped; --resume goes on")
        return 0
    if outcome is None:
        _say("stopped before the run began")
        return 0
    _say(
        f"the run was asked to stop and did not end well ({outcome}); --resume goes on from its "
        f"newest checkpoint"
    )
    return _exit_code(code)


def _exit_code(code: int) -> int:
    """A failure's: the runner may say 0, or be killed."""
    return code if code > 0 else _FAILURE


def with_resume(command: Sequence[str]) -> tuple[str, ...]:
    """`command`, which trains, going on with its run."""
    if any(word.partition("=")[0] == "--resume" for word in command):
        return tuple(command)
    return (*command, "--resume")


def _usable_hosts(request: LaunchRequest) -> list[Host]:
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
        seconds=request.timeouts.probe_seconds,
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
        _say(f"going on without {len(troubles)} of {len(hosts)} hosts ({named})")
    return usable
