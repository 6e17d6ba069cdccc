"""Ranks that `stacking-ds bench` starts itself: a failure is told, and nobody waits for ever."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from stacking_ds.bench import launch
from stacking_ds.errors import UserError


def _start_python(
    program: Sequence[str], environment: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", *program],
            env={**os.environ, **environment},
            stdout=stream,
            stderr=stream,
        )


@pytest.fixture(autouse=True)
def _ranks_run_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_start", _start_python)


def test_a_rank_that_fails_is_named_and_the_others_are_stopped(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "rank = os.environ['RANK']\n"
        f"open('{tmp_path}/' + rank, 'w').write(str(os.getpid()))\n"
        "if rank == '1':\n"
        f"    while len(os.listdir('{tmp_path}')) < 3: time.sleep(0.01)\n"
        "    sys.exit('the disk is full')\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(UserError, match=r"rank 1 of 3 ended with exit code 1(.|\n)*disk is full"):
        launch.run_on_ranks([program], 3)
    for rank in range(3):
        assert not Path(f"/proc/{(tmp_path / str(rank)).read_text()}").exists()


def test_ranks_know_their_places_and_one_another(tmp_path: Path) -> None:
    program = (
        "import os\n"
        "names = ('WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')\n"
        f"open('{tmp_path}/' + os.environ['RANK'], 'w')"
        ".write(' '.join(os.environ[name] for name in names))\n"
    )
    launch.run_on_ranks([program], 2)
    said = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert [words[:4] for words in said] == [
        ["2", "2", "0", "127.0.0.1"],
        ["2", "2", "1", "127.0.0.1"],
    ]
    assert said[0][4] == said[1][4]


def test_a_rank_that_is_killed_is_told() -> None:
    program = (
        "import os, time\nif os.environ['RANK'] == '0': os.kill(os.getpid(), 9)\ntime.sleep(600)\n"
    )
    with pytest.raises(UserError, match="rank 0 of 2 ended with exit code -9"):
        launch.run_on_ranks([program], 2)


@pytest.mark.parametrize(
    ("variable", "launched"), [("RANK", True), ("OMPI_COMM_WORLD_SIZE", True), ("HOME", False)]
)
def test_a_launcher_is_noticed(
    monkeypatch: pytest.MonkeyPatch, variable: str, launched: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "1")
    assert launch.under_launcher() is launched
