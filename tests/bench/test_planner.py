"""The planner's prices against arithmetic that fits on a hand, and against live engines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stacking_ds.bench.bytes_sent import BytesSent
from stacking_ds.bench.crossing import LabelledWorld
from stacking_ds.bench.planner import MODELS, Growth, PerRank, price
from stacking_ds.bench.workload import Workload
from stacking_ds.cli import main
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import release_engine
from stacking_ds.growth.transfer import capture, install
from stacking_ds.model.bert_config import BertConfig
from tests.ranks import run_ranks

LAYER = 7_087_872  # BERT-base: 12 * 768^2 weights and 13 * 768 biases and LayerNorms
SMALL = Growth("bert-base", 1, 2, ranks=2, new_ranks=2, zero_stage=3, new_zero_stage=3)


def _parameters(depth: int) -> int:
    return BertConfig(num_hidden_layers=depth, **MODELS["bert-base"]).num_parameters


def test_the_same_layout_moves_nothing() -> None:
    for zero_stage in range(4):
        same = replace(SMALL, zero_stage=zero_stage, new_zero_stage=zero_stage)
        found = price(same, 1.0, 1.0)
        assert found.parameters == (_parameters(1), _parameters(1) + LAYER)
        assert found.sent == found.received == PerRank(0, 0.0, 0)
        copies = 2 if zero_stage == 0 else 1  # ZeRO 0: everything on both ranks
        assert 2 * found.captured.mean == copies * 12 * _parameters(1)
        assert 2 * found.kept.mean == copies * 12 * _parameters(2)


def test_from_shards_to_replicas_each_rank_lacks_the_others_half() -> None:
    found = price(replace(SMALL, new_zero_stage=0), 1.0, 1.0)
    # the halves of a parameter with an odd number of elements differ by one
    assert found.sent.mean == found.received.mean == 12 * _parameters(2) / 2
    assert found.kept.mean == 12 * _parameters(2) / 2
    assert found.received.most - found.received.least <= 2 * 12 * 50


def test_from_replicas_to_shards_nothing_moves() -> None:
    found = price(replace(SMALL, zero_stage=0), 1.0, 1.0)
    assert found.sent.most == 0
    assert 2 * found.kept.mean == 12 * _parameters(2)


def test_to_more_ranks() -> None:
    """ZeRO 3 from 1 to 2 ranks: the second half of every parameter goes to the new rank."""
    found = price(replace(SMALL, ranks=1), 1.0, 1.0)
    assert found.sent.least == found.sent.most == found.received.most
    assert found.received.least == 0
    assert found.sent.most + found.kept.most == 12 * _parameters(2)


def test_moments_that_are_reset_do_not_move() -> None:
    carried, reset = (
        price(replace(SMALL, new_zero_stage=0, moments=moments), 1.0, 1.0)
        for moments in ("carry", "reset")
    )
    assert carried.sent.most == 3 * reset.sent.most
    assert carried.captured == reset.captured


def test_the_time_is_bytes_over_bandwidth() -> None:
    found = price(
        replace(SMALL, new_zero_stage=0), host_gib_per_second=2.0, link_gib_per_second=0.5
    )
    busiest = found.captured.most + 12 * _parameters(2) + found.received.least
    assert found.host_seconds == pytest.approx(busiest / 2**31, rel=1e-4)
    assert found.link_seconds == found.received.most / 2**29


TINY = {
    "vocab_size": 50,
    "hidden_size": 20,
    "num_attention_heads": 1,
    "intermediate_size": 80,
    "max_position_embeddings": 8,
}
_WORKLOAD = Workload(
    hidden_size=20,
    layers=1,
    new_layers=3,
    vocab_size=50,
    sequence_length=8,
    global_batch_size=6,
    micro_batch_size=2,
    precision="bf16",
    zero_stage=3,
)


def _change_zero_stage(world: World) -> dict[str, int]:
    """Grow from ZeRO 3 to ZeRO 1; what this rank sent."""
    old, new = _WORKLOAD, replace(_WORKLOAD, zero_stage=1)
    engine = old.old_engine(world)
    state = capture(engine)
    release_engine(engine)
    engine = new.new_engine(world)
    with BytesSent() as sent:
        ranks = LabelledWorld(world, sent)
        install(state, engine, old.layer_map, "carry", ranks)
    return dict(sent.by_label)


def test_live_engines_send_what_was_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)  # type: ignore[arg-type]
    growth = Growth("tiny", 1, 3, ranks=3, new_ranks=3, zero_stage=3, new_zero_stage=1)
    priced = price(growth, 1.0, 1.0)
    by_rank = run_ranks(_change_zero_stage, 3)
    moved = [sent["state moved"] for sent in by_rank]
    assert PerRank(min(moved), sum(moved) / 3, max(moved)) == priced.sent
    assert priced.sent.least > 0
    # each of the 8 parameter groups is padded to a multiple of the ranks
    padding = 8 * 2 * 2 * 3
    assert all(0 <= sent[""] - priced.refreshed <= padding for sent in by_rank)


def test_bert_large_on_4096_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "price.json"
    speeds = ["--host-gib-per-second", "10", "--link-gib-per-second", "10"]
    assert main(["bench", "planner", "--json", str(path), *speeds]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bert-large, 24 -> 48 layers (336.2 M -> 638.5 M parameters)")
    assert lines[1] == "ZeRO 3 on 4,096 ranks"
    (sent,) = (line for line in lines if line.startswith("sent to other ranks"))
    assert sent.split()[-3:] == ["0", "0", "0"]
    figures = json.loads(path.read_text())
    assert figures["price"]["captured"][1] == 12 * figures["price"]["parameters"][0] / 4096
    assert figures["machine"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ranks", "0"], "--ranks=0"),
        (["--new-layers", "24"], "24 layers cannot grow from one of 24"),
        (["--operator", "interleave", "--new-layers", "30"], "interleave"),
        (["--link-gib-per-second", "0"], "--link-gib-per-second=0"),
    ],
)
def test_what_cannot_be_priced(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "planner", "--host-gib-per-second", "1", *arguments]) == 2
    assert sentence in capsys.readouterr().err
