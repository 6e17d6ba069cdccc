"""The optimizer step: forward, loss and backward of every micro-batch, then one update.

micro-batch   0                    1                              last
              forward, backward -> advance, forward, backward ... -> finite? -> advance
                                   (DeepSpeed counts)                          (it updates)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stacking_ds.data.batches import Batch
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import advance, set_learning_rate
from stacking_ds.errors import NonFiniteError
from stacking_ds.model.bert import forward_loss


@dataclass(frozen=True)
class StepCounts:
    """Counts that the losses of a global batch are divided by, summed over all ranks."""

    mlm_targets: float
    nsp_targets: float
    tokens: float
    """Real ones, padding excluded."""


@dataclass(frozen=True)
class StepResult:
    """One step over all ranks; losses are means over the global batch's targets, in nats."""

    mlm_loss: float | None
    """None where no token could be masked."""
    nsp_loss: float | None
    """None where examples are no sentence pairs."""
    mlm_targets: int
    tokens: int
    grad_norm: float
    learning_rate: float

    @property
    def loss(self) -> float | None:
        """The sum of the two, as far as the batch has targets; None where it has none at all, so
        that nothing was computed."""
        found = [loss for loss in (self.mlm_loss, self.nsp_loss) if loss is not None]
        return sum(found) if found else None


def forward_backward(engine: Any, batch: Batch, counts: StepCounts, scale: float) -> torch.Tensor:
    """Add the batch's gradient to the engine's.

    The loss is MLM sum / MLM targets + NSP sum / NSP targets, with the counts of the *global*
    batch. DeepSpeed averages gradients over ranks and micro-steps; `scale` undoes that.

    Returns:
        The batch's summed MLM and NSP loss in nats, [2].
    """
    forward = forward_loss(
        engine, batch.model_inputs, batch.mlm_labels_M, batch.next_sentence_label_E
    )
    mlm_sum, nsp_sum = forward.sums
    total = mlm_sum / max(counts.mlm_targets, 1) + nsp_sum / max(counts.nsp_targets, 1)
    engine.backward(scale * total)
    return torch.stack([mlm_sum.detach(), nsp_sum.detach()])


def _seed_dropout(seed: int, device: torch.device) -> None:
    # `torch.manual_seed` asks every backend there is, which takes a hundred times as long
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def require_finite(what: str, value: float) -> None:
    """Raises:
    NonFiniteError: the value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise NonFiniteError(f"the {what} is {value}")


def training_step(
    engine: Any,
    micro_batches: Sequence[Batch],
    counts: StepCounts,
    *,
    learning_rate: float,
    seed: int,
    world: World,
    require_finite: Callable[[str, float], None] = require_finite,
) -> StepResult:
    """One optimizer step on one global batch. A collective.

    A batch without targets of one kind trains on the other; one without any is passed over.

    Args:
        micro_batches: this rank's share, as many of the same shape on every rank.
        seed: of this rank's dropout in this step.
        require_finite: called with "loss" before the update and with "gradient norm" after it
            (in fp16 loss scaling skips such steps itself); raises if the value is not finite.
    """
    tokens = round(counts.tokens)
    if not counts.mlm_targets + counts.nsp_targets:  # the same on all ranks
        return StepResult(None, None, 0, tokens, 0.0, learning_rate)
    set_learning_rate(engine, learning_rate)
    _seed_dropout(seed, world.device)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for index, micro_batch in enumerate(micro_batches):
        world.pulse.move()
        if index > 0:
            advance(engine)
        batch = micro_batch.to(world.device)
        sums += forward_backward(engine, batch, counts, world.size * len(micro_batches))
    mlm_total, nsp_total = world.sum(sums.tolist())
    mlm_loss = mlm_total / counts.mlm_targets if counts.mlm_targets else None
    nsp_loss = nsp_total / counts.nsp_targets if counts.nsp_targets else None
    require_finite("loss", (mlm_loss or 0.0) + (nsp_loss or 0.0))
    grad_norm = advance(engine)
    assert grad_norm is not None, "the last micro-batch did not complete a step"
    if not engine.fp16_enabled():
        require_finite("gradient norm", grad_norm)
    return StepResult(
        mlm_loss, nsp_loss, round(counts.mlm_targets), tokens, grad_norm, learning_rate
    )
