"""The doctor on emulated hosts: all is well, or the node that differs is named."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.running import REPOSITORY, Job, wait_gone
from tests.cluster.slurm import Slurm
from tests.prose import tiny_shards

NODES = {"node1": 2, "node2": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@contextmanager
def _other_code_on(hosts: Hosts, node: str, folder: Path) -> Iterator[None]:
    """A checkout that was not brought up to date on one node."""
    source = REPOSITORY / "stacking_ds" / "console.py"
    old = folder / "console.py"
    old.write_text(source.read_text() + "\n# an older version\n")
    assert hosts.run(node, ["mount", "--bind", old, source]).returncode == 0
    try:
        yield
    finally:
        hosts.run(node, ["umount", source])


def _doctor(job: Job) -> list[str]:
    recipe, run_dir = str(job.folder / "small.yaml"), str(job.run_dir)
    found = str(job.folder / "found.json")
    return ["doctor", "--recipe", recipe, "--run-dir", run_dir, "--json", found]


def _verdicts(job: Job) -> dict[str, str]:
    found = json.loads((job.folder / "found.json").read_text())
    return {finding["check"]: finding["verdict"] for finding in found["findings"]}


def test_all_is_well(hosts: Hosts, shards: Path, tmp_path: Path) -> None:
    job = Job.create(hosts, tmp_path, shards, NODES)
    runner = job.start(job.launch(command=_doctor(job)))
    assert runner.wait(90) == 0, job.said()
    assert "FAILED" not in _verdicts(job).values(), job.said()
    assert not job.run_dir.exists(), "it leaves nothing behind"


def test_under_srun_too(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    job = Job.create(slurm.hosts, tmp_path, shards, NODES)
    done = slurm.run(
        ["srun", "-N2", "--ntasks-per-node=2", *job.python(["-m", "stacking_ds", *_doctor(job)])],
        env={**slurm.environment, **job.forwarded},
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    assert "2 nodes, 4 ranks: node1 and node2" in done.stdout


def test_the_node_that_differs_is_named(hosts: Hosts, shards: Path, tmp_path: Path) -> None:
    job = Job.create(hosts, tmp_path, shards, NODES)
    with _other_code_on(hosts, "node2", tmp_path):
        assert job.start(job.launch(command=_doctor(job))).wait(90) == 2, job.said()
    assert _verdicts(job)["code"] == "FAILED"
    assert "node2" in next(line for line in job.said().splitlines() if "code" in line)


def test_a_run_begins_with_its_cheap_part(hosts: Hosts, shards: Path, tmp_path: Path) -> None:
    job = Job.create(hosts, tmp_path, shards, NODES)
    with _other_code_on(hosts, "node2", tmp_path):
        runner = job.start(job.deepspeed(job.train()))
        assert wait_gone(job, runner, 60) == 2
    assert job.said().count("stacking-ds: error:") == 1
    said = next(line for line in job.said().splitlines() if "stacking-ds: error:" in line)
    assert "node2" in said
    assert "code" in said
    assert not job.run_dir.exists()
