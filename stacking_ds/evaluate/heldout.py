"""Masked-LM and next-sentence loss on held-out rows with fixed masks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from stacking_ds.data.batches import RankStep
from stacking_ds.distributed import World
from stacking_ds.model.loss import pretraining_loss

__all__ = ["HeldOut", "evaluate_heldout"]


@dataclass(frozen=True)
class HeldOut:
    """Means over all held-out targets of all ranks; losses in nats."""

    mlm_loss: float
    mlm_accuracy: float
    nsp_loss: float
    nsp_accuracy: float
    mlm_targets: int

    def metrics(self) -> dict[str, float]:
        return {
            "eval/mlm_loss": self.mlm_loss,
            "eval/mlm_accuracy": self.mlm_accuracy,
            "eval/nsp_loss": self.nsp_loss,
            "eval/nsp_accuracy": self.nsp_accuracy,
        }


@torch.no_grad()
def evaluate_heldout(model: Any, steps: Iterable[RankStep], world: World) -> HeldOut:
    """Run `model` (a module or a DeepSpeed engine) over this rank's part of the held-out pass.

    A collective: every rank passes the same number of equally shaped micro-batches, which
    `RankStep` guarantees. The model is left in training mode.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=world.device)
    model.eval()
    for rank_step in steps:
        for micro_batch in rank_step.micro_batches:
            batch = micro_batch.to(world.device)
            mlm_logits_MV, nsp_logits_B2 = model(
                batch.input_ids_BS,
                batch.token_type_ids_BS,
                batch.attention_mask_BS,
                batch.mlm_positions_M,
            )
            loss = pretraining_loss(
                mlm_logits_MV, batch.mlm_labels_M, nsp_logits_B2, batch.next_sentence_label_B
            )
            sums += torch.stack(
                [
                    loss.mlm_sum.double(),
                    loss.nsp_sum.double(),
                    (mlm_logits_MV.argmax(-1) == batch.mlm_labels_M).sum().double(),
                    (nsp_logits_B2.argmax(-1) == batch.next_sentence_label_B).sum().double(),
                    (batch.mlm_labels_M >= 0).sum().double(),
                    (batch.next_sentence_label_B >= 0).sum().double(),
                ]
            )
    model.train()
    mlm_loss, nsp_loss, mlm_right, nsp_right, mlm_targets, nsp_targets = world.sum(sums.tolist())
    return HeldOut(
        mlm_loss=mlm_loss / mlm_targets,
        mlm_accuracy=mlm_right / mlm_targets,
        nsp_loss=nsp_loss / nsp_targets,
        nsp_accuracy=nsp_right / nsp_targets,
        mlm_targets=round(mlm_targets),
    )
