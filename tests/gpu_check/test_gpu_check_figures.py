"""What `make gpu-check` makes of the outputs of tests, tools and runs, here made up."""

# ruff: noqa: E402 -- the folder of the commands has to be put on the path first

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / ".ci"))

import gpu_parts
import gpu_runs
import gpu_sanitizer
from gpu_ground import Ground, PartError
from gpu_parts import count_tests
from gpu_runs import checkpointing_rows, chosen_kernels, run_figures

from stacking_ds.config.recipe import load_run_config


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    (tmp_path / "work").mkdir()
    return Ground(tmp_path / "work", deadline=time.monotonic() + 120)


# ------------------------------------------------------------------ figures


def _line(step: int, stage: int, loss: float, **more: float) -> dict[str, Any]:
    return {
        "step": step,
        "stage": stage,
        "num_hidden_layers": 2**stage,
        "train/loss": loss,
        "speed/tokens_per_second": 100.0 * step,
        "speed/model_flops_utilization": step / 100,
        "stage/boundary_seconds": 0.5,
        "memory/peak_gib": 1.5,
        "eval/unigram_mlm_loss": 6.1,
        "wall_seconds": 9.0,
        "eval/mlm_loss": loss - 0.5,
    }


RUN = [_line(1, 0, 7.0), _line(2, 0, 6.0), _line(6, 0, 5.0), _line(8, 1, 4.0)]


def test_figures_of_a_run_are_per_stage() -> None:
    first, second = run_figures(RUN, (6, 2))["stages"]
    assert (first["layers"], first["tokens_per_second"], first["heldout_mlm_loss"]) == (1, 200, 4.5)
    assert (second["layers"], second["steps"], second["train_loss"]) == (2, 2, 4.0)


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (RUN[:-1], "stage 1 was not trained to its end"),
        ([*RUN[:-1], _line(7, 1, 4.0)], "stage 1 was not trained to its end"),
        ([*RUN[:-1], _line(8, 1, 6.55)], r"6\.05 .* alone has 6\.1"),
        ([*RUN[:1], _line(2, 0, float("nan")), *RUN[2:]], "not finite"),
        ([*RUN[:-1], _line(8, 1, float("nan"))], "not finite"),
        ([*RUN[:-1], {**RUN[-1], "eval/mlm_loss": float("nan")}], "nan"),
    ],
)
def test_a_run_that_did_not_learn_fails(lines: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(PartError, match=what):
        run_figures(lines, (6, 2))


def test_skipped_tests_are_counted_with_their_reason(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text(
        '<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1">'
        '<testcase name="a"><skipped message="no such tool"/></testcase></testsuite></testsuites>'
    )
    assert count_tests(junit) == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "skipped_because": ["no such tool"],
    }


# ------------------------------------------------------------------ runs


LOG = """attention: flash for up to 4096 tokens (flash 0.1 ms)
step 20/500  loss 7.1
kernels: triton (the model is on a GPU)
LAMB kernel: triton (the masters are on a GPU)
attention: cudnn for up to 8192 tokens (cudnn 0.1 ms)
"""


def test_the_log_says_that_triton_ran() -> None:
    said = chosen_kernels(LOG)
    assert "kernels: triton (the model is on a GPU); LAMB kernel: triton" in said
    assert "attention: flash" in said
    for gone in ("kernels: triton (the model", "LAMB kernel: triton"):
        with pytest.raises(PartError, match="the run's log does not say"):
            chosen_kernels(LOG.replace(gone, gone.replace("triton", "torch")))


def test_runs_at_the_same_time_are_told_apart(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def fake(self: Ground, *arguments: object, limit_seconds: float) -> str:
        command = list(map(str, arguments))
        commands.append(command)
        run_dir = Path(command[command.index("--run-dir") + 1])
        run_dir.mkdir()
        if run_dir.name.startswith("short-"):
            (run_dir / "metrics.jsonl").write_text(json.dumps(_losses(7.0)[0]))
            return ""
        steps = gpu_runs.STAGE_STEPS
        lines = [_line(sum(steps[: i + 1]), i, 7.0 - i) for i in range(3)]
        (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (run_dir / "train.log").write_text(LOG)
        return ""

    monkeypatch.setattr(Ground, "python", fake)
    figures = gpu_runs.lamb_runs(ground)
    assert [row["run"] for row in figures["stages"]] == [
        f"ZeRO {i}" for i in range(4) for _ in "abc"
    ]
    assert "tokens_per_second" not in figures["stages"][0]
    assert [row["log"] == "triton by name" for row in figures["kernels"]] == [False, True] * 2
    runs = [row["run"] for row in gpu_runs.short_runs(ground)["runs"]]
    assert runs == ["bf16", "fp8", "selective", "full", "graphs"]
    commands = [command for command in commands if "optimizer.name=lamb" in command]
    ports = {command[command.index("--master_port") + 1] for command in commands}
    assert len(ports) == 4
    for command in commands:
        assert "data.packing=true" in command
    assert sum("engine.kernels=triton" in command for command in commands) == 2


@pytest.mark.parametrize("named", [{}, gpu_runs.NAMED, gpu_runs.SHORT, {"engine.fp8": "true"}])
def test_the_settings_of_the_runs_are_a_recipes(named: dict[str, Any]) -> None:
    settings = {**(named if named == gpu_runs.SHORT else {**gpu_runs.LAMB, **named})}
    config = load_run_config("demo", [f"{key}={value}" for key, value in settings.items()])
    assert config.data.packing
    assert config.optimizer.name == ("adamw" if named == gpu_runs.SHORT else "lamb")
    steps = gpu_runs.SHORT_STEPS if named == gpu_runs.SHORT else gpu_runs.STAGE_STEPS
    assert config.schedule.warmup_steps + (config.schedule.decay_steps or 0) <= sum(steps)


def _losses(*values: float) -> list[dict[str, Any]]:
    return [{"train/loss": value, "memory/peak_gib": 1.0} for value in values]


def test_activation_checkpointing_has_the_same_losses() -> None:
    runs = {"bf16": _losses(8.0, 7.0), "fp8": _losses(8.1, 7.2), "full": _losses(8.0, 7.001)}
    rows = checkpointing_rows(runs)["runs"]
    assert [row["last_train_loss"] for row in rows] == [7.0, 7.2, 7.001]
    with pytest.raises(PartError, match="activation checkpointing full"):
        checkpointing_rows({**runs, "full": _losses(8.0, 7.1)})
    for broken in (_losses(8.0, float("nan")), []):
        with pytest.raises(PartError, match="the losses of fp8"):
            checkpointing_rows({**runs, "fp8": broken})


# ------------------------------------------------------------------ the sanitizer


LAUNCHED = "launched: a_kernel, b_kernel\n"
CLEAN = f"========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n{LAUNCHED}"
RACES = (
    "========= Error: Race reported between Write access at b_kernel+0x10\n"
    "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
)


def test_what_the_sanitizer_says() -> None:
    assert gpu_sanitizer.verdict("memcheck", "", CLEAN) == (
        "ERROR SUMMARY: 0 errors; a_kernel, b_kernel"
    )
    warned = (
        "========= Warning: Race reported between Read access at b_kernel+0x10\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n"
    )
    assert "(0 errors, 1 warning)" in gpu_sanitizer.verdict("racecheck", "", warned + LAUNCHED)
    unknown = "========= Error: Device not supported. Please refer to the documentation\n"
    assert gpu_sanitizer.verdict("memcheck", "exit code 1", unknown).startswith("skipped: memcheck")


def test_what_the_sanitizer_finds_in_torchs_kernels_is_told() -> None:
    theirs = RACES.replace("b_kernel", "at::native::sort") + LAUNCHED
    said = gpu_sanitizer.verdict("racecheck", "exit code 99", theirs)
    assert "1 error, 1 warning); none in our kernels" in said


@pytest.mark.parametrize(
    ("problem", "output", "what"),
    [
        ("exit code 99", RACES + LAUNCHED, "(1 error, 1 warning), in b_kernel"),
        ("", RACES + LAUNCHED, "in b_kernel"),
        ("exit code 99", RACES, "exit code 99; RACECHECK SUMMARY: 2 hazards"),
        ("", "no such thing", "it did not come to an end"),
        ("", LAUNCHED, "it did not come to an end"),
        ("exit code 1", CLEAN, "exit code 1"),
        ("stopped after 200 s", "", "stopped after 200 s"),
    ],
)
def test_what_the_sanitizer_finds_fails_the_part(problem: str, output: str, what: str) -> None:
    with pytest.raises(PartError) as failure:
        gpu_sanitizer.verdict("racecheck", problem, output)
    assert what in str(failure.value)


def test_without_the_sanitizer_the_part_passes_with_the_reason(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_sanitizer, "find_sanitizer", lambda: None)
    gpu_sanitizer.begin_sanitizer(ground)
    assert gpu_sanitizer.sanitizer(ground) == {
        "skipped": "there is no compute-sanitizer on this machine"
    }


def test_the_sanitizer_is_found_where_cuda_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_sanitizer, "PLACES", ((tmp_path, ("cuda*/bin",)),))
    assert gpu_sanitizer.find_sanitizer() is None
    tool = tmp_path / "cuda-13.0" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch()
    assert gpu_sanitizer.find_sanitizer() == str(tool)


def test_a_sanitizer_that_finds_errors_fails_the_part(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "tool"
    tool.write_text(
        "#!/bin/sh\n"
        f"echo '{LAUNCHED.strip()}'\n"
        "while [ $1 != --log-file ]; do [ $1 = --tool ] && tool=$2; shift; done\n"
        f"[ $tool = racecheck ] && printf '{RACES}' > $2 && exit 99\n"
        f"printf '{CLEAN}' > $2\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_sanitizer, "find_sanitizer", lambda: str(tool))
    gpu_sanitizer.begin_sanitizer(ground)
    with pytest.raises(PartError, match=r"^racecheck: racecheck: .* in b_kernel$"):
        gpu_sanitizer.sanitizer(ground)


@pytest.mark.slow
def test_every_kernel_is_launched_for_the_sanitizer() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "gpu_sanitize.py")],
        check=False,
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    launched = done.stdout.partition("launched: ")[2].split(", ")
    assert len(launched) >= 12


def test_the_halves_of_the_tests_are_counted(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "gpu_test_files", lambda folder: [folder / "test_gpu.py"])

    def fake(ground: Ground, name: str, files: Sequence[Path]) -> dict[str, Any]:
        counts = {"passed": len(list(files)), "failed": 0, "skipped": 1}
        return {**counts, "skipped_because": [f"{name} lack it"]}

    monkeypatch.setattr(gpu_parts, "_pytest", fake)
    figures = gpu_parts.gpu_tests(ground)
    assert [row["passed"] for row in figures["tests"]] == [1, 0]
    assert figures["skipped_because"] == ["engines lack it", "kernels_and_benches lack it"]
