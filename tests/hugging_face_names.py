"""State dicts of Hugging Face's `BertForPreTraining`, which has two names for what is tied."""

from collections.abc import Mapping

import torch

from stacking_ds.errors import CheckpointError
from stacking_ds.model.parameters import WORD_EMBEDDINGS

__all__ = ["TIED_AT_HUGGING_FACE", "from_hugging_face", "to_hugging_face"]

# The one table of what differs: Hugging Face's second name -> the name under which we, and Hugging
# Face too, keep the values.
TIED_AT_HUGGING_FACE = {
    "cls.predictions.decoder.weight": WORD_EMBEDDINGS,
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def to_hugging_face(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A full Hugging Face state dict; tied entries are the same tensor under both names."""
    tied = {second: tensors[first] for second, first in TIED_AT_HUGGING_FACE.items()}
    return {**tensors, **tied}


def from_hugging_face(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors from a state dict of Hugging Face's `BertForPreTraining`.

    Raises:
        CheckpointError: a pair that must be tied holds different values.
    """
    for second, first in TIED_AT_HUGGING_FACE.items():
        if second in tensors and not torch.equal(tensors[second], tensors[first]):
            raise CheckpointError(
                f"{second} and {first} differ, but this BERT has one parameter for both; "
                f"only models with tied embeddings can be read"
            )
    return {name: value for name, value in tensors.items() if name not in TIED_AT_HUGGING_FACE}
