"""The Triton cross-entropy, and what all of a model's Triton kernels have to bear: no rows, odd
strides, any shape, more elements than an int32 counts.

Where there is no GPU Triton interprets them, in a process of its own.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")
from stacking_ds.bench.kernels_operations import cross_entropy_traffic
from stacking_ds.kernels import triton_cross_entropy
from stacking_ds.kernels.triton_cross_entropy import cross_entropy_sum
from stacking_ds.kernels.triton_embedding import embed
from stacking_ds.kernels.triton_norm import bias_dropout_add, bias_dropout_add_norm
from stacking_ds.kernels.triton_operations import bias_gelu
from stacking_ds.kernels.triton_parts import column_sums
from tests.cubins import INTERPRETED, IS_OTHER_HALF, run_other_half
from tests.kernel_comparison import DEVICE, TOLERANCE, apart, compare, random, recorded

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # then `make gpu-check` runs them
RUNS = INTERPRETED or DEVICE.type == "cuda"
EPS = 1e-5


def strided(logits_MV: torch.Tensor, padding: int) -> torch.Tensor:
    """The same in rows with something else between them."""
    M, V = logits_MV.shape
    wide = torch.full((M, V + padding), float("nan"), dtype=logits_MV.dtype, device=DEVICE)
    wide[:, :V] = logits_MV
    return wide[:, :V]


def random_labels(M: int, V: int, ignored: int | None = None) -> torch.Tensor:
    labels_M = torch.randint(V, (M,), generator=torch.Generator().manual_seed(M))
    if ignored:
        labels_M[::ignored] = -100
    return labels_M.to(DEVICE)


def compare_loss(logits_MV: torch.Tensor, labels_M: torch.Tensor, factor: float = 1.0) -> None:
    """Loss and gradient agree with torch's in fp64, where that has numbers and where it has not;
    the logits stay until backward, and what lies between rows for good."""
    wide = logits_MV.detach().double().requires_grad_()
    expected = functional.cross_entropy(wide, labels_M, ignore_index=-100, reduction="sum")
    (expected * factor).backward()
    own = logits_MV.detach()
    before, base = own.clone(), own.as_strided(own.shape, own.stride()).requires_grad_()
    found = cross_entropy_sum(base, labels_M)
    assert (found.dtype, found.shape) == (torch.float32, ())
    torch.testing.assert_close(own, before, rtol=0, atol=0, equal_nan=True)
    (gradient,) = torch.autograd.grad(found * factor, base)
    assert gradient.data_ptr() == own.data_ptr()
    assert gradient.stride() == own.stride()
    assert gradient.dtype == own.dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    same = {"rtol": TOLERANCE[own.dtype], "atol": TOLERANCE[own.dtype] * factor, "equal_nan": True}
    torch.testing.assert_close(gradient.double(), wide.grad, **same)


class TestCrossEntropy:
    __test__ = RUNS

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("padding", [0, 6])
    @pytest.mark.parametrize(("M", "V"), [(1, 97), (17, 97), (9, 1000), (3, 5000), (3, 2)])
    def test_equals_the_reference(self, M: int, V: int, padding: int, dtype: torch.dtype) -> None:
        logits_MV = strided(3.0 * random(M, V, seed=1, dtype=dtype), padding)
        compare_loss(logits_MV, random_labels(M, V, ignored=3), factor=0.37)

    @pytest.mark.parametrize("V", [97, 512, 1000])
    def test_rows_of_several_blocks(self, V: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_cross_entropy, "_BLOCK", 128)
        compare_loss(strided(5.0 * random(5, V, seed=2), 4), random_labels(5, V))

    def test_the_maximum_may_come_late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_cross_entropy, "_BLOCK", 128)
        logits_MV = torch.linspace(-300.0, 300.0, 1000, device=DEVICE)
        compare_loss(torch.stack([logits_MV, logits_MV.flip(0)]), random_labels(2, 1000))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
    @pytest.mark.parametrize("V", [97, 1000])
    def test_extreme_logits(self, V: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_cross_entropy, "_BLOCK", 128)
        labels_M = torch.full((9,), 3, device=DEVICE)
        infinity, logits_MV = float("inf"), random(9, V, seed=3)
        logits_MV[0, 3], logits_MV[1, 7], logits_MV[2] = 1e4, 1e4, -1e4
        logits_MV[3, 4:] = logits_MV[4, :3] = -infinity
        compare_loss(logits_MV[:5], labels_M[:5])
        assert cross_entropy_sum(logits_MV[:5], labels_M[:5]).isfinite()
        # and where torch has no number there is none
        logits_MV[5, 3] = logits_MV[6, 5] = -infinity
        logits_MV[7] = -infinity
        logits_MV[8, 9] = infinity
        for row in range(5, 9):
            compare_loss(logits_MV[row : row + 1].clone(), labels_M[:1])

    def test_a_row_may_begin_with_blocks_of_minus_infinity(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(triton_cross_entropy, "_BLOCK", 128)
        logits_MV = random(2, 1000, seed=3)
        logits_MV[0, :300] = logits_MV[1, 200:] = -float("inf")
        compare_loss(logits_MV, torch.tensor([500, 7], device=DEVICE))

    def test_rows_without_a_target_may_hold_anything(self) -> None:
        logits_MV = random(3, 97, seed=4)
        logits_MV[1] = float("nan")
        labels_M = torch.tensor([5, -100, 6], device=DEVICE)
        compare_loss(logits_MV[[0, 2]], labels_M[[0, 2]])
        loss = cross_entropy_sum(leaf := logits_MV.requires_grad_(), labels_M)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite()
        assert gradient[1].tolist() == [0.0] * 97

    def test_without_any_target_there_is_no_loss_and_no_gradient(self) -> None:
        leaf = random(3, 97, seed=5).requires_grad_()
        loss = cross_entropy_sum(leaf, torch.full((3,), -100, device=DEVICE))
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, leaf)[0].any()

    @pytest.mark.parametrize("wrong", [97, -1, -99, 1 << 40])
    def test_a_label_that_is_no_word_makes_the_sum_nan(self, wrong: int) -> None:
        labels_M = torch.tensor([1, wrong, 2], device=DEVICE)
        assert cross_entropy_sum(random(3, 97, seed=6), labels_M).isnan()

    def test_no_rows(self) -> None:
        leaf = torch.empty(0, 97, device=DEVICE, requires_grad=True)
        loss = cross_entropy_sum(leaf, torch.empty(0, dtype=torch.int64, device=DEVICE))
        assert (loss.item(), loss.dtype) == (0.0, torch.float32)
        assert torch.autograd.grad(loss, leaf)[0].shape == (0, 97)

    @pytest.mark.parametrize("retain", [True, False])
    def test_a_second_backward_says_that_the_logits_are_gone(self, retain: bool) -> None:
        logits_MV = random(3, 97, seed=7).requires_grad_() * 1.0
        loss = cross_entropy_sum(logits_MV, random_labels(3, 97))
        torch.autograd.grad(loss, logits_MV, retain_graph=retain)
        with pytest.raises(RuntimeError, match=r"logits.*cannot run twice"):
            torch.autograd.grad(loss, logits_MV)

    def test_who_else_needs_the_logits_is_told(self) -> None:
        logits_MV = random(3, 97, seed=8).requires_grad_() * 1.0
        squares = logits_MV.square().sum()
        cross_entropy_sum(logits_MV, random_labels(3, 97)).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.backward()

    def test_the_gradient_reaches_a_matrix_before_it(self) -> None:
        weight, hidden = random(97, 24, seed=9), random(5, 24, seed=10)
        labels_M = random_labels(5, 97)
        compare(
            lambda weight: cross_entropy_sum(hidden @ weight.T, labels_M),
            lambda weight: functional.cross_entropy(
                hidden.double() @ weight.T, labels_M, reduction="sum"
            ),
            [weight],
            torch.tensor(0.7, device=DEVICE),
        )

    def test_rows_further_apart_than_an_int32_counts(self) -> None:
        stride = (1 << 30) + 16
        # memory that nobody touches is not there
        storage = torch.empty(2 * stride + 97, dtype=torch.float16, device=DEVICE)
        logits_MV = storage.as_strided((3, 97), (stride, 1))
        logits_MV.copy_(random(3, 97, seed=11))
        compare_loss(logits_MV, random_labels(3, 97))

    def test_bytes_are_those_of_its_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward, backward = recorded(monkeypatch, triton_cross_entropy, "cross_entropy")
        logits_MV = strided(random(5, 97, seed=12).half(), 3).requires_grad_() * 1
        cross_entropy_sum(logits_MV, random_labels(5, 97)).backward()
        counted = forward.moved(), backward.moved(logits_MV=2 * 5 * 97)  # read and written
        assert counted == cross_entropy_traffic(5, 97, 2)


# --------------------------------------------------------------------------- what all have to bear

Call = Callable[[torch.Tensor], torch.Tensor]


def calls(H: int) -> dict[str, Call]:
    """Each function of a T,H tensor."""
    bias_H, weight_H, norm_bias_H = (random(H, seed=seed).requires_grad_() for seed in range(3))
    tables = [random(rows, H, seed=3).requires_grad_() for rows in (7, 7, 7)]

    def embedded(x_TH: torch.Tensor) -> torch.Tensor:
        ids_T = torch.arange(len(x_TH), device=DEVICE) % 7
        return embed(ids_T, ids_T, ids_T, *tables, weight_H, norm_bias_H, EPS, 0.2) + 0.0 * x_TH

    return {
        "gelu": lambda x_TH: bias_gelu(x_TH, bias_H),
        "add": lambda x_TH: bias_dropout_add(x_TH, bias_H, x_TH, 0.2),
        "norm": lambda x_TH: bias_dropout_add_norm(
            x_TH, bias_H, x_TH, weight_H, norm_bias_H, EPS, 0.2
        ),
        "plain norm": lambda x_TH: bias_dropout_add_norm(
            x_TH, None, None, weight_H, norm_bias_H, EPS, 0.0
        ),
        "embed": embedded,
    }


def both(call: Call, x_TH: torch.Tensor, d_out: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The result and x's gradient, masks drawn anew from one seed."""
    torch.manual_seed(5)
    found = call(x_TH)
    d_out = random(*found.shape, seed=9) if d_out is None else d_out
    return [found.detach(), *torch.autograd.grad(found, x_TH, d_out)]


class TestAllOfThem:
    __test__ = RUNS

    @pytest.mark.parametrize("name", calls(24))
    def test_no_tokens(self, name: str) -> None:
        torch.manual_seed(5)
        leaf = torch.empty(0, 24, device=DEVICE, requires_grad=True)
        found = calls(24)[name](leaf)
        assert found.shape == (0, 24)
        found.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == (0, 24)

    def test_no_tokens_give_parameters_gradients_of_zero(self) -> None:
        x_TH = torch.empty(0, 24, device=DEVICE)
        parameters = [random(24, seed=seed).requires_grad_() for seed in range(3)]
        out = bias_dropout_add_norm(x_TH, parameters[0], x_TH, *parameters[1:], EPS, 0.1)
        (out.sum() + bias_gelu(x_TH, parameters[0]).sum()).backward()
        for parameter in parameters:
            assert parameter.grad is not None
            assert parameter.grad.tolist() == [0.0] * 24

    @pytest.mark.parametrize("name", calls(24))
    def test_strides_do_not_matter(self, name: str) -> None:
        call, x_TH = calls(24)[name], random(17, 24, seed=1)
        expected = both(call, x_TH.clone().requires_grad_(), torch.ones(17, 24, device=DEVICE))
        every_second = x_TH.repeat_interleave(2, dim=1)[:, ::2].requires_grad_()
        transposed = x_TH.T.contiguous().T.requires_grad_()
        expanded = torch.ones((), device=DEVICE).expand(17, 24)
        for leaf in (every_second, transposed):
            assert not leaf.is_contiguous()
            for found, right in zip(both(call, leaf, expanded), expected, strict=True):
                assert torch.equal(found, right)

    def test_strides_of_logits_do_not_matter(self) -> None:
        logits_MV, labels_M = random(5, 97, seed=1), random_labels(5, 97)
        expected = cross_entropy_sum(logits_MV, labels_M)
        leaf = logits_MV.T.contiguous().T.requires_grad_()
        found = cross_entropy_sum(leaf, labels_M.repeat(2, 1).T[:, 0])
        assert torch.equal(found, expected)
        (gradient,) = torch.autograd.grad(found, leaf)
        assert torch.equal(leaf, logits_MV)  # the copy was overwritten
        same = logits_MV.clone().requires_grad_()
        (right,) = torch.autograd.grad(cross_entropy_sum(same, labels_M), same)
        assert torch.equal(gradient, right)

    @pytest.mark.parametrize("name", calls(24))
    def test_the_same_bits_every_time(self, name: str) -> None:
        call, leaf = calls(100)[name], random(64, 100, seed=1).requires_grad_()
        for one, other in zip(both(call, leaf), both(call, leaf), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("programs", [0, 1, 64, 150])
    def test_sums_of_many_programs(self, programs: int) -> None:
        partial_KPH = random(3, programs, 70, seed=1)
        for found, expected in zip(
            column_sums(partial_KPH, torch.float32), partial_KPH.double().sum(1), strict=True
        ):
            assert apart(found, expected) <= TOLERANCE[torch.float32]

    @given(T=st.integers(0, 40), H=st.integers(3, 70), dropout=st.booleans())
    @settings(max_examples=15, phases=[Phase.generate])
    def test_any_shape(self, T: int, H: int, dropout: bool) -> None:
        probability = 0.4 * dropout
        inputs = [random(*size, seed=i) for i, size in enumerate([(T, H), (H,), (T, H)])]
        torch.manual_seed(3)
        mask = bias_dropout_add(
            0 * inputs[0], torch.ones_like(inputs[1]), 0 * inputs[2], probability
        )
        of_norm = random(H, seed=3), random(H, seed=4)

        def kernel(*given: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return bias_dropout_add_norm(*given, 0.1, probability)

        def reference(
            x: torch.Tensor, b: torch.Tensor, r: torch.Tensor, *n: torch.Tensor
        ) -> torch.Tensor:
            return functional.layer_norm(r + mask * (x + b), (H,), *n, 0.1)

        compare(kernel, reference, [*inputs, *of_norm])
        compare(bias_gelu, lambda x, b: functional.gelu(x + b), inputs[:2])
        if T:
            compare_loss(2.0 * inputs[0], random_labels(T, H))

    @pytest.mark.skipif(DEVICE.type != "cuda", reason="needs tensors of 4 GiB")
    @pytest.mark.parametrize("name", ["gelu", "add", "norm", "plain norm"])
    def test_more_elements_than_an_int32_counts(self, name: str) -> None:
        call, H = calls(1024)[name], 1024
        x_TH = torch.zeros((1 << 21) + 3, H, dtype=torch.bfloat16, device=DEVICE)
        x_TH[-5:] = random(5, H, seed=1, dtype=torch.bfloat16)
        leaf = x_TH.requires_grad_()
        with torch.no_grad():
            torch.manual_seed(5)
            evaluated = call(leaf)[-5:].clone()
        found, d_x = both(call, leaf, torch.ones_like(leaf))
        assert torch.equal(found[-5:], evaluated)
        assert found[-5:].float().std() > 0.3
        assert d_x[-5:].isfinite().all()
        if name in ("gelu", "plain norm"):  # nothing is drawn: rows do not know their number
            short = x_TH[-5:].detach().clone().requires_grad_()
            right, d_short = both(call, short, torch.ones_like(short))
            assert torch.equal(found[-5:], right)
            assert torch.equal(d_x[-5:], d_short)


@pytest.mark.slow
class TestTheOtherHalf:
    __test__ = not RUNS and not IS_OTHER_HALF

    def test_in_a_process_of_its_own(self) -> None:
        run_other_half(__file__)
