"""The table of a run: true to its metrics, also for a run that is half way."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from stacking_ds.errors import CheckpointError
from stacking_ds.launch import restart_policy
from stacking_ds.run import attempts, directory
from stacking_ds.run.report import run_table
from tests.runs import small_recipe
from tests.tables import same_as_golden


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    directory.write_config(folder, small_recipe(tmp_path, tmp_path))
    return folder


def _write(run_dir: Path, *lines: tuple[int, int, int, float | None]) -> None:
    text = ""
    for step, stage, depth, heldout in lines:
        line = {
            "step": step,
            "stage": stage,
            "num_hidden_layers": depth,
            "train/loss": 7.25,
            "train/mlm_loss": 6.5,
            "stage/tokens": 3000,
            "stage/train_seconds": 1.5,
            "stage/boundary_seconds": 0.25 if stage else 0.0,
            "wall_seconds": 9.0,
        }
        if heldout is not None:
            line |= {"eval/mlm_loss": heldout, "eval/unigram_mlm_loss": 6.5}
        text += json.dumps(line) + "\n"
    (run_dir / "metrics.jsonl").write_text(text)


def test_a_row_a_stage(run_dir: Path) -> None:
    _write(run_dir, (3, 0, 1, None), (4, 0, 1, 6.125), (7, 1, 2, 6.0), (10, 2, 4, 5.875))
    # 1 x 4 + 2 x 3 + 4 x 3 layer-steps, against 4 x 10
    same_as_golden(run_table(run_dir), run_dir, "report.txt")


def test_a_run_half_way_says_so(run_dir: Path) -> None:
    _write(run_dir, (4, 0, 1, 6.125), (6, 1, 2, None))
    rows = [line.split() for line in run_table(run_dir).splitlines()]
    assert rows[2][:6] == ["1", "2", "2", "3,000", "6.500", "-"]
    assert "steps: 6 of 10" in run_table(run_dir)


@pytest.mark.parametrize(("loss", "cell"), [(6.9, "6.900"), (None, "not finite")])
def test_a_run_that_has_diverged_says_so(run_dir: Path, loss: float | None, cell: str) -> None:
    _write(run_dir, (4, 0, 1, 6.125), (7, 1, 2, 6.0))
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    line = {**last, "step": 9, "stage": 2, "num_hidden_layers": 4}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line | {"eval/mlm_loss": loss, "eval/unigram_mlm_loss": None}))
        file.write("\n")
        file.write(json.dumps(line | {"step": 10, "eval/mlm_loss": loss}) + "\n")
    text = run_table(run_dir)
    assert f" {cell} " in text.splitlines()[3]
    assert "state: diverged: held-out MLM loss is " in text


def test_a_run_without_metrics_is_named(run_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="no metrics yet"):
        run_table(run_dir)


def test_attempts_are_told_of_when_there_were_several(run_dir: Path) -> None:
    _write(run_dir, (2, 0, 1, 6.0))
    attempts.begun(run_dir, 0, 4, ["node1", "node2"])
    attempts.ended(run_dir, "stopped", 1, "")
    assert "1 stopped" not in run_table(run_dir)
    attempts.begun(run_dir, 1, 2, ["node1"])
    restart_policy.judge(run_dir, 137)
    attempts.begun(run_dir, 1, 2, ["node1"])
    attempts.ended(run_dir, "complete", 2, "")
    assert "3 attempts: 1 stopped, 1 killed, 1 complete" in run_table(run_dir)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\x00",
        b"[" * 100_000,
        b"[1]",
        b"null",
        b'{"step": 2}',
        b'{"step": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda line: line[:20].decode(errors="replace"),
)
def test_what_is_no_line_of_metrics_is_passed_over_and_told(run_dir: Path, line: bytes) -> None:
    _write(run_dir, (3, 0, 1, None), (4, 0, 1, 6.125))
    whole = run_table(run_dir)
    path = run_dir / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, second, b""]))
    assert run_table(run_dir) == f"{whole}\n{path}: passed over 1 line, which is no record (line 2)"
    path.write_bytes(line)
    with pytest.raises(CheckpointError, match=r"no metrics yet; train it first \(.* passed over 1"):
        run_table(run_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"stage": 99},
        {"stage": -1},
        {"stage": 1},  # it is a step of stage 0
        {"step": 10**6},
        {"stage/train_seconds": 0.0},
        {"stage/tokens": 1e999},
        {"train/loss": "7"},
        {"wall_seconds": float("nan")},
        {"num_hidden_layers": [1]},
    ],
    ids=str,
)
def test_a_line_that_cannot_be_true_is_passed_over(run_dir: Path, change: dict[str, Any]) -> None:
    _write(run_dir, (3, 0, 1, None), (4, 0, 1, 6.125))
    path = run_dir / "metrics.jsonl"
    line = {**json.loads(path.read_text().splitlines()[0]), **change}
    path.write_text(json.dumps(line) + "\n" + path.read_text())
    assert "passed over 1 line, which is no record (line 1)" in run_table(run_dir)


@pytest.mark.timeout(20)
def test_a_run_whose_attempts_are_no_file_is_told_of(run_dir: Path) -> None:
    _write(run_dir, (2, 0, 1, 6.0))
    os.mkfifo(run_dir / "attempts.jsonl")
    assert "attempts.jsonl is damaged: it is not a regular file; move it aside" in run_table(
        run_dir
    )
    (run_dir / "metrics.jsonl").unlink()
    os.mkfifo(run_dir / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged: it is not a regular"):
        run_table(run_dir)
