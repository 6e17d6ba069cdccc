"""Linear maps in FP8: how far from fp32 they are, what scales do, and what cuBLAS would refuse."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.fp8 import linear_fp8, require_fp8, require_fp8_sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16
REAL_PRODUCT = torch._scaled_mm


def _as_cublas_takes_it(
    left: torch.Tensor, right: torch.Tensor, scale_a: Any, scale_b: Any, **options: Any
) -> torch.Tensor:
    """What torch checks on CUDA before cuBLAS, and what cuBLAS does (aten/src/ATen/native/cuda)."""
    assert left.is_contiguous()
    assert right.t().is_contiguous()
    assert left.shape[1] % 16 == 0
    assert right.shape[0] % 16 == right.shape[1] % 16 == 0
    assert {left.dtype, right.dtype} != {torch.float8_e5m2}
    for scale in (scale_a, scale_b):
        assert scale.dtype == FP32
        assert scale.numel() == 1
    if (bias := options.get("bias")) is not None:
        assert options["out_dtype"] == bias.dtype == BF16
    assert options.get("use_fast_accum", False) == (left.dtype == torch.float8_e4m3fn)
    return REAL_PRODUCT(left, right, scale_a, scale_b, **options)


@pytest.fixture(autouse=True)
def _cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", _as_cublas_takes_it)


def _leaves(
    tokens: int, dtype: torch.dtype = FP32, device: torch.device = CPU, weight_dtype: Any = None
) -> list[torch.Tensor]:
    x_TI, weight_OI, bias_O = torch.randn(tokens, 64), torch.randn(48, 64) / 8, torch.randn(48)
    tensors = x_TI.to(dtype), weight_OI.to(weight_dtype or dtype), bias_O.to(weight_dtype or dtype)
    return [tensor.to(device).requires_grad_() for tensor in tensors]


def _run(linear: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and all gradients, for output gradients of very unequal sizes."""
    y_TO = linear(*leaves)
    draw = torch.Generator().manual_seed(3)
    weights = torch.randn(y_TO.shape, generator=draw) * torch.logspace(-3, 0, y_TO.shape[1])
    return [y_TO.detach(), *torch.autograd.grad(y_TO, leaves, weights.bfloat16().to(y_TO))]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _assert_near(leaves: list[torch.Tensor]) -> None:
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    bias_bound = 1e-6 if leaves[2].dtype == FP32 else 4e-3
    bounds = (0.05, 0.1, 0.1, bias_bound)  # y, dx, dw, db
    pairs = zip(_run(linear_fp8, leaves), _run(functional.linear, wide), bounds, strict=True)
    for found, expected, bound in pairs:
        assert _error(found, expected) < bound


@pytest.mark.parametrize("tokens", [1, 15, 16, 77])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
def test_it_is_near_fp32(tokens: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    leaves = _leaves(tokens, dtype, weight_dtype=weight_dtype)
    found = _run(linear_fp8, leaves)
    assert found[0].dtype == dtype
    for gradient, leaf in zip(found[1:], leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
    _assert_near(leaves)


def test_products_are_of_numbers_in_8_bits() -> None:
    """Of numbers that E4M3 holds, scaled by a power of two, the product is exact."""
    exact = torch.randint(-8, 9, (32, 64)).float()
    exact[0, 0] = 448.0  # so that the scale is 1
    weight_OI = torch.eye(64)[:48] * 448.0
    assert torch.equal(linear_fp8(exact, weight_OI), exact @ weight_OI.t())
    inexact = exact + 0.4  # 8.4 becomes 8
    assert _error(linear_fp8(inexact, weight_OI), inexact @ weight_OI.t()) > 1e-4


def test_without_a_bias() -> None:
    x_TI, weight_OI, _ = _leaves(7, BF16)
    y_TO = linear_fp8(x_TI, weight_OI)
    assert _error(y_TO.detach(), functional.linear(x_TI, weight_OI).detach()) < 0.05
    y_TO.sum().backward()
    assert weight_OI.grad is not None


@pytest.mark.parametrize("power", [-60, -8, 8, 60])
@pytest.mark.parametrize("which", ["x", "weight", "gradient"])
def test_a_power_of_two_changes_the_scale_alone(power: int, which: str) -> None:
    x_TI, weight_OI, _ = _leaves(13)
    factor = 2.0**power
    gradient = torch.randn(13, 48)

    def run(x: float, weight: float, output: float) -> list[torch.Tensor]:
        leaves = [(t.detach() * f).requires_grad_() for t, f in ((x_TI, x), (weight_OI, weight))]
        y_TO = linear_fp8(*leaves)
        return [y_TO, *torch.autograd.grad(y_TO, leaves, gradient * output)]

    factors = {"x": (factor, 1, 1), "weight": (1, factor, 1), "gradient": (1, 1, factor)}[which]
    changes = {"x": (1, 0, 1), "weight": (1, 1, 0), "gradient": (0, 1, 1)}[which]
    for found, plain, changed in zip(run(*factors), run(1, 1, 1), changes, strict=True):
        assert torch.equal(found, plain * factor**changed)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_zeros_are_zeros(dtype: torch.dtype) -> None:
    for zeroed in range(2):
        leaves = _leaves(5, dtype)
        leaves[zeroed].data.zero_()
        y_TO, *gradients = _run(linear_fp8, leaves)
        assert torch.equal(y_TO, leaves[2].detach().expand(5, -1))
        assert all(gradient.isfinite().all() for gradient in gradients)
    leaves = _leaves(5, dtype)
    gradients = torch.autograd.grad(linear_fp8(*leaves), leaves, torch.zeros(5, 48, dtype=dtype))
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    leaves = _leaves(5)
    leaves[0].data[2, 3] = bad
    assert not linear_fp8(*leaves).isfinite().any()
    leaves = _leaves(5)
    gradient = torch.ones(5, 48)
    gradient[1, 1] = bad
    for found in torch.autograd.grad(linear_fp8(*leaves), leaves[:2], gradient):
        assert not found.isfinite().any()


@pytest.mark.parametrize("leaf", range(3))
def test_only_what_is_asked_for_is_computed(leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = _leaves(5)
    expected = torch.autograd.grad(linear_fp8(*leaves).sum(), leaves)[leaf]
    products = []

    def count(*arguments: Any, **options: Any) -> torch.Tensor:
        products.append(arguments)
        return _as_cublas_takes_it(*arguments, **options)

    monkeypatch.setattr(torch, "_scaled_mm", count)
    for other in range(3):
        leaves[other].requires_grad_(other == leaf)
    (found,) = torch.autograd.grad(linear_fp8(*leaves).sum(), leaves[leaf])
    assert len(products) == (1 if leaf == 2 else 2)
    assert torch.equal(found, expected)


def test_tensors_may_lie_otherwise() -> None:
    x_TI, weight_OI, bias_O = _leaves(32)
    turned = [x_TI.t().contiguous().t(), weight_OI.t().contiguous().t(), bias_O]
    assert torch.equal(linear_fp8(*turned), linear_fp8(x_TI, weight_OI, bias_O))
    linear_fp8(*turned).sum().backward()  # its gradient is one number, expanded
    assert x_TI.grad is not None


def test_it_keeps_8_bits_for_the_backward() -> None:
    x_TI, weight_OI, bias_O = _leaves(32, BF16)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_fp8(x_TI, weight_OI, bias_O)
    assert sorted(kept) == [4, 4, 32 * 64, 48 * 64]


def test_small_gradients_survive_beside_a_large_one() -> None:
    """E5M2 has 32 powers of two; a gradient in E4M3 would have 18."""
    x_TI, weight_OI, _ = _leaves(16)
    gradient = torch.full((16, 48), 2.0**-28)
    gradient[0, 0] = 1.0
    (found,) = torch.autograd.grad(linear_fp8(x_TI, weight_OI), x_TI, gradient)
    expected = gradient @ weight_OI.detach()
    assert _error(found[1:], expected[1:]) < 0.1


def test_training_learns() -> None:
    target_IO = torch.randn(64, 16)
    up, down = torch.randn(32, 64) / 8, torch.randn(16, 32) / 6
    weights = [up.requires_grad_(), down.requires_grad_()]
    losses = []
    for _ in range(60):
        x_TI = torch.randn(37, 64)
        hidden_TH = functional.gelu(linear_fp8(x_TI, up))
        loss = (linear_fp8(hidden_TH, down) - x_TI @ target_IO / 8).square().mean()
        losses.append(loss.item())
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.3 * gradient
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# ------------------------------------------------------------------ refusals


def test_sizes_that_tensor_cores_cannot_read() -> None:
    require_fp8_sizes(768, 3072)
    for sizes in ((770, 3072), (768, 3080)):
        with pytest.raises(ConfigError, match=r"multiples of 16, not (770|3080); change model"):
            require_fp8(CPU, *sizes)
    with pytest.raises(ConfigError, match="multiples of 16, not 40"):
        linear_fp8(torch.randn(3, 40), torch.randn(16, 40))
    with pytest.raises(ConfigError, match="multiples of 16, not 24"):
        linear_fp8(torch.randn(3, 16), torch.randn(24, 16))


def test_fp16_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bf16 or fp32, not in torch.float16; set"):
        linear_fp8(torch.randn(3, 16).half(), torch.randn(16, 16).half())


def test_the_card_must_have_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    require_fp8(CPU, 16, 16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        require_fp8(CUDA, 16, 16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"capability 8.9 or more .* but A100 has 8.6; set"):
        require_fp8(CUDA, 16, 16)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, but the model is on mps"):
        require_fp8(torch.device("mps"), 16, 16)


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 15, 16, 77, 4096])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    require_fp8(CUDA, 64, 48)
    _assert_near(_leaves(tokens, dtype, CUDA))
    leaves = _leaves(tokens, dtype, CUDA)
    leaves[0].data[0, 0] = torch.inf
    assert not linear_fp8(*leaves).isfinite().any()


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu() -> None:
    leaves = _leaves(77, BF16, CUDA)
    _run(linear_fp8, leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_fp8(*leaves).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
