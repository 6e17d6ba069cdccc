"""Attempts at a command, one after the other, for as long as it is worth another one."""

import os
from functools import partial
from pathlib import Path

from stacking_ds.errors import UserError
from stacking_ds.launch import restart_policy
from stacking_ds.launch.attempt import StopSignals, run_attempt, say, usable_hosts
from stacking_ds.launch.environment import parse_assignments, secret_names
from stacking_ds.launch.request import Request, tracked_run, with_resume
from stacking_ds.run import attempts

_FAILURE = 1


def supervise(request: Request) -> int:
    """Do what `request` asks for; the exit code.

    A run (`train`) is judged by its records and started again while they say that it is worth it
    and restarts are left: 0 only if it is complete, or was asked to stop and has saved. Any other
    command is started once, and its code is what its runner says.

    Raises:
        UserError: an option, the hostfile or the environment cannot be used, too few hosts answer,
            or the run's records cannot be read or written.
    """
    request.check()
    run_dir = tracked_run(request.command)
    _warn_of_secrets(request)
    with StopSignals() as stop:
        if run_dir is None:
            if request.restarts:
                say(f"`{request.command[0]}` leaves no records to judge by, so it is started once")
            code = run_attempt(request, request.command, usable_hosts(request), stop)
            return _exit_code(code) if code else 0
        return _train(request, run_dir, stop)


def _warn_of_secrets(request: Request) -> None:
    if request.hostfile is None:
        return  # ranks on this machine inherit the environment
    names = secret_names(parse_assignments(request.env), os.environ)
    if names:
        say(
            f"warning: {', '.join(names)} would be on command lines, which `ps` shows to every "
            f"user of every host; put the secret into a file that only you can read (Hugging "
            f"Face: HF_TOKEN_PATH names one)"
        )


def _train(request: Request, run_dir: Path, stop: StopSignals) -> int:
    command, left = request.command, request.restarts
    while True:
        since = attempts.count(run_dir)
        hosts = usable_hosts(request)
        if stop.asked_by:
            say("asked to stop before the ranks were started")
            return 0
        code = run_attempt(request, command, hosts, stop, partial(_has_ended, run_dir, since))
        if stop.asked_by:
            return _after_stop(run_dir, since, code)
        verdict = restart_policy.judge(run_dir, code, since=since)
        if verdict.outcome == "complete":
            say(verdict.why)
            return 0
        if verdict.outcome == "stopped":
            say(f"not started again, since {verdict.why} with --resume")
            return 0
        if not verdict.again:
            say(verdict.why)
            return _exit_code(code)
        if left == 0:
            say(f"{verdict.why}, but no restarts are left (--restarts {request.restarts})")
            return _exit_code(code)
        left -= 1
        seconds = request.patience.pause_seconds
        say(f"{verdict.why}; starting again in {seconds:.0f} s ({left} restarts left after that)")
        if stop.wait(seconds):
            say("asked to stop before the next attempt; --resume goes on")
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
        say("the run is complete" if outcome == "complete" else "stopped; --resume goes on")
        return 0
    if outcome is None:
        say("stopped before the run began")
        return 0
    say(
        f"the run was asked to stop and did not end well ({outcome}); --resume goes on from its "
        f"newest checkpoint"
    )
    return _exit_code(code)


def _exit_code(code: int) -> int:
    """A failure's: the runner may say 0, or be killed."""
    return code if code > 0 else _FAILURE
