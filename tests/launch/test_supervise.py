"""What `launch` does when hosts do not answer, runs fail, and people want it to stop.

The runner is a script of the test's, ssh runs its command here, and records are real.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from stacking_ds.commands.launch import add_launch
from stacking_ds.errors import ConfigError, UserError
from stacking_ds.launch import restart_policy
from stacking_ds.launch import supervise as supervise_module
from stacking_ds.launch.runner import LaunchRequest, Timeouts
from stacking_ds.launch.supervise import StopSignals, supervise
from stacking_ds.run import attempts

# reads what this attempt is to do, writes down how it was started, and does it
RUNNER = """
import json, os, subprocess, sys, time
from pathlib import Path
from stacking_ds.run import attempts
folder = Path({folder!r})
arguments = sys.argv[1:]
hostfile = Path(arguments[arguments.index("--hostfile") + 1])
seen = {{"command": arguments[arguments.index("stacking_ds") + 1:],
         "hosts": hostfile.read_text().split("\\n")[:-1] if hostfile.exists() else []}}
with (folder / "seen").open("a") as file:
    file.write(json.dumps(seen) + "\\n")
plan = json.loads((folder / "plan").read_text())
(folder / "plan").write_text(json.dumps(plan[1:]))
for word, *rest in plan[0]:
    if word == "begun":
        attempts.begun(folder / "run", rest[0], 2, ["node1"])
    elif word == "ended":
        attempts.ended(folder / "run", rest[0], rest[1], "because")
    elif word == "child":  # a rank, in a session of its own as on another host
        rank = {{"RANK": str(rest[1])}} if len(rest) > 1 else {{}}
        subprocess.Popen([sys.executable, str(folder / (rest[0] + ".py"))],
                         env={{**os.environ, **rank}}, start_new_session=True)
        while not (folder / "up").exists(): time.sleep(0.02)
    elif word == "wait":
        while not (folder / rest[0]).exists(): time.sleep(0.02)
    elif word == "exit":
        sys.exit(rest[0])
    elif word == "die":
        os.kill(os.getpid(), 9)
"""
# a rank that needs two seconds to save
SAVES = """
import signal, sys, time
from pathlib import Path
from stacking_ds.run import attempts
folder = Path({folder!r})
def stop(*_):
    print("saving", flush=True)
    time.sleep(2)
    attempts.ended(folder / "run", "stopped", 7, "")
    (folder / "saved").write_text("")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
attempts.begun(folder / "run", 0, 1, [])
(folder / "up").write_text("")
while True: signal.pause()
"""
DEAF = """
import signal
from pathlib import Path
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
(Path({folder!r}) / "up").write_text("")
while True: signal.pause()
"""
SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
if grep -qx "$2" '{folder}/dead'; then
    echo "ssh: connect to host $2 port 22: Connection timed out" >&2
    exit 255
fi
exec sh -c "$3"
"""


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        for name, text in [("runner", RUNNER), ("saves", SAVES), ("deaf", DEAF)]:
            (folder / f"{name}.py").write_text(text.format(folder=str(folder)))
        (folder / "bin").mkdir()
        self.script("ssh", SSH.format(folder=folder))
        self.script("pdsh", "#!/bin/sh\nexit 99\n")
        self.dead()
        self.hostfile = folder / "hosts"
        self.hostfile.write_text("node1 slots=1\nnode2 slots=1\nnode3 slots=2\n")

    def script(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def dead(self, *hosts: str) -> None:
        (self.folder / "dead").write_text("".join(f"{host}\n" for host in hosts))

    def plan(self, *plan: list[tuple[Any, ...]]) -> None:
        """What each attempt does."""
        (self.folder / "plan").write_text(json.dumps(plan))

    def seen(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "seen").read_text().splitlines()]

    def launch(self, *, hosts: bool = True, command: str = "train", **options: Any) -> int:
        where: dict[str, Any] = {"hostfile": self.hostfile} if hosts else {"ranks": 1}
        words = (command, "--recipe", "base", "--run-dir", str(self.run))
        timeouts = Timeouts(
            pause_seconds=0.1, survivors_seconds=0.5, sweep_seconds=20, look_seconds=0.2
        )
        runner = (sys.executable, str(self.folder / "runner.py"))
        run_dir = self.run if command == "train" else None
        return supervise(
            LaunchRequest(
                words, run_dir, **where, **{"runner": runner, "timeouts": timeouts, **options}
            )
        )

    def signal_when(self, name: str, *numbers: signal.Signals) -> threading.Thread:
        """Send this process the signals once the file `name` is there."""

        def send() -> None:
            deadline = time.monotonic() + 30
            while not (self.folder / name).exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.5)

        thread = threading.Thread(target=send)
        thread.start()
        return thread

    def left(self) -> list[psutil.Process]:
        """Processes of the test that still run."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(self.folder) in word for word in process.info["cmdline"] or ())
        ]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    cluster = Cluster(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RANK", "SLURM_JOB_ID", "DS_ENV_FILE", "PYTHONPATH", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    yield cluster
    for process in cluster.left():
        process.kill()


COMPLETE = [("begun", 0), ("ended", "complete", 9), ("exit", 0)]
COMPLETE_AT_9 = "stacking-ds launch: the run is complete at step 9"


def failure(step: int, code: int = 1) -> list[tuple[Any, ...]]:
    return [("begun", 0), ("ended", "failed", step), ("exit", code)]


# ------------------------------------------------------------------ hosts


def test_a_complete_run_is_started_once(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.plan(COMPLETE)
    assert cluster.launch(restarts=5) == 0
    (seen,) = cluster.seen()
    assert seen["hosts"] == ["node1 slots=1", "node2 slots=1", "node3 slots=2"]
    assert seen["command"] == ["train", "--recipe", "base", "--run-dir", str(cluster.run)]
    assert capsys.readouterr().err.splitlines()[1:] == [COMPLETE_AT_9]


def test_too_few_hosts_are_named_and_nothing_starts(cluster: Cluster) -> None:
    cluster.dead("node1", "node3")
    with pytest.raises(ConfigError, match=r"2 of 3 hosts .* 3 are needed") as raised:
        cluster.launch()
    assert "node1: ssh: connect to host node1 port 22: Connection timed out" in str(raised.value)
    assert "node3: " in str(raised.value)
    assert "--min-nodes" in str(raised.value)
    assert not (cluster.folder / "seen").exists()
    assert not cluster.run.exists()


def test_a_dead_host_is_left_out_if_enough_are_left(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.dead("node1")
    cluster.plan(COMPLETE)
    assert cluster.launch(min_nodes=2, env=("HF_TOKEN=hf_abc",)) == 0
    assert cluster.seen()[0]["hosts"] == ["node2 slots=1", "node3 slots=2"]
    said = capsys.readouterr().err
    assert "going on without 1 of 3 hosts (node1: ssh: connect" in said
    assert "warning: HF_TOKEN would be on command lines" in said
    assert "hf_abc" not in said


def test_more_hosts_than_there_are_cannot_be_needed(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="--min-nodes 4 must be between 1 and the 3 hosts"):
        cluster.launch(min_nodes=4)


def test_a_host_that_answers_without_our_interpreter_is_not_used(cluster: Cluster) -> None:
    cluster.script("ssh", "#!/bin/sh\nexit 1\n")
    with pytest.raises(ConfigError, match=r"node1: exit code 1; .* finds"):
        cluster.launch()


def test_hosts_are_asked_without_a_chance_to_be_options(cluster: Cluster) -> None:
    cluster.script("ssh", f"#!/bin/sh\nprintf '%s\\n' \"$@\" >>'{cluster.folder}/asked'; exit 9\n")
    cluster.hostfile.write_text("node1 slots=1\n")
    with pytest.raises(ConfigError):
        cluster.launch(ssh_port=2222)
    asked = (cluster.folder / "asked").read_text().splitlines()
    at = asked.index("--")
    assert asked[at + 1 : at + 2] == ["node1"]
    assert len(asked) == at + 3
    assert asked[at - 2 : at] == ["-p", "2222"]
    assert "BatchMode=yes" in asked
    assert "ConnectTimeout=5" in asked


# ------------------------------------------------------------------ restarts


def test_a_failed_run_is_resumed_on_the_hosts_that_are_left(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.plan(failure(4), COMPLETE)
    judge = restart_policy.judge

    def node2_dies_too(*arguments: Any, **options: Any) -> restart_policy.RestartDecision:
        cluster.dead("node2")
        return judge(*arguments, **options)

    monkeypatch.setattr(restart_policy, "judge", node2_dies_too)
    assert cluster.launch(restarts=1, min_nodes=2) == 0
    first, second = cluster.seen()
    assert "--resume" not in first["command"]
    assert second["command"] == [*first["command"], "--resume"]
    assert second["hosts"] == ["node1 slots=1", "node3 slots=2"]
    said = capsys.readouterr().err
    assert "failed at step 4 for: because; it starts anew; starting again in 0 s" in said
    assert "going on without 1 of 3 hosts" in said


def test_what_a_person_has_to_mend_is_not_tried_again(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.plan([("exit", 2)])
    assert cluster.launch(restarts=5) == 2
    assert len(cluster.seen()) == 1
    assert "a person has to mend" in capsys.readouterr().err
    assert not cluster.run.exists(), "a folder that may not be a run's was written to"


def test_the_same_step_twice_ends_it(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.plan(failure(4), failure(4, code=7))
    assert cluster.launch(restarts=5) == 7
    assert len(cluster.seen()) == 2
    assert "the run failed at step 4 twice, for: because" in capsys.readouterr().err


def test_restarts_are_used_up(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.plan(failure(4), failure(5, code=0))
    assert cluster.launch(restarts=1) == 1
    assert "but no restarts are left (--restarts 1)" in capsys.readouterr().err


@pytest.mark.parametrize("end", [("exit", 0), ("die",)])
def test_a_runner_that_says_nothing_of_it_has_failed(
    cluster: Cluster, end: tuple[Any, ...]
) -> None:
    cluster.plan([("begun", 0), end])
    assert cluster.launch() == 1
    records = [json.loads(line) for line in (cluster.run / "attempts.jsonl").open()]
    assert [(r["event"], r.get("outcome")) for r in records] == [
        ("begun", None),
        ("judged", "killed"),
    ]


def test_a_run_that_others_stopped_is_not_started_again(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.plan([("begun", 0), ("ended", "stopped", 3), ("exit", 0)])
    assert cluster.launch(restarts=5) == 0
    assert len(cluster.seen()) == 1
    assert "not started again, since the run was asked to stop" in capsys.readouterr().err


def test_records_of_earlier_attempts_do_not_speak_for_this_one(cluster: Cluster) -> None:
    attempts.begun(cluster.run, 0, 2, [])
    attempts.ended(cluster.run, "complete", 9, "")  # by hand, so nobody judged it
    cluster.plan([("exit", 1)])
    assert cluster.launch() == 1


def test_another_command_is_started_once_and_its_code_is_the_launchers(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.plan([("exit", 5)])
    assert cluster.launch(command="doctor", restarts=3) == 5
    assert "`doctor` leaves no records" in capsys.readouterr().err
    cluster.plan([("exit", 0)])
    assert cluster.launch(command="doctor") == 0
    assert not cluster.run.exists()


def test_records_that_cannot_be_read_are_a_sentence(cluster: Cluster) -> None:
    cluster.run.write_text("a file")
    with pytest.raises(UserError, match=r"cannot read .*attempts.jsonl"):
        cluster.launch()


# ------------------------------------------------------------------ what is left


def test_survivors_are_killed_before_the_next_attempt(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.hostfile.write_text("node1 slots=1\n")
    cluster.plan([("child", "deaf", 0), *failure(4)])
    assert cluster.launch() == 1
    assert cluster.left() == []
    # the host shares this machine's processes here
    assert "killed 1 process that was left on node1" in capsys.readouterr().err


def test_survivors_that_end_by_themselves_are_waited_for(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster.folder / "slow.py").write_text(
        f"import time; from pathlib import Path; folder = Path({str(cluster.folder)!r})\n"
        "(folder / 'up').write_text(''); time.sleep(1); (folder / 'ended').write_text('')"
    )
    cluster.plan([("child", "slow", 0), *failure(4)])
    timeouts = Timeouts(survivors_seconds=20, sweep_seconds=20, look_seconds=0.2)
    assert cluster.launch(hosts=False, timeouts=timeouts) == 1
    assert (cluster.folder / "ended").exists()
    assert "killed" not in capsys.readouterr().err


def test_a_host_that_does_not_say_is_told_and_not_waited_for(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    # it answers when it is asked for, and never again
    cluster.script(
        "ssh",
        '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\n'
        'case "$2 $3" in *sweep*node2*|node2*sweep*) exec sleep 60;; esac\nexec sh -c "$3"\n',
    )
    cluster.plan(failure(4))
    timeouts = Timeouts(survivors_seconds=0.1, sweep_seconds=2, look_seconds=0.1)
    started = time.monotonic()
    assert cluster.launch(timeouts=timeouts) == 1
    assert time.monotonic() - started < 20
    assert "node2 does not say what still runs there (no answer in 2 s)" in capsys.readouterr().err


def test_nothing_of_it_stays_in_the_temporary_folder(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = cluster.folder / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    cluster.plan(COMPLETE)
    assert cluster.launch() == 0
    assert list(temporary.iterdir()) == []


def test_records_that_cannot_be_read_for_a_moment_end_no_healthy_run(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a network file system, of which a handle is stale."""
    asked: list[Path] = []

    def stale(run_dir: Path, since: int) -> str | None:
        asked.append(run_dir)
        if len(asked) == 3:
            (cluster.folder / "go").write_text("")
        raise UserError(f"cannot read {run_dir}/attempts.jsonl (Stale file handle)")

    monkeypatch.setattr(attempts, "outcome_since", stale)
    cluster.plan([("begun", 0), ("wait", "go"), *COMPLETE[1:]])
    assert cluster.launch() == 0
    assert len(asked) >= 3
    assert capsys.readouterr().err.splitlines()[1:] == [COMPLETE_AT_9]


@pytest.mark.parametrize("began", [[("begun", 0)], []])
def test_a_signal_before_the_run_could_save_is_no_failure_of_it(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], began: list[tuple[Any, ...]]
) -> None:
    early = [*began, ("exit", 143)]
    cluster.plan(early, early, early, COMPLETE)
    assert cluster.launch(restarts=3) == 0
    assert len(cluster.seen()) == 4
    assert capsys.readouterr().err.count("before it could save (exit status 143)") == 3


# ------------------------------------------------------------------ stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_waits_for_what_is_being_saved(
    cluster: Cluster, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    cluster.plan([("child", "saves", 0), ("wait", "saved"), ("exit", 0)])
    thread = cluster.signal_when("up", number)
    assert cluster.launch(hosts=False, restarts=5) == 0
    thread.join()
    assert (cluster.folder / "saved").exists()
    assert len(cluster.seen()) == 1
    heard = capfd.readouterr()
    assert f"asked to stop ({number.name})" in heard.err
    assert "stopped; --resume goes on" in heard.err
    assert "killed" not in heard.err
    assert "saving" in heard.out  # what ranks say while they save can still be read


def test_a_rank_is_asked_once_also_on_a_host_that_launches(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    """A second SIGTERM may meet a rank that has saved, and ends it before it says so."""
    cluster.hostfile.write_text("node1 slots=1\n")
    cluster.plan([("child", "saves", 0), ("wait", "saved"), ("exit", 0)])
    thread = cluster.signal_when("up", signal.SIGTERM)
    assert cluster.launch() == 0
    thread.join()
    assert capfd.readouterr().out.count("saving") == 1


def test_a_stop_saves_also_when_nobody_reads(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `stacking-ds launch ... 2>&1 | tee log`, where Ctrl-C ends the `tee` first."""
    reader, writer = os.pipe()
    os.close(reader)
    cluster.plan([("child", "saves", 0), ("wait", "saved"), ("exit", 0)])
    thread = cluster.signal_when("up", signal.SIGINT)
    with open(writer, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        assert cluster.launch(hosts=False) == 0
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            broken.write("a line\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that it can be closed
    thread.join()
    assert (cluster.folder / "saved").exists()


def test_nohup_outlives_the_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wait(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_waits_for_ranks_also_when_their_launcher_has_gone(cluster: Cluster) -> None:
    """As on another host, whose ssh is gone: nobody but the marker knows of them."""
    cluster.plan([("child", "saves", 0), ("wait", "for-ever")])
    cluster.hostfile.write_text("node1 slots=2\n")  # one rank is missing: all is told to end
    thread = cluster.signal_when("up", signal.SIGTERM)
    assert cluster.launch() == 0
    thread.join()
    assert (cluster.folder / "saved").exists()


def test_ranks_that_do_not_stop_are_killed_in_the_end(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.plan([("begun", 0), ("child", "deaf", 0), ("wait", "for-ever")])
    thread = cluster.signal_when("up", signal.SIGTERM)
    assert cluster.launch(hosts=False, stop_seconds=1) == 1
    thread.join()
    assert cluster.left() == []
    said = capsys.readouterr().err
    assert "the ranks have 1 s" in said
    assert "did not end well (killed)" in said


def test_a_second_ctrl_c_kills_at_once(cluster: Cluster) -> None:
    cluster.plan([("begun", 0), ("child", "deaf", 0), ("wait", "for-ever")])
    thread = cluster.signal_when("up", signal.SIGINT, signal.SIGINT)
    started = time.monotonic()
    assert cluster.launch(hosts=False, stop_seconds=60) == 1
    assert time.monotonic() - started < 20
    thread.join()
    assert cluster.left() == []


def test_a_stop_between_attempts_ends_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.plan(failure(4), COMPLETE)
    judge = restart_policy.judge

    def judged(*arguments: Any, **options: Any) -> restart_policy.RestartDecision:
        verdict = judge(*arguments, **options)
        (cluster.folder / "judged").write_text("")
        return verdict

    monkeypatch.setattr(restart_policy, "judge", judged)
    thread = cluster.signal_when("judged", signal.SIGTERM)
    timeouts = Timeouts(pause_seconds=60, survivors_seconds=0.1, look_seconds=0.1)
    started = time.monotonic()
    assert cluster.launch(hosts=False, restarts=5, timeouts=timeouts) == 0
    assert time.monotonic() - started < 20
    thread.join()
    assert len(cluster.seen()) == 1
    assert "asked to stop before the next attempt" in capsys.readouterr().err


def test_the_persons_signal_handlers_come_back(cluster: Cluster) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    cluster.plan(COMPLETE)
    cluster.launch(hosts=False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ------------------------------------------------------------------ the command line


def test_the_command_begins_where_the_options_end(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[LaunchRequest] = []

    def keep(request: LaunchRequest) -> int:
        requests.append(request)
        return 0

    monkeypatch.setattr(supervise_module, "supervise", keep)
    parser = argparse.ArgumentParser()
    add_launch(parser)
    words = "--hostfile h --restarts 3 --min-nodes 2 --env A=1 --env B=2 --launcher-args=-x -v"
    for dashes in ("", " --"):
        options = parser.parse_args(f"{words}{dashes} train --run-dir r --env C=3".split())
        assert options.command(options) == 0
    for request in requests:
        assert request == LaunchRequest(
            command=("train", "--run-dir", "r", "--env", "C=3"),
            run_dir=Path("r"),
            hostfile=Path("h"),
            restarts=3,
            min_nodes=2,
            env=("A=1", "B=2"),
            launcher_args="-x",
            verbose=True,
        )
    assert len(requests) == 2
