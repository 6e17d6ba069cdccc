"""The torch forms of a BERT's operations, on the CPU, against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from stacking_ds.kernels import cross_entropy
from stacking_ds.kernels.cross_entropy import AlignedLogits, cross_entropy_sum, vocabulary_logits
from stacking_ds.kernels.operations import (
    Norm,
    Operations,
    Weights,
    dropout_add,
    keep_mask,
)

# --------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("dropout_prob", [0.1, 0.5, 0.9, 1e-3])
def test_a_mask_keeps_what_it_should(dropout_prob: float) -> None:
    torch.manual_seed(0)
    kept = keep_mask(torch.Size([1000, 1003]), dropout_prob, torch.float32)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    kept = kept.bool()
    numel = kept.numel()
    deviation = math.sqrt(numel * dropout_prob * (1 - dropout_prob))
    assert abs(int((~kept).sum()) - dropout_prob * numel) < 5 * deviation
    # no place is favoured: the four numbers of a random word, and neighbours, are independent
    lanes = (~kept).flatten()[: numel // 4 * 4].view(-1, 4).double()
    assert (lanes.mean(0) - dropout_prob).abs().max() < 5 * deviation / numel * 2
    pairs = (lanes[:, :-1] * lanes[:, 1:]).mean()
    assert abs(float(pairs) - dropout_prob**2) < 10 * dropout_prob / math.sqrt(numel)


@given(shape=st.lists(st.integers(0, 9), max_size=3), dropout_prob=st.floats(0.0, 0.999))
@settings(max_examples=40)
def test_a_mask_has_any_shape_and_the_seed_decides_it(
    shape: list[int], dropout_prob: float
) -> None:
    torch.manual_seed(5)
    first = keep_mask(torch.Size(shape), dropout_prob, torch.bfloat16)
    assert (first.shape, first.dtype) == (tuple(shape), torch.bfloat16)
    torch.manual_seed(5)
    assert torch.equal(keep_mask(torch.Size(shape), dropout_prob, torch.bfloat16), first)


def test_the_ends_of_the_scale() -> None:
    for dropout_prob in (0.0, 1e-9):
        assert keep_mask(torch.Size([4096]), dropout_prob, torch.float32).all()
    assert keep_mask(torch.Size([4096]), 1 - 1e-9, torch.float32).mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_scales_what_it_keeps_and_its_gradient_alike(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    inner = torch.ones(64, 33, dtype=dtype, requires_grad=True)
    dropped = dropout_add(inner, None, 0.25)
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75, dtype=dtype))}
    dropped.backward(torch.ones_like(dropped))
    assert torch.equal(inner.grad, dropped)
    torch.manual_seed(1)
    residual = torch.full_like(inner, 2.0).requires_grad_()
    inner.grad = None
    added = dropout_add(inner, residual, 0.25)
    torch.testing.assert_close(added, 2.0 + dropped)
    added.backward(torch.ones_like(added))
    assert torch.equal(inner.grad, dropped)
    assert torch.equal(residual.grad, torch.ones_like(residual))


def test_without_dropout_nothing_random_is_drawn() -> None:
    before = torch.get_rng_state()
    inner = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropout_add(inner, None, 0.0), inner)
    assert torch.equal(dropout_add(inner, inner, 0.0), 2 * inner)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------- cross-entropy


def _expected(logits_MV: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exact_MV = logits_MV.detach().double().requires_grad_()
    loss = functional.cross_entropy(exact_MV, labels_M, reduction="sum", ignore_index=-100)
    loss.backward()
    return loss.detach(), exact_MV.grad


@given(
    rows=st.integers(1, 20),
    classes=st.sampled_from([2, 7, 97]),
    ignored=st.integers(0, 20),
    chunk=st.sampled_from([1, 97, 500, 1 << 18]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_cross_entropy_and_its_gradient(
    rows: int, classes: int, ignored: int, chunk: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_MV = (4 * torch.randn(rows, classes, generator=generator)).to(dtype).requires_grad_()
    labels_M = torch.randint(0, classes, (rows,), generator=generator)
    labels_M[:ignored] = -100
    expected, gradient_MV = _expected(logits_MV, labels_M)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cross_entropy._CHUNK_ELEMENTS, "cpu", chunk)
        computed_MV = logits_MV * 1  # what the backward pass may overwrite
        loss = cross_entropy_sum(computed_MV, labels_M)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        (3.0 * loss).backward()
    close = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(logits_MV.grad.double(), 3 * gradient_MV, rtol=close, atol=close)


def test_the_gradient_takes_the_place_of_the_logits_once() -> None:
    computed_MV = torch.randn(5, 11, requires_grad=True) * 1
    before = computed_MV.detach().clone()
    loss = cross_entropy_sum(computed_MV, torch.arange(5))
    assert torch.equal(computed_MV, before), "evaluation reads them after the loss"
    (gradient,) = torch.autograd.grad(loss, computed_MV, retain_graph=True)
    assert gradient.data_ptr() == computed_MV.data_ptr()
    with pytest.raises(RuntimeError, match="cannot run twice"):
        loss.backward()


def test_no_rows_and_huge_logits() -> None:
    nothing_MV = torch.zeros(0, 7, requires_grad=True)
    loss = cross_entropy_sum(nothing_MV * 1, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert nothing_MV.grad.shape == (0, 7)
    huge_MV = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, 0.0]], requires_grad=True)
    cross_entropy_sum(huge_MV * 1, torch.tensor([0, 1])).backward()
    torch.testing.assert_close(huge_MV.grad, torch.tensor([[0.0, 0, 0], [0, -0.5, 0.5]]))


# --------------------------------------------------------------------------- the operations


class _Count(TorchDispatchMode):
    """How many elements each operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_fp32 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.largest_fp32 = max(self.largest_fp32, out.numel())
        return out


def test_bf16_logits_never_exist_in_fp32_as_a_whole() -> None:
    rows, classes = 100, 8000
    logits_MV = torch.randn(rows, classes, dtype=torch.bfloat16, requires_grad=True) * 1
    with _Count() as counted:
        cross_entropy_sum(logits_MV, torch.arange(rows)).backward()
    assert 0 < counted.largest_fp32 < rows * classes // 2


def test_operations_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(2)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weights, residual = made(6, 5), Weights(made(7, 5), made(7)), made(6, 7)
    norm, operations = Norm(made(7), made(7), 1e-3), Operations()
    inner = x @ weights.weight_OI.T + weights.bias_O
    exact_gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    torch.testing.assert_close(operations.linear_gelu(x, weights), exact_gelu)
    summed = residual + inner
    torch.testing.assert_close(operations.linear_add(x, weights, residual, 0.0), summed)
    centred = summed - summed.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-3).sqrt()
    normed = normed * norm.weight_H + norm.bias_H
    torch.testing.assert_close(operations.norm(summed, norm), normed)
    torch.testing.assert_close(operations.linear_add_norm(x, weights, residual, norm, 0.0), normed)


@pytest.mark.parametrize("classes", [97, 128, 30522])
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_logits_in_longer_rows_are_the_same(rows: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(3)
    given = [
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((rows, 8), (classes, 8), (classes,))
    ]
    labels_M = torch.randint(0, classes, (rows,), generator=generator)
    found, expected = [], []
    for product, results in ((AlignedLogits.apply, found), (functional.linear, expected)):
        logits_MV = product(*given)
        results.append(logits_MV.detach().clone())
        loss = cross_entropy_sum(logits_MV, labels_M)
        results.extend(torch.autograd.grad(loss, given))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert AlignedLogits.apply(*given).stride() == (-(-classes // 64) * 64, 1)


@pytest.mark.parametrize(("device", "stride"), [("cpu", 97), ("meta", 128)])
def test_rows_are_longer_away_from_the_cpu_alone(device: str, stride: int) -> None:
    hidden_MH, weight_VH, bias_V = (
        torch.zeros(*shape, device=device) for shape in ((3, 8), (97, 8), (97,))
    )
    logits_MV = vocabulary_logits(hidden_MH, weight_VH, bias_V)
    assert (logits_MV.shape, logits_MV.stride()) == ((3, 97), (stride, 1))
