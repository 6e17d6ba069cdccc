"""Operations of a BERT besides attention: the torch form, which defines them, compiled, and apex's.

A form is chosen in `stacking_ds.kernels.registry`; the others derive from this one and replace what
they do faster. Matrix products belong to an operation with what follows them, so that each form
decides how much of that one pass over memory can do.

Shapes: T tokens, I inputs, O outputs, H hidden size, M masked positions, V vocabulary.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn import functional

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.cross_entropy import cross_entropy_sum

_LEVELS = 1 << 16
_LANES = 4  # of 16 bits in a random word


def keep_mask(shape: torch.Size, dropout_prob: float, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU: 1 with probability 1 - dropout_prob, to the nearest 65536th, else 0; drawn from
    torch's global generator."""
    if dropout_prob == 0.0:
        return torch.ones(shape, dtype=dtype)
    numel = shape.numel()
    # torch's dropout draws one number at a time here, a tenth of a bf16 step; this, four in a word
    words = torch.empty(-(-numel // _LANES), dtype=torch.int64).random_(-(1 << 63), None)
    numbers = words.view(torch.int16)[:numel].view(shape)
    lowest_kept = min(round(dropout_prob * _LEVELS), _LEVELS - 1) - _LEVELS // 2
    if lowest_kept == -_LEVELS // 2:
        return torch.ones(shape, dtype=dtype)
    # a comparison would give bools, which torch multiplies and converts ten times slower
    return numbers.clamp_(lowest_kept - 1, lowest_kept).sub_(lowest_kept - 1).to(dtype)


def dropout_add(
    inner: torch.Tensor, residual: torch.Tensor | None, dropout_prob: float
) -> torch.Tensor:
    """residual + dropout(inner), of one shape; without residual, dropout alone.

    Each element is 0 with probability `dropout_prob`, else divided by 1 - dropout_prob (Srivastava
    et al. 2014).
    """
    # the compiler knows torch's own
    if dropout_prob == 0.0 or inner.device.type != "cpu" or torch.compiler.is_compiling():
        dropped = functional.dropout(inner, dropout_prob)
        return dropped if residual is None else residual + dropped
    added: torch.Tensor = _DropoutAdd.apply(inner, residual, dropout_prob)  # type: ignore[no-untyped-call]
    return added


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, inner: torch.Tensor, residual: torch.Tensor | None, dropout_prob: float
    ) -> torch.Tensor:
        keep = keep_mask(inner.shape, dropout_prob, inner.dtype)
        ctx.save_for_backward(keep)
        ctx.scale, ctx.adds = 1.0 / (1.0 - dropout_prob), residual is not None
        if residual is None:
            return (inner * keep).mul_(ctx.scale)
        return torch.add(residual, inner * keep, alpha=ctx.scale)

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), grad if ctx.adds else None, None


LinearForm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(x_TI, weight_OI, bias_O or None) -> T, O"""
Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


class Weights(NamedTuple):
    """Of a linear map."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor


class Norm(NamedTuple):
    """LayerNorm's parameters (Ba et al. 2016)."""

    weight_H: torch.Tensor
    bias_H: torch.Tensor
    eps: float


class TokenIds(NamedTuple):
    """Rows of the `EmbeddingTables`: T of each."""

    word: torch.Tensor
    token_type: torch.Tensor
    position: torch.Tensor


class EmbeddingTables(NamedTuple):
    """Of words, token types and positions: (rows, H) each."""

    word: torch.Tensor
    token_type: torch.Tensor
    position: torch.Tensor


@dataclass(frozen=True)
class Operations:
    """Plain torch operations; what follows a matrix product reads and writes memory anew.

    `linear` multiplies the layers' matrices; heads use torch's own.
    """

    linear: LinearForm = functional.linear

    name = "torch"

    def linear_gelu(self, x_TI: torch.Tensor, weights: Weights) -> torch.Tensor:
        """gelu(x W' + b), with the exact GELU (Hendrycks and Gimpel 2016). Shape [T, O]."""
        return functional.gelu(self.linear(x_TI, *weights))

    def linear_add(
        self,
        x_TI: torch.Tensor,
        weights: Weights,
        residual_TO: torch.Tensor,
        dropout_prob: float,
    ) -> torch.Tensor:
        """residual + dropout(x W' + b). Shape [T, O]."""
        return dropout_add(self.linear(x_TI, *weights), residual_TO, dropout_prob)

    def norm(self, x_TH: torch.Tensor, norm: Norm) -> torch.Tensor:
        return functional.layer_norm(x_TH, x_TH.shape[-1:], norm.weight_H, norm.bias_H, norm.eps)

    def linear_add_norm(
        self,
        x_TI: torch.Tensor,
        weights: Weights,
        residual_TH: torch.Tensor,
        norm: Norm,
        dropout_prob: float,
    ) -> torch.Tensor:
        """LayerNorm(residual + dropout(x W' + b)). Shape [T, H]."""
        return self.norm(self.linear_add(x_TI, weights, residual_TH, dropout_prob), norm)

    def embed(
        self, ids: TokenIds, tables: EmbeddingTables, norm: Norm, dropout_prob: float
    ) -> torch.Tensor:
        """dropout(LayerNorm(word + token type + position)). Shape [T, H]."""
        word_TH, type_TH, position_TH = map(functional.embedding, ids, tables)
        return dropout_add(self.norm(word_TH + type_TH + position_TH, norm), None, dropout_prob)

    def cross_entropy_sum(self, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        """As `stacking_ds.kernels.cross_entropy` has it: its backward overwrites the logits."""
        return cross_entropy_sum(logits_MV, labels_M)

    def between_attentions(self, function: Function) -> Function:
        """The function of a layer after its attention, in the form this one runs it in."""
        return function


@dataclass(frozen=True)
class CompiledOperations(Operations):
    """By torch.compile, the rival that the hand-written kernels have to beat.

    Needs a C++ compiler on the CPU, Triton and a C compiler on a GPU.
    """

    name = "compile"

    def between_attentions(self, function: Function) -> Function:
        compiled: Any = _compiled(function)
        return compiled  # type: ignore[no-any-return]


@cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    compiled = torch.compile(function)

    def run(operations: Operations, context_TH: torch.Tensor, *rest: Any) -> torch.Tensor:
        # every micro-batch has another number of tokens
        torch._dynamo.maybe_mark_dynamic(context_TH, 0)
        torch._dynamo.maybe_mark_dynamic(rest[0], 0)
        found: torch.Tensor = compiled(operations, context_TH, *rest)
        return found

    return run


def find_apex(key: str, compiled: str, module: str, needed: Sequence[str]) -> Any:
    """A module of NVIDIA's apex that has these functions, for the recipe's `key`.

    The package called `apex` on PyPI is another project, and NVIDIA's can be installed without its
    compiled part; both can be imported, and neither can compute. So it is that part, `compiled`,
    that is looked for.

    Raises:
        ConfigError: it is not there, cannot be loaded, or is not what it should be; the message
            says what is there instead.
    """
    remedy = (
        f"build NVIDIA's apex from its repository with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or leave "
        f"{key} to auto"
    )
    try:
        importlib.import_module(compiled)
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{_what_is_there(compiled, error)}: {remedy}") from None
    missing = [name for name in needed if not callable(getattr(found, name, None))]
    if missing:
        raise ConfigError(
            f"the module {module} at {getattr(found, '__file__', None)} has no "
            f"{', '.join(missing)}: it is not that of NVIDIA's apex, or an old one; {remedy}"
        )
    return found


def _what_is_there(compiled: str, error: ImportError) -> str:
    if importlib.util.find_spec(compiled) is not None:
        return f"apex's compiled part {compiled} cannot be loaded ({error}); it fits another torch"
    apex = importlib.util.find_spec("apex")
    if apex is None:
        return "NVIDIA's apex is not installed"
    # a look at its folder, since importing the other project would run it
    places = [Path(place) for place in apex.submodule_search_locations or []]
    if any((place / "multi_tensor_apply").is_dir() for place in places):
        return f"NVIDIA's apex in {places[0]} was installed without its compiled part {compiled}"
    where = places[0] if places else apex.origin
    return (
        f"the package apex in {where}, without {compiled}, is not NVIDIA's (PyPI's is another "
        f"project)"
    )


@dataclass(frozen=True)
class ApexOperations(Operations):
    """The torch form with a LayerNorm of NVIDIA's apex: of input, weight, bias, shape and eps."""

    layer_norm: Any = None

    name = "apex"

    def norm(self, x_TH: torch.Tensor, norm: Norm) -> torch.Tensor:
        weight_H, bias_H, eps = norm
        normed_TH: torch.Tensor = self.layer_norm(x_TH, weight_H, bias_H, weight_H.shape, eps)
        return normed_TH
