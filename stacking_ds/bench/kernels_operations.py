"""The fused operations, each in every form that runs here, beside the bytes that it must move.

    gelu            gelu(x + bias)
    add_norm        LayerNorm(residual + dropout(x + bias))
    norm            LayerNorm(x), as in the head and in pre-LN layers
    embedding       dropout(LayerNorm(word + token type + position))
    cross_entropy   of masked positions

x comes from a matrix product, which adds the bias in passing where a form leaves it to torch; its
backward pass sums the bias's gradient over all tokens. Bytes are those of the fused form.

Shapes: T tokens, H hidden size, F = 4 H, M masked positions, V vocabulary.
"""

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from stacking_ds.bench.kernels_clock import Clock, Entrant, race
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.cross_entropy import IGNORE_INDEX
from stacking_ds.kernels.operations import EmbeddingTables, Norm, Operations, TokenIds, Weights
from stacking_ds.kernels.registry import choose_operations

FORMS = ("plain", "torch", "triton", "compile")
OPERATIONS = ("gelu", "add_norm", "norm", "embedding", "cross_entropy")
MASKED_FRACTION = 0.15
TYPES, POSITIONS = 2, 512
_DROPOUT, _EPS = 0.1, 1e-12
_ALIGNED_LOGITS = 64  # on a GPU, as `stacking_ds.kernels.cross_entropy` makes them
_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of forms to one another


@dataclass(frozen=True)
class Sizes:
    """Of a BERT's activations."""

    tokens: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype

    @property
    def masked(self) -> int:
        return max(1, round(MASKED_FRACTION * self.tokens))


@dataclass(frozen=True)
class Subject:
    """An operation on its tensors: by a form's operations, and written out in torch's functions."""

    by: Callable[[Operations, float], torch.Tensor]
    """(form, dropout_prob)"""
    chain: Callable[[Callable[..., torch.Tensor], float], torch.Tensor]
    """(how a bias is added, dropout_prob)"""
    inputs: tuple[torch.Tensor, ...]
    gradient: torch.Tensor
    traffic: tuple[int, int]
    """Bytes forward and backward, by the functions below."""
    prepare: Callable[[], Any] = lambda: None

    def entrant(self, forward: Callable[[], torch.Tensor]) -> Entrant:
        return Entrant(forward, self.inputs, self.gradient, self.prepare)


class _AddedBias(torch.autograd.Function):
    """A bias that the matrix product before has added: forward there is no pass, backward a sum."""

    @staticmethod
    def forward(ctx: Any, x_TO: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
        return x_TO.view_as(x_TO)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_TO, grad_TO.sum(0)


def _added(x_TO: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    added_TO: torch.Tensor = _AddedBias.apply(x_TO, bias_O)  # type: ignore[no-untyped-call]
    return added_TO


def _product(
    x_TO: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """In the place of a linear map: the product has been computed, and is not timed."""
    return x_TO if bias_O is None else _added(x_TO, bias_O)


class _Draw:
    """Tensors of one dtype on one device, the same in every run."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.dtype, self.device = sizes.dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, requires_grad: bool = True) -> torch.Tensor:
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        return values.normal_(generator=self.generator).requires_grad_(requires_grad)

    def ids(self, count: int, below: int) -> torch.Tensor:
        return torch.randint(below, (count,), device=self.device, generator=self.generator)

    def zeros(self, size: int) -> torch.Tensor:
        """A bias: zeros, so that it is the same whether the product before has added it."""
        values = torch.zeros(size, dtype=self.dtype, device=self.device)
        return values.requires_grad_()

    def norm(self, size: int) -> Norm:
        return Norm(self.normal(size), self.normal(size), _EPS)


# ------------------------------------------------- bytes that must cross memory, in the fused form
#
# Forward (to be followed by a backward pass) and backward. Every tensor once: what is read and what
# is written. The programs' partial sums are workspace, so time spent on them shows as bandwidth
# lost.


def gelu_traffic(tokens: int, width: int, itemsize: int) -> tuple[int, int]:
    rows, parameter = tokens * width * itemsize, width * itemsize
    return 2 * rows + parameter, 3 * rows + 2 * parameter


def norm_traffic(
    tokens: int,
    width: int,
    itemsize: int,
    *,
    bias: bool = True,
    residual: bool = True,
    dropout: bool = True,
    norm: bool = True,
) -> tuple[int, int]:
    rows, parameter = tokens * width * itemsize, width * itemsize
    seed, of_rows = 8 * dropout, 8 * tokens * norm  # of rows: mean and rstd
    written = (bias or residual or dropout) + norm  # the sum, and what came of it
    forward = (1 + residual + written) * rows + (bias + 2 * norm) * parameter + seed + of_rows
    # without dropout inner and residual have one gradient, which without a norm is the output's
    written = norm * (residual or not dropout) + dropout
    backward = (1 + norm + written) * rows + (bias + 3 * norm) * parameter + seed + of_rows
    return forward, backward


def embedding_traffic(
    tokens: int, width: int, itemsize: int, *, types: int, positions: int, dropout: bool = True
) -> tuple[int, int]:
    """Of the words a row for each token, of the small tables all; the gradients of the three tables
    are torch's, and not in here."""
    rows, parameter = tokens * width * itemsize, width * itemsize
    tables = rows + (types + positions) * parameter
    ids, of_rows, seed = 3 * 8 * tokens, 8 * tokens, 8 * dropout  # of rows: mean and rstd
    forward = tables + ids + 2 * parameter + seed + of_rows + rows
    backward = rows + tables + ids + parameter + seed + of_rows + rows + 2 * parameter
    return forward, backward


def cross_entropy_traffic(rows: int, vocabulary: int, itemsize: int) -> tuple[int, int]:
    """The logits in backward twice, as they are read and written; no padding between rows."""
    logits, labels, number = rows * vocabulary * itemsize, 8 * rows, 4 * rows
    return logits + labels + 3 * number, 2 * logits + labels + 2 * number + 4


# ------------------------------------------------------------------------ the subjects


def subjects(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Subject]]:
    """One after the other, so that each finds the memory of the one before."""
    makers = (_gelu, _add_norm, _norm, _embedding, _cross_entropy)
    for name, make in zip(OPERATIONS, makers, strict=True):
        yield name, make(sizes, _Draw(sizes, device))


def _gelu(sizes: Sizes, draw: _Draw) -> Subject:
    width = 4 * sizes.hidden_size
    x_TF, bias_F = draw.normal(sizes.tokens, width), draw.zeros(width)
    return Subject(
        lambda form, dropout_prob: form.linear_gelu(x_TF, Weights(x_TF, bias_F)),
        lambda add, dropout_prob: functional.gelu(add(x_TF, bias_F)),
        (x_TF, bias_F),
        draw.normal(sizes.tokens, width, requires_grad=False),
        gelu_traffic(sizes.tokens, width, sizes.dtype.itemsize),
    )


def _add_norm(sizes: Sizes, draw: _Draw) -> Subject:
    shape = sizes.tokens, sizes.hidden_size
    x_TH, residual_TH = draw.normal(*shape), draw.normal(*shape)
    bias_H, norm = draw.zeros(sizes.hidden_size), draw.norm(sizes.hidden_size)

    def chain(add: Callable[..., torch.Tensor], dropout_prob: float) -> torch.Tensor:
        sum_TH = residual_TH + functional.dropout(add(x_TH, bias_H), dropout_prob)
        return _layer_norm(sum_TH, norm)

    return Subject(
        lambda form, dropout_prob: form.linear_add_norm(
            x_TH, Weights(x_TH, bias_H), residual_TH, norm, dropout_prob
        ),
        chain,
        (x_TH, residual_TH, bias_H, norm.weight_H, norm.bias_H),
        draw.normal(*shape, requires_grad=False),
        norm_traffic(*shape, sizes.dtype.itemsize),
    )


def _norm(sizes: Sizes, draw: _Draw) -> Subject:
    shape = sizes.tokens, sizes.hidden_size
    x_TH, norm = draw.normal(*shape), draw.norm(sizes.hidden_size)
    without = dict.fromkeys(("bias", "residual", "dropout"), False)
    return Subject(
        lambda form, dropout_prob: form.norm(x_TH, norm),
        lambda add, dropout_prob: _layer_norm(x_TH, norm),
        (x_TH, norm.weight_H, norm.bias_H),
        draw.normal(*shape, requires_grad=False),
        norm_traffic(*shape, sizes.dtype.itemsize, **without),
    )


def _embedding(sizes: Sizes, draw: _Draw) -> Subject:
    width = sizes.hidden_size
    rows = sizes.vocab_size, TYPES, POSITIONS
    tables = EmbeddingTables(*(draw.normal(count, width) for count in rows))
    ids = TokenIds(*(draw.ids(sizes.tokens, count) for count in rows))
    norm = draw.norm(width)

    def chain(add: Callable[..., torch.Tensor], dropout_prob: float) -> torch.Tensor:
        word, token_type, position = map(functional.embedding, ids, tables)
        return functional.dropout(_layer_norm(word + token_type + position, norm), dropout_prob)

    return Subject(
        lambda form, dropout_prob: form.embed(ids, tables, norm, dropout_prob),
        chain,
        (*tables, norm.weight_H, norm.bias_H),
        draw.normal(sizes.tokens, width, requires_grad=False),
        embedding_traffic(
            sizes.tokens, width, sizes.dtype.itemsize, types=TYPES, positions=POSITIONS
        ),
    )


def _cross_entropy(sizes: Sizes, draw: _Draw) -> Subject:
    kept_MV = draw.normal(sizes.masked, sizes.vocab_size, requires_grad=False)
    # rows begin where the model's do
    multiple = _ALIGNED_LOGITS if draw.device.type == "cuda" else 1
    width = -(-sizes.vocab_size // multiple) * multiple
    logits_MV = kept_MV.new_empty(sizes.masked, width)[:, : sizes.vocab_size].requires_grad_()
    labels_M = draw.ids(sizes.masked, sizes.vocab_size)

    def restore() -> None:
        with torch.no_grad():
            logits_MV.copy_(kept_MV)

    return Subject(
        lambda form, dropout_prob: form.cross_entropy_sum(logits_MV, labels_M),
        lambda add, dropout_prob: functional.cross_entropy(
            logits_MV.float(), labels_M, ignore_index=IGNORE_INDEX, reduction="sum"
        ),
        (logits_MV,),
        torch.ones((), device=draw.device),
        cross_entropy_traffic(sizes.masked, sizes.vocab_size, sizes.dtype.itemsize),
        restore,
    )


def _layer_norm(x_TH: torch.Tensor, norm: Norm) -> torch.Tensor:
    return functional.layer_norm(x_TH, x_TH.shape[-1:], norm.weight_H, norm.bias_H, norm.eps)


# --------------------------------------------------------------------------- the forms


def measure_operations(
    widths: tuple[int, ...],
    sizes: Callable[[int], Sizes],
    device: torch.device,
    clock: Clock,
    rounds: int,
    *,
    compiled: bool,
) -> dict[str, Any]:
    """A row for each operation, width, pass and form; `sizes` of a width."""
    forms, absent = _forms(device, compiled)
    has_triton = importlib.util.find_spec("triton") is not None
    rows, copies = [], []
    for width in widths:
        for name, subject in subjects(sizes(width), device):
            entrants = {form: subject.entrant(_forward(subject, form, forms)) for form in forms}
            for form in ("torch", "triton"):
                if form in forms:
                    _require_agreement(name, form, subject, forms, sizes(width).dtype)
            # without the fused form nothing is held against its bytes
            counted = subject.traffic if has_triton else (None, None)
            found = race(entrants, clock, rounds, counted[0] or subject.gradient.nbytes)
            copies.append(found.copy_bytes_per_second)
            for way, nbytes in zip(("forward", "backward"), counted, strict=True):
                floor = None if nbytes is None else nbytes / found.copy_bytes_per_second
                shared = {"operation": name, "hidden_size": width, "pass": way, "bytes": nbytes}
                shared["floor_seconds"] = floor
                rows += [
                    {**shared, "form": form, "seconds": seconds[way]}
                    for form, seconds in found.seconds.items()
                ]
                rows += [
                    {**shared, "form": form, "not_measured": why}
                    for form, why in (absent | found.not_measured).items()
                ]
            if compiled:
                torch._dynamo.reset()  # what was compiled holds the tensors
    return {"copy_gb_per_second": statistics.median(copies) / 1e9, "rows": rows}


def _forms(
    device: torch.device, compiled: bool
) -> tuple[dict[str, Operations | None], dict[str, str]]:
    """What each form computes with, None for torch's functions; and why others cannot."""
    forms: dict[str, Operations | None] = {"plain": None, "torch": Operations(_product)}
    absent = {}
    try:
        if device.type != "cuda":
            raise ConfigError("Triton needs an NVIDIA GPU")
        forms["triton"] = choose_operations("triton", device, _product)
    except ConfigError as error:
        absent["triton"] = str(error)
    try:
        if not compiled:
            raise ConfigError("--compile asks for it, since compiling takes its time")
        choose_operations("compile", device)
        forms["compile"] = None
    except ConfigError as error:
        absent["compile"] = str(error)
    return forms, absent


def _forward(
    subject: Subject, form: str, forms: Mapping[str, Operations | None], dropout: float = _DROPOUT
) -> Callable[[], torch.Tensor]:
    operations = forms[form]
    if operations is not None:
        return lambda: subject.by(operations, dropout)
    if form == "plain":
        return lambda: subject.chain(_added, dropout)
    return torch.compile(lambda: subject.chain(torch.add, dropout))


def _require_agreement(
    name: str,
    form: str,
    subject: Subject,
    forms: Mapping[str, Operations | None],
    dtype: torch.dtype,
) -> None:
    """No time is worth anything otherwise. Without dropout, whose masks differ."""
    results = []
    for one in ("plain", form):
        entrant = subject.entrant(_forward(subject, one, forms, 0.0))
        entrant.prepare()
        made = entrant.forward()
        kept = made.detach().clone()
        results.append([kept, *(grad.clone() for grad in entrant.backward(made))])
    for expected, found in zip(*results, strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert float(error) < _ERROR[dtype], f"{name}: {form} is off by {float(error):.1e}"
