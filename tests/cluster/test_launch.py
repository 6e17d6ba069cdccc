"""`stacking-ds launch` over emulated hosts: what is lost is noticed, ended and started again."""

import json
import signal
from pathlib import Path

import pytest

from stacking_ds.checkpoint import folders, load, manifest
from tests.cluster.hosts import Hosts
from tests.cluster.running import Job, last_end, require_same, wait_gone
from tests.prose import tiny_shards
from tests.runs import losses

TWO_BY_TWO = {"node1": 2, "node2": 2}
TWO = {"node1": 1, "node2": 1}
SOON = ("--set", "cluster.timeout_seconds=30", "--set", "cluster.silence_seconds=10")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(hosts: Hosts, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of four ranks that nothing happened to, in a folder whose name is no shell's friend.

    DeepSpeed changes into the folder it was started in, so that one is an ordinary one.
    """
    job = Job.create(hosts, tmp_path_factory.mktemp("whole"), shards, TWO_BY_TWO)
    odd = job.folder / "a run; with $(touch /tmp/pwned) 'quotes' & %n"
    started = job.start(job.launch(command=["train", *job.train(run_dir=odd)[1:]]))
    assert started.wait(120) == 0, job.said()
    assert (odd / "export" / "model.safetensors").is_file()
    return odd


def _steps_begun_at(job: Job) -> list[int]:
    lines = (job.run_dir / "attempts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["step"] for record in records if record["event"] == "begun"]


def test_a_killed_rank_is_named_and_the_run_is_started_again_to_the_same_end(
    hosts: Hosts, shards: Path, tmp_path: Path, whole: Path
) -> None:
    job = Job.create(hosts, tmp_path, shards, TWO_BY_TWO, hold="step:6")
    launch = job.start(job.launch("--restarts", "1"))
    victim = job.wait_held("step-6", 4)[3]
    job.hosts.run("node2", ["kill", "-9", str(victim)])
    job.release("step-6")
    assert wait_gone(job, launch, 150) == 0, job.said()
    assert "rank 3 on node2 is gone or cut off" in job.said()
    assert _steps_begun_at(job) == [0, 4], "it went on from the checkpoint at the boundary"
    require_same(job.run_dir, whole)


def test_a_rank_that_hangs_is_named_and_ended(hosts: Hosts, shards: Path, tmp_path: Path) -> None:
    job = Job.create(hosts, tmp_path, shards, TWO, hold="step:5")
    command = ["train", *job.train(*SOON)[1:]]
    launch = job.start(job.launch(command=command))
    victim = job.wait_held("step-5", 2)[1]
    job.hosts.run("node2", ["kill", "-STOP", str(victim)])
    job.release("step-5")
    # rank 0 waits for silence_seconds, and what is left then is given some seconds to end
    assert wait_gone(job, launch, 60) != 0
    assert "rank 1 on node2 is gone or cut off" in job.said()
    assert last_end(job)["outcome"] == "lost"


def test_a_node_that_is_gone_is_left_out_of_the_next_attempt(
    hosts: Hosts, shards: Path, tmp_path: Path, whole: Path
) -> None:
    job = Job.create(hosts, tmp_path, shards, TWO, hold="step:5")
    command = ["train", *job.train(*SOON)[1:]]
    launch = job.start(job.launch("--restarts", "1", "--min-nodes", "1", command=command))
    job.wait_held("step-5", 2)
    job.hosts.unplug("node2")
    job.release("step-5")
    assert launch.wait(150) == 0, job.said()
    assert "node2" in job.said()
    begun = [
        json.loads(line)["hosts"]
        for line in (job.run_dir / "attempts.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "begun"
    ]
    assert begun == [["node1", "node2"], ["node1"]]
    # another number of ranks adds in another order
    assert losses(job.run_dir) == pytest.approx(losses(whole), rel=1e-4)
    job.hosts.plug("node2")
    assert not job.hosts.processes("node2", str(job.folder)), "cut off, its ranks ended too"


def test_a_host_that_does_not_answer_is_named_before_anything_starts(
    hosts: Hosts, shards: Path, tmp_path: Path
) -> None:
    job = Job.create(hosts, tmp_path, shards, {**TWO, "node3": 1})
    hosts.crash("node3")
    launch = job.start(job.launch())
    assert launch.wait(60) == 2
    assert "node3" in job.said()
    assert "--min-nodes" in job.said()
    assert "Traceback" not in job.said()
    assert not job.run_dir.exists()


def test_asked_to_stop_it_returns_when_all_is_saved(
    hosts: Hosts, shards: Path, tmp_path: Path
) -> None:
    job = Job.create(hosts, tmp_path, shards, TWO, hold="step:5")
    launch = job.start(job.launch())
    job.wait_held("step-5", 2)
    launch.send_signal(signal.SIGTERM)
    assert launch.wait(60) == 0, job.said()
    assert not [p for node in TWO for p in job.hosts.processes(node, str(job.folder))]
    assert "stopped at step 5" in job.said()
    found = folders.latest(job.run_dir)
    assert found is not None
    assert manifest.read_manifest(found).step == 5
    assert load.problems(found) == []


def test_nothing_that_was_typed_is_run_by_a_shell(whole: Path) -> None:
    assert len(losses(whole)) == 10
    assert not Path("/tmp/pwned").exists()
