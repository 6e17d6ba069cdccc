"""`stacking-ds bench data`: what it measures is there, its verdicts follow, the rival is whole."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stacking_ds.bench import data, hf_path
from stacking_ds.bench.data_table import data_table, data_targets
from stacking_ds.cli import main
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import DataError
from tests.prose import tiny_shards, write_text

MACHINE = {"command": "stacking-ds bench data"}
NONE = {part: {"not_measured": "no disk"} for part in ("prepare", "memory", "masking", "loader")}


def _spent(wall: float, peak: float = 0.5) -> dict[str, float]:
    return {"wall_seconds": wall, "cpu_seconds": 2 * wall, "peak_gib": peak}


def _figures(**changes: Any) -> dict[str, Any]:
    cases = [
        {"sequence_length": length, "masking": masking, "rows": 64, "fill": fill,
         "wall_tokens_per_second": rate, "cpu_tokens_per_second": 1e7}
        for length, masking, fill, rate in (
            (128, "tokens", 0.99, 7e6), (512, "tokens", 0.985, 8e6), (512, "spans", 0.9, 1e6)
        )
    ]  # fmt: skip
    return {
        "prepare": {
            "workers": 2, "rounds": 2, "documents": 1000, "text_bytes": 40_000_000,
            "ours": [_spent(5), _spent(4)], "hf": [_spent(10), _spent(12)],
        },
        "memory": {
            "workers": 2, "whole_bytes": 40_000_000, "fourfold_bytes": 160_000_000,
            "whole": _spent(2, 0.5), "fourfold": _spent(5, 0.54),
        },
        "masking": {
            "tokens": 2**17,
            "tokens_per_second": {
                "tokens": {"128": 6e7, "512": 7e7}, "spans": {"128": 3e7, "512": 3e7}
            },
        },
        "loader": {"workers": 2, "cases": cases},
        **changes,
    }  # fmt: skip


def test_targets_follow_the_figures() -> None:
    met = {target.name: target for target in data_targets(_figures())}
    assert {target.verdict for target in met.values()} == {"met"}
    assert met["prepare: usual path's wall time / ours"].value == 10 / 4
    assert met["loader: real tokens/s, packed and masked"].value == 7e6
    assert met["loader: fill of packed rows of 512 slots"].value == 0.985
    slow = _figures(prepare={"ours": [_spent(6)], "hf": [_spent(10)]})
    assert [target.verdict for target in data_targets(slow)].count("MISSED") == 1
    assert {target.verdict for target in data_targets(NONE)} == {"not measured"}


def test_the_table_says_rates_and_what_is_missing() -> None:
    text = data_table(_figures(masking=NONE["masking"]), MACHINE)
    assert "40.0 MB of text in 1,000 documents, 2 processes" in text
    assert "| stacking-ds prepare             |    4.0 | 10.0 |   8.0 |" in text
    assert "Masking: not measured: no disk" in text
    assert "masking tokens: tokens/s of one thread: target >= 5e+07: not measured (no disk)" in text
    assert "| 512, tokens    |          64 |   98.5 |    8.0 |" in text


def test_the_usual_path_joins_and_cuts_as_the_scripts_do() -> None:
    batch = {"input_ids": [list(range(700)), list(range(400))], "mask": [[0] * 700, [1] * 400]}
    blocks = hf_path.blocks(batch)
    assert [len(block) for block in blocks["input_ids"]] == [512, 512]
    assert blocks["input_ids"][1] == [*range(512, 700), *range(324)]
    assert blocks["mask"][1] == [0] * 188 + [1] * 324


def test_masking_and_loading_are_measured(tmp_path: Path) -> None:
    shards = TokenShards.open(tiny_shards(tmp_path))
    masked = data.measure_masking(shards, rounds=1)
    assert masked["tokens"] == min(2**17, shards.split("train").num_tokens)
    assert masked["tokens_per_second"].keys() == {"tokens", "whole_words", "spans"}
    assert all(rate > 0 for each in masked["tokens_per_second"].values() for rate in each.values())
    loaded = data.measure_loader(shards, workers=0, seconds=0.01)
    assert len(loaded["cases"]) == 6
    assert all(case["wall_tokens_per_second"] > 0 for case in loaded["cases"])
    assert all(0.9 < case["fill"] <= 1 for case in loaded["cases"])


def test_a_command_that_fails_says_what_it_said(tmp_path: Path) -> None:
    corpus = data.Corpus.write([str(write_text(tmp_path / "a.txt", 40))], tmp_path / "text")
    with pytest.raises(DataError, match=r"failed: .*no\.txt cannot be read"):
        data.measure_prepare(corpus, tmp_path / "no.txt", 1, 1, tmp_path)
    with pytest.raises(DataError, match="hold 3 documents; give at least 32"):
        data.Corpus.write([str(write_text(tmp_path / "b.txt", 3))], tmp_path / "few")


@pytest.mark.slow
def test_the_whole_bench_on_a_small_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, figures = write_text(tmp_path / "a.txt", 400), tmp_path / "figures.json"
    arguments = ["--rounds=1", "--seconds=0.2", f"--json={figures}"]
    assert main(["bench", "data", str(text), *arguments]) == 0
    said = capsys.readouterr().out
    assert "datasets.map, group_texts, save" in said
    found = json.loads(figures.read_text())
    assert {target["verdict"] for target in found["targets"]} <= {"met", "MISSED"}
    assert found["prepare"]["hf"][0]["cpu_seconds"] > 0
    assert main(["bench", "data", str(text), "--only=nothing"]) == 2


@pytest.mark.slow
def test_the_rival_writes_the_tokens_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = data.Corpus.write([str(write_text(tmp_path / "a.txt", 400))], tmp_path / "text")
    shards = tiny_shards(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        [
            "hf_path", *corpus.files("whole"), "--workers=2", f"--out={tmp_path / 'rival'}",
            f"--tokenizer={shards / 'tokenizer.json'}",
        ],
    )  # fmt: skip
    hf_path.main()
    tables = [
        pa.ipc.open_stream(path).read_all()
        for path in sorted((tmp_path / "rival" / "blocks").glob("*.arrow"))
    ]
    blocks = [block for table in tables for block in table.column("input_ids").to_pylist()]
    assert {len(block) for block in blocks} == {512}
    # all but the rest of each batch of 1,000 documents, with [CLS] and [SEP]
    assert len(blocks) * 512 > 0.8 * corpus.text_bytes / 6
