"""Processes of a launch are found by their marker: all of them, and no others."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from stacking_ds.launch import sweep as sweep_module
from stacking_ds.launch.sweep import MARKER_VARIABLE, Found, main, sweep

# tells when it is up, and when SIGTERM came
CODE = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("asked", flush=True), sys.exit(0)))
print("up", flush=True)
while True: signal.pause()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def marker() -> str:
    return secrets.token_hex(8)


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(**environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_the_marked_are_killed_and_others_are_not(start: Start, marker: str) -> None:
    marked = start(**{MARKER_VARIABLE: marker, "RANK": "3"})
    other = start(**{MARKER_VARIABLE: marker + "0", "RANK": "3"})
    unmarked = start(RANK="3")
    assert sweep(marker) == Found(1, (3,))
    assert sweep(marker, "kill") == Found(1, (3,))
    assert marked.wait(5) == -signal.SIGKILL
    assert sweep(marker) == Found(0, ())
    assert (other.poll(), unmarked.poll()) == (None, None)


def test_an_orphan_is_found(marker: str) -> None:
    """Its parent is gone, as when a launcher is killed."""
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {CODE!r}]).pid)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, MARKER_VARIABLE: marker},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    orphan = psutil.Process(int(parent.stdout.readline()))
    parent.wait(10)
    assert sweep(marker).processes == 1
    sweep(marker, "kill")
    deadline = time.monotonic() + 5
    while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.stdout.close()


def test_only_ranks_are_asked_to_stop_first(start: Start, marker: str) -> None:
    rank = start(**{MARKER_VARIABLE: marker, "OMPI_COMM_WORLD_RANK": "1"})
    launcher = start(**{MARKER_VARIABLE: marker})
    assert sweep(marker, "stop-ranks") == Found(2, (1,))
    assert rank.communicate(timeout=5)[0] == "asked\n"
    time.sleep(0.3)
    assert launcher.poll() is None
    assert sweep(marker, "stop") == Found(1, ())
    assert launcher.communicate(timeout=5)[0] == "asked\n"


def test_who_asks_is_spared(marker: str) -> None:
    """Also where the sweep itself, and who started it, carry the marker."""
    environment = {**os.environ, MARKER_VARIABLE: marker}
    command = f"{sys.executable} -m stacking_ds.launch.sweep {marker} --action kill; echo alive"
    done = subprocess.run(
        ["sh", "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ['{"processes": 0, "ranks": []}', "alive"]


def test_one_that_starts_another_while_it_is_looked_for_does_not_get_away(
    start: Start, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(**{MARKER_VARIABLE: marker})
    late: list[subprocess.Popen[str]] = []
    send = sweep_module._send

    def send_too_late(process: psutil.Process, number: signal.Signals) -> None:
        if not late:
            late.append(start(**{MARKER_VARIABLE: marker}))
        send(process, number)

    monkeypatch.setattr(sweep_module, "_send", send_too_late)
    sweep(marker, "kill")
    assert first.wait(5) == late[0].wait(5) == -signal.SIGKILL


def test_the_command_counts_by_default(
    start: Start, marker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(**{MARKER_VARIABLE: marker, "RANK": "0"})
    assert main([marker]) == 0
    assert capsys.readouterr().out == '{"processes": 1, "ranks": [0]}\n'
    assert process.poll() is None
