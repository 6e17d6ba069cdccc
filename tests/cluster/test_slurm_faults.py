"""Nodes that SLURM loses, runs that fail for reasons of their own, and `deepspeed` in SLURM."""

from pathlib import Path

import pytest

from tests.cluster.hosts import wait_until
from tests.cluster.jobs import TWO_NODES, BatchRun, uninterrupted
from tests.cluster.slurm import Slurm
from tests.runs import losses


@pytest.mark.timeout(300)
def test_a_node_whose_slurmd_dies_is_replaced(slurm: Slurm, tmp_path: Path) -> None:
    run = BatchRun.create(slurm, tmp_path, hold="step:6")
    job = run.submit(TWO_NODES)
    run.wait_held("step-6", 4)
    slurm.kill_slurmd("node2")
    run.wait(job, restarts=1)
    # the ranks were still there, and could save
    assert run.ends() == [("stopped", 6), ("complete", 10)]
    assert run.began() == [(0, ["node1", "node2"]), (6, ["node1", "node3"])]
    run.require_as_uninterrupted()
    slurm.start_slurmd("node2")
    wait_until(
        lambda: not slurm.hosts.processes("node2", "stacking"),
        lambda: f"left on node2: {slurm.hosts.processes('node2')}",
        timeout=60,
    )


@pytest.mark.timeout(300)
def test_a_node_that_crashes_is_replaced(slurm: Slurm, tmp_path: Path) -> None:
    run = BatchRun.create(slurm, tmp_path, hold="step:6")
    job = run.submit(TWO_NODES)
    run.wait_held("step-6", 4)
    slurm.hosts.crash("node2")
    run.job.release("step-6")
    run.wait(job, restarts=1)
    assert run.ends() == [("lost", 5), ("complete", 10)]
    assert run.began() == [(0, ["node1", "node2"]), (4, ["node1", "node3"])]
    assert "on node2" in run.records("ended")[0]["message"]
    run.require_as_uninterrupted()


@pytest.mark.timeout(240)
def test_a_run_that_fails_twice_at_a_step_is_given_up(slurm: Slurm, tmp_path: Path) -> None:
    run = BatchRun.create(slurm, tmp_path)
    # each step makes the weights some hundred times larger
    values = ["optimizer.learning_rate=100", "optimizer.weight_decay=1"]
    job = run.submit(TWO_NODES, train=[part for value in values for part in ("--set", value)])
    assert run.wait(job, "FAILED", restarts=1)["ExitCode"] == "3:0"
    [(outcome, step), again] = run.ends()
    assert outcome == "not_finite"
    assert again == (outcome, step)
    assert [begun for begun, _ in run.began()] == [0, 4]
    assert [verdict["again"] for verdict in run.records("judged")] == [True, False]
    last = run.job.said().splitlines()[-1]
    assert f"failed at step {step} twice" in last
    assert "the loss is" in last


def test_a_job_that_a_person_has_to_mend_is_not_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    run = BatchRun.create(slurm, tmp_path)
    job = run.submit(TWO_NODES, recipe=tmp_path / "absent.yaml")
    assert run.wait(job, "FAILED")["ExitCode"] == "2:0"
    told = [line for line in run.job.said().splitlines() if "absent.yaml" in line]
    assert len(told) == 1, run.job.said()
    assert told[0].startswith("stacking-ds: error: no recipe")
    assert not run.run_dir.exists()


@pytest.mark.timeout(240)
def test_deepspeed_starts_ranks_in_an_allocation(slurm: Slurm, tmp_path: Path) -> None:
    run = BatchRun.create(slurm, tmp_path)
    slurm.hosts.hostfile(tmp_path / "hosts", {"node1": 2, "node2": 2})
    place = ["--launcher", "slurm", "--no_ssh_check", "--master_addr", slurm.hosts.address("node1")]
    command = [
        "salloc",
        TWO_NODES,
        "--ntasks-per-node=2",
        *run.job.deepspeed(run.job.train(), *place),
    ]
    result = slurm.run(command, cwd=tmp_path, env=run.environment, timeout=120)
    assert result.returncode == 0, result.stdout
    assert losses(run.run_dir) == losses(uninterrupted(slurm).run_dir)
