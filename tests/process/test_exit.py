"""Errors at a process's end: which rank says the sentence, and the exit code."""

import subprocess

import pytest
from pydantic import ValidationError

from stacking_ds.errors import (
    AgreedError,
    CheckpointError,
    LostRankError,
    LostRankToldError,
    NonFiniteError,
    agreed,
)
from stacking_ds.process.exit import report_error
from stacking_ds.schedule.learning_rate import ScheduleSection


@pytest.mark.parametrize(
    ("error", "code", "speakers"),
    [
        (CheckpointError("it is damaged"), 2, [0, 1, 2, 3]),
        (agreed(CheckpointError("it is damaged")), 2, [0]),
        (NonFiniteError("it is damaged"), 3, [0]),
        # rank 1 too, since rank 0 may be the one that is lost; 2 is the first of another node
        (LostRankError("it is damaged"), 4, [0, 1, 2]),
        (LostRankToldError("it is damaged"), 4, []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_who_says_what(
    error: Exception,
    code: int,
    speakers: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoke = []
    for rank, local_rank in enumerate((0, 1, 0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert report_error(error) == code
        said = capsys.readouterr().err
        if said:
            prefix = f"[rank {rank}] " if rank else ""
            assert said == f"{prefix}stacking-ds: error: it is damaged\n"
            spoke.append(rank)
    assert spoke == speakers


def test_an_agreed_error_is_what_it_was() -> None:
    found = agreed(CheckpointError("it is damaged"))
    assert isinstance(found, AgreedError)
    assert isinstance(found, CheckpointError)
    assert (type(found).__name__, str(found)) == ("CheckpointError", "it is damaged")
    assert agreed(found) is found
    stale = OSError(116, "Stale file handle", "file")
    assert str(agreed(stale)) == str(stale)
    assert isinstance(agreed(ValueError("odd")), ValueError)


def _refused_by_pydantic() -> Exception:
    try:
        ScheduleSection.model_validate({"warmup_steps": "many"})
    except ValidationError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "error",
    [
        OSError("Couldn't deserialize thrift"),  # as Arrow raises them, without a number
        OSError(18, "Invalid cross-device link", "a", None, "b"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        subprocess.CalledProcessError(3, ["nvcc"]),
        _refused_by_pydantic(),
        KeyError("of a library"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_words_of_an_error_are_lost_when_it_is_agreed(error: Exception) -> None:
    error.add_note("in a worker")
    found = agreed(error)
    assert isinstance(found, AgreedError)
    assert str(error) in str(found)
    assert type(found).__name__ == type(error).__name__ or type(error).__name__ in str(found)
