"""The emulated hosts and their SLURM behave as real ones do where the other tests rely on it."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.namespaces import missing_program, wait_until
from tests.cluster.slurm import DAEMONS, Slurm

_REQUEUES_ITSELF = """\
#!/bin/bash
echo restart ${SLURM_RESTART_COUNT:-0}
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 600
fi
"""


def _ssh(hosts: Hosts, node: str, *command: str) -> tuple[int, str]:
    result = hosts.run("node1", ["ssh", "-o", "ConnectTimeout=1", node, *command])
    return result.returncode, result.stdout


def test_ssh_reaches_another_host(hosts: Hosts) -> None:
    assert _ssh(hosts, "node2", "hostname") == (0, "node2\n")
    assert _ssh(hosts, "node2", "hostname", "-I")[1].split() == [hosts.address("node2")]


def test_pdsh_reaches_all_hosts(hosts: Hosts) -> None:
    result = hosts.run("node1", ["pdsh", "-S", "-R", "ssh", "-w", "node[1-3]", "hostname"])
    assert sorted(result.stdout.split("\n")[:-1]) == [f"{node}: {node}" for node in hosts.names]


def test_a_crashed_host_is_gone_until_it_boots(hosts: Hosts, tmp_path: Path) -> None:
    running = hosts.start("node2", ["sleep", "600"], log=tmp_path / "log")
    hosts.crash("node2")
    assert running.wait(10) == -signal.SIGKILL
    assert "refused" in _ssh(hosts, "node2", "hostname")[1]
    hosts.boot("node2")
    assert _ssh(hosts, "node2", "hostname") == (0, "node2\n")


def test_an_unplugged_host_is_silent_until_it_is_plugged_in(hosts: Hosts, tmp_path: Path) -> None:
    session = hosts.start("node1", ["ssh", "node2", "sleep 600"], log=tmp_path / "log")
    wait_until(lambda: bool(hosts.processes("node2", "sleep 600")), "the sleep starts")
    hosts.unplug("node2")
    assert "timed out" in _ssh(hosts, "node2", "hostname")[1]
    assert session.poll() is None
    hosts.plug("node2")
    # a neighbour that did not answer is asked for its address again a little later
    wait_until(lambda: _ssh(hosts, "node2", "hostname") == (0, "node2\n"), "node2 answers")


def test_processes_belong_to_their_host(hosts: Hosts, tmp_path: Path) -> None:
    session = hosts.start("node1", ["ssh", "node2", "exec sleep 601"], log=tmp_path / "log")
    [sleep] = wait_until(lambda: hosts.processes("node2", "sleep 601") or None, "the sleep starts")
    assert [process.name() for process in hosts.processes("node1", "sleep 601")] == ["ssh"]
    assert hosts.processes("node3", "sleep 601") == []
    sleep.kill()
    assert session.wait(10) != 0
    assert hosts.processes("node2", "sleep 601") == []


def test_signals_reach_the_command_and_its_exit_code_comes_back(
    hosts: Hosts, tmp_path: Path
) -> None:
    script = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done"
    log = tmp_path / "log"
    command = hosts.start("node1", ["bash", "-c", script], log=log)
    wait_until(lambda: "ready" in log.read_text(), "the trap is set")
    command.terminate()
    assert command.wait(10) == 75


def test_a_command_gets_the_given_environment_and_folder_only(hosts: Hosts, tmp_path: Path) -> None:
    result = hosts.run("node3", ["/usr/bin/env"], cwd=tmp_path, env={"ONE": "1"})
    assert result.stdout == "ONE=1\n"
    assert hosts.run("node3", ["pwd"], cwd=tmp_path).stdout == f"{tmp_path}\n"


def test_a_command_that_takes_too_long_is_ended_and_shown(hosts: Hosts) -> None:
    with pytest.raises(AssertionError, match=r"over 0.5 s:\nhalf"):
        hosts.run("node1", ["sh", "-c", "echo half; sleep 602"], timeout=0.5)
    wait_until(lambda: not hosts.processes("node1", "sleep 602"), "the sleep ends")


def test_mending_ends_leftovers_and_brings_hosts_back(hosts: Hosts, tmp_path: Path) -> None:
    hosts.start("node1", ["ssh", "node3", "setsid sleep 603"], log=tmp_path / "log")
    wait_until(lambda: bool(hosts.processes("node3", "sleep 603")), "the sleep starts")
    hosts.crash("node2")
    hosts.unplug("node3")
    hosts.mend(spare=DAEMONS)
    assert not any(hosts.processes(node, "sleep 603") for node in hosts.names)
    assert [_ssh(hosts, node, "hostname")[0] for node in hosts.names] == [0, 0, 0]


@pytest.mark.usefixtures("hosts")  # for its reasons to skip
def test_hosts_end_with_the_process_that_started_them() -> None:
    program = (
        "import os; from tests.cluster.hosts import Hosts; hosts = Hosts(1); hosts.up();"
        "print(hosts.directory, hosts.processes('node1')[0].pid, flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    directory, pid = killed.stdout.split()
    wait_until(lambda: not Path(directory).exists(), f"{directory} is removed")
    wait_until(lambda: not psutil.pid_exists(int(pid)), f"process {pid} ends")


def test_a_hostfile_names_hosts_and_slots(tmp_path: Path) -> None:
    path = Hosts.hostfile(tmp_path / "hostfile", {"node1": 2, "node2": 1})
    assert path.read_text() == "node1 slots=2\nnode2 slots=1\n"


def test_a_missing_program_is_named() -> None:
    assert missing_program(["sh", "no-such-program"]) == "not installed: no-such-program"
    assert missing_program(["sh"]) is None


def test_srun_starts_tasks_on_two_nodes(slurm: Slurm) -> None:
    result = slurm.run(["srun", "--quiet", "-N2", "-n4", "--ntasks-per-node=2", "hostname"])
    assert sorted(result.stdout.split()) == ["node1", "node1", "node2", "node2"]


def test_a_job_that_requeues_itself_starts_again(slurm: Slurm, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(_REQUEUES_ITSELF)
    job = slurm.submit(["--nodes=2", "--open-mode=append", script], cwd=tmp_path)
    assert slurm.wait(job, "COMPLETED", timeout=60)["Restarts"] == "1"
    assert slurm.log(job).endswith("restart 1\n")


def test_a_job_that_ends_otherwise_is_told_with_its_log(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(["--wrap=echo words; exit 3"], cwd=tmp_path)
    with pytest.raises(AssertionError, match=r"(?s)ExitCode.*3:0.*words"):
        slurm.wait(job, "COMPLETED", timeout=60)


def test_a_signal_reaches_the_tasks_of_a_job(slurm: Slurm, tmp_path: Path) -> None:
    task = "trap 'echo got USR1; exit 0' USR1; echo ready; while :; do sleep 0.05; done"
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/bash\nexec srun bash -c "{task}"\n')
    job = slurm.submit(["--ntasks=2", script], cwd=tmp_path)
    wait_until(lambda: slurm.log(job).count("ready") == 2, lambda: f"both run: {slurm.log(job)}")
    slurm.cancel(job, "--signal=USR1")
    slurm.wait(job, "COMPLETED", timeout=30)
    assert slurm.log(job).count("got USR1") == 2


def test_slurm_is_whole_again_after_each_test(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(["--nodes=3", "--wrap=srun sleep 604"], cwd=tmp_path)
    slurm.wait(job, "RUNNING", timeout=30)
    slurm.kill_slurmd("node3")
    slurm.hosts.crash("node2")
    slurm.mend()
    assert slurm.queue() == {}
    assert len(slurm.run(["srun", "--quiet", "-N3", "hostname"]).stdout.split()) == 3
