"""Kernels beside what plain torch computes in fp64, and the bytes that their launches move."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

__all__ = ["DEVICE", "TOLERANCE", "Recorder", "apart", "compare", "random", "recorded"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of a result's norm. In bf16 the interpreter cuts digits off where a GPU rounds.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # not around 0, so that a term left out shows in every sum
    return (torch.randn(shape, generator=generator) + 0.3).to(DEVICE, dtype)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = float((found.detach().double() - expected.detach().double()).norm())
    return difference and difference / float(expected.detach().double().norm())


def compare(
    kernel: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    d_out: torch.Tensor | None = None,
    *,
    slack: float = 1.0,
) -> None:
    """Results and the gradients of all inputs agree, the reference computing in fp64."""
    own = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = kernel(*own), reference(*wide)
    assert found.dtype == inputs[0].dtype
    if d_out is None:
        d_out = random(*found.shape, seed=99, dtype=found.dtype)
    gradients = torch.autograd.grad(found, own, d_out)
    expected_gradients = torch.autograd.grad(expected, wide, d_out.double())
    tolerance = slack * TOLERANCE[inputs[0].dtype]
    assert apart(found, expected) <= tolerance
    for number, pair in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert pair[0].dtype == inputs[number].dtype
        assert pair[0].shape == inputs[number].shape
        assert apart(*pair) <= tolerance, number


class Recorder:
    """Stands for a kernel, and notes the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, list[dict[str, Any]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = dict(zip(self.kernel.arg_names, args, strict=False))
            self.launches.append({**given, **kwargs})
            self.kernel[grid](*args, **kwargs)

        return launch

    def moved(self, **elements: int) -> int:
        """Bytes of the tensors of the one launch, whole but for those whose elements are given."""
        [launch] = self.launches
        tensors = {name: t for name, t in launch.items() if isinstance(t, torch.Tensor)}
        return sum(
            tensor.element_size() * elements.get(name, tensor.numel())
            for name, tensor in tensors.items()
            if not name.startswith("partial")
        )


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> tuple[Recorder, Recorder]:
    """The launches of a kernel of `module`, and of its backward."""
    names = f"{name}_kernel", f"{name}_backward_kernel"
    forward, backward = (Recorder(getattr(module, kernel)) for kernel in names)
    for kernel, recorder in zip(names, (forward, backward), strict=True):
        monkeypatch.setattr(module, kernel, recorder)
    return forward, backward
