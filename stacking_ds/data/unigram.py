"""The floor a language model must beat: guessing each masked token by its frequency alone."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from stacking_ds.data.batches import RankStep
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import DataError


def unigram_log_probabilities(shards: TokenShards) -> NDArray[np.float64]:
    """Natural logarithms of the tokens' shares in the training split, each counted once more than
    it occurs (Laplace 1814), so that none is impossible. Shape [vocab_size]."""
    counts = shards.split("train").unigram_counts() + 1
    logarithms: NDArray[np.float64] = np.log(counts) - np.log(counts.sum())
    return logarithms


def unigram_mlm_loss(log_probability: NDArray[np.float64], steps: Iterable[RankStep]) -> float:
    """Cross-entropy of these probabilities over the masked tokens of `steps`, in nats per token.

    Give it the evaluation steps of a single rank, so that they are all there. Raises DataError
    when they mask nothing.
    """
    total, targets = 0.0, 0
    for step in steps:
        for batch in step.micro_batches:
            labels = batch.mlm_labels_M.numpy()
            total -= float(log_probability[labels].sum())
            targets += len(labels)
    if not targets:
        raise DataError("the evaluation masks no token; there is nothing to compare with")
    return total / targets
