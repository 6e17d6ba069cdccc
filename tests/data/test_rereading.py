"""Data are read again beside the training: damage is found, and what cannot be read is none."""

import errno
import logging
import time
from pathlib import Path

import pytest

from stacking_ds.data import rereading, shards
from stacking_ds.data.rereading import Rereading
from stacking_ds.errors import DataError, UnreadableDataError
from stacking_ds.train.plan import TrainingPlan, open_plan
from tests.prose import tiny_shards
from tests.runs import small_recipe


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> TrainingPlan:
    folder = tmp_path_factory.mktemp("shards")
    plan = open_plan(small_recipe(folder, tiny_shards(folder)))
    for data in plan.data.train.values():
        data.layout(0)
    return plan


@pytest.fixture(autouse=True)
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(rereading.logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger="stacking_ds")
    return caplog


def _again(plan: TrainingPlan) -> Rereading:
    return Rereading(plan.data, enabled=True)


def _wait(reading: Rereading) -> None:
    """As the end of a run does."""
    deadline = time.monotonic() + 30
    while reading.goes_on(0.01):
        assert time.monotonic() < deadline


SHARDS, ROWS = "train-0", "part-0"


def _failing(files: str, monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
    """The first so many of these files cannot be read, with this error."""
    sha256 = shards.file_sha256
    left = [number] * times

    def read(path: Path) -> str:
        if left and path.name.startswith(files):
            raise OSError(left.pop(), "as Arrow words it", str(path))
        return sha256(path)

    monkeypatch.setattr(shards, "file_sha256", read)


def test_whole_data_are_read_to_their_end(plan: TrainingPlan) -> None:
    with _again(plan) as reading:
        _wait(reading)
        reading.require_whole(0)
    assert not Rereading(plan.data, enabled=False).goes_on(60.0)


@pytest.mark.parametrize("files", [SHARDS, ROWS])
def test_damage_is_found(plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch, files: str) -> None:
    sha256 = shards.file_sha256
    monkeypatch.setattr(
        shards,
        "file_sha256",
        lambda path: "0" * 64 if path.name.startswith(files) else sha256(path),
    )
    with _again(plan) as reading:
        _wait(reading)
        assert reading.failed
        with pytest.raises(DataError, match=r"arrow.*; what was trained after step 7.* the damage"):
            reading.require_whole(7)


@pytest.mark.parametrize("files", [SHARDS, ROWS])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_what_cannot_be_read_is_no_damage_and_tried_again(
    plan: TrainingPlan,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
    files: str,
    number: int,
) -> None:
    monkeypatch.setattr(rereading, "_SECONDS_BETWEEN_TRIES", 0.01)
    _failing(files, monkeypatch, number, times=3)
    with _again(plan) as reading:
        assert reading.thread is not None
        reading.thread.join(30)
        reading.require_whole(0)
    [warning] = log.messages
    assert warning.startswith("the data cannot be read again yet, and training goes on: ")
    assert warning.endswith("mend access to it and try again")


def test_the_end_of_a_run_does_not_wait_for_what_cannot_be_read(
    plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    _failing(ROWS, monkeypatch, errno.ESTALE, times=1000)
    with _again(plan) as reading:
        _wait(reading)
        reading.require_whole(0)
    assert log.messages[-1].startswith("the data were not read again to their end: ")
    assert "Stale file handle" in log.messages[-1]


def test_rows_that_cannot_be_read_are_not_to_be_deleted(
    plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    [data] = plan.data.train.values()
    _failing(ROWS, monkeypatch, errno.EACCES, times=1)
    with pytest.raises(UnreadableDataError, match=r"cannot be read \(Permission denied\); mend"):
        list(data.verifying())
    list(data.verifying())
