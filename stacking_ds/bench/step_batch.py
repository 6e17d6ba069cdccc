"""Rows of random tokens with the lengths of real ones, as our model and as transformers take them.

Shapes: B rows, S slots a row, T tokens, M masked positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stacking_ds.bench.step_case import StepCase
from stacking_ds.data.batches import Batch
from stacking_ds.distributed.world import World
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.cross_entropy import IGNORE_INDEX
from stacking_ds.model.bert import from_rows
from stacking_ds.train.step import StepCounts

_MASKED_SHARE = 0.15  # Devlin et al. 2019 §3.1
_MASK_ID = 3
_SHORTEST = 4
_CONCENTRATION = 4.0  # of the lengths around their mean: all lengths occur, the shortest seldom


@dataclass(frozen=True)
class StepBatch:
    """The rows of one micro-step. Word ids follow Zipf's law, as those of text do."""

    ours: Batch
    theirs: dict[str, torch.Tensor]
    """What `transformers.BertForPreTraining` is called with: the same rows, with padding."""
    attended_tokens: float
    """Mean over the tokens of how many a token attends to, itself included."""

    @property
    def tokens(self) -> int:
        return len(self.ours.input_ids_T)

    @property
    def mlm_targets(self) -> int:
        return len(self.ours.mlm_labels_M)

    @property
    def nsp_targets(self) -> int:
        return len(self.ours.next_sentence_label_E)


def row_lengths(rows: int, sequence_length: int, fill: float, seed: int) -> NDArray[np.int64]:
    """Tokens of each row: beta-distributed, and together `fill` of all slots to the token.

    Raises:
        ConfigError: rows too short for that fill.
    """
    total = round(fill * rows * sequence_length)
    if not _SHORTEST * rows <= total <= rows * sequence_length:
        raise ConfigError(
            f"rows of {sequence_length} slots cannot be filled to {fill:.0%} with rows of at least "
            f"{_SHORTEST} tokens; raise --sequence-length"
        )
    if total == rows * sequence_length:
        return np.full(rows, sequence_length)
    generator = np.random.default_rng(seed)
    shares = generator.beta(_CONCENTRATION * fill, _CONCENTRATION * (1 - fill), rows)
    lengths = np.rint(shares * sequence_length).astype(np.int64).clip(_SHORTEST, sequence_length)
    # so few rows miss the mean that they are drawn with
    while off := total - int(lengths.sum()):
        one = 1 if off > 0 else -1
        movable = np.flatnonzero(lengths < sequence_length if off > 0 else lengths > _SHORTEST)
        lengths[generator.permutation(movable)[: abs(off)]] += one
    return lengths


def make_batch(
    lengths_B: NDArray[np.int64], sequence_length: int, vocab_size: int, seed: int
) -> StepBatch:
    """Rows of these lengths; 15 % of all tokens are masked."""
    generator = torch.Generator().manual_seed(seed)
    shape = B, S = len(lengths_B), sequence_length
    lengths_B1 = torch.from_numpy(lengths_B)[:, None]
    places_BS = torch.arange(S).expand(shape)
    mask_BS = places_BS < lengths_B1
    # 0 is [PAD], to which transformers gives no gradient
    drawn_BS = vocab_size ** torch.rand(shape, generator=generator, dtype=torch.float64)
    original_BS = drawn_BS.long().clamp(1, vocab_size - 1) * mask_BS
    slots_T = mask_BS.flatten().nonzero().flatten()
    masked = max(1, round(_MASKED_SHARE * len(slots_T)))
    slots_M = slots_T[torch.randperm(len(slots_T), generator=generator)[:masked]].sort().values
    labels_M = original_BS.flatten()[slots_M]
    ids_BS = original_BS.flatten().index_fill(0, slots_M, _MASK_ID).view(shape)
    types_BS = ((places_BS >= lengths_B1 // 2) & mask_BS).long()
    nsp_B = torch.randint(0, 2, (B,), generator=generator)
    labels_BS = torch.full(shape, IGNORE_INDEX).flatten().index_copy(0, slots_M, labels_M)
    ids_T, types_T, places_T, sequences = from_rows(ids_BS, types_BS, mask_BS)
    return StepBatch(
        ours=Batch(
            sequences,
            *(ids_T, types_T, places_T),
            mlm_positions_M=torch.searchsorted(slots_T, slots_M),
            mlm_labels_M=labels_M,
            next_sentence_label_E=nsp_B,
        ),
        theirs={
            "input_ids": ids_BS,
            "token_type_ids": types_BS,
            "attention_mask": mask_BS.long(),
            "labels": labels_BS.view(shape),
            "next_sentence_label": nsp_B,
        },
        attended_tokens=float((lengths_B**2).sum() / lengths_B.sum()),
    )


def counts_of(batches: Sequence[StepBatch], world: World) -> StepCounts:
    """Targets and tokens of these micro-batches over all ranks. A collective."""
    return StepCounts(
        *world.sum(
            [
                sum(batch.mlm_targets for batch in batches),
                sum(batch.nsp_targets for batch in batches),
                sum(batch.tokens for batch in batches),
            ]
        )
    )


def case_batches(case: StepCase, device: torch.device) -> list[StepBatch]:
    """The micro-batches of the case's step, on `device`.

    Raises:
        ConfigError: rows too short for the case's fill.
    """
    lengths = [
        row_lengths(case.rows, case.sequence_length, case.fill, seed)
        for seed in range(case.micro_steps)
    ]
    return _batches(case, lengths, device)


def dense_batches(case: StepCase, device: torch.device) -> list[StepBatch]:
    """Micro-batches of full rows with as many tokens as the case's, to half a row."""
    rows = max(1, round(case.fill * case.rows))
    length = case.sequence_length
    lengths = [np.full(rows, length, dtype=np.int64) for _ in range(case.micro_steps)]
    return _batches(case, lengths, device)


def _batches(
    case: StepCase, lengths: list[NDArray[np.int64]], device: torch.device
) -> list[StepBatch]:
    made = [
        make_batch(lengths_B, case.sequence_length, case.model.vocab_size, seed)
        for seed, lengths_B in enumerate(lengths)
    ]
    return [
        StepBatch(
            batch.ours.to(device),
            {name: tensor.to(device) for name, tensor in batch.theirs.items()},
            batch.attended_tokens,
        )
        for batch in made
    ]
