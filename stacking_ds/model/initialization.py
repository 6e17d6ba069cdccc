"""The first values of the parameters: a function of (seed, name, shape) and nothing else.

Every rank computes the same ones, no other random stream is touched, and a layer starts alike
whatever the depth of the model around it.
"""

import hashlib

import torch
from torch import nn

__all__ = ["initialize_parameters"]


def initialize_parameters(module: nn.Module, seed: int, standard_deviation: float) -> None:
    """Fill the parameters in place, on the CPU.

    | parameter                          | first value                      |
    |------------------------------------|----------------------------------|
    | weights of linears and embeddings  | normal(0, standard_deviation)    |
    | biases                             | 0                                |
    | LayerNorm weights                  | 1                                |

    Devlin et al. 2019's code draws a normal cut off at two deviations; Hugging Face's draws this.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "LayerNorm" in name:
                parameter.fill_(1.0)
            else:
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
                parameter.normal_(0.0, standard_deviation, generator=generator)
