"""Signals of a run: acknowledged at once, never lost, and ending at once where that is asked."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
_BEGIN = """
import hashlib, os, signal, sys, time
from stacking_ds.process import stop_signals
stop_signals._SECONDS_TO_END = 0.3
with stop_signals.StopRequest() as request:
    ready = lambda: print('ready', flush=True)
    tell = lambda word: print(word, file=sys.stderr, flush=True)

    def step_for_minutes():
        while True:
            try:
                ready()
                # one call of C, whose end Python's own handlers wait for
                hashlib.pbkdf2_hmac("sha512", b"", b"", 10**9)
            except KeyboardInterrupt:
                pass

"""
_ACKNOWLEDGED = "asked to stop ({}): the run finishes the step and saves; "


@contextmanager
def _program(
    *lines: str, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Runs `lines` in a request; it has said "ready"."""
    body = "".join(f"    {line}\n" for line in lines)
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", _BEGIN + body],
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=20)
    return process.returncode, said


def test_an_interrupt_that_something_swallowed_holds() -> None:
    swallowing = ("try: ready(); time.sleep(60)", "except KeyboardInterrupt: tell('gone')")
    with _program(*swallowing, "request.hold_all()", "tell('trains')") as process:
        process.send_signal(signal.SIGINT)
        code, said = _end(process)
    assert said.startswith("gone\n")
    assert "trains" not in said
    assert code == -signal.SIGINT  # as Python ends of KeyboardInterrupt


def test_an_interrupt_ends_a_process_that_does_not_see_it() -> None:
    with _program("step_for_minutes()") as process:
        process.send_signal(signal.SIGINT)
        assert _end(process) == (130, "stacking-ds: interrupted\n")


def test_a_second_interrupt_does_not_wait_for_the_first() -> None:
    patient = "stop_signals._SECONDS_TO_END = 60"
    with _program(patient, "step_for_minutes()") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert _end(process) == (130, "stacking-ds: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_long_step_acknowledges_at_once_and_an_interrupt_ends_it(number: signal.Signals) -> None:
    with _program("request.hold_all()", "step_for_minutes()") as process:
        process.send_signal(number)
        assert process.stderr is not None
        assert _ACKNOWLEDGED.format(number.name) in process.stderr.readline()
        process.send_signal(signal.SIGTERM)  # said once
        time.sleep(1.1)
        process.send_signal(signal.SIGINT)
        assert _end(process) == (130, "stacking-ds: interrupted\n")


def test_a_press_that_a_launcher_passes_on_is_one() -> None:
    waits = ("time.sleep(0.3)", "time.sleep(0.3)", "tell('saves')")
    with _program("request.hold_all()", "ready()", *waits) as process:
        process.send_signal(signal.SIGTERM)  # the launcher may be faster than the terminal
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        code, said = _end(process)
    assert (code, said.splitlines()[1:]) == (0, ["saves"])


def test_under_nohup_a_closed_terminal_asks_for_nothing() -> None:
    sent = "os.kill(os.getpid(), signal.SIGHUP); tell(request.made)"
    for prefix, made in ([], "True"), (["nohup"], "False"):
        with _program("request.hold_all()", "ready()", sent, prefix=prefix) as process:
            assert made in _end(process)[1]


def test_what_a_child_is_sent_is_no_business_of_its_parent() -> None:
    child = "os.kill(os.getpid(), signal.SIGTERM); os._exit(0)"
    waits = ("os.wait()", "time.sleep(0.2)", "tell(request.made)")
    with _program(
        "request.hold_all()", "ready()", f"if os.fork() == 0: {child}", *waits
    ) as process:
        assert _end(process) == (0, "False\n")


def test_one_rank_of_a_node_speaks() -> None:
    for rank, local_rank, prefix in (0, 0, ""), (3, 1, None), (8, 0, "[rank 8] "):
        with _program(
            "request.hold_all()",
            "ready()",
            "os.kill(os.getpid(), signal.SIGTERM)",
            environment={"RANK": str(rank), "LOCAL_RANK": str(local_rank)},
        ) as process:
            said = _end(process)[1]
        assert (
            said.startswith(f"{prefix}stacking-ds: asked to stop")
            if prefix is not None
            else not said
        )
