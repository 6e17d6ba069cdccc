"""Mistakes in a bench's options are told before anything is measured."""

from pathlib import Path

import pytest

from stacking_ds.bench.options import numbers
from stacking_ds.cli import main


def test_lists_of_numbers() -> None:
    assert numbers("1,2,30") == (1, 2, 30)
    assert numbers("5e5,5e6") == (500_000, 5_000_000)


@pytest.mark.parametrize("text", ["abc", "", "1,", "inf", "64x"])
def test_what_is_no_list_of_numbers(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "overlap", f"--buckets={text}"])
    assert ended.value.code == 2
    assert "is not a list of numbers such as 1,2 or 5e6" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bench", ["step", "growth", "kernels", "overlap", "lamb", "boundary", "planner"]
)
def test_a_file_that_could_not_be_written(
    bench: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (tmp_path / "nowhere" / "x.json", tmp_path):
        with pytest.raises(SystemExit) as ended:
            main(["bench", bench, "--json", str(wrong)])
        assert ended.value.code == 2
        assert "is no file in a folder that is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--buckets=0", "from 2 on, not 0"),
        ("--buckets=5", "even numbers of elements from 2 on, not 5"),
        ("--layers=1", "--layers=1 must be at least 2"),
        ("--global-batch-size=0", "--global-batch-size=0 must be at least 1"),
        ("--micro-batch-size=-1", "--micro-batch-size=-1 must be at least 1"),
    ],
)
def test_settings_that_no_rank_could_take(
    option: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "overlap", option]) == 2
    assert sentence in capsys.readouterr().err
