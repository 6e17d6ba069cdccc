"""Choose the form of attention: the one asked for, or the fastest that can run, by measurement.

Shapes: T tokens, E sequences, N heads, D head size.
"""

import itertools
import logging
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, get_args

import torch

from stacking_ds.config.sections import AttentionName
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention.flash import (
    attend_flash,
    attend_varlen,
    require_flash,
    require_varlen,
)
from stacking_ds.kernels.attention.padded import attend_cudnn, attend_padded
from stacking_ds.kernels.attention.sequences import (
    Attend,
    Sequences,
    attend_loops,
    require_gpu_and_half,
)

logger = logging.getLogger("stacking_ds")

Clock = Callable[[Callable[[], object]], float]
"""Does the work a few times; how many milliseconds it took."""

_WARM_UPS = 3
_TIMED = 7


def choose_attention(
    name: AttentionName,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int = 64,
    dropout_prob: float = 0.0,
) -> Attend:
    """The form called `name` for heads of `head_size`, in `dtype` on `device`, with this dropout;
    "auto" says in the log what it chose, on a GPU at the first tokens of each shape.

    Raises:
        ConfigError: no such form, or it cannot run here.
    """
    if name not in get_args(AttentionName):
        raise ConfigError(f"engine.attention={name!r} must be one of {get_args(AttentionName)}")
    if name != "auto":
        _require(name, device, dtype)
        if device.type == "cuda":
            _try_out(name, device, dtype, head_size, dropout_prob)
        return _FORMS[name]
    if device.type != "cuda":
        logger.info("attention: loops (the model is on %s)", device.type)
        return attend_loops
    candidates, left_out = {}, {}
    for candidate in _ON_GPU:
        try:
            _require(candidate, device, dtype)
            candidates[candidate] = _FORMS[candidate]
        except ConfigError as error:
            left_out[candidate] = str(error)
    return FastestAttention(candidates, left_out)


def _require(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if name == "loops" and device.type != "cpu":
        raise ConfigError(
            f"engine.attention=loops, but the model is on {device.type}: it is the form of the "
            f"CPU; leave the attention to auto"
        )
    if name in _REQUIREMENTS:
        _REQUIREMENTS[name](device, dtype)


def _try_out(
    name: str, device: torch.device, dtype: torch.dtype, head_size: int, dropout_prob: float
) -> None:
    """A few tokens: what cannot run says so before training has begun."""
    try:
        starts_E1 = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        qkv_T3ND = torch.zeros(8, 3, 1, head_size, dtype=dtype, device=device)
        call = _Call(qkv_T3ND, Sequences(starts_E1, 5), dropout_prob)
        _forward_and_backward(_FORMS[name], call)()
        torch.cuda.synchronize(device)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"engine.attention={name} cannot run on this GPU ({type(error).__name__}: {error}); "
            f"leave the attention to auto"
        ) from error


# ------------------------------------------------------------------ by measurement


class _Call(NamedTuple):
    """The arguments of an `Attend`."""

    qkv_T3ND: torch.Tensor
    sequences: Sequences
    dropout_prob: float


class _ShapeClass(NamedTuple):
    """Calls between which the fastest form is taken to be the same."""

    tokens_up_to: int
    sequences_up_to: int
    longest: int
    num_heads: int
    head_size: int
    dtype: torch.dtype
    has_dropout: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"up to {self.tokens_up_to} tokens in {self.sequences_up_to} sequences of at most "
            f"{self.longest}, {self.num_heads} heads of {self.head_size}, {dtype}, "
            f"{'with' if self.has_dropout else 'without'} dropout"
        )


class FastestAttention:
    """`Attend` by whichever candidate takes the shortest for a forward and a backward.

    It measures once for each class of shapes, on a copy of the tokens that it is called with.
    Training sees none of it: neither its random numbers nor its gradients. Ranks may choose
    differently, and so may two runs, wherever two candidates are as fast; the results then differ
    in the last bits, and with dropout in what is dropped.
    """

    def __init__(
        self,
        candidates: Mapping[str, Attend],
        left_out: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`left_out`: why others are no candidates. The clock is the GPU's unless one is given.

        Raises:
            ConfigError: there is no candidate.
        """
        self._left_out = dict(left_out or {})
        if not candidates:
            raise ConfigError(f"no form of attention can run here: {self._reasons(self._left_out)}")
        self._candidates = dict(candidates)
        self._clock = clock or _milliseconds_on_gpu
        self._chosen: dict[_ShapeClass, str] = {}
        self._unmeasured: set[_ShapeClass] = set()

    def __call__(
        self, qkv_T3ND: torch.Tensor, sequences: Sequences, dropout_prob: float
    ) -> torch.Tensor:
        """As `Attend`.

        Raises:
            ConfigError: none of the candidates can run on these tensors.
        """
        call = _Call(qkv_T3ND, sequences, dropout_prob)
        shape = _shape_class(call)
        name = self._chosen.get(shape)
        if name is None and (why_not := _why_not_now(qkv_T3ND)):
            name = self._unmeasured_choice(shape, why_not)
        elif name is None:
            name = self._chosen[shape] = self._fastest(shape, call)
        return self._candidates[name](*call)

    def _unmeasured_choice(self, shape: _ShapeClass, why: str) -> str:
        """For this call; the next may measure."""
        alike = [name for known, name in self._chosen.items() if known[-4:] == shape[-4:]]
        name = alike[-1] if alike else next(iter(self._candidates))
        if shape not in self._unmeasured:
            self._unmeasured.add(shape)
            logger.info("attention: %s for %s (not measured, since %s)", name, shape, why)
        return name

    def _fastest(self, shape: _ShapeClass, call: _Call) -> str:
        left_out, times = dict(self._left_out), {}
        for name, attend in self._candidates.items():
            try:
                times[name] = _measure(attend, call, self._clock)
            except (RuntimeError, ValueError, TypeError) as error:
                left_out[name] = str(error)
        if not times:
            raise ConfigError(f"no form of attention can run on {shape}: {self._reasons(left_out)}")
        name = min(times, key=lambda candidate: times[candidate])
        measured = ", ".join(f"{form} {time:.3f} ms" for form, time in times.items())
        if left_out:
            measured += f"; left out {self._reasons(left_out)}"
        logger.info("attention: %s for %s (%s)", name, shape, measured)
        return name

    @staticmethod
    def _reasons(left_out: Mapping[str, str]) -> str:
        return "; ".join(f"{name}: {' '.join(why.split())}" for name, why in left_out.items())


def _why_not_now(qkv_T3ND: torch.Tensor) -> str:
    """Why nothing can be measured, if so."""
    if qkv_T3ND.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch._C._current_graph_task_id() != -1:
        # The GPU's one thread for backward passes would wait for a backward of its own.
        return "a backward pass is computing this again"
    return ""


def _shape_class(call: _Call) -> _ShapeClass:
    qkv_T3ND, sequences, dropout_prob = call
    T, _, N, D = qkv_T3ND.shape
    E, dtype, has_dropout = sequences.starts_E1.numel() - 1, qkv_T3ND.dtype, dropout_prob > 0.0
    return _ShapeClass(_rounded_up(T), _rounded_up(E), sequences.longest, N, D, dtype, has_dropout)


def _rounded_up(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()


def _measure(attend: Attend, call: _Call, clock: Clock) -> float:
    """Milliseconds of a forward and a backward, on copies.

    In a thread of its own, where nothing of the caller's holds: the hooks and dispatch modes by
    which checkpointing counts what a forward pass does, autocast, no_grad, inference mode.
    """
    qkv_T3ND, sequences, dropout_prob = call
    device = qkv_T3ND.device
    stream = torch.cuda.current_stream(device) if qkv_T3ND.is_cuda else None

    def measured() -> float:
        on_device: AbstractContextManager[object] = torch.cuda.stream(stream)
        with on_device, torch.random.fork_rng([device] if stream else []):
            copied = Sequences(sequences.starts_E1.clone(), sequences.longest)
            copy = _Call(qkv_T3ND.detach().clone(), copied, dropout_prob)
            return clock(_forward_and_backward(attend, copy))

    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(measured).result()


def _forward_and_backward(attend: Attend, call: _Call) -> Callable[[], object]:
    qkv_T3ND = call.qkv_T3ND.requires_grad_()
    grad_TND = qkv_T3ND.detach()[:, 0].contiguous()
    return lambda: torch.autograd.grad(attend(*call), qkv_T3ND, grad_TND)


def _milliseconds_on_gpu(work: Callable[[], object]) -> float:
    """The median of a few, queued one behind the other as in training."""
    for _ in range(_WARM_UPS):
        work()
    new_event = partial(torch.cuda.Event, enable_timing=True)
    events = [new_event() for _ in range(_TIMED + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    events[-1].synchronize()
    times = [float(start.elapsed_time(end)) for start, end in itertools.pairwise(events)]
    return statistics.median(times)


_FORMS: dict[str, Attend] = {
    "loops": attend_loops,
    "padded": attend_padded,
    "cudnn": attend_cudnn,
    "flash": attend_flash,
    "varlen": attend_varlen,
}
_REQUIREMENTS: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "cudnn": partial(require_gpu_and_half, "cudnn", "cuDNN"),
    "flash": require_flash,
    "varlen": require_varlen,
}
_ON_GPU = ("flash", "varlen", "padded", "cudnn")
"""The first is taken where nothing could be measured."""
