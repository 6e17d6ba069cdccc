"""Held-out losses: without dropout, the same on any number of ranks, against plain torch."""

from pathlib import Path

import pytest
import torch

from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.train.heldout import HeldOut, evaluate_heldout
from stacking_ds.train.plan import open_plan
from tests.prose import tiny_shards
from tests.ranks import run_ranks
from tests.runs import small_recipe


def _evaluate(world: World, config: RunConfig) -> tuple[HeldOut, bool]:
    plan = open_plan(config)
    model = BertForPreTraining(plan.model_config(2), seed=4)
    result = evaluate_heldout(
        model, plan.data.heldout_steps(world.rank, world.size, plan.schedule.phases.at(0)), world
    )
    return result, model.training


_DROPOUT = ("model.hidden_dropout_prob=0.5", "model.attention_probs_dropout_prob=0.5")


def test_dropout_is_off_and_the_ranks_agree(tmp_path: Path) -> None:
    config = small_recipe(tmp_path, tiny_shards(tmp_path), *_DROPOUT)
    [(alone, training)] = run_ranks(_evaluate, 1, config)
    assert training, "training goes on with dropout"
    for result, _ in run_ranks(_evaluate, 3, config):
        assert result.mlm_targets == alone.mlm_targets
        assert result.mlm_loss == pytest.approx(alone.mlm_loss, rel=1e-6)
        assert result.nsp_loss == pytest.approx(alone.nsp_loss, rel=1e-6)
        assert result.mlm_accuracy == alone.mlm_accuracy

    plan = open_plan(config)
    model = BertForPreTraining(plan.model_config(2), seed=4).eval()
    total, right, targets = 0.0, 0, 0
    for rank_step in plan.data.heldout_steps(0, 1, plan.schedule.phases.at(0)):
        for micro_batch in rank_step.micro_batches:
            batch = micro_batch.to("cpu")
            with torch.no_grad():
                logits, _ = model(*batch.model_inputs[:4])
            at_masks = logits[batch.mlm_positions_M].double()
            chosen = at_masks.log_softmax(-1).gather(1, batch.mlm_labels_M[:, None])
            total -= float(chosen.sum())
            right += int((at_masks.argmax(-1) == batch.mlm_labels_M).sum())
            targets += len(batch.mlm_labels_M)
    assert alone.mlm_targets == targets
    assert alone.mlm_loss == pytest.approx(total / targets, rel=1e-6)
    assert alone.mlm_accuracy == pytest.approx(right / targets)
