"""`sbatch slurm/pretrain.sbatch` trains to the end, whenever and wherever SLURM lets it."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from stacking_ds.checkpoint import folders, load
from tests.cluster.jobs import TWO_NODES, BatchRun, uninterrupted
from tests.cluster.running import REPOSITORY
from tests.cluster.slurm import Slurm
from tests.prose import write_text
from tests.runs import losses

# Sums over another number of ranks are rounded differently.
_ROUNDING = 1e-5


@pytest.mark.timeout(400)
def test_time_limits_in_a_stage_and_at_a_boundary_change_nothing(
    slurm: Slurm, tmp_path: Path
) -> None:
    run = BatchRun.create(slurm, tmp_path, hold="step:5,boundary:7")
    job = run.submit(TWO_NODES, "--time=1", "--signal=USR1@10")
    run.wait_held("step-5", 4)
    run.wait_held("boundary-7", 4)
    slurm.wait(job, "COMPLETED", timeout=300)
    stops = [step for outcome, step in run.ends() if outcome == "stopped"]
    # on a busy machine a signal may come before an attempt has come to where it is held
    assert {5, 7} <= set(stops), run.job.said()
    assert run.ends() == [*(("stopped", step) for step in stops), ("complete", 10)]
    assert [step for step, _ in run.began()] == [0, *stops]
    assert [verdict["saved"] or 0 for verdict in run.records("judged")] == [*stops, 10]
    assert slurm.job(job)["Restarts"] == str(len(stops))
    run.require_as_uninterrupted()


@pytest.mark.timeout(400)
def test_a_run_goes_on_with_fewer_nodes_and_with_more(slurm: Slurm, tmp_path: Path) -> None:
    run = BatchRun.create(slurm, tmp_path, hold="step:3,step:6")
    with _drained(slurm) as drain:
        drain("node3")
        job = run.submit("--nodes=1-3")
        run.wait_held("step-3", 4)
        drain("node2", "node3")
        slurm.cancel(job, "--signal=USR1")
        run.wait_held("step-6", 2)
        drain()
        slurm.cancel(job, "--signal=USR1")
        run.wait(job, restarts=2)
    assert run.ends() == [("stopped", 3), ("stopped", 6), ("complete", 10)]
    assert run.began() == [
        (0, ["node1", "node2"]),
        (3, ["node1"]),
        (6, ["node1", "node2", "node3"]),
    ]
    assert [record["world_size"] for record in run.records("begun")] == [4, 2, 6]
    whole = losses(uninterrupted(slurm).run_dir)
    assert losses(run.run_dir) == pytest.approx(whole, rel=_ROUNDING)


@contextmanager
def _drained(slurm: Slurm) -> Iterator[Callable[..., None]]:
    """Gives a function that takes these nodes, and no others, out of use for jobs to come."""
    drained: set[str] = set()

    def drain(*nodes: str) -> None:
        for node in drained - set(nodes):
            _update(slurm, node, "State=RESUME")
        for node in set(nodes) - drained:
            _update(slurm, node, "State=DRAIN", "Reason=test")
        drained.clear()
        drained.update(nodes)

    try:
        yield drain
    finally:
        drain()


def _update(slurm: Slurm, node: str, *values: str) -> None:
    result = slurm.run(["scontrol", "update", f"NodeName={node}", *values])
    assert result.returncode == 0, result.stdout


@pytest.mark.timeout(240)
def test_a_job_requeued_from_outside_saves_first(slurm: Slurm, tmp_path: Path) -> None:
    run = BatchRun.create(slurm, tmp_path, hold="step:5")
    job = run.submit(TWO_NODES)
    run.wait_held("step-5", 4)
    slurm.requeue(job)
    run.wait(job, restarts=1)
    assert run.ends() == [("stopped", 5), ("complete", 10)]
    assert [step for step, _ in run.began()] == [0, 5]
    assert "submit it once more" not in run.job.said()
    run.require_as_uninterrupted()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("partition", ["tests", "cancelling"])
def test_a_preempted_run_saves_and_goes_on_when_it_gets_nodes(
    slurm: Slurm, tmp_path: Path, partition: str
) -> None:
    """With PreemptMode=REQUEUE, where SLURM queues it again, and CANCEL, where the script does."""
    run = BatchRun.create(slurm, tmp_path, hold="step:5")
    job = run.submit(TWO_NODES, f"--partition={partition}")
    run.wait_held("step-5", 4)
    others = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    urgent = slurm.submit([*others, "--wrap=sleep 5"], cwd=tmp_path)
    slurm.wait(urgent, "COMPLETED", timeout=90)
    run.wait(job, restarts=1)
    assert run.ends() == [("stopped", 5), ("complete", 10)]
    assert run.began() == [(0, ["node1", "node2"]), (5, ["node1", "node2"])]
    assert "DUE TO PREEMPTION" in run.job.said()
    run.require_as_uninterrupted()


@pytest.mark.timeout(240)
def test_a_job_cancelled_while_it_saves_stays_so_and_goes_on_when_submitted_anew(
    slurm: Slurm, tmp_path: Path
) -> None:
    run = BatchRun.create(slurm, tmp_path, hold="save:6")
    job = run.submit(TWO_NODES)
    run.wait_held("save-6", 4)
    before = folders.latest(run.run_dir)
    assert before is not None
    assert before.name == folders.folder_name(4)
    slurm.cancel(job)
    run.wait_judged(1)
    run.wait(job, "CANCELLED")
    assert load.problems(before) == []
    # the step that followed was done when the ranks were asked to stop
    [(outcome, step)] = run.ends()
    assert (outcome, run.newest_step()) == ("stopped", step)
    assert load.problems(run.run_dir / "checkpoints" / folders.folder_name(step)) == []
    again = run.submit(TWO_NODES)
    run.wait(again)
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert run.began()[1][0] == step
    run.require_as_uninterrupted()


@pytest.mark.timeout(240)
def test_text_becomes_shards_a_run_and_a_held_out_loss_one_after_the_other(
    slurm: Slurm, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "prose.txt", 400)
    jobs = _submit_all(slurm, tmp_path, [text, "--vocab-size=512", "--heldout-fraction=0.1"])
    for job in jobs:
        slurm.wait(job, "COMPLETED", timeout=150)
    tasks, *others = [_times(slurm, job) for job in jobs]
    assert len(tasks) == 2
    for former, later in pairwise([max(tasks), *(times for [times] in others)]):
        assert former[0] <= later[1]
    [line] = [line for line in slurm.log(jobs[2]).splitlines() if line.startswith("{")]
    assert '"mlm_loss": ' in line, slurm.log(jobs[2])
    assert str(tmp_path / "run/checkpoints" / folders.folder_name(10)) in line


def _times(slurm: Slurm, job: int) -> list[tuple[str, str]]:
    """When each task of a job that is COMPLETED has ended, and begun."""
    shown = slurm.run(["scontrol", "-o", "show", "job", str(job)]).stdout
    assert shown.count("JobState=") == shown.count("JobState=COMPLETED"), shown
    return list(
        zip(
            re.findall(r"EndTime=(\S+)", shown), re.findall(r" StartTime=(\S+)", shown), strict=True
        )
    )


def test_what_follows_a_failed_preparation_does_not_run(slurm: Slurm, tmp_path: Path) -> None:
    prepare, pretrain, evaluate = _submit_all(slurm, tmp_path, [tmp_path / "absent.txt"])
    slurm.wait(prepare, "FAILED", timeout=60)
    for job in (pretrain, evaluate):
        slurm.wait(job, "CANCELLED", timeout=60)
        assert slurm.log(job) == ""
    assert not (tmp_path / "run").exists()
    log = slurm.log(prepare)
    assert "absent.txt" in log
    assert log.count("\n") == 1, log


def _submit_all(slurm: Slurm, folder: Path, sources: list[Path | str]) -> list[int]:
    """`slurm/submit.sh` of a site with small nodes; the ids of its jobs."""
    run = BatchRun.create(slurm, folder)
    site = folder / "slurm"
    shutil.copytree(REPOSITORY / "slurm", site)
    with (site / "site.sh").open("a") as file:
        file.write("PREPARE_OPTIONS=(--array=1-2)\nTRAIN_OPTIONS=(--nodes=2)\n")
    environment = {**run.environment, "STACKING_DS_HOME": str(folder)}
    command = [site / "submit.sh", run.recipe, run.run_dir, folder / "new-shards", *sources]
    result = slurm.run(command, cwd=folder, env=environment)
    assert result.returncode == 0, result.stdout
    return [int(part.split()[1]) for part in result.stdout.strip().split(", ")]
