"""Whole runs whose rows and batches change on the way, inside a stage and at its end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.errors import ConfigError, StageError
from stacking_ds.train import plan
from stacking_ds.train.plan import open_plan
from tests.prose import tiny_shards
from tests.ranks import RankError, run_ranks
from tests.runs import losses, metrics, parameters, small_recipe, train_small, train_until

# stages end after steps 4 and 7: the first phase changes inside a stage, the second at its end
PHASES = (
    "data.sequence_length=16",
    "data.packing=true",
    "data.variants=2",
    "data.masking=whole_words",
    "phases=[{from_step: 2, sequence_length: 32, global_batch_size: 6, micro_batch_size: 2},"
    " {from_step: 7, global_batch_size: 8}, {from_step: 9, sequence_length: 16}]",
)
# attention dropout too: it is a function of the step, whatever happened before
slow = pytest.mark.slow
DROPOUT = ("model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def _config(folder: Path, shards: Path, *overrides: str) -> RunConfig:
    return small_recipe(folder, shards, *PHASES, *overrides)


def _resolved(world: World, config: RunConfig, run_dir: Path) -> int:
    calls = []
    original = plan.resolve_ds_config

    def resolve(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return original(*arguments, **options)

    plan.resolve_ds_config = resolve
    train_small(world, config, run_dir)
    return len(calls)


def test_the_deepspeed_json_is_resolved_once_for_each_phase(shards: Path, tmp_path: Path) -> None:
    assert run_ranks(_resolved, 1, _config(tmp_path, shards), tmp_path / "run") == [4]


@pytest.mark.slow
def test_phases_train_the_same_at_any_zero_stage_and_rank_count(
    shards: Path, tmp_path: Path
) -> None:
    run_ranks(train_small, 1, _config(tmp_path, shards, "engine.deepspeed=zero0"), tmp_path / "a")
    reference = metrics(tmp_path / "a")
    for name, world_size, zero_stage in (("b", 2, 1), ("c", 3, 3)):
        config = _config(tmp_path, shards, f"engine.deepspeed=zero{zero_stage}")
        run_ranks(train_small, world_size, config, tmp_path / name)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "a"), rel=2e-5)
    rows = [10, 20, 26, 32, 38, 44, 50, 58, 66, 74]
    assert [line["samples_seen"] for line in reference] == rows
    said = (tmp_path / "a" / "train.log").read_text()
    assert "phase 1 at step 2: 6 rows of 32 tokens a step" in said
    tokens = [line["tokens_seen"] for line in reference]
    steps = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    slots = [160, 160, 192, 192, 192, 192, 192, 256, 256, 128]
    assert all(0.85 * slot < step <= slot for step, slot in zip(steps, slots, strict=True))
    assert {line["num_hidden_layers"] for line in reference} == {1, 2, 4}


@pytest.mark.parametrize(
    "at_step",
    [
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(1, marks=slow),
        7,
        pytest.param(5, marks=slow),
        pytest.param(9, marks=slow),
    ],
)
def test_a_run_stopped_anywhere_among_phases_ends_bit_for_bit_the_same(
    shards: Path, tmp_path: Path, at_step: int
) -> None:
    config = _config(tmp_path, shards, *DROPOUT)
    run_ranks(train_small, 2, config, tmp_path / "whole")
    run_ranks(train_until, 2, config, tmp_path / "cut", "term", at_step)
    run_ranks(train_small, 2, config, tmp_path / "cut", True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    expected = parameters(tmp_path / "whole")
    for name, tensor in parameters(tmp_path / "cut").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_new_engine_for_a_phase_changes_no_weight_and_no_moment(
    shards: Path, tmp_path: Path
) -> None:
    # the moments are reset at growth, so that only the phase can carry them on
    one = ("stages=[{num_hidden_layers: 2, steps: 8}]", "growth.moments=reset")
    run_ranks(train_small, 2, small_recipe(tmp_path, shards, *one), tmp_path / "a")
    other = small_recipe(tmp_path, shards, *one, "phases=[{from_step: 3, micro_batch_size: 1}]")
    run_ranks(train_small, 2, other, tmp_path / "b")
    assert "phase 1 at step 3" in (tmp_path / "b" / "train.log").read_text()
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=2e-6)


def test_a_phase_soon_after_a_boundary_goes_on_from_the_present_weights(
    shards: Path, tmp_path: Path
) -> None:
    # the boundary's save leaves a host copy, which is stale a step later
    never = "checkpoint.every_steps=1000"
    run_ranks(train_small, 1, small_recipe(tmp_path, shards, never), tmp_path / "a")
    other = small_recipe(tmp_path, shards, never, "phases=[{from_step: 6, micro_batch_size: 1}]")
    run_ranks(train_small, 1, other, tmp_path / "b")
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=2e-6)


def test_each_length_is_evaluated_on_rows_of_its_own(shards: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, shards)
    run_ranks(train_small, 1, config, tmp_path / "run")
    lines = [line for line in metrics(tmp_path / "run") if "eval/mlm_loss" in line]
    # where a phase ends, and where a stage does
    assert [line["step"] for line in lines] == [2, 4, 7, 9, 10]
    assert [line["sequence_length"] for line in lines] == [16, 32, 32, 32, 16]
    floors = {line["sequence_length"]: line["eval/unigram_mlm_loss"] for line in lines}
    assert floors[16] != floors[32]
    assert [line["eval/unigram_mlm_loss"] for line in lines] == [
        floors[line["sequence_length"]] for line in lines
    ]


def test_documents_without_next_sentences_train_and_report_no_such_loss(
    shards: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, shards, "data.examples=documents", "data.masking=spans")
    run_ranks(train_small, 2, config, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert not any("nsp" in key for line in lines for key in line)
    assert all(line["train/loss"] == line["train/mlm_loss"] for line in lines)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert all(0 <= line["speed/data_wait_share"] < 1 for line in lines)


def test_the_peak_follows_the_batch_of_the_phase(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(
        tmp_path,
        shards,
        "optimizer.learning_rate_batch_size=10",
        "schedule={shape: constant}",
        "phases=[{from_step: 4, global_batch_size: 40}, {from_step: 6, global_batch_size: 10}]",
    )
    rates = config.learning_rates()
    peak = config.optimizer.learning_rate
    assert [rates.at(step) / peak for step in (3, 4, 5, 6)] == pytest.approx([1, 2, 2, 1])


def test_impossible_phases_are_refused_before_anything_starts(shards: Path, tmp_path: Path) -> None:
    for phases, sentence in (
        ("[{from_step: 3}]", "phases.0: say what changes: sequence_length"),
        ("[{from_step: 3, sequence_length: 64}]", "phases.0.sequence_length=64 does not fit"),
        ("[{from_step: 3, rows: 4}]", "phases.0.rows is not a key"),
        (
            "[{from_step: 5, micro_batch_size: 2}, {from_step: 5, micro_batch_size: 1}]",
            "phase 2 starts at step 5, not after the 5",
        ),
    ):
        with pytest.raises(ConfigError, match=sentence):
            small_recipe(tmp_path, shards, f"phases={phases}")
    late = small_recipe(tmp_path, shards, "phases=[{from_step: 10, micro_batch_size: 2}]")
    with pytest.raises(StageError, match=r"from_step=10 is not before the end of the run at step"):
        open_plan(late)
    large = small_recipe(tmp_path, shards, "phases=[{from_step: 5, global_batch_size: 100000}]")
    with pytest.raises(RankError, match="fewer than one global batch of 100000"):
        run_ranks(train_small, 1, large, tmp_path / "run")


@pytest.mark.slow
def test_another_micro_batch_of_a_phase_is_the_same_run(shards: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, shards)
    run_ranks(train_until, 1, config, tmp_path / "run", "term", 3)
    smaller = _config(tmp_path, shards, "phases.0.micro_batch_size=3")
    run_ranks(train_small, 2, smaller, tmp_path / "run", True)
    assert metrics(tmp_path / "run")[-1]["step"] == 10
    other = _config(tmp_path, shards, "phases.0.global_batch_size=4")
    with pytest.raises(RankError, match=r"phases\.0\.global_batch_size: 6 -> 4"):
        run_ranks(train_small, 1, other, tmp_path / "run", True)
