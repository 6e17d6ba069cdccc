"""`stacking-ds bench growth`: what a step costs at each depth, and what follows from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.bench.growth import affine_fit, growth_ratio
from stacking_ds.bench.growth_table import growth_table, growth_targets
from stacking_ds.cli import main


def _figures(
    seconds: dict[int, float], plain: dict[int, float] | None = None, **changes: Any
) -> dict[str, Any]:
    def step(time: float) -> dict[str, float]:
        return {
            "step_seconds": time,
            "tokens_per_second": 2048 / time,
            "model_flops_utilization": 0.5,
        }

    return {
        "machine": {"commit": "abc"},
        "device": "cpu",
        "keeps_memory": False,
        "zero_stage": 1,
        "rounds": 8,
        "precision": "fp32",
        "peak_flops_per_second": 1e11,
        "rows": 16,
        "micro_steps": 1,
        "sequence_length": 128,
        "hidden_size": 256,
        "vocab_size": 30522,
        "depths": [
            {
                "layers": layers,
                "parameters": 1_000_000 * layers,
                "engine": step(time),
                **({"plain": step(plain[layers])} if plain else {}),
            }
            for layers, time in seconds.items()
        ],
        **changes,
    }


EVEN = {3: 0.5, 6: 0.9, 12: 1.7}


def test_an_even_cost_is_an_affine_one() -> None:
    assert growth_ratio(EVEN) == pytest.approx(2.0)
    assert affine_fit(EVEN) == pytest.approx((0.1, 0.4 / 3))
    assert growth_ratio({3: 0.5, 6: 0.9, 12: 1.8}) == pytest.approx(2.25)


def test_targets_are_met_or_missed() -> None:
    plain = {3: 0.49, 6: 0.9, 12: 1.7}
    base = {"hidden_size": 768}
    low, high, outside, engine = growth_targets(_figures(EVEN, plain, **base))
    assert (low.name, low.limit, high.limit) == ("(t12 - t6) / (t6 - t3)", 1.9, 2.1)
    assert [one.verdict for one in (low, high, outside, engine)] == ["met"] * 4
    assert outside.value == pytest.approx(0.1 / 1.7)
    assert engine.value == pytest.approx(0.5 / 0.49)
    for seconds, verdicts in (
        ({3: 0.5, 6: 0.9, 12: 1.8}, ["met", "MISSED"]),
        ({3: 0.5, 6: 0.9, 12: 1.6}, ["MISSED", "met"]),
    ):
        assert [one.verdict for one in growth_targets(_figures(seconds, plain))[:2]] == verdicts
    heavy = {3: 1.0, 6: 1.4, 12: 2.2}
    rows = growth_targets(_figures(heavy, {**heavy, 6: 1.3}, **base))
    assert [one.verdict for one in rows[2:]] == ["MISSED", "MISSED"]
    assert rows[3].value == pytest.approx(1.4 / 1.3)


def test_what_was_not_measured_says_why() -> None:
    rows = growth_targets(_figures(EVEN, precision="bf16", device="cuda"))
    assert [one.verdict for one in rows[2:]] == ["not measured"] * 2
    assert rows[2].note == "promised of BERT-base; here it is 6%"
    assert rows[3].note == "the plain loop is fp32, these engines are bf16"


def test_the_table() -> None:
    text = growth_table(_figures(EVEN, {3: 0.5, 6: 0.8, 12: 1.7}))
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert rows["6 layers"] == ["6.0", "900.0", "900.0", "2,276", "50.0", "800.0", "1.125"]
    assert "100.0 ms + 133.3 ms a layer: 6% of the deepest step is outside the layers" in text
    assert "process CPU time of one thread, new pages included, least of 8 rounds" in text
    bf16 = growth_table(_figures(EVEN, device="cuda"))
    assert "wall time from an idle device to the end of its work, median of 8 rounds" in bf16
    assert "| 12 layers |" in bf16


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures as a machine without GPU does")
def test_the_command_measures_three_depths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert (
        main(["bench", "growth", "--quick", "--rounds=1", "--no-keep-memory", f"--json={path}"])
        == 0
    )
    found, printed = json.loads(path.read_text()), capsys.readouterr()
    assert [depth["layers"] for depth in found["depths"]] == [1, 2, 4]
    parameters = [depth["parameters"] for depth in found["depths"]]
    assert parameters[2] - parameters[1] == 2 * (parameters[1] - parameters[0]) > 0
    for depth in found["depths"]:
        for who in ("engine", "plain"):
            assert 0 < depth[who]["seconds"]["minimum"] < 10
            assert depth[who]["tokens"] == 4 * found["rows"] * found["sequence_length"]
    assert found["targets"][0]["name"] == "(t4 - t2) / (t2 - t1)"
    assert "One training step at each depth: hidden size 64" in printed.out
    assert "1, 2, 4 layers: building, then 1 rounds" in printed.err


@pytest.mark.slow
def test_the_command_in_bf16_has_no_plain_loop(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["--quick", "--rounds=1", "--precision=bf16", "--zero-stage=2"]
    assert main(["bench", "growth", *options, "--no-keep-memory", f"--json={path}"]) == 0
    found = json.loads(path.read_text())
    assert found["zero_stage"] == 2
    assert all("plain" not in depth for depth in found["depths"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds=0"], "--rounds=0 must be at least 1"),
        (["--layers=0"], "--layers=0 and --sequence-length=32: at least 1 and 8"),
        (["--hidden-size=0"], "hidden_size must be at least 1, not 0"),
    ],
)
def test_impossible_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "growth", "--quick", *options]) != 0
    assert message in capsys.readouterr().err
