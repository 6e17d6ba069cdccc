"""A small run on emulated hosts: its recipe, and the command that each launcher takes."""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.cluster.hosts import Command, Hosts
from tests.cluster.namespaces import wait_until
from tests.runs import losses, parameters, small_recipe

__all__ = ["REPOSITORY", "Job", "last_end", "require_same", "wait_gone"]

REPOSITORY = Path(__file__).parents[2]
PYTHON = sys.executable
_PORT = "29511"


@dataclass(frozen=True)
class Job:
    """A run of the small recipe; nodes have `slots` ranks each."""

    hosts: Hosts
    folder: Path
    """Where commands start, with the recipe, the hostfile, and `.deepspeed_env`."""
    nodes: Mapping[str, int]
    hold: str = ""
    """Where its ranks wait for a signal or for `release`: see holding/sitecustomize.py."""

    @classmethod
    def create(
        cls,
        hosts: Hosts,
        folder: Path,
        shards: Path,
        nodes: Mapping[str, int],
        *,
        hold: str = "",
    ) -> "Job":
        small_recipe(folder, shards)
        job = cls(hosts, folder, nodes, hold)
        hosts.hostfile(folder / "hosts", nodes)
        lines = [f"{name}={value}\n" for name, value in job.forwarded.items()]
        (folder / ".deepspeed_env").write_text("".join(lines))
        return job

    @property
    def forwarded(self) -> dict[str, str]:
        """What a launcher has to carry to every node: docs/cluster.md."""
        carried = {
            "PATH": self.hosts.environment["PATH"],
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            # a rank here would spend more time on importing it than on training
            "TORCHDYNAMO_DISABLE": "1",
        }
        if not self.hold:
            return carried
        holding = {"HOLD": self.hold, "HOLD_FOLDER": str(self.folder)}
        return carried | holding | {"PYTHONPATH": f"{REPOSITORY / 'tests/cluster/holding'}"}

    def wait_held(self, place: str, ranks: int, timeout: float = 90) -> list[int]:
        """Until `ranks` ranks are held there ("step-5"); their process ids, as their nodes see
        them, in rank order."""
        files = [self.folder / f"{place}.rank{rank}" for rank in range(ranks)]
        wait_until(
            lambda: all(file.exists() and file.read_text() for file in files),
            lambda: f"ranks held at {place}: {self.said()[-2000:]}",
            timeout=timeout,
        )
        return [int(file.read_text()) for file in files]

    def release(self, place: str) -> None:
        (self.folder / f"{place}.released").touch()

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def environment(self) -> dict[str, str]:
        return {**self.hosts.environment, **self.forwarded}

    def train(self, *options: str, run_dir: Path | None = None) -> list[str]:
        """The command that every launcher is given."""
        place = str(run_dir or self.run_dir)
        recipe = str(self.folder / "small.yaml")
        return [str(REPOSITORY / "train.py"), "--recipe", recipe, "--run-dir", place, *options]

    def deepspeed(self, command: Sequence[str], *options: str) -> list[str]:
        return [
            *(PYTHON, "-m", "deepspeed.launcher.runner", "--hostfile", str(self.folder / "hosts")),
            *("--master_port", _PORT, "--log_level", "warning", *options, *command),
        ]

    def launch(self, *options: str, command: Sequence[str] = ()) -> list[str]:
        """`stacking-ds launch` of this run, or of another command."""
        wanted = command or ["train", *self.train()[1:]]
        hostfile = str(self.folder / "hosts")
        return [PYTHON, "-m", "stacking_ds", "launch", "--hostfile", hostfile, *options, *wanted]

    def mpirun(self, command: Sequence[str], carried: Collection[str] = ()) -> list[str]:
        """`carried`: names of variables that go along, besides `forwarded`."""
        hosts = ",".join(f"{node}:{slots}" for node, slots in self.nodes.items())
        options = [part for name in [*self.forwarded, *carried] for part in ("-x", name)]
        return [
            *("mpirun", "--allow-run-as-root", "--host", hosts),
            *("--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"),
            *(*options, PYTHON, *command),
        ]

    def torchrun(self, command: Sequence[str]) -> dict[str, list[str]]:
        """One command for each node."""
        first, slots = next(iter(self.nodes.items()))
        return {
            node: [
                *(PYTHON, "-m", "torch.distributed.run", "--nnodes", str(len(self.nodes))),
                *("--nproc-per-node", str(slots), "--node-rank", str(rank)),
                *("--master-addr", first, "--master-port", _PORT, *command),
            ]
            for rank, node in enumerate(self.nodes)
        }

    def python(self, command: Sequence[str]) -> list[str]:
        return [PYTHON, *command]

    def start(
        self,
        command: Sequence[str],
        node: str = "node1",
        env: Mapping[str, str] | None = None,
    ) -> Command:
        """Start it in the job's folder; what it says is `said`. `env` is added to the job's."""
        log = self.folder / f"{node}.log"
        whole = {**self.environment, **(env or {})}
        return self.hosts.start(node, command, cwd=self.folder, env=whole, log=log)

    def said(self, node: str = "node1") -> str:
        return (self.folder / f"{node}.log").read_text(errors="replace")


def _processes(job: Job) -> list[psutil.Process]:
    """All that the launcher and its ranks are, on any node."""
    folder = str(job.folder)
    return [process for node in job.hosts.names for process in job.hosts.processes(node, folder)]


def wait_gone(job: Job, runner: Command, seconds: float) -> int:
    """Until the launcher has ended, and nothing of the job is left on any node; its exit code."""

    def gone() -> bool:
        return runner.poll() is not None and not _processes(job)

    wait_until(gone, lambda: f"{_processes(job)} left\n{job.said()}", timeout=seconds)
    return int(runner.returncode)


def require_same(run_dir: Path, whole: Path) -> None:
    """Losses and weights are those of another run, bit for bit."""
    assert losses(run_dir) == losses(whole)
    ours, theirs = parameters(run_dir), parameters(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def last_end(job: Job) -> dict[str, Any]:
    """The record of how the run's last attempt ended."""
    lines = (job.run_dir / "attempts.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == "ended"][-1]
