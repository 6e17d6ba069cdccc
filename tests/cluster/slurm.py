"""A SLURM cluster on emulated hosts: the controller in node1, one slurmd in every host."""

import re
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

from tests.cluster import hosts as emulated
from tests.cluster.hosts import Command, Hosts
from tests.cluster.namespaces import SYSTEM_PATH, missing_program, program, wait_until
from tests.cluster.settings import write_slurm_settings

__all__ = ["DAEMONS", "ENDED", "Slurm", "missing"]

DAEMONS = ("munged", "slurmctld", "slurmd")
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
)

_CLIENTS = ("sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
_HEAD = "node1"
_LOG_CHARACTERS = 3000


def missing() -> str | None:
    """Why there can be no SLURM on emulated hosts here; None where there can."""
    return emulated.missing() or missing_program([*DAEMONS, *_CLIENTS])


class Slurm:
    """Partitions of all `hosts`: `tests`, `cancelling` and, before those, `urgent`.

    The times are SLURM's KillWait, cred_expire and SlurmdTimeout.
    """

    def __init__(
        self,
        hosts: Hosts,
        *,
        cpus: int = 4,
        kill_wait_seconds: int = 30,
        requeue_seconds: int = 5,
        slurmd_timeout_seconds: int = 10,
    ) -> None:
        self.hosts = hosts
        self._values = {
            "cpus": cpus,
            "kill_wait_seconds": kill_wait_seconds,
            "requeue_seconds": requeue_seconds,
            "slurmd_timeout_seconds": slurmd_timeout_seconds,
        }
        self._directory: Path | None = None
        self._daemons: dict[tuple[str, str], Command] = {}

    @property
    def directory(self) -> Path:
        """Where settings, state and the daemons' logs are, until `down`."""
        assert self._directory is not None, "SLURM is not up"
        return self._directory

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment in which commands and submitted jobs start."""
        return {**self.hosts.environment, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def up(self) -> None:
        """Start all daemons and wait until every node is idle."""
        assert self._directory is None, "SLURM is up"
        self._directory = Path(tempfile.mkdtemp(prefix="slurm-", dir=self.hosts.directory))
        write_slurm_settings(self._directory, self.hosts.names, self._values)
        self.start_daemons()
        self._wait_idle()

    def down(self) -> None:
        """End all jobs and daemons. Again is no harm."""
        if self._directory is not None:
            self.hosts.mend()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        self._directory = None

    def run(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> CompletedProcess[str]:
        """Run a command such as `srun` in node1; as `Hosts.run`, but it finds this cluster."""
        whole = self.environment if env is None else env
        return self.hosts.run(_HEAD, command, cwd=cwd, env=whole, timeout=timeout)

    def submit(
        self,
        script: Path | Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """`sbatch` a script, or a list of options, script and its arguments; the job's id."""
        arguments = [script] if isinstance(script, Path) else script
        output = self._client("sbatch", "--parsable", *arguments, cwd=cwd, env=env)
        return int(output.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """The fields that `scontrol show job` shows."""
        return _fields(self._client("scontrol", "-o", "show", "job", str(job)))

    def node(self, node: str) -> dict[str, str]:
        """The fields that `scontrol show node` shows."""
        return _fields(self._client("scontrol", "-o", "show", "node", node))

    def queue(self) -> dict[int, str]:
        """The states of the jobs that have not ended, by id."""
        lines = self._client("squeue", "--noheader", "--format=%A %T").splitlines()
        return {int(job): state for job, state in (line.split() for line in lines)}

    def log(self, job: int) -> str:
        """What the job has written so far."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(
        self,
        job: int,
        states: str | Collection[str] = ENDED,
        *,
        timeout: float,
        restarts: int | None = None,
    ) -> dict[str, str]:
        """Wait for one of the states (after so many restarts); the job's fields then.

        Raises:
            AssertionError: with the job's fields and the end of its log, after `timeout` seconds,
                or earlier if the job has ended in another state and stays so.
        """
        wanted = [states] if isinstance(states, str) else list(states)
        deadline = time.monotonic() + timeout
        polls_after_end = 0
        while True:
            fields = self.job(job)
            restarted = restarts is None or int(fields["Restarts"]) == restarts
            if fields["JobState"] in wanted and restarted:
                return fields
            # a job that SLURM is about to requeue may be seen in an end state
            polls_after_end = polls_after_end + 1 if fields["JobState"] in ENDED else 0
            if polls_after_end > 10 or time.monotonic() > deadline:
                log = self.log(job)[-_LOG_CHARACTERS:]
                raise AssertionError(f"job {job} is not {wanted}: {fields}\nits log:\n{log}")
            time.sleep(0.5)

    def cancel(self, job: int, *options: str) -> None:
        """`scancel` with options such as `--signal=USR1`; without, it ends the job."""
        self._client("scancel", *options, str(job))

    def requeue(self, job: int) -> None:
        self._client("scontrol", "requeue", str(job))

    def kill_slurmd(self, node: str) -> None:
        """Kill a node's slurmd; the tasks go on, and the controller hears nothing."""
        daemon = self._daemons.pop((node, "slurmd"))
        daemon.kill()
        daemon.wait()

    def start_slurmd(self, node: str) -> None:
        conf = self.directory / "slurm.conf"
        self._start(node, "slurmd", "-D", "-N", node, "-f", conf)

    def start_daemons(self) -> None:
        """Start the daemons that do not run, and wait for the controller to answer."""
        munge = [f"--{what}-file={self.directory}/munge.{what}" for what in ("key", "pid", "log")]
        socket = f"--socket={self.directory}/munge.socket"
        seed = f"--seed-file={self.directory}/munge.seed"
        self._start(_HEAD, "munged", "--foreground", "--force", *munge, socket, seed)
        self._start(_HEAD, "slurmctld", "-D", "-f", self.directory / "slurm.conf")
        for node in self.hosts.names:
            self.start_slurmd(node)
        wait_until(self._answers, lambda: f"slurmctld answers:\n{self._logs()}", interval=0.1)

    def wait_node(self, node: str, state: str, *, timeout: float) -> dict[str, str]:
        """Wait until a node is in exactly this state, such as IDLE, MIXED or DOWN*."""

        def record() -> dict[str, str] | None:
            fields = self.node(node)
            return fields if fields["State"] == state else None

        return wait_until(
            record,
            lambda: f"{node} is {state}: {self.node(node)}\n{self._logs()}",
            timeout=timeout,
            interval=0.2,
        )

    def mend(self) -> None:
        """End all jobs; plug in and boot all hosts and start what daemons are lost."""
        if self._answers():
            self._client("scancel", "--user=root")
        self.hosts.mend(spare=DAEMONS)
        self.start_daemons()
        # a crashed controller remembers jobs that nobody could cancel
        self._client("scancel", "--user=root")
        wait_until(lambda: not self.queue(), lambda: f"all jobs end: {self.queue()}", timeout=60)
        self.hosts.mend(spare=DAEMONS)
        self._wait_idle()

    def _wait_idle(self) -> None:
        for node in self.hosts.names:
            self.wait_node(node, "IDLE", timeout=60)

    def _start(self, node: str, daemon: str, *arguments: str | Path) -> None:
        """Start a daemon in a host, unless it runs."""
        running = self._daemons.get((node, daemon))
        if running is not None and running.poll() is None:
            return
        self._daemons[node, daemon] = self.hosts.start(
            node,
            [program(daemon), *arguments],
            env={"PATH": SYSTEM_PATH, "SLURM_CONF": str(self.directory / "slurm.conf")},
            log=self.directory / f"{daemon}-{node}.out",
        )

    def _client(
        self,
        *command: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        result = self.run(command, cwd=cwd, env=env)
        assert result.returncode == 0, f"{result.args} failed:\n{result.stdout}\n{self._logs()}"
        return result.stdout

    def _answers(self) -> bool:
        if not self.hosts.is_up(_HEAD):
            return False
        return self.run(["scontrol", "ping"], timeout=20).returncode == 0

    def _logs(self) -> str:
        """The ends of what the daemons have written."""
        return "\n".join(
            f"{log.name}:\n{log.read_text(errors='replace')[-_LOG_CHARACTERS:]}"
            for log in sorted(self.directory.glob("*.out"))
        )


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line.splitlines()[0]))
