"""The first values of the parameters: a function of (seed, name, shape) and nothing else.

Every rank computes the same ones, no other random stream is touched, and a layer starts alike
whatever the depth of the model around it.
"""

import hashlib

import torch
from torch import nn

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


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
