"""Attention in all its forms: what it computes, and what it must not see.

The reference is written out in fp64, one sequence at a time.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

from stacking_ds.config.sections import AttentionName
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention import flash, padded
from stacking_ds.kernels.attention.choice import choose_attention
from stacking_ds.kernels.attention.flash import attend_flash, attend_varlen
from stacking_ds.kernels.attention.padded import attend_cudnn, attend_padded
from stacking_ds.kernels.attention.sequences import Attend, Sequences, attend_loops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
as_for_cudnn = partial(attend_padded, backends=(SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH))
on_cpu = pytest.mark.parametrize("attend", [attend_loops, attend_padded, as_for_cudnn])
on_gpu = pytest.mark.parametrize("name", ["flash", "varlen", "padded", "cudnn"])
UNEVEN = (5, 1, 0, 17, 64, 3, 0)
LENGTHS = [UNEVEN, (16, 16, 16), (7, 7), (1,), (0, 7), (3, 2) * 12]


def _sequences(lengths: tuple[int, ...], device: torch.device = CPU) -> Sequences:
    starts = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    return Sequences(starts, max(lengths))


def _qkv(
    lengths: tuple[int, ...], size: int = 8, device: torch.device = CPU, dtype: Any = None
) -> torch.Tensor:
    return torch.randn(sum(lengths), 3, 2, size, dtype=dtype).to(device).requires_grad_()


def _one(q_SND: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaled_keep: Any) -> torch.Tensor:
    scores_NSS = torch.einsum("snd,tnd->nst", q_SND, k) / math.sqrt(q_SND.shape[-1])
    return torch.einsum("nst,tnd->snd", scores_NSS.softmax(-1) * scaled_keep, v)


def _reference(
    qkv_T3ND: torch.Tensor, sequences: Sequences, scaled_keep: Any = None
) -> torch.Tensor:
    """In fp64; `scaled_keep` has a mask (N, S, S) for each sequence, times 1 / (1 - p)."""
    starts = sequences.starts_E1.tolist()
    rows = [
        _one(*qkv_T3ND[start:end].double().unbind(1), scaled_keep[i] if scaled_keep else 1.0)
        for i, (start, end) in enumerate(itertools.pairwise(starts))
    ]
    return torch.cat(rows)


def _both_ways(
    attend: Callable[..., torch.Tensor], qkv_T3ND: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    context_TND = attend(qkv_T3ND, *arguments)
    draw = torch.Generator().manual_seed(7)
    weights = torch.randn(context_TND.shape, generator=draw).bfloat16().to(context_TND)
    return context_TND.detach(), torch.autograd.grad(context_TND, qkv_T3ND, weights)[0]


def _assert_like_reference(
    attend: Attend, lengths: tuple[int, ...], size: int, device: torch.device, dtype: torch.dtype
) -> None:
    sequences = _sequences(lengths, device)
    qkv_T3ND = _qkv(lengths, size, device, dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    found = _both_ways(attend, qkv_T3ND, sequences, 0.0)
    for ours, theirs in zip(found, _both_ways(_reference, qkv_T3ND, sequences), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@on_cpu
@pytest.mark.parametrize("lengths", LENGTHS)
def test_it_is_the_reference(attend: Attend, lengths: tuple[int, ...]) -> None:
    _assert_like_reference(attend, lengths, 8, CPU, torch.float32)


@on_cpu
def test_no_sequence_may_reach_the_longest(attend: Attend) -> None:
    sequences = Sequences(_sequences((4, 9)).starts_E1, 30)
    qkv_T3ND = _qkv((4, 9))
    torch.testing.assert_close(
        attend(qkv_T3ND, sequences, 0.0), _reference(qkv_T3ND, sequences).float()
    )


@on_cpu
def test_no_sequence_sees_another(attend: Attend) -> None:
    sequences, qkv_T3ND = _sequences(UNEVEN), _qkv(UNEVEN)
    before, grad_before = _both_ways(attend, qkv_T3ND, sequences, 0.0)
    changed_T3ND = qkv_T3ND.detach().clone()
    changed_T3ND[6:23] = math.nan  # the one of 17 tokens
    after, grad_after = _both_ways(attend, changed_T3ND.requires_grad_(), sequences, 0.0)
    others = torch.ones(len(before), dtype=torch.bool)
    others[6:23] = False
    assert torch.equal(before[others], after[others])
    assert torch.equal(grad_before[others], grad_after[others])
    assert after[6:23].isnan().all()


@pytest.mark.parametrize("attend", [attend_padded, as_for_cudnn])
def test_without_tokens_there_is_nothing(attend: Attend) -> None:
    context_TND, grad_T3ND = _both_ways(attend, _qkv((0, 0)), _sequences((0, 0)), 0.1)
    assert context_TND.shape == (0, 2, 8)
    assert grad_T3ND.shape == (0, 3, 2, 8)


# ------------------------------------------------------------------ dropout


def _dropped_probabilities(
    attend: Attend, qkv_T3ND: torch.Tensor, lengths: tuple[int, ...], p: float, seed: int
) -> list[torch.Tensor]:
    """What multiplies v, of every sequence (N, S, S): v is the unit matrix, so D >= S."""
    units = torch.cat([torch.eye(length, qkv_T3ND.shape[-1]) for length in lengths])
    units_T2D = units[:, None].expand(-1, 2, -1).to(qkv_T3ND)
    with_units = torch.cat([qkv_T3ND.detach()[:, :2], units_T2D[:, None]], 1)
    torch.manual_seed(seed)
    context_TND = attend(with_units, _sequences(lengths, qkv_T3ND.device), p).double()
    parts = zip(context_TND.split(lengths), lengths, strict=True)
    return [part[..., :length].transpose(0, 1) for part, length in parts]


def _assert_dropout(
    attend: Attend, lengths: tuple[int, ...], size: int, device: torch.device, dtype: Any
) -> None:
    """As many dropped as asked for, the rest scaled; again with the seed; and the backward drops
    what the forward did."""
    p, sequences = 0.25, _sequences(lengths, device)
    qkv_T3ND = _qkv(lengths, size, device, dtype)
    dropped = _dropped_probabilities(attend, qkv_T3ND, lengths, p, 1)
    again = _dropped_probabilities(attend, qkv_T3ND, lengths, p, 1)
    other = _dropped_probabilities(attend, qkv_T3ND, lengths, p, 2)
    everything = torch.cat([part.flatten() for part in dropped])
    assert torch.equal(everything, torch.cat([part.flatten() for part in again]))
    assert not torch.equal(everything, torch.cat([part.flatten() for part in other]))
    # FlashAttention draws 8 bits for each, so that its rate is a 256th off.
    spread = 5 * math.sqrt(p * (1 - p) / everything.numel()) + 1 / 256
    assert abs(float((everything == 0).double().mean()) - p) < spread
    assert abs(float(everything.sum()) / (2 * sum(lengths)) - 1) < 2 * spread
    keep = [(part != 0) / (1 - p) for part in dropped]
    torch.manual_seed(1)
    found = _both_ways(attend, qkv_T3ND, sequences, p)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    expected = _both_ways(_reference, qkv_T3ND, sequences, keep)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@on_cpu
@pytest.mark.parametrize("lengths", [(64, 5, 1, 0, 37), (48, 48)])
def test_dropout(attend: Attend, lengths: tuple[int, ...]) -> None:
    _assert_dropout(attend, lengths, 64, CPU, torch.float32)


# ------------------------------------------------------------------ padded


def test_padding_needs_nothing_from_the_device() -> None:
    lengths = (5, 1, 17)
    starts = torch.empty(4, dtype=torch.int32, device="meta")  # has no values to wait for
    qkv_T3ND = _qkv(lengths).to("meta")
    assert attend_padded(qkv_T3ND, Sequences(starts, 17), 0.0).shape == (23, 2, 8)


def test_every_row_shows_a_slot() -> None:
    """Not all kernels make zeros of a row that is hidden altogether."""
    slots = padded._place(_sequences((0, 5, 0, 0, 3, 0)).starts_E1, 5, 8, for_cudnn=True)
    assert slots.real_R11S.sum((1, 2, 3)).tolist() == [1, 5, 1, 1, 3, 1]


def test_rows_of_lengths_and_numbers_that_suit_cudnn() -> None:
    for number in range(1, 600):
        length, rows = padded._row_length(number), padded._rounded_rows(number)
        assert number <= length < number + 16
        assert length % 8 == 0
        assert length % 128 != 64
        assert number <= rows <= number * 9 / 8
    assert len({padded._rounded_rows(number) for number in range(192, 257)}) <= 6


def test_backends_are_tried_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []

    def record(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        orders.append(torch._C._get_sdp_priority_order()[:2])
        return tensors[0]

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    for order in ((SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH), padded._WITHOUT_CUDNN):
        attend_padded(_qkv((3, 2)), _sequences((3, 2)), 0.0, order)
        assert orders.pop() == [int(backend) for backend in order[:2]]


def test_places_are_found_anew_where_starts_were_written_over() -> None:
    sequences, qkv_T3ND = _sequences((4, 9)), _qkv((4, 9))
    attend_padded(qkv_T3ND, sequences, 0.0)
    sequences.starts_E1[1] = 6
    torch.testing.assert_close(
        attend_padded(qkv_T3ND, sequences, 0.0), _reference(qkv_T3ND, sequences).float()
    )


def test_what_inference_mode_made_does_not_get_into_training() -> None:
    sequences, qkv_T3ND = _sequences((4, 9)), _qkv((4, 9))
    with torch.inference_mode():
        attend_padded(qkv_T3ND, sequences, 0.0)
    _both_ways(attend_padded, qkv_T3ND, sequences, 0.0)


# ------------------------------------------------------------------ flash and varlen

# torchgen/packaged/ATen/native/native_functions.yaml of the wheel of torch 2.11.0
FORWARD_2_11 = """aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, \
Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, \
bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, \
SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> \
(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, \
Tensor debug_attn_mask)"""
BACKWARD_2_11 = """aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, \
Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, \
SymInt max_k, float dropout_p, bool is_causal, Tensor rng_state, Tensor unused, *, \
float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None) -> \
(Tensor, Tensor, Tensor)"""
HERE = "the installed torch's"


class _FakeFlash:
    """The two operations on the CPU, their arguments named as a schema names them."""

    def __init__(self, forward: str, backward: str) -> None:
        aten = torch.ops.aten
        self._schemas = [
            getattr(aten, name).default._schema if text == HERE else torch._C.parse_schema(text)
            for name, text in zip(flash._OPERATIONS, (forward, backward), strict=True)
        ]

    def _bind(self, schema: Any, values: tuple[Any, ...]) -> dict[str, Any]:
        positional = [a.name for a in schema.arguments if not a.kwarg_only]
        return dict(zip(positional, values, strict=True))

    @staticmethod
    def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, got: Any, seed: Any) -> Any:
        assert got["cum_seq_q"] is got["cum_seq_k"]
        assert (got["max_q"], got["max_k"], got["is_causal"]) == (17, 17, False)
        assert q.stride(-1) == 1
        draw = torch.Generator().manual_seed(int(seed))
        p, lengths = got["dropout_p"], got["cum_seq_q"].diff().tolist()
        keep = [(torch.rand(2, n, n, generator=draw) >= p) / (1 - p) for n in lengths]
        return _reference(torch.stack([q, k, v], 1), Sequences(got["cum_seq_q"], 17), keep).float()

    def forward(self, *values: Any) -> tuple[torch.Tensor, ...]:
        got = self._bind(self._schemas[0], values)
        assert not got["return_debug_mask"]
        seed = torch.randint(1000, ())
        self.out = self._attend(got["query"], got["key"], got["value"], got, seed)
        self.made = [torch.randn(2, 23), seed, torch.zeros(())]
        assert len(self._schemas[0].returns) == 5
        return self.out, *self.made, torch.empty(0)

    def backward(self, *values: Any) -> tuple[torch.Tensor, ...]:
        got = self._bind(self._schemas[1], values)
        for name, made in zip(("logsumexp", "rng_state", "unused"), self.made, strict=True):
            assert torch.equal(got[name], made)
        assert torch.equal(got["out"], self.out)
        tensors = [got[name].detach().requires_grad_() for name in ("query", "key", "value")]
        with torch.enable_grad():
            context_TND = self._attend(*tensors, got, got["rng_state"])
        return torch.autograd.grad(context_TND, tensors, got["grad_out"])


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "require_flash", lambda device, dtype: None)
    monkeypatch.setattr(flash, "require_varlen", lambda device, dtype: None)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("schemas", [(FORWARD_2_11, BACKWARD_2_11), (HERE, HERE)])
def test_flash_calls_the_operations_as_they_are_declared(
    monkeypatch: pytest.MonkeyPatch, schemas: tuple[str, str]
) -> None:
    fake = _FakeFlash(*schemas)
    for name, operation in zip(flash._OPERATIONS, (fake.forward, fake.backward), strict=True):
        monkeypatch.setattr(torch.ops.aten, name, operation)
    lengths = (5, 1, 17)
    qkv_T3ND, sequences = _qkv(lengths), _sequences(lengths)
    found = _both_ways(attend_flash, qkv_T3ND, sequences, 0.3)
    draw = torch.Generator().manual_seed(int(fake.made[1]))
    keep = [(torch.rand(2, n, n, generator=draw) >= 0.3) / 0.7 for n in lengths]
    expected = _both_ways(_reference, qkv_T3ND, sequences, keep)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(("attend", "p"), [(attend_flash, 0.1), (attend_varlen, 0.0)])
def test_the_installed_torch_takes_the_arguments(attend: Attend, p: float) -> None:
    qkv_T3ND = torch.empty(23, 3, 2, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    sequences = Sequences(torch.empty(4, dtype=torch.int32, device="meta"), 17)
    context_TND = attend(qkv_T3ND, sequences, p)
    assert context_TND.shape == (23, 2, 64)
    (grad_T3ND,) = torch.autograd.grad(context_TND.sum(), qkv_T3ND)
    assert grad_T3ND.shape == qkv_T3ND.shape


@pytest.mark.usefixtures("anywhere")
def test_what_only_a_call_can_show_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded, "require_gpu_and_half", lambda *where: None)
    with pytest.raises(ConfigError, match=r"with multiples of 1/16, not with .*=0.1; set that"):
        attend_cudnn(_qkv((3,)), _sequences((3,)), 0.1)
    for p in (0.0, 0.25):
        with pytest.raises(ConfigError, match=r"cannot run on 2 heads of size 8 in torch.float"):
            attend_cudnn(_qkv((3,)), _sequences((3,)), p)
    with pytest.raises(ConfigError, match=r"varlen has no dropout, .*=0.1; set that to 0"):
        attend_varlen(_qkv((3,)), _sequences((3,)), 0.1)
    for attend in (attend_flash, attend_varlen):
        with pytest.raises(ConfigError, match=r"multiple of 8 and at most 256, not 12"):
            attend(_qkv((3,), size=12), _sequences((3,)), 0.0)


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("lengths", [*LENGTHS, (512,) * 4, (37, 512, 64, 128, 1)])
def test_on_a_gpu_it_is_the_reference(name: AttentionName, lengths: tuple[int, ...]) -> None:
    attend = choose_attention(name, CUDA, torch.bfloat16)
    _assert_like_reference(attend, lengths, 64, CUDA, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "padded", "cudnn"])
@pytest.mark.parametrize("lengths", [(64, 5, 1, 0, 37), (64,) * 16])
def test_dropout_on_a_gpu(name: AttentionName, lengths: tuple[int, ...]) -> None:
    attend = choose_attention(name, CUDA, torch.bfloat16)
    _assert_dropout(attend, lengths, 64, CUDA, torch.bfloat16)


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu() -> None:
    qkv_T3ND, sequences = _qkv(UNEVEN, 64, CUDA, torch.bfloat16), _sequences(UNEVEN, CUDA)
    for name in ("flash", "padded", "cudnn"):
        attend = choose_attention(name, CUDA, torch.bfloat16)
        _both_ways(attend, qkv_T3ND, sequences, 0.25)  # plans are made
        fresh = Sequences(sequences.starts_E1.clone(), sequences.longest)
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend(qkv_T3ND, fresh, 0.25).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
