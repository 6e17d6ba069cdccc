"""`stacking-ds bench overlap` runs each setting that it names, and shows the fastest."""

import json
from pathlib import Path

import pytest

from stacking_ds.bench.overlap import overlap_options, overlap_table
from stacking_ds.bench.workload import Workload
from stacking_ds.cli import main
from stacking_ds.distributed.world import World
from tests.ranks import run_ranks


def test_settings_are_all_combinations_under_their_names() -> None:
    at_1, at_3 = (list(overlap_options(stage, (5, 7))) for stage in (1, 3))
    assert [(overlap, bucket) for overlap, bucket, _ in at_1] == [
        (False, 5),
        (False, 7),
        (True, 5),
        (True, 7),
    ]
    assert at_1[3][2] == {
        "overlap_comm": True,
        "reduce_bucket_size": 7,
        "allgather_bucket_size": 7,
    }
    assert at_3[0][2] == {
        "overlap_comm": False,
        "reduce_bucket_size": 5,
        "stage3_prefetch_bucket_size": 5,
    }


def _settings_of_engines(world: World) -> list[tuple[bool, int]]:
    found = []
    for overlap, bucket, options in overlap_options(1, (778, 9998)):
        workload = Workload(16, 1, 2, 64, 8, 4, 1, "fp32", 1, options)
        engine = workload.trained_engine(world)
        workload.train_step(engine, world)
        assert engine.global_steps == 1
        found.append((engine.zero_overlap_comm(), engine.zero_reduce_bucket_size()))
        assert (overlap, bucket) == found[-1]
    return found


def test_engines_get_the_settings() -> None:
    [found, _] = run_ranks(_settings_of_engines, 2)
    assert len(set(found)) == 4


def test_the_table_says_how_far_behind_each_is() -> None:
    cases = [
        {"zero_stage": 1, "ranks": 2, "overlap_comm": overlap, "bucket": 500, "step_seconds": s}
        for overlap, s in ((False, 0.2), (True, 0.1))
    ]
    lines = overlap_table(cases).splitlines()
    assert lines[2].split("|")[-2].strip() == "2.00"
    assert lines[3].split("|")[-2].strip() == "1.00"


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    small = ["--hidden-size=16", "--layers=2", "--vocab-size=64", "--sequence-length=8"]
    code = main(
        ["bench", "overlap", *small, "--zero-stage=2", "--buckets=1e3,1e4", "--rounds=2",
         "--global-batch-size=8", "--micro-batch-size=2", f"--json={path}"]
    )  # fmt: skip
    assert code == 0
    cases = json.loads(path.read_text())["cases"]
    assert [(c["overlap_comm"], c["bucket"], c["ranks"]) for c in cases] == [
        (False, 1000, 2), (False, 10000, 2), (True, 1000, 2), (True, 10000, 2),
    ]  # fmt: skip
    assert all(0 < c["fastest_seconds"] <= c["step_seconds"] for c in cases)
    assert "of the fastest" in capsys.readouterr().out


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "overlap", "--zero-stage=0,1"]) != 0
    assert "ZeRO 0 has nothing to choose" in capsys.readouterr().err
