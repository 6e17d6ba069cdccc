"""Batches in which nothing can be predicted count as steps and change nothing, on all ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.config.run import RunConfig
from stacking_ds.data.batches import Batch, RankStep
from stacking_ds.data.loader import PretrainingSteps
from stacking_ds.data.run_data import RunData
from stacking_ds.distributed.world import World
from stacking_ds.kernels.cross_entropy import IGNORE_INDEX
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.train.metrics import Interval, TrainState
from stacking_ds.train.plan import open_plan
from stacking_ds.train.step import StepResult
from tests.prose import tiny_shards
from tests.ranks import run_ranks
from tests.runs import losses, metrics, parameters, small_recipe, train_small

EMPTY = 1
STEPS = "stages=[{num_hidden_layers: 1, steps: 4}]"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def _without(batch: Batch, *, pairs: bool) -> Batch:
    """Nothing masked; and no sentence pairs either, unless `pairs`."""
    label_E = batch.next_sentence_label_E
    nothing = batch.mlm_positions_M[:0]
    return replace(
        batch,
        mlm_positions_M=nothing,
        mlm_labels_M=nothing,
        next_sentence_label_E=label_E if pairs else torch.full_like(label_E, IGNORE_INDEX),
    )


def _train(world: World, config: RunConfig, run_dir: Path, steps: range, pairs: bool) -> int:
    """Train where the batches of these steps have nothing to predict, or nothing masked."""
    original = PretrainingSteps.__getitem__

    def step(self: PretrainingSteps, number: int) -> RankStep:
        found = original(self, number)
        if number not in steps:
            return found
        micro_batches = [_without(batch, pairs=pairs) for batch in found.micro_batches]
        return RankStep.of(micro_batches, found.real_tokens)

    PretrainingSteps.__getitem__ = step  # type: ignore[method-assign]
    return train_small(world, config, run_dir)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_batch_without_targets_counts_and_is_passed_over(
    shards: Path, tmp_path: Path, ranks: int
) -> None:
    config = small_recipe(tmp_path, shards, STEPS)
    run_dir = tmp_path / "run"
    assert run_ranks(_train, ranks, config, run_dir, range(EMPTY, EMPTY + 2), False) == [4] * ranks
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["train/loss" in line for line in lines] == [True, False, False, True]
    assert [line["optim/empty_steps"] for line in lines] == [0, 1, 2, 2]
    assert [line["samples_seen"] for line in lines] == [10, 20, 30, 40]
    rates = open_plan(config).schedule.learning_rates
    assert [line["optim/learning_rate"] for line in lines] == [rates.at(n) for n in range(4)]
    said = (run_dir / "train.log").read_text()
    assert said.count("step 2 is passed over: nothing in its batch can be predicted") == 1
    assert "step 2/4  stage 0 (1 layers)  train MLM loss -  lr" in said


def test_a_run_of_such_batches_leaves_the_weights_as_they_were(
    shards: Path, tmp_path: Path
) -> None:
    config = small_recipe(tmp_path, shards, STEPS)
    run_ranks(_train, 1, config, tmp_path / "run", range(4), False)
    assert not any("train/loss" in line for line in metrics(tmp_path / "run"))
    initial = BertForPreTraining(open_plan(config).model_config(1), seed=config.seed)
    saved = parameters(tmp_path / "run")
    assert all(torch.equal(saved[name], value) for name, value in initial.named_parameters())


def test_without_masks_sentence_pairs_are_still_learned(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards, STEPS)
    run_ranks(_train, 1, config, tmp_path / "run", range(EMPTY, EMPTY + 1), True)
    line = metrics(tmp_path / "run")[EMPTY]
    assert "train/mlm_loss" not in line
    assert line["train/loss"] == line["train/nsp_loss"] > 0
    assert line["optim/grad_norm"] > 0
    assert line["optim/empty_steps"] == 0
    assert len(losses(tmp_path / "run")) == 4


def test_means_are_over_the_steps_that_have_a_loss() -> None:
    interval, state = Interval(), TrainState()
    for mlm_loss, nsp_loss in ((4.0, 0.5), (None, 0.7), (None, None)):
        result = StepResult(mlm_loss, nsp_loss, 0, 10, 1.0, 1e-3)
        interval.count(result, 1.0)
        state.count(result, 8, 1.0)
    assert interval.means() == pytest.approx(
        {"train/loss": (4.5 + 0.7) / 2, "train/mlm_loss": 4.0, "train/nsp_loss": 0.6}
    )
    assert (interval.tokens, state.tokens_seen, state.empty_steps) == (20, 30, 1)


def _unknown_heldout(world: World, config: RunConfig, run_dir: Path) -> int:
    original = RunData.heldout_steps

    def steps(self: RunData, *arguments: Any) -> list[RankStep]:
        found = original(self, *arguments)
        return [
            RankStep.of([_without(batch, pairs=True)], step.real_tokens)
            for step in found
            for batch in step.micro_batches
        ]

    RunData.heldout_steps = steps  # type: ignore[method-assign]
    return train_small(world, config, run_dir)


def test_held_out_rows_without_masks_give_no_loss_and_end_no_run(
    shards: Path, tmp_path: Path
) -> None:
    config = small_recipe(tmp_path, shards, STEPS)
    assert run_ranks(_unknown_heldout, 1, config, tmp_path / "run") == [4]
    assert not any("eval/mlm_loss" in line for line in metrics(tmp_path / "run"))
    assert (
        "no held-out loss: nothing in the held-out rows of 32 tokens"
        in (tmp_path / "run" / "train.log").read_text()
    )
