"""What `make gpu-check` makes of the figures of benches, here made up, and how its report reads."""

# ruff: noqa: E402 -- the folder of the commands has to be put on the path first

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / ".ci"))

import gpu_benches
from gpu_benches import even_rows, kernel_figures, lamb_figures, step_figures, tables
from gpu_ground import Ground, PartError
from gpu_report import Report, Result


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    (tmp_path / "work").mkdir()
    return Ground(tmp_path / "work", deadline=time.monotonic() + 120)


# ------------------------------------------------------------------ LAMB's


def _lamb_found(kernels: int | None = 4, synchronisation: str | None = None) -> dict[str, Any]:
    times = {"minimum": 0.001, "median": 0.0012}
    step = {
        "device_seconds": times,
        "host_seconds": times,
        "wall_seconds": times,
        "kernels": kernels,
        "copies": 2,
    }
    apex = {"not_measured": "apex is not installed"}
    return {
        "gpu": {
            "steps": {"triton": {**step, "kernels": 4}, "triton_by_group": step, "apex": apex},
            "synchronisation": synchronisation,
            "copy_gb_per_second": 4300.0,
            "floor_seconds": 0.001,
        },
        "targets": [
            {"name": "ours / floor", "relation": "<=", "limit": 1.5, "value": 1.6, "note": "",
             "verdict": "MISSED"},
            {"name": "apex / ours", "relation": ">=", "limit": 1.3, "value": None, "note": "why",
             "verdict": "not measured"},
        ],
    }  # fmt: skip


def test_a_slow_lamb_step_is_reported_and_does_not_fail() -> None:
    figures = lamb_figures(_lamb_found())
    ours, _, apex = figures["steps"]
    assert (ours["device_ms"], ours["times_the_floor"], ours["kernels"]) == (1.2, 1.2, 4)
    assert apex["device_ms"] == "not measured: apex is not installed"
    assert [row["verdict"] for row in figures["targets"]] == ["MISSED", "not measured why"]
    for rows in (figures["steps"], figures["targets"]):  # tables of the report
        assert len({tuple(row) for row in rows}) == 1


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (_lamb_found(kernels=13), "triton_by_group launches 13 kernels, 12 are"),
        (_lamb_found(kernels=None), "not counted"),
        (_lamb_found(synchronisation="RuntimeError: called"), "host wait .* RuntimeError: called"),
        ({"gpu": {"not_measured": "no GPU"}}, "not measured: no GPU"),
    ],
)
def test_a_lamb_step_of_many_launches_or_that_waits_fails(found: dict[str, Any], what: str) -> None:
    with pytest.raises(PartError, match=what):
        lamb_figures(found)


# ------------------------------------------------------------------ any bench


def test_the_figures_of_a_bench_become_tables() -> None:
    step = {"seconds": {"median": 0.25}, "tokens_per_second": 1e6}
    found = {
        "machine": {"commit": "abc"},
        "sizes": {"tokens": 2},
        "device": "cuda",
        "cases": [
            {
                "name": "base-3L",
                "layers": 3,
                "steps": {"ours": step, "compile": {"not_measured": "out of memory"}},
            }
        ],
        "fit": {"per_layer_seconds": 0.5, "rows": [{"layers": 3}, {"layers": 6, "seconds": None}]},
        "accumulation": {"not_measured": "hide the GPUs for it"},
        "targets": [
            {"name": "faster", "relation": ">=", "limit": 1.5, "value": 1.2, "verdict": "MISSED",
             "note": ""}
        ],
    }  # fmt: skip
    figures = tables(found)
    assert figures["as_measured"] == found
    assert figures["cases"] == [
        {"name": "base-3L", "steps": "ours", "seconds_median": 0.25, "tokens_per_second": 1e6,
         "not_measured": "-"},
        {"name": "base-3L", "steps": "compile", "seconds_median": "-", "tokens_per_second": "-",
         "not_measured": "out of memory"},
    ]  # fmt: skip
    assert figures["fit"] == [{"layers": 3, "seconds": "-"}, {"layers": 6, "seconds": "-"}]
    assert figures["fit_per_layer_seconds"] == 0.5
    assert figures["accumulation"] == "not measured: hide the GPUs for it"
    assert figures["targets"] == [
        {"target": "faster", "should_be": ">= 1.5", "is": 1.2, "verdict": "MISSED"}
    ]


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"machine": {"load": 1.5}, "rounds": 3, "cases": []},
        {"cases": [{"name": "a", "steps": {"ours": {"not_measured": "no GPU", "fill": 0.5}}}]},
        {"gpu": {"not_measured": "no GPU"}, "targets": [{"name": "a", "limit": 1.5}]},
    ],
)
def test_a_bench_that_measured_nothing_fails(found: dict[str, Any]) -> None:
    with pytest.raises(PartError, match="nothing was measured"):
        tables(found)


def test_a_bench_that_wrote_nothing_fails(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ground, "python", lambda self, *arguments, **limits: "said nothing")
    with pytest.raises(PartError, match="bench growth wrote no figures"):
        gpu_benches.bench_growth(ground)


def test_lamb_is_measured_without_fused_lamb_where_that_cannot_be_built(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def fake(self: Ground, *arguments: object, **limits: Any) -> str:
        if arguments[0] == "-c":
            raise PartError("exit code 1", "Traceback\nOSError: no nvcc")
        asked.append(arguments)
        Path(str(arguments[-1])).write_text(json.dumps(_lamb_found()))
        return ""

    monkeypatch.setattr(Ground, "python", fake)
    gpu_benches.begin_fused_lamb(ground)
    figures = gpu_benches.bench_lamb(ground)
    assert figures["fused_lamb_not_built"] == "exit code 1; OSError: no nvcc"
    assert "--deepspeed-fused-lamb" not in asked[0]


# ------------------------------------------------------------------ the kernels'


def _kernels_found(**changes: Any) -> dict[str, Any]:
    shared = {"operation": "gelu", "hidden_size": 768, "bytes": 400_000_000, "floor_seconds": 1e-4}
    rows = [
        {**shared, "pass": way, "form": form, "seconds": seconds}
        for way in ("forward", "backward")
        for form, seconds in (("plain", 3e-4), ("triton", 1.25e-4))
    ]
    rows.append({**shared, "pass": "forward", "form": "compile", "not_measured": "not asked for"})
    attention = [
        {"longest": 128, "dropout": 0.1, "form": form, "tflop_per_second": speed}
        for form, speed in (("flash", 150.0), ("padded", 90.0))
    ]
    attention.append({"longest": 128, "dropout": 0.1, "form": "varlen", "not_measured": "dropout"})
    return {
        "machine": {"commit": "abc"},
        "times_the_host_was_behind": 0,
        "operations": {"copy_gb_per_second": 4300.0, "rows": rows},
        "attention": {"tokens": 32768, "rows": attention},
        "products": {"not_measured": "no FP8"},
        "targets": [
            {"name": "GPU: bias + GELU, forward", "relation": ">=", "limit": 0.75, "value": 0.8,
             "verdict": "met", "note": ""},
        ],
        **changes,
    }  # fmt: skip


def test_the_kernels_have_a_row_for_each_pass() -> None:
    figures = kernel_figures(_kernels_found())
    forward, backward = figures["operations"]
    assert forward == {
        "operation": "gelu", "hidden_size": 768, "pass": "forward", "mb": 400.0,
        "floor_us": pytest.approx(100), "plain_us": pytest.approx(300),
        "triton_us": pytest.approx(125), "compile_us": "-", "floor_over_triton": pytest.approx(0.8),
    }  # fmt: skip
    assert backward.keys() == forward.keys()
    assert figures["attention_tflop_per_second"] == [
        {"longest": 128, "dropout": 0.1, "flash": 150.0, "padded": 90.0, "varlen": "-"}
    ]
    assert figures["products"] == "not measured: no FP8"
    assert figures["forms_not_measured"] == ["compile: not asked for", "varlen: dropout"]


def test_kernels_that_were_not_measured_fail() -> None:
    with pytest.raises(PartError, match="no operation was measured: out of memory"):
        kernel_figures(_kernels_found(operations={"not_measured": "out of memory"}))
    for change, what in (
        ({"form": "triton", "not_measured": "boom"}, "triton was not measured at gelu: boom"),
        ({"form": "torch", "seconds": 1.0}, "triton was not measured"),
    ):
        found = _kernels_found()
        row = {"operation": "gelu", "hidden_size": 768, "pass": "forward", "bytes": 1,
               "floor_seconds": 1.0, **change}  # fmt: skip
        found["operations"]["rows"] = [row]
        with pytest.raises(PartError, match=what):
            kernel_figures(found)
    found = _kernels_found()
    found["attention"]["rows"][0] = {"longest": 128, "form": "flash", "not_measured": "boom"}
    with pytest.raises(PartError, match="flash was not measured at 128: boom"):
        kernel_figures(found)


# ------------------------------------------------------------------ the report


def _text(results: Sequence[Result]) -> str:
    machine = {"card": "NVIDIA H200", "driver": "580.1"}
    return Report("2026-11-26", "abc123", machine, 321.0, results).markdown()


def test_the_report_reads_as_plain_text() -> None:
    text = _text(
        [
            Result("bench kernels", "passed", 31.5, kernel_figures(_kernels_found())),
            Result("bench lamb", "passed", 9.0, lamb_figures(_lamb_found())),
            Result("sanitizer", "passed", 1.0, {"skipped": "not there"}),
            Result("begin", "passed"),
        ]
    )
    tables_of = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    for lines in tables_of:
        assert len({len(line) for line in lines}) == 1, lines
    assert "as measured" not in text
    assert "1 met, 1 missed." in text
    assert "- not measured why: apex / ours" in text
    assert text.count("should be") == 1, "the targets of all parts are one table"
    assert "| GPU: bias + GELU, forward |" in text
    assert "skipped: not there" in text
    assert "## begin" not in text


def test_a_target_that_any_part_measured_is_told_once() -> None:
    unknown = {
        "target": "compile / triton",
        "should_be": ">= 1",
        "is": "-",
        "verdict": "not measured",
    }
    known = {**unknown, "is": 1.1, "verdict": "met"}
    for rows in ([unknown, known], [known, unknown]):
        results = [
            Result(str(i), "passed", figures={"targets": [row]}) for i, row in enumerate(rows)
        ]
        text = _text(results)
        assert "1 met, 0 missed." in text
        assert "- not measured" not in text


def test_a_miss_is_told_whatever_another_part_measured() -> None:
    missed = {"target": "share", "should_be": ">= 0.75", "is": 0.5, "verdict": "MISSED at 1024"}
    met = {**missed, "is": 0.9, "verdict": "met"}
    for rows in ([missed, met], [met, missed]):
        results = [
            Result(str(i), "passed", figures={"targets": [row]}) for i, row in enumerate(rows)
        ]
        assert "0 met, 1 missed." in _text(results)


@pytest.mark.parametrize("who", ["ours", "transformers"])
def test_a_step_that_nobody_took_fails(who: str) -> None:
    step = {"step_seconds": 0.5, "tokens_per_second": 2.0}
    case = {"name": "base-3L-128", "fill": 1.0, "steps": {"ours": step, "transformers": step}}
    assert step_figures({"cases": [case], "targets": []})
    case["steps"] = {**case["steps"], who: {"not_measured": "out of memory"}}
    with pytest.raises(PartError, match=f"base-3L-128: {who}: not measured: out of memory"):
        step_figures({"cases": [case], "targets": []})


def test_one_figure_may_have_two_targets() -> None:
    rows = [
        {"target": "ratio", "should_be": should_be, "is": 2.5, "verdict": verdict}
        for should_be, verdict in ((">= 1.9", "met"), ("<= 2.1", "MISSED"))
    ]
    assert "1 met, 1 missed." in _text([Result("bench", "passed", figures={"targets": rows})])


def test_rows_of_unequal_columns_are_made_equal() -> None:
    rows = even_rows([{"a": 1, "b": {"c": 2.5}}, {"a": None, "d": [1, 2], "not_measured": "why"}])
    assert rows == [
        {"a": 1, "b_c": 2.5, "d": "-", "not_measured": "-"},
        {"a": "-", "b_c": "-", "d": "1, 2", "not_measured": "why"},
    ]
