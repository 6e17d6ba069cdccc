"""Where a run's numbers go: metrics.jsonl, TensorBoard and train.log, once each, rank 0 only."""

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stacking_ds.errors import CheckpointError
from stacking_ds.run.metrics_file import drop_after, read_metrics
from stacking_ds.schedule.stages import StageSchedule
from stacking_ds.train.sinks import Monitor

SCHEDULE = StageSchedule.from_depths([(2, 3), (4, 3)])


def _line(step: int, **more: Any) -> dict[str, Any]:
    stage = SCHEDULE.at(step - 1)
    return {
        "step": step,
        "stage": stage.index,
        "num_hidden_layers": stage.num_hidden_layers,
        "train/loss": 10.0 - step,
        "train/mlm_loss": 9.5 - step,
        "optim/learning_rate": 1e-3,
        "speed/tokens_per_second": 1000.0,
        "speed/remaining_seconds": 3.0,
        **more,
    }


def _write(run_dir: Path, steps: range, completed_steps: int = 0, **more: Any) -> str | None:
    """As a run that goes on does; what it has to say of the lines before."""
    damage = drop_after(run_dir, completed_steps)
    with Monitor(run_dir, SCHEDULE, completed_steps=completed_steps, enabled=True) as monitor:
        for step in steps:
            monitor.stage(SCHEDULE.at(step - 1), step - 1)
            monitor.step(step, 10.0 - step)
            monitor.record(_line(step, **more))
    return damage


def _scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_number_arrives_everywhere_once(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 7), **{"eval/mlm_loss": 5.5})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert _scalars(tmp_path, "train/loss") == [(step, 10.0 - step) for step in range(1, 7)]
    depths = [depth for _, depth in _scalars(tmp_path, "progress/num_hidden_layers")]
    assert depths == [2, 2, 2, 4, 4, 4]
    log = (tmp_path / "train.log").read_text()
    assert log.count("step 5/6  stage 1 (4 layers)  train MLM loss 4.5000") == 1
    assert "held-out MLM loss 5.5000" in log


def test_steps_taken_again_replace_the_lost_ones(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 6))
    _write(tmp_path, range(4, 7), completed_steps=3, **{"train/loss": 0.5})
    lines = list(read_metrics(tmp_path))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["train/loss"] for line in lines] == [9.0, 8.0, 7.0, 0.5, 0.5, 0.5]
    assert [step for step, _ in _scalars(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    _write(tmp_path, range(4, 5), completed_steps=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", [b"\xff\x00", b"[" * 100_000, b"[1]", b'{"step": "2"}', b"\0"])
def test_a_damaged_line_costs_that_line_and_is_told(tmp_path: Path, damage: bytes) -> None:
    _write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, *rest, b""]))
    said = _write(tmp_path, range(4, 5), completed_steps=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert said == f"{path}: passed over 1 line, which is no record (line 2)"


@pytest.mark.timeout(20)
def test_no_fifo_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "train.log")
    _write(tmp_path, range(1, 4))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert f"are not written to {tmp_path / 'train.log'}" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="is damaged: it is not a regular file; move it"):
        _write(tmp_path, range(4, 5), completed_steps=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_valid_json(tmp_path: Path, value: float) -> None:
    _write(tmp_path, range(1, 2), **{"optim/grad_norm": value})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["optim/grad_norm"] is None


@pytest.mark.parametrize("name", ["eval/mlm_loss", "train/mlm_loss", "speed/remaining_seconds"])
def test_no_number_that_is_not_finite_ends_a_run(tmp_path: Path, name: str) -> None:
    _write(tmp_path, range(1, 3), **{"eval/mlm_loss": 5.5, name: math.nan})
    assert [line[name] for line in read_metrics(tmp_path)] == [None, None]
    log = (tmp_path / "train.log").read_text()
    assert log.count("MLM loss not finite") == (0 if "speed" in name else 2)


@pytest.mark.parametrize("values", [[math.nan], [], [math.inf, 1e30], [-1e25, math.nan, 1.0]])
def test_a_histogram_may_have_any_values(tmp_path: Path, values: list[float]) -> None:
    with Monitor(tmp_path, SCHEDULE, completed_steps=0, enabled=True) as monitor:
        monitor.record(_line(1), {"optim/trust_ratio": values})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [value for value in values if not math.isnan(value)]
    assert events.Tags()["histograms"] == (["optim/trust_ratio"] if shown else [])
    if shown:
        assert events.Histograms("optim/trust_ratio")[0].histogram_value.num == len(shown)


def _evaluated(heldout: float) -> dict[str, float]:
    return {"eval/mlm_loss": heldout, "eval/unigram_mlm_loss": 6.4, "train/mlm_loss": heldout}


def test_a_run_that_diverges_and_recovers_is_told_of_once_each(tmp_path: Path) -> None:
    with Monitor(tmp_path, SCHEDULE, completed_steps=0, enabled=True) as monitor:
        for step, heldout in enumerate([6.5, 6.1, 6.9, 6.8, 6.0, 6.7], start=1):
            monitor.record(_line(step, **_evaluated(heldout)))
        monitor.conclude()
    log = (tmp_path / "train.log").read_text()
    assert log.count("the run has diverged: held-out MLM loss is 6.900 at step 3") == 1
    assert log.count("the run has recovered: held-out MLM loss is 6.000 at step 5") == 1
    assert log.count("the run has diverged: held-out MLM loss is 6.700 at step 6") == 2
    assert log.count("the run has") == 4
    was = [False, False, True, True, False, True]
    assert [line["diverged"] for line in read_metrics(tmp_path)] == was
    assert [value for _, value in _scalars(tmp_path, "progress/diverged")] == was


def test_an_attempt_that_goes_on_knows_how_the_run_was(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4), **_evaluated(6.0))
    _write(tmp_path, range(3, 4), completed_steps=2, **_evaluated(6.9))
    assert "at step 3, and was 6.000 at step 1" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(
    "clocks",
    [
        [2e9, 1e9, 2e9, 1.0, 3e9],  # forth and back
        [1.7e9, 1.7e9, 1.7e9],  # within one second
        [1e11, 1e9, 9.9999999995e9, 9.9999999999e9, 1e12, 0.0, -1e9],  # in the far future and past
    ],
)
def test_tensorboard_shows_each_attempt_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clocks: list[float]
) -> None:
    expected: dict[int, float] = {}
    for attempt, clock in enumerate(clocks):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        monkeypatch.setattr("socket.gethostname", lambda attempt=attempt: f"node{9 - attempt}")
        completed = (0, 2, 1, 3, 2, 3, 0)[attempt]
        steps = range(completed + 1, completed + 4)
        _write(tmp_path, steps, completed_steps=completed, **{"eval/mlm_loss": float(attempt)})
        expected = {step: value for step, value in expected.items() if step <= completed}
        expected |= dict.fromkeys(steps, float(attempt))
        assert _scalars(tmp_path, "eval/mlm_loss") == sorted(expected.items())
    assert len(list((tmp_path / "tensorboard").iterdir())) == len(clocks)


def test_events_follow_those_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    for name in ("9999999999.host.1.0", "9999999999.host.1.0.v2", "x", "17.host"):
        (tmp_path / "tensorboard" / f"events.out.tfevents.{name}").touch()
    before = {path.name for path in (tmp_path / "tensorboard").iterdir()}
    _write(tmp_path, range(1, 3))
    [ours] = {path.name for path in (tmp_path / "tensorboard").iterdir()} - before
    assert ours > "events.out.tfevents.9999999999.host.1.0.v2"
    assert [step for step, _ in _scalars(tmp_path, "train/loss")] == [1, 2]


@contextmanager
def _no_file_larger_than(size: int) -> Iterator[None]:
    """As a full disk: what still fits of a line is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _record(monitor: Monitor, steps: range) -> None:
    for step in steps:
        # 10 kB in metrics.jsonl, 10 kB in the events, 10 kB in train.log
        monitor.record(_line(step, **{f"more/{'x' * 20}_{n}": step / 7 for n in range(200)}))
        monitor.say(f"<{step}>" * 3000)


def test_a_full_disk_holds_lines_back_and_ends_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Monitor(tmp_path, SCHEDULE, completed_steps=0, enabled=True) as monitor:
        _record(monitor, range(1, 3))
        with _no_file_larger_than(25_000):
            _record(monitor, range(3, 5))
            assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2], (
                "a torn line is last"
            )
            assert (tmp_path / "metrics.jsonl").stat().st_size > 24_000, "it is torn"
        _record(monitor, range(5, 7))
    said = capfd.readouterr().err
    warning = f"metrics are not written to {tmp_path / 'metrics.jsonl'} (File too large): make room"
    assert said.count(warning) == said.count("are not written to") == 1
    assert "Traceback" not in said
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in _scalars(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6]
    log = (tmp_path / "train.log").read_text()
    assert [log.count(f" {f'<{step}>' * 3000}\n") for step in range(1, 7)] == [1] * 6
    assert warning in log


def test_a_disk_that_stays_full_ends_nothing_either(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        _no_file_larger_than(25_000),
        Monitor(tmp_path, SCHEDULE, completed_steps=0, enabled=True) as monitor,
    ):
        _record(monitor, range(1, 7))
    said = capfd.readouterr().err
    assert said.count("are not written to") == 1
    assert "Traceback" not in said
    _write(tmp_path, range(3, 7), completed_steps=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in _scalars(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_no_more_is_held_than_memory_bears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stacking_ds.train.sinks._MOST_HELD_BYTES", 30_000)
    with Monitor(tmp_path, SCHEDULE, completed_steps=0, enabled=True) as monitor:
        with _no_file_larger_than(1000):
            _record(monitor, range(1, 7))
        assert len(monitor._metrics._held) < 50_000
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 1 < len([json.loads(line) for line in lines]) < 6


def test_a_console_that_cannot_be_written_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 - it cannot even be closed
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", full)
        monitor = Monitor(tmp_path, SCHEDULE, completed_steps=0, enabled=True)
    with monitor:
        monitor.say("a sentence")
    with pytest.raises(OSError, match="No space left"):
        full.close()
    assert capfd.readouterr().err == ""
    assert "a sentence" in (tmp_path / "train.log").read_text()


def test_a_disk_that_is_full_at_the_start_is_told_of_with_the_path(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 7))
    with (
        _no_file_larger_than(10),
        pytest.raises(OSError, match=r"File too large: '.*/metrics.jsonl'"),
    ):
        _write(tmp_path, range(4, 7), completed_steps=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Monitor(tmp_path, SCHEDULE, completed_steps=0, enabled=False) as monitor:
        monitor.stage(SCHEDULE.stages[0], 0)
        monitor.step(1, 1.0)
        monitor.record(_line(1))
        monitor.say("nothing")
    assert list(tmp_path.iterdir()) == []
