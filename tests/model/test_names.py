"""The table between our names and Hugging Face's."""

import pytest
import torch

from stacking_ds.errors import CheckpointError
from tests.hugging_face_names import from_hugging_face, to_hugging_face

OURS = {
    "bert.embeddings.word_embeddings.weight": torch.arange(6.0).view(3, 2),
    "cls.predictions.bias": torch.arange(3.0),
    "cls.seq_relationship.bias": torch.ones(2),
}


def test_there_and_back() -> None:
    theirs = to_hugging_face(OURS)
    assert (
        theirs["cls.predictions.decoder.weight"] is OURS["bert.embeddings.word_embeddings.weight"]
    )
    assert theirs["cls.predictions.decoder.bias"] is OURS["cls.predictions.bias"]
    assert from_hugging_face(theirs) == OURS


def test_a_file_that_holds_the_tied_tensors_once() -> None:
    assert from_hugging_face(OURS) == OURS


def test_untied_weights_are_refused() -> None:
    theirs = to_hugging_face(OURS)
    theirs["cls.predictions.decoder.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"decoder\.bias and cls\.predictions\.bias differ"):
        from_hugging_face(theirs)
