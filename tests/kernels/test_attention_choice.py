"""The choice of a form of attention: by name, or by a measurement that nothing else notices."""

import logging
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention import choice, flash
from stacking_ds.kernels.attention.choice import FastestAttention, choose_attention
from stacking_ds.kernels.attention.flash import attend_flash, attend_varlen
from stacking_ds.kernels.attention.padded import attend_cudnn, attend_padded
from stacking_ds.kernels.attention.sequences import Attend, Sequences, attend_loops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stacking_ds")


def _batch(*lengths: int) -> tuple[torch.Tensor, Sequences]:
    qkv_T3ND = torch.randn(sum(lengths), 3, 2, 8, requires_grad=True)
    starts = torch.tensor((0, *lengths)).cumsum(0).int()
    return qkv_T3ND, Sequences(starts, max(lengths))


class _Race:
    """Candidates that note their calls, and a clock that gives them the times asked for."""

    def __init__(self, **milliseconds: float | Exception) -> None:
        self.calls: list[str] = []
        self._times = milliseconds
        self.candidates: dict[str, Attend] = {
            name: partial(self._attend, name) for name in milliseconds
        }

    def _attend(self, name: str, *arguments: Any) -> torch.Tensor:
        self.calls.append(name)
        failure = self._times[name]
        if isinstance(failure, Exception):
            raise failure
        torch.randn(3)
        return attend_padded(*arguments)

    def clock(self, work: Callable[[], object]) -> float:
        work()
        return float(self._times[self.calls[-1]])  # type: ignore[arg-type]

    def start(self, **left_out: str) -> FastestAttention:
        return FastestAttention(self.candidates, left_out, self.clock)


def test_the_fastest_is_measured_once_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    race = _Race(first=2.0, second=0.5, third=1.0)
    attend = race.start(fourth="it needs another card")
    qkv_T3ND, sequences = _batch(5, 9)
    found = attend(qkv_T3ND, sequences, 0.0)
    assert race.calls == ["first", "second", "third", "second"]
    assert torch.equal(found, attend_padded(qkv_T3ND, sequences, 0.0))
    attend(qkv_T3ND, sequences, 0.0)
    assert race.calls[4:] == ["second"]
    assert caplog.messages == [
        "attention: second for up to 16 tokens in 2 sequences of at most 9, 2 heads of 8, "
        "float32, without dropout (first 2.000 ms, second 0.500 ms, third 1.000 ms; "
        "left out fourth: it needs another card)"
    ]


def test_each_class_of_shapes_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    race = _Race(only=1.0)
    attend = race.start()
    # 14 and 16 tokens in 2 sequences; 19 and 21 in 3 and 4; 17 in 2
    for lengths in [(5, 9), (7, 9), (5, 5, 9), (5, 2, 5, 9), (8, 9)]:
        attend(*_batch(*lengths), 0.0)
    assert len(caplog.messages) == 3
    qkv_T3ND, sequences = _batch(5, 9)
    attend(qkv_T3ND, sequences, 0.1)
    attend(qkv_T3ND, sequences, 0.2)
    attend(qkv_T3ND.bfloat16(), sequences, 0.0)
    attend(qkv_T3ND, Sequences(sequences.starts_E1, 12), 0.0)
    attend(qkv_T3ND.view(14, 3, 1, 16), sequences, 0.0)
    assert len(caplog.messages) == 7
    assert "with dropout" in caplog.messages[3]
    assert "bfloat16" in caplog.messages[4]


def test_who_cannot_run_is_left_out_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    race = _Race(fast=RuntimeError("no kernel\n for this"), slow=9.0, other=ConfigError("never"))
    race.start()(*_batch(5, 9), 0.0)
    assert race.calls[-1] == "slow"
    (line,) = caplog.messages
    assert line.endswith("(slow 9.000 ms; left out fast: no kernel for this; other: never)")


def test_where_none_can_run_all_reasons_are_said() -> None:
    race = _Race(one=RuntimeError("too wide"), two=ConfigError("no dropout"))
    with pytest.raises(ConfigError, match=r"up to 16 tokens.*three: absent; one: too wide; two: "):
        race.start(three="absent")(*_batch(5, 9), 0.0)
    with pytest.raises(ConfigError, match="can run here: three: absent"):
        FastestAttention({}, {"three": "absent"})


def test_training_does_not_notice() -> None:
    race = _Race(first=2.0, second=1.0)
    qkv_T3ND, sequences = _batch(5, 9)
    attend, version = race.start(), qkv_T3ND._version
    torch.manual_seed(3)
    context_TND = attend(qkv_T3ND, sequences, 0.5)
    drawn = torch.randn(1)
    assert qkv_T3ND.grad is None
    assert qkv_T3ND._version == version
    torch.manual_seed(3)
    assert torch.equal(context_TND, race.candidates["second"](qkv_T3ND, sequences, 0.5))
    assert torch.equal(drawn, torch.randn(1))


def test_a_backward_is_timed_too_even_without_gradients() -> None:
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, qkv_T3ND: torch.Tensor) -> torch.Tensor:
            return qkv_T3ND[:, 0].clone()

        @staticmethod
        def backward(ctx: Any, grad_TND: torch.Tensor) -> torch.Tensor:
            seen.append(grad_TND)
            return torch.stack([grad_TND] * 3, 1)

    def attend(qkv_T3ND: torch.Tensor, sequences: Sequences, dropout_prob: float) -> Any:
        return Watched.apply(qkv_T3ND)

    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            qkv_T3ND, sequences = _batch(5, 9)
            FastestAttention({"one": attend}, clock=lambda work: bool(work()))(
                qkv_T3ND, sequences, 0.0
            )
        assert seen.pop().shape == (14, 2, 8)


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_does_not_count_what_was_measured(selective: bool) -> None:
    race = _Race(first=2.0, second=1.0)
    attend = race.start()
    qkv_T3ND, sequences = _batch(5, 9)
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def layer(qkv_T3ND: torch.Tensor) -> torch.Tensor:
        square = torch.eye(8)
        widened_T3ND = (qkv_T3ND.reshape(-1, 8) @ square).view_as(qkv_T3ND)
        return attend(widened_T3ND, sequences, 0.0).reshape(-1, 8) @ square

    options = {"context_fn": kept} if selective else {}
    output = checkpoint(layer, qkv_T3ND, use_reentrant=False, **options)
    (found,) = torch.autograd.grad(output.square().sum(), qkv_T3ND)
    (expected,) = torch.autograd.grad(layer(qkv_T3ND).square().sum(), qkv_T3ND)
    assert torch.equal(found, expected)
    assert race.calls.count("first") == 1


def test_nothing_is_measured_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    race = _Race(first=2.0, second=1.0)
    attend = race.start()
    why_not = ["a CUDA graph is being captured"]
    monkeypatch.setattr(choice, "_why_not_now", lambda qkv_T3ND: why_not[0])
    for _ in range(3):
        attend(*_batch(5, 9), 0.0)
    assert race.calls == ["first"] * 3
    assert len(caplog.messages) == 1
    assert "first for up to 16 tokens" in caplog.messages[0]
    assert "not measured, since a CUDA graph is being captured" in caplog.messages[0]
    why_not[0] = ""
    attend(*_batch(5, 9), 0.0)
    assert race.calls[3:] == ["first", "second", "second"]
    why_not[0] = "a CUDA graph is being captured"
    attend(*_batch(50, 9), 0.0)  # of another class, but alike
    attend(*_batch(50, 9), 0.1)
    assert race.calls[6:] == ["second", "first"]


def test_nothing_is_measured_within_a_backward(caplog: pytest.LogCaptureFixture) -> None:
    race = _Race(first=2.0, second=1.0)
    attend = race.start()

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, qkv_T3ND: torch.Tensor) -> torch.Tensor:
            return qkv_T3ND[:, 0].clone()

        @staticmethod
        def backward(ctx: Any, grad_TND: torch.Tensor) -> torch.Tensor:
            attend(*_batch(5, 9), 0.0)
            return torch.stack([grad_TND] * 3, 1)

    Late.apply(_batch(5, 9)[0]).sum().backward()
    assert race.calls == ["first"]
    assert "since a backward pass is computing this again" in caplog.messages[0]


# ------------------------------------------------------------------ by name


def test_on_the_cpu_auto_is_loops(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_attention("auto", CPU, FP32) is attend_loops
    assert caplog.messages == ["attention: loops (the model is on cpu)"]


@pytest.mark.parametrize(("name", "attend"), [("loops", attend_loops), ("padded", attend_padded)])
def test_a_name_is_that_form(name: Any, attend: Attend, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_attention(name, CPU, FP32) is attend
    assert not caplog.messages


def test_on_a_gpu_auto_measures_what_the_precision_allows() -> None:
    half = choose_attention("auto", CUDA, BF16)
    single = choose_attention("auto", CUDA, FP32)
    assert isinstance(half, FastestAttention)
    assert isinstance(single, FastestAttention)
    assert half._candidates == {
        "flash": attend_flash,
        "varlen": attend_varlen,
        "padded": attend_padded,
        "cudnn": attend_cudnn,
    }
    assert list(single._candidates) == ["padded"]
    assert "in bf16 and fp16, not in torch.float32" in single._left_out["flash"]


@pytest.mark.parametrize("name", ["flash", "varlen", "cudnn"])
def test_what_cannot_run_is_refused_by_name(name: Any) -> None:
    with pytest.raises(ConfigError, match=rf"engine.attention={name}, but the model is on cpu"):
        choose_attention(name, CPU, BF16)
    with pytest.raises(ConfigError, match=rf"={name} computes in bf16 and fp16, not in torch.fl"):
        choose_attention(name, CUDA, FP32)


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"engine.attention='fast' must be one of \('auto', "):
        choose_attention("fast", CPU, FP32)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="=loops, but the model is on cuda"):
        choose_attention("loops", CUDA, FP32)
    monkeypatch.setattr(flash, "_OPERATIONS", ("_flash_attention_of_tomorrow",))
    with pytest.raises(ConfigError, match=r"aten._flash_attention_of_tomorrow, which torch 2\."):
        choose_attention("flash", CUDA, BF16)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ConfigError, match=r"needs torch.nn.attention.varlen, which torch 2\."):
        choose_attention("varlen", CUDA, BF16)


def test_what_fails_on_a_few_tokens_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("needs Ampere")

    monkeypatch.setitem(choice._FORMS, "flash", broken)
    # Where there is no GPU, another error comes first.
    expected = r"=flash cannot run on this GPU \((RuntimeError|AssertionError): .*; leave the att"
    with pytest.raises(ConfigError, match=expected):
        choose_attention("flash", CUDA, BF16)


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_all_are_measured_on_a_gpu(p: float, caplog: pytest.LogCaptureFixture) -> None:
    sequences = Sequences(torch.tensor([0, 5, 6, 6, 70, 128]).int().cuda(), 64)
    qkv_T3ND = torch.randn(128, 3, 2, 64, dtype=BF16).cuda().requires_grad_()
    attend = choose_attention("auto", CUDA, BF16)
    state = torch.cuda.get_rng_state()
    with torch.inference_mode():
        attend(qkv_T3ND, sequences, 0.0)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    attend(qkv_T3ND, sequences, p).sum().backward()
    assert qkv_T3ND.grad is not None
    assert qkv_T3ND.grad.isfinite().all()
    line = caplog.messages[-1]
    for name in ("flash", "padded", "cudnn"):
        assert re.search(rf"{name} \d+\.\d{{3}} ms", line)
    assert ("varlen: engine.attention=varlen has no dropout" in line) == (p > 0)
