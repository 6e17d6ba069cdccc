"""Ranks and nodes that are lost: the job ends soon and whole, says which, and can go on."""

import signal
import time
from pathlib import Path

import pytest

from stacking_ds.checkpoint import folders, load, manifest
from tests.cluster.hosts import Hosts
from tests.cluster.running import Job, last_end, require_same, wait_gone
from tests.prose import tiny_shards

NODES = {"node1": 1, "node2": 1}
RANKS = 2
SOON = ("--set", "cluster.timeout_seconds=30", "--set", "cluster.silence_seconds=10")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(hosts: Hosts, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    job = Job.create(hosts, tmp_path_factory.mktemp("whole"), shards, NODES)
    assert job.start(job.deepspeed(job.train())).wait(120) == 0, job.said()
    return job.run_dir


@pytest.fixture
def job(hosts: Hosts, shards: Path, tmp_path: Path) -> Job:
    """Held in step 5, of which step 4 has left a checkpoint."""
    return Job.create(hosts, tmp_path, shards, NODES, hold="step:5")


def _resume(job: Job, whole: Path) -> None:
    """On with the same launcher; the end is that of the run that nothing happened to."""
    runner = job.start(job.deepspeed(job.train("--resume")))
    assert runner.wait(120) == 0, job.said()
    require_same(job.run_dir, whole)


def test_a_killed_rank_on_the_far_node_ends_all_and_is_named(
    hosts: Hosts, shards: Path, tmp_path: Path
) -> None:
    job = Job.create(hosts, tmp_path, shards, {"node1": 2, "node2": 2}, hold="step:5")
    runner = job.start(job.deepspeed(job.train()))
    victim = job.wait_held("step-5", 4)[3]
    job.hosts.run("node2", ["kill", "-9", str(victim)])
    job.release("step-5")
    assert wait_gone(job, runner, 60) != 0
    assert "stacking-ds: error: rank 3 on node2 is gone or cut off" in job.said()
    assert "after step 4" in job.said()
    assert last_end(job)["outcome"] == "lost"


def test_a_network_cut_for_five_seconds_is_survived(job: Job, whole: Path) -> None:
    runner = job.start(job.deepspeed(job.train(*SOON)))
    job.wait_held("step-5", RANKS)
    job.hosts.unplug("node2")
    job.release("step-5")
    time.sleep(5)
    job.hosts.plug("node2")
    assert runner.wait(60) == 0, job.said()
    require_same(job.run_dir, whole)


def test_a_network_cut_for_good_ends_all_within_the_time_out(job: Job, whole: Path) -> None:
    keepalive = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"}
    runner = job.start(job.deepspeed(job.train(*SOON)), env=keepalive)
    job.wait_held("step-5", RANKS)
    job.hosts.unplug("node2")
    job.release("step-5")
    assert wait_gone(job, runner, 60) != 0
    assert "rank 1 on node2 is gone or cut off" in job.said()
    job.hosts.plug("node2")
    _resume(job, whole)


def test_a_node_that_crashes_leaves_nothing_running(job: Job) -> None:
    runner = job.start(job.deepspeed(job.train(*SOON)))
    job.wait_held("step-5", RANKS)
    job.hosts.crash("node2")
    job.release("step-5")
    assert wait_gone(job, runner, 60) != 0
    assert "rank 1 on node2" in last_end(job)["message"]


def test_the_launcher_that_is_told_to_end_leaves_a_checkpoint(job: Job, whole: Path) -> None:
    runner = job.start(job.deepspeed(job.train()))
    job.wait_held("step-5", RANKS)
    runner.send_signal(signal.SIGTERM)
    wait_gone(job, runner, 60)
    assert last_end(job)["outcome"] == "stopped"
    found = folders.latest(job.run_dir)
    assert found is not None
    assert manifest.read_manifest(found).step == 5
    assert load.problems(found) == []
    _resume(job, whole)


def test_a_second_job_in_the_run_directory_is_refused(job: Job, whole: Path) -> None:
    first = job.start(job.deepspeed(job.train()))
    job.wait_held("step-5", RANKS)
    second = job.hosts.run(
        "node3",
        job.python(job.train("--resume", "--set", "cluster.silence_seconds=2")),
        env=job.environment,
        timeout=90,
    )
    assert second.returncode == 2
    assert f"another job is training in {job.run_dir}; wait for it" in second.stdout
    assert "Traceback" not in second.stdout
    job.release("step-5")
    assert first.wait(90) == 0, job.said()
    require_same(job.run_dir, whole)


def test_a_host_that_does_not_answer(hosts: Hosts, shards: Path, tmp_path: Path) -> None:
    """With DeepSpeed's own launcher: the ranks that are there do not wait for ever."""
    job = Job.create(hosts, tmp_path, shards, {**NODES, "node3": 1})
    hosts.crash("node3")
    runner = job.start(job.deepspeed(job.train("--set", "cluster.timeout_seconds=5")))
    assert wait_gone(job, runner, 120) != 0
    said = job.said()
    assert "1 of 3 ranks have not come in time: 2; those that have are on node1, node2" in said
    assert said.count("stacking-ds: error:") == 1
    assert not (job.run_dir / "checkpoints").exists()


# ------------------------------------------------------------------ file systems


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    hosts: Hosts, shards: Path, tmp_path: Path, whole: Path
) -> None:
    """A checkpoint may fail, with a warning; two in a row end the run."""
    job = Job.create(hosts, tmp_path, shards, {"node1": 2}, hold="step:5")
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    assert hosts.run("node1", ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).stdout == ""
    try:
        runner = job.start(job.deepspeed(job.train(run_dir=run)))
        job.wait_held("step-5", 2)
        hosts.run("node1", ["dd", "if=/dev/zero", f"of={disk / 'fill'}", "bs=1k"])
        job.release("step-5")
        assert wait_gone(job, runner, 90) != 0
        _require_told_of_once(job.said(), run)
        verify = ["-m", "stacking_ds", "checkpoint", "verify", str(run)]
        kept = hosts.run("node1", job.python(verify), env=job.environment)
        assert kept.returncode == 0, kept.stdout
        assert "step_00000004" in kept.stdout
        assert hosts.run("node1", ["rm", disk / "fill"]).returncode == 0
        again = job.start(job.deepspeed(job.train("--resume", run_dir=run)))
        assert wait_gone(job, again, 90) == 0, job.said()
        assert hosts.run("node1", ["cp", "-r", run, job.run_dir]).returncode == 0
    finally:
        hosts.run("node1", ["umount", "-l", disk])
    require_same(job.run_dir, whole)


def _require_told_of_once(said: str, run: Path) -> None:
    full = "No space left on device"
    warning, in_between, end = (
        f"metrics are not written to {run}/",
        f"{run / 'checkpoints' / 'step_00000006'} was not saved (rank 0: ",
        f"stacking-ds: error: {run / 'checkpoints' / 'step_00000007'} was not saved (rank 0: ",
    )
    assert said.count(warning) == said.count(in_between) == said.count(end) == 1, said
    assert said.count("stacking-ds: error:") == 1, said
    assert said.index(in_between) < said.index(end)
    for start, goes_on in ((warning, "goes on"), (in_between, "goes on until"), (end, "untouched")):
        [line] = [line for line in said.splitlines() if start in line]
        assert full in line, line
        assert goes_on in line, line
    assert "Traceback" not in said, said


def test_a_read_only_data_directory(
    hosts: Hosts, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows that are not laid out yet go to the user's cache; where that cannot be either, to none,
    which is one sentence."""
    fresh = tiny_shards(tmp_path_factory.mktemp("fresh"))
    job = Job.create(hosts, tmp_path, fresh, NODES)
    for node in NODES:
        assert hosts.run(node, ["mount", "--bind", "-o", "ro", fresh, fresh]).returncode == 0
    try:
        nowhere = {"XDG_CACHE_HOME": str(fresh / "cache")}
        runner = job.start(job.mpirun(job.train(*SOON), carried=nowhere), env=nowhere)
        assert wait_gone(job, runner, 60) == 2
        assert job.said().count("stacking-ds: error:") == 1
        assert "cannot be laid out, since nothing can be written" in job.said()
        assert not job.run_dir.exists()
        runner = job.start(job.deepspeed(job.train()))
        assert wait_gone(job, runner, 90) == 0, job.said()
    finally:
        for node in NODES:
            hosts.run(node, ["umount", fresh])
    assert (job.run_dir / "export").is_dir()


def test_a_node_without_the_data_is_named(hosts: Hosts, shards: Path, tmp_path: Path) -> None:
    job = Job.create(hosts, tmp_path, shards, NODES)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert hosts.run("node2", ["mount", "--bind", empty, shards]).returncode == 0
    try:
        runner = job.start(job.deepspeed(job.train(*SOON)))
        status = wait_gone(job, runner, 60)
    finally:
        hosts.run("node2", ["umount", shards])
    assert status == 2
    assert "stacking-ds: error: rank 1 on node2: " in job.said()
    assert job.said().count("stacking-ds: error:") == 1
    assert not job.run_dir.exists()


def test_a_stale_latest_is_one_sentence(job: Job) -> None:
    runner = job.start(job.deepspeed(job.train()))
    job.wait_held("step-5", RANKS)
    runner.send_signal(signal.SIGTERM)
    wait_gone(job, runner, 60)
    pointer = job.run_dir / "checkpoints" / "latest"
    right = pointer.read_text()
    pointer.write_text("step_00000099\n")
    runner = job.start(job.deepspeed(job.train("--resume")))
    assert wait_gone(job, runner, 60) == 2
    assert "names 'step_00000099', which is not there; say from which" in job.said()
    assert job.said().count("stacking-ds: error:") == 1
    pointer.write_text(right)
    found = folders.latest(job.run_dir)
    assert found is not None
    assert load.problems(found) == []
