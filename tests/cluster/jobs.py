"""The small run as SLURM jobs: `slurm/pretrain.sbatch`, and what became of it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stacking_ds.checkpoint import folders, manifest
from tests.cluster.hosts import wait_until
from tests.cluster.running import REPOSITORY, Job
from tests.cluster.slurm import Slurm
from tests.prose import tiny_shards
from tests.runs import losses, parameters

__all__ = ["RANKS_PER_NODE", "TWO_NODES", "BatchRun", "uninterrupted"]

TWO_NODES = "--nodes=2"
RANKS_PER_NODE = 2
_COMMAND = Path(sys.executable).with_name("stacking-ds")
_ATTEMPT_SECONDS = 120  # of a busy machine: a quiet one needs a tenth


@cache
def uninterrupted(slurm: Slurm) -> "BatchRun":
    """The run that nothing happened to, by plain `srun`, on two nodes with two ranks each."""
    folder = slurm.directory / "uninterrupted"
    folder.mkdir()
    run = BatchRun(slurm, Job.create(slurm.hosts, folder, tiny_shards(folder), {}))
    options = ["--recipe", run.recipe, "--run-dir", run.run_dir]
    command = [
        "srun",
        TWO_NODES,
        f"--ntasks-per-node={RANKS_PER_NODE}",
        _COMMAND,
        "train",
        *options,
    ]
    result = slurm.run(command, env=run.environment, timeout=_ATTEMPT_SECONDS)
    assert result.returncode == 0, result.stdout
    return run


@dataclass(frozen=True)
class BatchRun:
    """A run in a folder of its own; the jobs that train it write one log."""

    slurm: Slurm
    job: Job

    @classmethod
    def create(cls, slurm: Slurm, folder: Path, *, hold: str = "") -> "BatchRun":
        """Shards are those of `uninterrupted`; `hold` is as for `Job`."""
        [shards] = uninterrupted(slurm).job.folder.glob("shards-*")
        return cls(slurm, Job.create(slurm.hosts, folder, shards, {}, hold=hold))

    @property
    def run_dir(self) -> Path:
        return self.job.run_dir

    @property
    def recipe(self) -> Path:
        return self.job.folder / "small.yaml"

    @property
    def environment(self) -> dict[str, str]:
        site = {
            "STACKING_DS": str(_COMMAND),
            "STACKING_DS_HOME": str(REPOSITORY),
            "RANKS_PER_NODE": str(RANKS_PER_NODE),
        }
        return {**self.slurm.environment, **self.job.forwarded, **site}

    def submit(self, *options: str, recipe: Path | None = None, train: Sequence[str] = ()) -> int:
        """`sbatch` with options, and for the command those in `train`; the job's id."""
        script = REPOSITORY / "slurm/pretrain.sbatch"
        command = [f"--output={self.job.folder}/node1.log", script, recipe or self.recipe]
        return self.slurm.submit(
            [*options, *command, self.run_dir, *train], cwd=self.job.folder, env=self.environment
        )

    def wait_held(self, place: str, ranks: int) -> None:
        self.job.wait_held(place, ranks, timeout=_ATTEMPT_SECONDS)

    def wait_judged(self, times: int) -> None:
        """Until the batch script has asked so many times whether to queue again."""
        wait_until(
            lambda: len(self.records("judged")) == times,
            lambda: f"{times} verdicts: {self.job.said()}",
            timeout=_ATTEMPT_SECONDS,
        )

    def wait(self, job: int, state: str = "COMPLETED", *, restarts: int = 0) -> dict[str, str]:
        """Until the job has ended for good, which has to be in that state after so many restarts;
        its fields."""
        self.slurm.wait(job, state, timeout=_ATTEMPT_SECONDS, restarts=restarts)
        # a job that is to be queued again is so before its nodes are free
        self.slurm.wait_node("node1", "IDLE", timeout=60)
        fields = self.slurm.job(job)
        assert fields["JobState"] == state, f"{fields}\n{self.job.said()}"
        return fields

    def records(self, event: str) -> list[dict[str, Any]]:
        """Those of an event in attempts.jsonl."""
        lines = (self.run_dir / "attempts.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == event]

    def ends(self) -> list[tuple[str, int]]:
        """Outcome and step of the attempts that came to an end of their own."""
        return [(record["outcome"], record["step"]) for record in self.records("ended")]

    def began(self) -> list[tuple[int, list[str]]]:
        """Step and nodes of all attempts."""
        return [(record["step"], record["hosts"]) for record in self.records("begun")]

    def newest_step(self) -> int:
        """Of the checkpoint that `latest` leads to."""
        found = folders.latest(self.run_dir)
        assert found is not None
        return manifest.read_manifest(found).step

    def require_as_uninterrupted(self) -> None:
        """Losses and final weights are the same, bit by bit."""
        whole = uninterrupted(self.slurm)
        assert losses(self.run_dir) == losses(whole.run_dir), self.job.said()
        ours, theirs = parameters(self.run_dir), parameters(whole.run_dir)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
