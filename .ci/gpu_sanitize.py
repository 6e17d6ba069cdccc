"""Launch every Triton kernel of the package on odd shapes, for a tool that watches; see
`gpu_sanitizer.py`. With TRITON_INTERPRET=1 it runs on the CPU."""

import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import torch

from stacking_ds import kernels
from stacking_ds.bench.lamb import Sizes
from stacking_ds.bench.lamb_rivals import Tensors, our_step
from stacking_ds.kernels.operations import EmbeddingTables, Norm, TokenIds, Weights
from stacking_ds.optim import lamb

# tokens and hidden size: fewer than a tile and more, rows that vectors do not divide
SHAPES = ((5, 24, torch.float32), (77, 200, torch.bfloat16), (3, 1000, torch.bfloat16))
VOCABULARY, TYPES, POSITIONS = 4099, 2, 9


class Recorded:
    """A kernel that tells that it was launched."""

    launched: set[str] = set()  # noqa: RUF012 - of all of them together

    def __init__(self, name: str, kernel: Any) -> None:
        self._name, self._kernel = name, kernel

    def __getitem__(self, grid: Any) -> Any:
        Recorded.launched.add(self._name)
        return self._kernel[grid]


def record_all() -> set[str]:
    """Put a `Recorded` in the place of each kernel of the package; their names."""
    names = set()
    for found in (
        *pkgutil.walk_packages(kernels.__path__, "stacking_ds.kernels."),
        *pkgutil.walk_packages(lamb.__path__, "stacking_ds.optim.lamb."),
    ):
        module = importlib.import_module(found.name)
        for name, value in list(vars(module).items()):
            defined_here = getattr(getattr(value, "fn", None), "__module__", None) == found.name
            if name.endswith("_kernel") and defined_here:
                setattr(module, name, Recorded(name, value))
                names.add(name)
    return names


def launch_operations(device: torch.device) -> None:
    from stacking_ds.kernels.triton_operations import TritonOperations

    form = TritonOperations(lambda x_TO, weight_OI, bias_O: x_TO)
    for tokens, width, dtype in SHAPES:
        if device.type == "cpu" and dtype == torch.bfloat16:
            continue  # which the interpreter cannot compute in
        for dropout_prob in (0.0, 0.1):
            for result in _results(form, tokens, width, dtype, dropout_prob, device):
                result.backward(torch.ones_like(result))
            with torch.no_grad():
                list(_results(form, tokens, width, dtype, dropout_prob, device))


def _results(
    form: Any, tokens: int, width: int, dtype: torch.dtype, dropout: float, device: torch.device
) -> Iterator[torch.Tensor]:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def ids(below: int) -> torch.Tensor:
        return torch.randint(below, (tokens,), device=device)

    weights, norm = Weights(drawn(1), drawn(width)), Norm(drawn(width), drawn(width), 1e-12)
    residual_TH = drawn(tokens, width)
    yield form.linear_gelu(drawn(tokens, width), weights)
    yield form.linear_add(drawn(tokens, width), weights, residual_TH, dropout)
    yield form.linear_add_norm(drawn(tokens, width), weights, residual_TH, norm, dropout)
    yield form.norm(drawn(tokens, width), norm)
    tables = EmbeddingTables(*(drawn(rows, width) for rows in (VOCABULARY, TYPES, POSITIONS)))
    yield form.embed(TokenIds(ids(VOCABULARY), ids(TYPES), ids(POSITIONS)), tables, norm, dropout)
    labels_M = ids(VOCABULARY)
    labels_M[0] = -100
    yield form.cross_entropy_sum(drawn(tokens, VOCABULARY), labels_M)


def launch_lamb(device: torch.device) -> None:
    config = Sizes(hidden_size=24, layers=1, vocab_size=97).config
    for flat_groups in (False, True):
        _, step = our_step(Tensors.of(config, device, flat_groups=flat_groups), "triton")
        step()


def main() -> int:
    on_gpu = torch.cuda.is_available()
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        print("needs an NVIDIA GPU, or TRITON_INTERPRET=1")
        return 2
    device = torch.device("cuda" if on_gpu else "cpu")
    names = record_all()
    launch_operations(device)
    launch_lamb(device)
    if on_gpu:
        torch.cuda.synchronize()
    if missed := names - Recorded.launched:
        print(f"never launched: {', '.join(sorted(missed))}")
        return 1
    print(f"launched: {', '.join(sorted(names))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
