"""2 nodes x 2 ranks by every launcher: one and the same run, bit for bit."""

from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.running import Job
from tests.cluster.slurm import Slurm
from tests.prose import tiny_shards
from tests.runs import losses

NODES = {"node1": 2, "node2": 2}
STEPS = 10


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def by_pdsh(hosts: Hosts, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of `deepspeed --hostfile hosts train.py`, with DeepSpeed's own runner."""
    job = Job.create(hosts, tmp_path_factory.mktemp("pdsh"), shards, NODES)
    runner = job.start(job.deepspeed(job.train()))
    assert runner.wait(120) == 0, job.said()
    assert (job.run_dir / "export" / "model.safetensors").is_file()
    found = losses(job.run_dir)
    assert len(found) == STEPS
    return found


def test_mpirun(hosts: Hosts, shards: Path, tmp_path: Path, by_pdsh: list[float]) -> None:
    job = Job.create(hosts, tmp_path, shards, NODES)
    assert job.start(job.mpirun(job.train())).wait(120) == 0, job.said()
    assert losses(job.run_dir) == by_pdsh


def test_torchrun(hosts: Hosts, shards: Path, tmp_path: Path, by_pdsh: list[float]) -> None:
    job = Job.create(hosts, tmp_path, shards, NODES)
    agents = {node: job.start(c, node) for node, c in job.torchrun(job.train()).items()}
    for node, agent in agents.items():
        assert agent.wait(120) == 0, job.said(node)
    assert losses(job.run_dir) == by_pdsh


def test_srun(slurm: Slurm, shards: Path, tmp_path: Path, by_pdsh: list[float]) -> None:
    job = Job.create(slurm.hosts, tmp_path, shards, NODES)
    done = slurm.run(
        ["srun", "-N2", "--ntasks-per-node=2", *job.python(job.train())],
        cwd=tmp_path,
        env={**slurm.environment, **job.forwarded},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert losses(job.run_dir) == by_pdsh


def test_deepspeed_by_openmpi(
    hosts: Hosts, shards: Path, tmp_path: Path, by_pdsh: list[float]
) -> None:
    job = Job.create(hosts, tmp_path, shards, NODES)
    options = ["--launcher", "openmpi", "--launcher_args=--allow-run-as-root"]
    assert job.start(job.deepspeed(job.train(), *options)).wait(120) == 0, job.said()
    assert losses(job.run_dir) == by_pdsh


def test_a_name_that_leads_to_loopback_does_no_harm(
    hosts: Hosts, shards: Path, tmp_path: Path, by_pdsh: list[float]
) -> None:
    """As Debian's installer writes it; gloo by itself would bind to it."""
    job = Job.create(hosts, tmp_path, shards, NODES)
    for node in NODES:
        debian = tmp_path / f"{node}.hosts"
        lines = [f"{hosts.address(other)} {other}" for other in NODES if other != node]
        debian.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {node}", *lines]) + "\n")
        assert hosts.run(node, ["mount", "--bind", debian, "/etc/hosts"]).returncode == 0
    try:
        options = ["--master_addr", hosts.address("node1")]
        assert job.start(job.deepspeed(job.train(), *options)).wait(120) == 0, job.said()
    finally:
        for node in NODES:
            hosts.run(node, ["umount", "/etc/hosts"])
    assert losses(job.run_dir) == by_pdsh
