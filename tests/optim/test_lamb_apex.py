"""apex's LAMB: found only where it is NVIDIA's with its compiled part, and called rightly."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from stacking_ds.errors import ConfigError
from stacking_ds.optim.lamb.apex import ApexLamb
from stacking_ds.optim.lamb.contract import Hyper, Item, ReferenceLamb
from stacking_ds.optim.lamb.optimizer import choose_kernel
from stacking_ds.sharding.fragments import Shard, Span

CPU = torch.device("cpu")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path in which a test may install things."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("apex", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("apex", "amp_C"):
        sys.modules.pop(name, None)


def _install(folder: Path, *paths: str, text: str = "") -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    importlib.invalidate_caches()


def test_without_apex_the_message_says_so(site: Path) -> None:
    with pytest.raises(ConfigError, match=r"NVIDIA's apex is not installed: build .*APEX_CUDA_EXT"):
        ApexLamb(CPU)


def test_the_apex_of_pypi_is_recognised_and_not_run(site: Path) -> None:
    _install(site, "apex/__init__.py", text="raise AssertionError('this project was run')")
    with pytest.raises(ConfigError, match="is not NVIDIA's"):
        ApexLamb(CPU)


def test_an_apex_without_its_compiled_part_is_recognised(site: Path) -> None:
    _install(site, "apex/__init__.py", "apex/multi_tensor_apply/__init__.py")
    with pytest.raises(ConfigError, match="installed without its compiled part"):
        ApexLamb(CPU)


def test_a_compiled_part_that_cannot_be_loaded_is_named(site: Path) -> None:
    _install(site, "amp_C.py", text="raise ImportError('undefined symbol')")
    with pytest.raises(ConfigError, match=r"cannot be loaded \(undefined symbol\)"):
        ApexLamb(CPU)


def test_another_module_of_that_name_is_refused(site: Path) -> None:
    _install(site, "amp_C.py", text="def multi_tensor_l2norm(): pass")
    with pytest.raises(ConfigError, match=r"amp_C\.py has no multi_tensor_lamb"):
        ApexLamb(CPU)


def test_it_steps_on_a_gpu_alone() -> None:
    with pytest.raises(ConfigError, match="the masters are on cpu"):
        choose_kernel("apex", CPU)


# ------------------------------------------------------------------ the call


def _multi_tensor_lamb(
    chunk_size: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], lr: float, beta1: float,
    beta2: float, eps: float, step: int, bias_correction: int, decay: float, grad_averaging: int,
    mode: int, global_norm: torch.Tensor, max_norm: float, use_nvlamb: bool,
) -> None:  # fmt: skip
    """What csrc/multi_tensor_lamb.cu of apex 6424da3 computes, in fp64: mode 1 is decoupled decay,
    and a ratio is taken where `use_nvlamb` or decay is not 0. The update replaces the gradient."""
    assert (bias_correction, grad_averaging, mode) == (1, 1, 1)
    clip = float(global_norm) / max_norm if float(global_norm) > max_norm else 1.0
    for grad, weight, exp_avg, exp_avg_sq in zip(*lists, strict=True):
        g = grad.double() / clip
        exp_avg.copy_(beta1 * exp_avg.double() + (1 - beta1) * g)
        exp_avg_sq.copy_(beta2 * exp_avg_sq.double() + (1 - beta2) * g * g)
        m = exp_avg.double() / (1 - beta1**step)
        v = exp_avg_sq.double() / (1 - beta2**step)
        update = m / (v.sqrt() + eps) + decay * weight.double()
        ratio = 1.0
        if use_nvlamb or decay != 0.0:
            norms = weight.double().norm(), update.norm()
            ratio = float(norms[0] / norms[1]) if 0.0 not in norms else 1.0
        weight.copy_(weight.double() - lr * ratio * update)
        grad.copy_(update)


@pytest.fixture
def amp_C(monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: N802
    module = ModuleType("amp_C")
    vars(module).update(multi_tensor_lamb=_multi_tensor_lamb, multi_tensor_l2norm=lambda: None)
    monkeypatch.setitem(sys.modules, "amp_C", module)


def _items(step: int, state: SimpleNamespace, gradients: list[torch.Tensor]) -> list[Item]:
    kinds = [(0.1, True), (0.0, False), (0.1, True), (0.0, True)]
    return [
        Item(
            Shard(weight, (Span(str(index), index, 0, weight.numel()),)),
            state.exp_avg[index],
            state.exp_avg_sq[index],
            Hyper(0.01, 0.9, 0.99, 1e-6, decay, adapts, 0.0, math.inf, step),
            gradients[index].clone(),
        )
        for index, (weight, (decay, adapts)) in enumerate(zip(state.weights, kinds, strict=True))
    ]


def _state() -> SimpleNamespace:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=draw) for size in ((3, 5), (7,), (2, 2), (4,))]
    zeros = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    return SimpleNamespace(weights=weights, exp_avg=zeros[0], exp_avg_sq=zeros[1])


@pytest.mark.usefixtures("amp_C")
def test_weights_moments_and_sums_are_those_of_the_reference() -> None:
    ours, theirs = _state(), _state()
    apex, reference = ApexLamb(CPU), ReferenceLamb()
    draw = torch.Generator().manual_seed(1)
    for step in range(1, 4):
        gradients = [torch.randn(w.shape, generator=draw) for w in ours.weights]
        scale = torch.tensor(0.5) if step == 3 else None
        sums = []
        for kernel, state in ((apex, ours), (reference, theirs)):
            squares = torch.zeros(2, 4, dtype=torch.float64)
            items = _items(step, state, gradients)
            kernel.accumulate(items, squares, scale)
            kernel.apply(items, squares)
            sums.append(squares)
        torch.testing.assert_close(*sums, rtol=1e-5, atol=0)
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("amp_C")
def test_a_step_without_items_does_nothing() -> None:
    sums_2P = torch.zeros(2, 3, dtype=torch.float64)
    ApexLamb(CPU).apply([], sums_2P)
    assert not sums_2P.any()
