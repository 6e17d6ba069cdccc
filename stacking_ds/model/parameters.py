"""The first values of the parameters: a function of (seed, name, shape) and nothing else.

Every rank computes the same ones, no other random stream is touched, and a layer starts alike
whatever the depth of the model around it.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from stacking_ds.errors import CheckpointError

# ---- Our parameter names and Hugging Face's: the one table of what differs.


WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"

# Hugging Face's second name -> the name under which we, and Hugging Face too, keep the values.
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


# ---- The first values of the parameters: a function of (seed, name, shape) and nothing
# else.


def first_value(name: str, shape: torch.Size, seed: int, standard_deviation: float) -> torch.Tensor:
    """The fp32 value, on the CPU, that the parameter `name` starts with.

    | parameter                          | first value                      |
    |------------------------------------|----------------------------------|
    | weights of linears and embeddings  | normal(0, standard_deviation)    |
    | biases                             | 0                                |
    | LayerNorm weights                  | 1                                |

    Devlin et al. 2019's code draws a normal cut off at two deviations; Hugging Face's draws this.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "LayerNorm" in name:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.empty(shape).normal_(0.0, standard_deviation, generator=generator)


@torch.no_grad()
def initialize_parameters(module: nn.Module, seed: int, standard_deviation: float) -> None:
    """Fill the parameters in place."""
    for name, parameter in module.named_parameters():
        parameter.copy_(first_value(name, parameter.shape, seed, standard_deviation))
