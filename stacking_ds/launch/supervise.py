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

from stacking_ds.console import first_of, plural, say_on_stderr
from stacking_ds.errors import EXIT_FAILURE, ConfigError, UserError
from stacking_ds.launch import restart_policy
from stacking_ds.launch.environment import parse_assignments, secret_names
from stacking_ds.launch.hosts import Census, Host, read_hostfile, run_on_hosts
from stacking_ds.launch.runner import LaunchRequest, Timeouts, prepare
from stacking_ds.process.stop_signals import STOP_SIGNALS
from stacking_ds.run import attempts

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
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            # nohup is meant to outlive the terminal
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._held.callback(signal.signal, number, signal.signal(number, self._remember))
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

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
        """The reason, for people, to wait for the rest no longer; None while it is waited for."""
        now, timeouts = time.monotonic(), self._timeouts
        if now >= self._look_at:
            self._look_at = now + timeouts.look_seconds
            if self._ended_at is None and self._run_has_ended():
                self._ended_at = now
        if self._ended_at is not None and now - self._ended_at > timeouts.end_seconds:
            return "the run has ended, and a part of its processes has not"
        if now < self._count_at:
            return None
        self._count_at = now + timeouts.count_seconds
        # by host: one that does not answer says nothing about its ranks
        gone: set[int] = set()
        for host, found in self._census.take().found.items():
            seen = self._seen.setdefault(host, set())
            gone |= seen - set(found.ranks)
            seen.update(found.ranks)
        self._gone_since = {rank: self._gone_since.get(rank, now) for rank in gone}
        # their host, asked twice, has said that it has them no longer
        long = [r for r, since in self._gone_since.items() if now - since >= timeouts.count_seconds]
        if not long:
            return None
        ranks = len(set().union(*self._seen.values()))
        return f"{len(long)} of {ranks} ranks have ended, rank {min(long)} among them"


class _Attempt:
    """DeepSpeed's runner and all processes it starts: waited for, asked to stop, cleared."""

    def __init__(self, request: LaunchRequest, hosts: Sequence[Host], stop: StopSignals) -> None:
        self._request, self._hosts, self._stop = request, hosts, stop
        self._marker = secrets.token_hex(8)
        names, seconds = [host.name for host in hosts], request.timeouts.sweep_seconds
        self._census = Census(names, self._marker, request.ssh_port, seconds)

    def run(self, command: Sequence[str], run_has_ended: Callable[[], bool] = lambda: False) -> int:
        """Start `command` and wait until every process of it has ended; the runner's exit code.

        `run_has_ended` is asked now and then: what the run's own records say. Where `stop` asks for
        it, all ranks are asked to stop and have `stop_seconds` for it. What then is left, or what
        survives an attempt that ended by itself, is killed.
        """
        request, hosts = self._request, self._hosts
        slots = [host.slots for host in hosts] or [request.ranks or 1]
        with tempfile.TemporaryDirectory(prefix="stacking-ds-launch-") as folder:
            arguments, environment = prepare(
                request, command, hosts, Path(folder), self._marker, os.environ
            )
            places = f"{len(hosts)} hosts" if hosts else "this machine"
            _say(
                f"starting {plural(sum(slots), 'rank')} on {places}; DeepSpeed's launcher and the "
                f"ranks need some seconds for their imports"
            )
            self._process = subprocess.Popen(
                arguments, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
            rest, why = PartEnded(self._census, run_has_ended, request.timeouts), None
            try:
                while why is None and self._process.poll() is None and not self._stop.asked_by:
                    self._stop.wait(_GLANCE_SECONDS)
                    why = rest.reason()
                if why is not None:
                    _say(f"{why}: ending what is left")
                elif self._stop.asked_by:
                    given, default = request.stop_seconds, 30.0 * max(slots) + 30.0
                    self._ask_to_stop(sum(slots), default if given is None else given)
                else:
                    self._wait_until_clear(request.timeouts.survivors_seconds)
            finally:
                self._clear()
            return self._process.returncode

    def _ask_to_stop(self, ranks: int, seconds: float) -> None:
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
        self._wait_until_clear(deadline - time.monotonic())

    def _wait_until_clear(self, seconds: float) -> None:
        """Wait until nothing is left of the attempt anywhere, or for `seconds`."""
        deadline = time.monotonic() + seconds
        while not self._stop.at_once and (left := deadline - time.monotonic()) > 0:
            runs = self._process.poll() is None
            if not runs and not self._census.take().processes:
                return
            pause = _GLANCE_SECONDS if runs else self._request.timeouts.look_seconds
            self._stop.wait(min(pause, left))

    def _clear(self) -> None:
        """Kill what is left, and tell of the hosts that did not say whether something is."""
        left = self._census.take("kill")
        if left.processes:
            what = "process that was" if left.processes == 1 else "processes that were"
            places = [host or "this machine" for host, own in left.found.items() if own.processes]
            _say(f"killed {left.processes} {what} left on {first_of(places)}")
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
    # ranks on this machine inherit the environment
    secret = request.hostfile and secret_names(parse_assignments(request.env), os.environ)
    if secret:
        _say(
            f"warning: {', '.join(secret)} would be on command lines, which `ps` shows to every "
            f"user of every host; put the secret into a file that only you can read (Hugging "
            f"Face: HF_TOKEN_PATH names one)"
        )
    with StopSignals() as stop:
        if request.run_dir is not None:
            return _train(request, request.run_dir, stop)
        if request.restarts:
            _say(f"`{request.command[0]}` leaves no records to judge by, so it is started once")
        code = _Attempt(request, _usable_hosts(request), stop).run(request.command)
        return _exit_code(code) if code else 0


def _train(request: LaunchRequest, run_dir: Path, stop: StopSignals) -> int:
    command, left = request.command, request.restarts
    while True:
        since = len(attempts.read_records(run_dir))
        attempt = _Attempt(request, _usable_hosts(request), stop)
        if stop.asked_by:
            _say("asked to stop before the ranks were started")
            return 0
        code = attempt.run(command, partial(_has_ended, run_dir, since))
        if stop.asked_by:
            return _after_stop(run_dir, since, code)
        decision = restart_policy.judge(run_dir, code, since=since)
        why = decision.why
        if decision.outcome in ("complete", "stopped"):
            complete = decision.outcome == "complete"
            _say(why if complete else f"not started again, since {why} with --resume")
            return 0
        if not decision.again or left == 0:
            none_left = f", but no restarts are left (--restarts {request.restarts})"
            _say(f"{why}{none_left if decision.again else ''}")
            return _exit_code(code)
        left -= 1
        seconds = request.timeouts.pause_seconds
        _say(f"{why}; starting again in {seconds:.0f} s ({left} restarts left after that)")
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
    well = {
        "complete": "the run is complete",
        "stopped": "stopped; --resume goes on",
        None: "stopped before the run began",
    }
    outcome = attempts.outcome_since(run_dir, since)
    if outcome in well:
        _say(well[outcome])
        return 0
    _say(
        f"the run was asked to stop and did not end well ({outcome}); --resume goes on from its "
        f"newest checkpoint"
    )
    return _exit_code(code)


def _exit_code(code: int) -> int:
    """A failure's: the runner may say 0, or be killed."""
    return code if code > 0 else EXIT_FAILURE


def with_resume(command: Sequence[str]) -> tuple[str, ...]:
    """`command`, which trains, going on with its run."""
    resumes = any(word.partition("=")[0] == "--resume" for word in command)
    return tuple(command) if resumes else (*command, "--resume")


def _usable_hosts(request: LaunchRequest) -> list[Host]:
    """The hosts of the request's hostfile that can take ranks now, none for ranks here; a
    ConfigError where they are fewer than `min_nodes`."""
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
    troubles = {host: trouble for host, (_, trouble) in answers.items() if trouble is not None}
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
