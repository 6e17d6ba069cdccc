"""The batch scripts, with programs of the test's in place of SLURM's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stacking_ds.run import attempts
from stacking_ds.run.attempts import begun, ended

SLURM = Path(__file__).parents[2] / "slurm"
STACKING_DS = Path(sys.executable).with_name("stacking-ds")
JOB = "JobId=7 JobState={state} Reason={reason} Restarts={restarts} PreemptTime={preempted} Power="
RUNNING = JOB.format(state="RUNNING", reason="None", restarts=0, preempted="None")
MOMENT = "2026-11-26T06:04:02"


def ending(reason: str = "None", restarts: int = 0, preempted: str = "None") -> str:
    """What SLURM 22.05 shows of a job that it is ending."""
    return JOB.format(state="COMPLETING", reason=reason, restarts=restarts, preempted=preempted)


class Site:
    """A folder where a person stands, and the programs that scripts find."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.run = folder, folder / "bin", folder / "run"
        self.bin.mkdir()
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "STACKING_DS_HOME": str(SLURM.parent),
            "STACKING_DS": "stacking-ds",
        }
        self.job = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_ON_NODE": "16",
            "SLURM_SUBMIT_DIR": str(folder),
        }
        self.program("scontrol", f"[ $1 = requeue ] && touch {folder}/requeued || cat {folder}/job")

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def bash(self, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *words],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def pretrain(
        self, status: int, verdict: int, job: str = RUNNING, **environment: str
    ) -> tuple[int, bool]:
        """The batch script where `srun` ends with `status`, and `stacking-ds again` with `verdict`;
        its exit code, and whether it queued the job again."""
        (self.folder / "job").write_text(f"{job}\n")
        self.program("srun", f"exit {status}")
        self.program("stacking-ds", f'echo "$@" >>{self.folder}/asked; exit {verdict}')
        script = SLURM / "pretrain.sbatch"
        done = self.bash(script, "base", self.run, **self.job, **environment)
        assert (self.folder / "asked").read_text() == f"again {self.run} --exit-status {status}\n"
        return done.returncode, (self.folder / "requeued").exists()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


# ------------------------------------------------------------------ pretrain.sbatch


@pytest.mark.parametrize(
    ("status", "verdict", "code", "requeued"),
    [
        (0, 0, 1, True),  # stopped
        (4, 0, 4, True),
        (0, 1, 1, False),  # given up
        (3, 1, 3, False),
        (0, 2, 1, False),  # the records cannot be read
        (0, 3, 0, False),  # complete
        (143, 3, 0, False),
    ],
)
def test_the_job_ends_as_the_run_did(
    site: Site, status: int, verdict: int, code: int, requeued: bool
) -> None:
    assert site.pretrain(status, verdict) == (code, requeued)


@pytest.mark.parametrize(
    ("words", "train"),
    [
        (("base", "r", "--set", "a=1"), "--recipe base --run-dir r --resume --set a=1"),
        (("--resume", "r", "--set", "a=1"), "--resume r --set a=1"),
    ],
)
def test_a_run_is_named_by_its_recipe_or_by_itself(
    site: Site, words: tuple[str, ...], train: str
) -> None:
    site.program("srun", f'echo "${{@: -{len(train.split()) + 1}}}" >{site.folder}/trained')
    site.program("stacking-ds", f'echo "$@" >{site.folder}/asked; exit 3')
    assert site.bash(SLURM / "pretrain.sbatch", *words, **site.job).returncode == 0
    assert (site.folder / "trained").read_text() == f"train {train}\n"
    assert (site.folder / "asked").read_text() == "again r --exit-status 0\n"


@pytest.mark.parametrize(
    ("job", "requeued"),
    [
        (ending("TimeLimit"), True),
        (ending(), False),  # cancelled
        (ending(restarts=1), False),  # requeued from outside, or preempted with REQUEUE
        (ending(restarts=1, preempted=MOMENT), False),
        (ending(preempted=MOMENT), True),  # preempted with CANCEL
    ],
)
def test_a_job_that_slurm_ends_is_queued_again_unless_it_was_cancelled_or_is_already(
    site: Site, job: str, requeued: bool
) -> None:
    assert site.pretrain(0, 0, job) == (1, requeued)


def test_restarts_before_this_one_do_not_count(site: Site) -> None:
    job = ending(restarts=2, preempted=MOMENT)
    assert site.pretrain(0, 0, job, SLURM_RESTART_COUNT="2") == (1, True)


@pytest.mark.parametrize(
    ("outcome", "code", "requeued"),
    [("complete", 0, False), ("stopped", 143, True), ("user_error", 143, False)],
)
def test_the_script_understands_the_commands_exit_code(
    site: Site, outcome: attempts.Outcome, code: int, requeued: bool
) -> None:
    begun(site.run, 0, 1, [])
    ended(site.run, outcome, 9, "why")
    site.program("srun", "exit 143")
    (site.folder / "job").write_text(f"{RUNNING}\n")
    places = {**site.job, "STACKING_DS": str(STACKING_DS)}
    done = site.bash(SLURM / "pretrain.sbatch", "base", site.run, **places)
    assert done.returncode == code, done.stderr
    assert (site.folder / "requeued").exists() is requeued


def test_a_job_that_slurm_does_not_queue_again_says_so(site: Site) -> None:
    site.program("scontrol", "exit 1")
    site.program("srun", "exit 0")
    site.program("stacking-ds", "exit 0")
    done = site.bash(SLURM / "pretrain.sbatch", "base", site.run, **site.job)
    assert done.returncode == 1
    assert "submit it once more" in done.stderr


# ------------------------------------------------------------------ site.sh and submit.sh


@pytest.mark.parametrize(
    ("given", "ranks", "cpus"),
    [
        ({}, 1, 16),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8, 2),
        ({"SLURM_GPUS_ON_NODE": "8", "RANKS_PER_NODE": "4"}, 4, 4),
    ],
)
def test_a_node_has_a_rank_for_each_gpu(
    site: Site, given: dict[str, str], ranks: int, cpus: int
) -> None:
    code = 'source "$1"; echo "${RANKS[@]}"'
    done = site.bash("-c", code, "bash", SLURM / "site.sh", **site.job, **given)
    assert done.stdout == f"--ntasks-per-node={ranks} --cpus-per-task={cpus}\n", done.stderr


@pytest.mark.parametrize(
    ("given", "node_has_gpus", "code", "told"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, True, 0, "8 ranks on each of 2 nodes, with 8 GPUs there"),
        ({}, True, 2, "node1 has GPUs and the job has asked for none: give sbatch --gpus-per-node"),
        ({"RANKS_PER_NODE": "4"}, True, 0, "4 ranks on each of 2 nodes; SLURM has given them no"),
        ({}, False, 0, "1 ranks on each of 2 nodes; SLURM has given them no GPU"),
    ],
)
@pytest.mark.parametrize("script", ["pretrain.sbatch", "evaluate.sbatch"])
def test_a_job_says_first_what_it_runs_on_and_leaves_no_gpu_idle(
    site: Site, script: str, given: dict[str, str], node_has_gpus: bool, code: int, told: str
) -> None:
    site.program("ls", f"exit {0 if node_has_gpus else 2}")  # of the GPUs' device files
    site.program("srun", f"touch {site.folder}/trained")
    site.program("stacking-ds", "exit 3")  # the run is complete
    job = {**site.job, "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "node1"}
    done = site.bash(SLURM / script, "base", site.run, **job, **given)
    assert done.returncode == code, done.stderr
    assert (done.stdout + done.stderr).startswith(told)
    assert (site.folder / "trained").exists() is (code == 0)


def test_the_command_is_the_checkouts_wherever_a_person_stands(site: Site) -> None:
    code = 'source "$1"; echo "$STACKING_DS"'
    words = ("-c", code, "bash", SLURM / "site.sh")
    assert site.bash(*words, STACKING_DS="").stdout == f"{SLURM.parent}/.venv/bin/stacking-ds\n"
    places = {"STACKING_DS": "", "STACKING_DS_HOME": "", "SLURM_SUBMIT_DIR": "/somewhere"}
    system = {"PATH": "/usr/bin:/bin"}
    stands = site.bash(*words, **places, **system)
    assert stands.stdout == "/somewhere/.venv/bin/stacking-ds\n"
    chosen = {**places, "STACKING_DS": "/in/the/container/stacking-ds"}
    assert site.bash(*words, **chosen, **system).stdout == "/in/the/container/stacking-ds\n"
    # an installed package has no checkout
    site.program("stacking-ds", "exit 0")
    system["PATH"] += f":{site.bin}"
    assert site.bash(*words, **places, **system).stdout == f"{site.bin}/stacking-ds\n"


WORDS = ("base", "runs/base", "shards", "books.parquet")


def test_submit_keeps_the_persons_folder_and_finds_the_scripts(site: Site) -> None:
    said = site.folder / "said"
    site.program("sbatch", f'echo "$PWD $STACKING_DS_HOME $@" >>{said}; wc -l <{said}')
    site.program("stacking-ds", f'echo "$@" >>{site.folder}/checked')
    done = site.bash(SLURM / "submit.sh", *WORDS, STACKING_DS_HOME="")
    assert done.stdout == "prepare 1, pretrain 2, evaluate 3\n", done.stderr
    place = f"{site.folder} {SLURM.parent} --parsable --kill-on-invalid-dep=yes"
    assert said.read_text().splitlines() == [
        f"{place} {SLURM}/prepare.sbatch books.parquet --out shards",
        f"{place} --dependency=afterok:1 {SLURM}/pretrain.sbatch base runs/base "
        "--set data.path=shards",
        f"{place} --nodes=1 --dependency=afterok:2 {SLURM}/evaluate.sbatch runs/base",
    ]
    assert (site.folder / "checked").read_text() == (
        "train --dry-run --without-data --recipe base --run-dir runs/base --resume "
        "--set data.path=shards\n"
    )


def test_what_a_dry_run_refuses_is_not_submitted(site: Site) -> None:
    site.program("sbatch", f"touch {site.folder}/submitted; echo 1")
    recipe, *rest = WORDS
    places = {"STACKING_DS": str(STACKING_DS)}
    done = site.bash(SLURM / "submit.sh", f"{recipe}-of-nobody", *rest, **places)
    assert done.returncode == 2
    assert "no recipe 'base-of-nobody'" in done.stderr
    assert "nothing is submitted" in done.stderr
    assert not (site.folder / "submitted").exists()


def test_jobs_are_submitted_all_or_none(site: Site) -> None:
    site.program("stacking-ds", "exit 0")
    site.program("scancel", f'echo "$@" >{site.folder}/cancelled')
    site.program(
        "sbatch",
        f"[ ! -e {site.folder}/two ] || exit 1; "
        f"[ ! -e {site.folder}/one ] || touch {site.folder}/two; "
        f"touch {site.folder}/one; [ -e {site.folder}/two ] && echo 12 || echo 11",
    )
    done = site.bash(SLURM / "submit.sh", *WORDS)
    assert done.returncode == 1
    assert (site.folder / "cancelled").read_text() == "11 12\n"
