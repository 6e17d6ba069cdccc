"""Masked-LM and next-sentence loss on held-out rows with fixed masks."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stacking_ds.data.batches import RankStep
from stacking_ds.data.run_data import RunData
from stacking_ds.distributed.world import World
from stacking_ds.errors import DataError, NonFiniteError
from stacking_ds.model.bert import forward_loss
from stacking_ds.run.metrics_file import finite_or_none
from stacking_ds.schedule.phases import Phase


@dataclass(frozen=True)
class HeldOut:
    """Means over all held-out targets of all ranks; losses in nats."""

    mlm_loss: float
    mlm_accuracy: float
    nsp_loss: float | None
    """None, like the accuracy, where examples are no sentence pairs."""
    nsp_accuracy: float | None
    mlm_targets: int

    def metrics(self) -> dict[str, float]:
        found = {
            "eval/mlm_loss": self.mlm_loss,
            "eval/mlm_accuracy": self.mlm_accuracy,
            "eval/nsp_loss": self.nsp_loss,
            "eval/nsp_accuracy": self.nsp_accuracy,
        }
        return {name: value for name, value in found.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """All of it, for JSON; a number that is not finite is null."""
        return {name: finite_or_none(value) for name, value in asdict(self).items()}

    def require_finite(self, whose: str) -> None:
        """Raises:
        NonFiniteError: the loss `whose` is NaN or infinite; the same on all ranks.
        """
        loss = self.mlm_loss + (self.nsp_loss or 0.0)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the held-out loss {whose} is {loss}: its weights have overflowed; take an "
                f"earlier checkpoint, or train again with a lower optimizer.learning_rate"
            )


class HeldOutPasses:
    """The held-out rows of a run for this rank, kept once they are made."""

    def __init__(self, data: RunData, world: World) -> None:
        self._data, self._world = data, world
        self._rows: dict[tuple[int, int], list[RankStep]] = {}
        self._unigram_loss: dict[int, float] = {}

    def metrics(self, model: Any, phase: Phase) -> dict[str, float]:
        """Those of one pass in the phase's sequence length, with what word frequencies alone give
        on the same targets, and what a blind guess does; nothing where there is no target. A
        collective."""
        data, world, length = self._data, self._world, phase.sequence_length
        key = (length, phase.micro_batch_size)
        if key not in self._rows:
            self._rows[key] = data.heldout_steps(world.rank, world.size, phase)
        if not world.any(any(step.mlm_targets for step in self._rows[key])):
            return {}
        if length not in self._unigram_loss:
            self._unigram_loss[length] = world.on_first(lambda: data.unigram_loss(phase))
        found = evaluate_heldout(model, self._rows[key], world).metrics()
        return {
            **found,
            "eval/unigram_mlm_loss": self._unigram_loss[length],
            "eval/uniform_mlm_loss": math.log(data.vocab_size),
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
            world.pulse.move()
            batch = micro_batch.to(world.device)
            loss, mlm_logits_MV, nsp_logits_E2 = forward_loss(
                model, batch.model_inputs, batch.mlm_labels_M, batch.next_sentence_label_E
            )
            sums += torch.stack(
                [
                    loss.mlm_sum.double(),
                    loss.nsp_sum.double(),
                    (mlm_logits_MV.argmax(-1) == batch.mlm_labels_M).sum().double(),
                    (nsp_logits_E2.argmax(-1) == batch.next_sentence_label_E).sum().double(),
                    (batch.mlm_labels_M >= 0).sum().double(),
                    (batch.next_sentence_label_E >= 0).sum().double(),
                ]
            )
    model.train()
    mlm_loss, nsp_loss, mlm_right, nsp_right, mlm_targets, nsp_targets = world.sum(sums.tolist())
    if not mlm_targets:
        raise DataError(
            "the held-out rows mask no token, so there is no loss to measure: hold out more text"
        )
    return HeldOut(
        mlm_loss=mlm_loss / mlm_targets,
        mlm_accuracy=mlm_right / mlm_targets,
        nsp_loss=nsp_loss / nsp_targets if nsp_targets else None,
        nsp_accuracy=nsp_right / nsp_targets if nsp_targets else None,
        mlm_targets=round(mlm_targets),
    )
