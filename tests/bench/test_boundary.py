"""`stacking-ds bench boundary`: what it measures is there, and is what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from stacking_ds.bench import boundary as bench_boundary
from stacking_ds.bench.boundary import measure_boundary
from stacking_ds.bench.boundary_table import boundary_table, boundary_targets
from stacking_ds.bench.workload import Workload
from stacking_ds.cli import main
from stacking_ds.distributed.world import World
from tests.ranks import RankError, run_ranks

TINY = {
    "hidden_size": 20,
    "layers": 1,
    "new_layers": 2,
    "vocab_size": 50,
    "sequence_length": 8,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "precision": "bf16",
}


def _workload(zero_stage: int) -> Workload:
    return Workload(**TINY, zero_stage=zero_stage)  # type: ignore[arg-type]


def _measure(world: World, zero_stages: list[int]) -> list[dict[str, Any]]:
    return [measure_boundary(_workload(zero_stage), world, rounds=2) for zero_stage in zero_stages]


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    by_rank: list[list[dict[str, Any]]] = run_ranks(_measure, 2, [0, 1, 3])
    assert by_rank[0] == by_rank[1]  # every rank knows all
    return by_rank[0]


@pytest.mark.slow
def test_our_boundary_moves_no_state(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        sent = case["ours"]["sent_bytes"]
        assert sent.get("state moved", 0) == 0
        # nothing but the checksums: no gathering of weights, nothing while an engine is built
        assert [label for label, size in sent.items() if size] == ["checksums"]
        # no hidden way around the counter: the kernel saw the same, and headers
        written = case["ours"]["written_bytes"]
        assert sum(sent.values()) <= written < 1.2 * sum(sent.values()) + 30_000


@pytest.mark.slow
def test_the_rivals_send_what_they_must(cases: list[dict[str, Any]]) -> None:
    zero_0, zero_1, zero_3 = cases
    old, new = zero_1["parameters"]
    assert "gathering" not in zero_0
    # DeepSpeed adds up whole fp32 parameters at ZeRO 1, and gathers the halves at ZeRO 3
    assert zero_1["gathering"]["sent_bytes"]["gather"] == 12 * old
    assert 12 * old / 2 <= zero_3["gathering"]["sent_bytes"]["gather"] < 12 * old / 2 + 12 * 60
    for case in cases:
        assert case["through_disk"]["sent_bytes"]["initialize"] >= 2 * new


@pytest.mark.slow
def test_times_and_peaks_have_a_minimum_and_a_median(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        ours, disk = case["ours"]["seconds"], case["through_disk"]["seconds"]
        assert set(ours) >= {"capture", "release", "build", "install", "boundary", "step"}
        assert set(disk) >= {"save", "load", "model", "initialize", "boundary"}
        for spread in (*ours.values(), *disk.values(), case["ours"]["peak_ratio"]):
            assert 0 < spread["minimum"] <= spread["median"]
        assert ours["boundary"]["minimum"] >= ours["capture + install"]["minimum"]


def _lose_state(world: World) -> None:
    bench_boundary.install = lambda *arguments: None
    _measure(world, [1])


def test_a_way_that_loses_the_state_is_not_timed() -> None:
    with pytest.raises(RankError, match=r"AssertionError: .*, not "):
        run_ranks(_lose_state, 2)


# --------------------------------------------------------------------- table, targets


@pytest.mark.slow
def test_targets_take_the_worst_case(cases: list[dict[str, Any]]) -> None:
    slow: dict[str, Any] = json.loads(json.dumps(cases[1]))
    slow["ranks"] = 3
    slow["ours"]["sent_bytes"]["state moved"] = 7_000_000
    slow["ours"]["peak_bytes"]["minimum"] = 2 * cases[1]["ours"]["peak_bytes"]["minimum"]
    targets = {target.name: target for target in boundary_targets([*cases, slow])}
    moved = targets["MB of state that leave a rank at ZeRO 1, 2, 3"]
    assert (moved.worst, moved.met, moved.where) == (7.0, False, "worst at ZeRO 1, 3 ranks")
    falling = targets["peak at ZeRO 1 / peak with a rank less"]
    assert (falling.worst, falling.met) == (2.0, False)
    assert "peak at ZeRO 3 / peak with a rank less" not in targets
    assert all(target.met for target in boundary_targets(cases) if target.limit == 0)


@pytest.mark.slow
def test_the_table_says_what_it_could_not_measure(cases: list[dict[str, Any]]) -> None:
    case: dict[str, Any] = json.loads(json.dumps(cases[0]))
    case["ours"] |= {"written_bytes": None, "captured_bytes": None, "peak_ratio": None}
    text = boundary_table([case], {"commit": "abc"}, rounds=2)
    assert "commit: abc" in text
    assert "peak host memory" not in text.splitlines()[-1]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|    0 |")]
    assert len(rows) == 3
    assert rows[1][4].strip() == rows[1][5].strip() == "-"


# ----------------------------------------------------------------------- command line


def _bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "figures.json"
    assert main(["bench", "boundary", "--quick", f"--json={path}", *arguments]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def _check(figures: dict[str, Any], printed: str, zero_stages: list[int]) -> None:
    assert [case["zero_stage"] for case in figures["cases"]] == zero_stages
    assert {"command", "commit", "processor", "torch", "deepspeed"} <= set(figures["machine"])
    assert all(case["ranks"] == 2 for case in figures["cases"])
    moved = next(target for target in figures["targets"] if target["limit"] == 0)
    assert moved["met"]
    head = next(line for line in printed.splitlines() if "state moved" in line and "|" in line)
    column = [cell.strip() for cell in head.split("|")].index("state moved")
    rows = [line for line in printed.splitlines() if line.startswith("|")][2:]
    for zero_stage, row in zip(zero_stages, rows, strict=False):
        cells = [cell.strip() for cell in row.split("|")]
        assert (cells[1], cells[column]) == (str(zero_stage), "0.00")
    for target in figures["targets"]:
        assert f"{target['name']}: target <= {target['limit']:g}: " in printed


@pytest.mark.slow
def test_the_command_starts_its_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = _bench(tmp_path, "--zero-stage=1", "--hidden-size=16", "--vocab-size=30")
    _check(figures, capsys.readouterr().out, [1])


@pytest.mark.slow
def test_the_command_at_every_zero_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _check(_bench(tmp_path, "--zero-stage=0,1,2,3"), capsys.readouterr().out, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--new-layers=2"], "2 layers cannot grow"),
        (["--hidden-size=0"], "hidden_size must be at least 1, not 0"),
        (["--zero-stage=4"], "zero4"),
        (["--rounds=0"], "start at 1"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "boundary", "--quick", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_another_number_of_ranks_than_the_launchers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stacking_ds.bench.launch.under_launcher", lambda: True)
    assert main(["bench", "boundary", "--quick", "--ranks=2,3"]) == 2
    assert "--ranks=2,3, but the launcher started 1" in capsys.readouterr().err
