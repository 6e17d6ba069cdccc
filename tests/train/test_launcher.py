"""The main job through the real `deepspeed` launcher, as users start it."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stacking_ds.checkpoint import folders, manifest
from tests.prose import tiny_shards
from tests.runs import losses, metrics, small_recipe

REPOSITORY = Path(__file__).parents[2]
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def _start(tmp_path: Path, *arguments: str, prefix: list[str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    return subprocess.Popen(
        [*prefix, "train.py", "--recipe", str(tmp_path / "small.yaml"), *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _launcher() -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return [*LAUNCHER, "--master_port", str(free.getsockname()[1])]


@pytest.mark.slow
def test_the_launcher_trains_without_compiling_anything(shards: Path, tmp_path: Path) -> None:
    small_recipe(tmp_path, shards)
    run = tmp_path / "run"
    # with a loader process per rank, as runs of real size have them
    job = _start(
        tmp_path, "--run-dir", str(run), "--set", "data.loader_workers=1", prefix=_launcher()
    )
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert [line["step"] for line in metrics(run)] == list(range(1, 11))
    assert (run / "export" / "model.safetensors").is_file()
    assert not (tmp_path / "extensions").exists(), "a DeepSpeed op was built"


@pytest.mark.slow
def test_a_wrong_recipe_ends_the_launcher_with_one_sentence(shards: Path, tmp_path: Path) -> None:
    small_recipe(tmp_path, shards)
    job = _start(tmp_path, "--set", "optimizer.learning_rat=1", prefix=_launcher())
    output, _ = job.communicate(timeout=200)
    assert job.returncode != 0
    assert output.count("did you mean optimizer.learning_rate") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("number", "prefix"),
    [
        pytest.param(signal.SIGTERM, "launcher", marks=slow),
        pytest.param(signal.SIGINT, "launcher", marks=slow),
        pytest.param(signal.SIGTERM, "torchrun", marks=slow),
        (signal.SIGINT, "alone"),
    ],
)
def test_a_signal_saves_and_resume_goes_on(
    shards: Path, tmp_path: Path, number: signal.Signals, prefix: str
) -> None:
    small_recipe(tmp_path, shards)
    run = tmp_path / "run"
    long = ("--set", "stages.0.steps=2000", "--set", "data.loader_workers=1", "--run-dir", str(run))
    job = _start(tmp_path, *long, prefix=_prefix(prefix))
    _wait_for_a_step(run, job)
    os.killpg(job.pid, number)
    output, _ = job.communicate(timeout=120)
    found = folders.latest(run)
    assert found is not None, output
    step = manifest.read_manifest(found).step
    assert 0 < step < 2000, output
    assert f"stopped at step {step}" in output
    # once, though the launcher passes a Ctrl-C on as SIGTERM
    assert output.count("finishes the step and saves") == 1, output
    assert [line["step"] for line in metrics(run)] == list(range(1, step + 1))
    before = losses(run)

    job = _start(tmp_path, *long, "--resume", prefix=_prefix("alone"))
    _wait_for_a_step(run, job, beyond=step)
    os.killpg(job.pid, signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert losses(run)[:step] == before
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > step


_ON_TERMINAL = """
import os, sys
os.login_tty(0)
os.execv(sys.executable, [sys.executable, "train.py", *sys.argv[1:]])
"""


@slow
def test_a_closed_terminal_saves(shards: Path, tmp_path: Path) -> None:
    small_recipe(tmp_path, shards)
    run = tmp_path / "run"
    ours, theirs = os.openpty()
    long = ("--set", "stages.0.steps=2000", "--set", "data.loader_workers=1", "--run-dir", str(run))
    job = subprocess.Popen(
        [sys.executable, "-c", _ON_TERMINAL, "--recipe", str(tmp_path / "small.yaml"), *long],
        cwd=REPOSITORY,
        stdin=theirs,
    )
    os.close(theirs)
    try:
        deadline = time.monotonic() + 120
        while not ((run / "metrics.jsonl").exists() and losses(run)):
            assert time.monotonic() < deadline
            if select.select([ours], [], [], 0.2)[0]:
                os.read(ours, 2**16)  # its bars, which it would wait with
        os.close(ours)
        assert job.wait(timeout=60) == 0
    finally:
        job.kill()
    found = folders.latest(run)
    assert found is not None
    assert manifest.read_manifest(found).step == len(losses(run))


def test_a_dead_loader_ends_the_run_instead_of_hanging_it(shards: Path, tmp_path: Path) -> None:
    small_recipe(tmp_path, shards)
    run = tmp_path / "run"
    long = ("--set", "stages.0.steps=2000", "--set", "data.loader_workers=2", "--run-dir", str(run))
    job = _start(tmp_path, *long, prefix=_prefix("alone"))
    _wait_for_a_step(run, job)
    dead, _alive = psutil.Process(job.pid).children()  # the second one ignores SIGTERM
    dead.kill()
    try:
        output, _ = job.communicate(timeout=60)
    finally:
        _kill(job)
    assert job.returncode == 1
    assert f"stacking-ds: error: a loader process (pid {dead.pid}) was ended by SIGKILL" in output
    assert "Traceback" not in output


def _kill(job: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(job.pid, signal.SIGKILL)


def _prefix(name: str) -> list[str]:
    if name == "launcher":
        return _launcher()
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [sys.executable]


def _wait_for_a_step(run: Path, job: subprocess.Popen[str], beyond: int = 0) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and job.poll() is None:
        if (run / "metrics.jsonl").exists() and len(losses(run)) > beyond:
            return
        time.sleep(0.2)
    os.killpg(job.pid, signal.SIGKILL)
    pytest.fail(f"no step beyond {beyond}: {job.communicate()[0]}")
