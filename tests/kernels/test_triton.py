"""The Triton kernels of a layer, of the embeddings and of the loss are what plain torch computes.

Where there is no GPU Triton interprets them, which is settled when it is imported: so the tests run
in a process of their own. That they compile, `test_kernels_triton_compiled.py` shows.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from stacking_ds.bench.kernels_operations import embedding_traffic, gelu_traffic, norm_traffic
from stacking_ds.kernels import triton_embedding, triton_norm, triton_operations
from stacking_ds.kernels.triton_embedding import embed
from stacking_ds.kernels.triton_norm import bias_dropout_add, bias_dropout_add_norm
from stacking_ds.kernels.triton_operations import bias_gelu
from tests.cubins import INTERPRETED, IS_OTHER_HALF, run_other_half
from tests.kernel_comparison import (
    DEVICE,
    TOLERANCE,
    apart,
    compare,
    random,
    recorded,
)

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # then `make gpu-check` runs them
RUNS = INTERPRETED or DEVICE.type == "cuda"

EPS = 1e-5
SHAPES = [(1, 768), (3, 96), (17, 768), (64, 100), (200, 24), (5, 1000)]
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
shapes = pytest.mark.parametrize(("T", "H"), SHAPES)
dropouts = pytest.mark.parametrize("dropout_prob", [0.0, 0.3])


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1.0 + torch.erf(x / math.sqrt(2.0))) / 2.0


def norm(h: torch.Tensor, weight_H: torch.Tensor, bias_H: torch.Tensor) -> torch.Tensor:
    centered = h - h.mean(1, keepdim=True)
    std = (centered.square().mean(1, keepdim=True) + EPS).sqrt()
    return weight_H * centered / std + bias_H


def scaled_mask(T: int, H: int, dropout_prob: float, seed: int = 7) -> torch.Tensor:
    """What dropout multiplies a T,H tensor with if the torch seed is this."""
    torch.manual_seed(seed)
    zeros = torch.zeros(T, H, device=DEVICE)
    return bias_dropout_add(zeros, torch.ones(H, device=DEVICE), zeros, dropout_prob)


def seeded(function: Callable[..., torch.Tensor], seed: int = 7) -> Callable[..., torch.Tensor]:
    def called(*arguments: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        return function(*arguments)

    return called


# --------------------------------------------------------------------------- GELU


class TestGelu:
    __test__ = RUNS

    @dtypes
    @shapes
    def test_equals_the_reference(self, T: int, H: int, dtype: torch.dtype) -> None:
        inputs = random(T, H, seed=1, dtype=dtype), random(H, seed=2, dtype=dtype)
        compare(bias_gelu, lambda inner, bias: gelu(inner + bias), inputs)

    def test_far_from_zero(self) -> None:
        far = torch.tensor([-300.0, -40.0, -6.0, 6.0, 40.0, 300.0], device=DEVICE)
        compare(bias_gelu, lambda x, b: gelu(x + b), (far[None], torch.zeros_like(far)))

    def test_bytes_are_those_of_its_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward, backward = recorded(monkeypatch, triton_operations, "gelu")
        inputs = random(17, 96, seed=1).half(), random(96, seed=2).half()
        bias_gelu(*(tensor.requires_grad_() for tensor in inputs)).sum().backward()
        # the sum's result is written by the kernel after
        result = 96 * 2
        counted = forward.moved(), backward.moved() + result
        assert counted == gelu_traffic(17, 96, 2)


# --------------------------------------------------------------------------- bias to norm


def sublayer_inputs(T: int, H: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """inner, bias, residual, weight, norm_bias"""
    sizes = [(T, H), (H,), (T, H), (H,), (H,)]
    return [random(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]


class TestNorm:
    __test__ = RUNS

    @dtypes
    @dropouts
    @shapes
    def test_equals_the_reference(
        self, T: int, H: int, dropout_prob: float, dtype: torch.dtype
    ) -> None:
        mask = scaled_mask(T, H, dropout_prob).double()
        compare(
            seeded(lambda *tensors: bias_dropout_add_norm(*tensors, EPS, dropout_prob)),
            lambda x, b, residual, *of_norm: norm(residual + (x + b) * mask, *of_norm),
            sublayer_inputs(T, H, dtype),
        )

    @pytest.mark.parametrize("dropout_prob", [0.0, 0.5])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("residual", [True, False])
    def test_parts_may_be_left_out(self, bias: bool, residual: bool, dropout_prob: float) -> None:
        mask = scaled_mask(17, 100, dropout_prob).double()
        inner, *parts, weight, norm_bias = sublayer_inputs(17, 100, torch.float32)
        given = [part for part, there in zip(parts, (bias, residual), strict=True) if there]

        def parted(some: tuple[Any, ...]) -> tuple[Any, Any]:
            return some[0] if bias else None, some[bias] if residual else None

        def kernel(inner: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return bias_dropout_add_norm(inner, *parted(rest), *rest[-2:], EPS, dropout_prob)

        def reference(inner: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            b, r = parted(rest)
            h = mask * (inner if b is None else inner + b)
            return norm(h if r is None else h + r, *rest[-2:])

        compare(seeded(kernel), reference, [inner, *given, weight, norm_bias])

    @dtypes
    @dropouts
    @pytest.mark.parametrize(("T", "H"), [(17, 100), (9, 768)])
    def test_without_the_norm(
        self, T: int, H: int, dropout_prob: float, dtype: torch.dtype
    ) -> None:
        mask = scaled_mask(T, H, dropout_prob).double()
        compare(
            seeded(lambda *tensors: bias_dropout_add(*tensors, dropout_prob)),
            lambda inner, bias, residual: residual + (inner + bias) * mask,
            sublayer_inputs(T, H, dtype)[:3],
        )

    def test_the_widest_rows(self) -> None:
        compare(
            lambda *tensors: bias_dropout_add_norm(*tensors, EPS, 0.0),
            lambda x, b, residual, *of_norm: norm(residual + x + b, *of_norm),
            sublayer_inputs(3, 4096, torch.float32),
        )

    def test_rows_far_from_zero_keep_their_variance(self) -> None:
        inner, _, _, weight, bias = sublayer_inputs(3, 96, torch.float32)
        inner = inner + 1000.0
        found = bias_dropout_add_norm(inner, None, None, weight, bias, EPS, 0.0)
        # of fp32 numbers this far away three digits fewer are left
        assert apart(found, norm(inner.double(), weight.double(), bias.double())) < 1e-4

    def test_evaluation_gives_the_same(self) -> None:
        inputs = sublayer_inputs(17, 100, torch.float32)
        for probability in (0.0, 0.3):
            for function in (
                seeded(lambda *i, p=probability: bias_dropout_add_norm(*i, EPS, p)),
                seeded(lambda *i, p=probability: bias_dropout_add(*i[:3], p)),
            ):
                trained = function(*(tensor.clone().requires_grad_() for tensor in inputs))
                assert trained.grad_fn is not None
                assert torch.equal(function(*inputs), trained)
                with torch.no_grad():
                    assert torch.equal(function(inputs[0].requires_grad_(), *inputs[1:]), trained)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("residual", [True, False])
    @pytest.mark.parametrize("dropout", [True, False])
    @pytest.mark.parametrize("normed", [True, False])
    def test_bytes_are_those_of_its_tensors(
        self,
        bias: bool,
        residual: bool,
        dropout: bool,
        normed: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if not normed and not (bias and residual):
            return
        inputs = [t.half().requires_grad_() for t in sublayer_inputs(17, 96, torch.float32)]
        forward, backward = recorded(monkeypatch, triton_norm, "add_norm")
        inner, b, r, *of_norm = inputs
        added = inner, b if bias else None, r if residual else None
        if normed:
            out = bias_dropout_add_norm(*added, *of_norm, EPS, 0.3 * dropout)
        else:
            out = bias_dropout_add(inner, b, r, 0.3 * dropout)
        out.sum().backward()
        results = (bias + 2 * normed) * 96 * 2  # written by the kernel after
        counted = forward.moved(), backward.moved() + results
        parts = {"bias": bias, "residual": residual, "dropout": dropout, "norm": normed}
        assert counted == norm_traffic(17, 96, 2, **parts)


class TestDropout:
    __test__ = RUNS

    @pytest.mark.parametrize("dropout_prob", [0.1, 0.5])
    def test_rates_are_within_binomial_bounds(self, dropout_prob: float) -> None:
        mask = scaled_mask(256, 192, dropout_prob) != 0
        parts = [mask, *(mask[:, lane::4] for lane in range(4)), mask[:, :32], mask[:16]]
        for part in parts:
            spread = math.sqrt(dropout_prob * (1 - dropout_prob) / part.numel())
            assert abs(float(part.double().mean()) - (1 - dropout_prob)) < 4.5 * spread
        # neighbours in either direction fall out independently
        for one, other in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1])):
            both, chance = float((one & other).double().mean()), (1 - dropout_prob) ** 2
            assert abs(both - chance) < 4.5 * math.sqrt(chance * (1 - chance) / one.numel())

    def test_what_is_left_is_scaled(self) -> None:
        assert scaled_mask(64, 96, 0.2).unique().tolist() == [0.0, 1.25]

    def test_masks_follow_the_torch_seed(self) -> None:
        one, same, other = (scaled_mask(17, 96, 0.5, seed) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_two_masks_are_two(self) -> None:
        zeros, ones = torch.zeros(17, 96, device=DEVICE), torch.ones(96, device=DEVICE)
        first, second = (bias_dropout_add(zeros, ones, zeros, 0.5) for _ in range(2))
        assert not torch.equal(first, second)

    def test_no_two_rows_and_no_two_columns_share_a_mask(self) -> None:
        mask = scaled_mask(64, 96, 0.5)
        assert len(mask.unique(dim=0)) == 64
        assert len(mask.unique(dim=1).T) == 96

    def test_backward_draws_the_mask_of_forward(self) -> None:
        inner, bias, residual = sublayer_inputs(17, 100, torch.float32)[:3]
        torch.manual_seed(7)
        out = bias_dropout_add(inner.requires_grad_(), bias, residual, 0.5)
        torch.manual_seed(8)  # which nothing may depend on any more
        (d_inner,) = torch.autograd.grad(out, inner, torch.ones_like(out))
        assert torch.equal(d_inner, scaled_mask(17, 100, 0.5))
        assert torch.equal(d_inner != 0, out != residual)

    def test_without_dropout_nothing_is_drawn(self) -> None:
        inputs = sublayer_inputs(3, 24, torch.float32)
        states = [torch.get_rng_state()]
        if DEVICE.type == "cuda":
            states.append(torch.cuda.get_rng_state())
        bias_dropout_add_norm(*inputs, EPS, 0.0)
        bias_dropout_add(*inputs[:3], 0.0)
        embed(*embedding_ids(3), *embedding_tables(24, torch.float32), EPS, 0.0)
        assert torch.equal(torch.get_rng_state(), states[0])
        if DEVICE.type == "cuda":
            assert torch.equal(torch.cuda.get_rng_state(), states[1])

    def test_a_probability_that_is_none_is_refused(self) -> None:
        for wrong in (-0.1, 1.0, float("nan")):
            with pytest.raises(AssertionError):
                scaled_mask(3, 24, wrong)


# --------------------------------------------------------------------------- embeddings

V, P, K = 97, 16, 2


def embedding_ids(T: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randint(size, (T,), generator=generator).to(DEVICE) for size in (V, K, P)]


def embedding_tables(H: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """word, type, position, weight, norm_bias"""
    sizes = [(V, H), (K, H), (P, H), (H,), (H,)]
    return [random(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]


class TestEmbedding:
    __test__ = RUNS

    @dtypes
    @dropouts
    @shapes
    def test_equals_the_reference(
        self, T: int, H: int, dropout_prob: float, dtype: torch.dtype
    ) -> None:
        input_ids, types, positions = ids = embedding_ids(T)
        mask = scaled_mask(T, H, dropout_prob).double()

        def reference(word: Any, type_: Any, position: Any, *of_norm: Any) -> torch.Tensor:
            return mask * norm(word[input_ids] + type_[types] + position[positions], *of_norm)

        compare(
            seeded(lambda *tables: embed(*ids, *tables, EPS, dropout_prob)),
            reference,
            embedding_tables(H, dtype),
            # on a CPU torch adds a table's gradients up in its own dtype
            slack=1.0 if dtype is torch.float32 else 5.0,
        )

    @pytest.mark.parametrize(("which", "wrong"), [(0, V), (0, -1), (1, K), (2, P), (2, 1 << 40)])
    def test_an_id_that_is_none_makes_its_token_nan(self, which: int, wrong: int) -> None:
        ids, tables = embedding_ids(5), embedding_tables(24, torch.float32)
        right = embed(*ids, *tables, EPS, 0.0)
        ids[which][3] = wrong
        found = embed(*ids, *tables, EPS, 0.0)
        assert found[3].isnan().all()
        others = [0, 1, 2, 4]
        assert torch.equal(found[others], right[others])

    def test_evaluation_gives_the_same(self) -> None:
        ids, tables = embedding_ids(17), embedding_tables(100, torch.float32)
        evaluated = embed(*ids, *tables, EPS, 0.0)
        trained = embed(*ids, *(table.requires_grad_() for table in tables), EPS, 0.0)
        assert trained.grad_fn is not None
        assert torch.equal(evaluated, trained)

    @pytest.mark.parametrize("dropout", [True, False])
    def test_bytes_are_those_of_its_tensors(
        self, dropout: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tables = [table.half().requires_grad_() for table in embedding_tables(96, torch.float32)]
        forward, backward = recorded(monkeypatch, triton_embedding, "embed")
        embed(*embedding_ids(17), *tables, EPS, 0.3 * dropout).sum().backward()
        gathered = {"word_VH": 17 * 96}
        counted = forward.moved(**gathered), backward.moved(**gathered) + 2 * 96 * 2
        sizes = {"types": K, "positions": P, "dropout": dropout}
        assert counted == embedding_traffic(17, 96, 2, **sizes)


@pytest.mark.slow
class TestTheOtherHalf:
    __test__ = not RUNS and not IS_OTHER_HALF

    def test_in_a_process_of_its_own(self) -> None:
        run_other_half(__file__)
