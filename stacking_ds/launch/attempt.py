"""One attempt: the hosts that answer, DeepSpeed's runner on them, and nothing left behind."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stacking_ds.console import first_of
from stacking_ds.errors import ConfigError
from stacking_ds.launch.census import Census
from stacking_ds.launch.hostfile import Host, read_hostfile
from stacking_ds.launch.part_ended import PartEnded
from stacking_ds.launch.request import Request
from stacking_ds.launch.runner import prepare_local, prepare_on_hosts
from stacking_ds.launch.signals import StopSignals
from stacking_ds.launch.ssh import run_on_hosts

__all__ = ["run_attempt", "say", "usable_hosts"]

_GLANCE_SECONDS = 0.2


def say(message: str) -> None:
    """A sentence for people, on stderr."""
    # the Ctrl-C that asks to stop may have ended the `tee` that reads it
    with contextlib.suppress(OSError):
        print(f"stacking-ds launch: {message}", file=sys.stderr, flush=True)


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
