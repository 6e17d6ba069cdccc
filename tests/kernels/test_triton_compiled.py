"""The Triton kernels of a model compile for every GPU we know, once for all numbers of tokens."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from stacking_ds.kernels import (
    triton_cross_entropy,
    triton_embedding,
    triton_norm,
    triton_operations,
    triton_parts,
)
from stacking_ds.kernels.triton_cross_entropy import cross_entropy_sum
from stacking_ds.kernels.triton_embedding import embed
from stacking_ds.kernels.triton_norm import bias_dropout_add, bias_dropout_add_norm
from stacking_ds.kernels.triton_operations import bias_gelu
from tests.cubins import (
    INTERPRETED,
    IS_OTHER_HALF,
    NoWaiting,
    believe_in_a_device,
    compiled,
    run_other_half,
    spills,
)
from tests.kernel_forms import FORMS, TYPES

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # for `make gpu-check`
# of BERT base and large
WIDTHS = {
    triton_parts: (768, 1024),
    triton_cross_entropy: (30522, 30522),
    triton_embedding: (768, 1024),
    triton_operations: (3072, 4096),
    triton_norm: (768, 1024),
}
DTYPES = ("bf16", "fp16", "fp32")
SPECIFIC = ((90, "bf16", 0), (100, "fp32", 1))  # the others are slow
Form = tuple[Any, int]  # of a module, and which one


def at(form: Form, width: int, dtype: str, capability: int) -> Any:
    """The kernel's form, compiled."""
    module, number = form
    kernel, constants = FORMS[module][number]
    sums = module is triton_parts
    cut = {"H": width, **module.OPTIONS} if sums else module.options(width)
    types = {name: told.replace("*x", "*" + dtype) for name, told in TYPES.items()}
    constants = {**cut, **constants}
    return compiled(kernel, types, constants, capability, aligned=("stride",))


ALL_FORMS: list[Form] = [
    (module, number) for module in WIDTHS for number in range(len(FORMS[module]))
]


def name_of(value: Any) -> str | None:
    if not isinstance(value, tuple):
        return None
    module, number = value
    return f"{FORMS[module][number][0].__name__}-{number}"


def cases() -> Iterator[Any]:
    for form, capability, dtype, size in itertools.product(
        ALL_FORMS, (80, 90, 100), DTYPES, (0, 1)
    ):
        if size == 0 or len(set(WIDTHS[form[0]])) == 2 or (capability, dtype, size) in SPECIFIC:
            slow = () if (capability, dtype, size) in SPECIFIC else (pytest.mark.slow,)
            yield pytest.param(form, WIDTHS[form[0]][size], dtype, capability, marks=slow)


# --------------------------------------------------------------------------- launches

H, V = 96, 97


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.rand(shape).to(dtype).requires_grad_()


def embedded(T: int, dropout_prob: float) -> torch.Tensor:
    ids_T = torch.zeros(T, dtype=torch.int64)
    return embed(
        ids_T,
        ids_T,
        ids_T,
        made(9, H),
        made(2, H),
        made(9, H),
        made(H),
        made(H),
        1e-12,
        dropout_prob,
    )


def sublayer(T: int, dropout_prob: float) -> torch.Tensor:
    added = made(T, H), made(H), made(T, H)
    return bias_dropout_add_norm(*added, made(H), made(H), 1e-12, dropout_prob)


def plain_norm(T: int) -> torch.Tensor:
    return bias_dropout_add_norm(made(T, H), None, None, made(H), made(H), 1e-12, 0.0)


def loss(T: int) -> torch.Tensor:
    logits_MV = torch.rand(T, 128).bfloat16()[:, :V].requires_grad_()
    return cross_entropy_sum(logits_MV, torch.zeros(T, dtype=torch.int64))


SUM = (triton_parts, 0)
TRAINING: dict[str, tuple[Callable[[int], torch.Tensor], list[Form]]] = {
    "gelu": (
        lambda T: bias_gelu(made(T, H), made(H)),
        [(triton_operations, 0), (triton_operations, 1), SUM],
    ),
    "sublayer": (lambda T: sublayer(T, 0.1), [(triton_norm, 0), (triton_norm, 7), SUM]),
    "sublayer dry": (lambda T: sublayer(T, 0.0), [(triton_norm, 1), (triton_norm, 8), SUM]),
    "norm": (plain_norm, [(triton_norm, 2), (triton_norm, 9), SUM]),
    "add": (
        lambda T: bias_dropout_add(made(T, H), made(H), made(T, H), 0.1),
        [(triton_norm, 5), (triton_norm, 10), SUM],
    ),
    "add dry": (
        lambda T: bias_dropout_add(made(T, H), made(H), made(T, H), 0.0),
        [(triton_norm, 6), (triton_norm, 11), SUM],
    ),
    "embed": (lambda T: embedded(T, 0.1), [(triton_embedding, 0), (triton_embedding, 3), SUM]),
    "embed dry": (lambda T: embedded(T, 0.0), [(triton_embedding, 1), (triton_embedding, 4), SUM]),
    "loss": (loss, [(triton_cross_entropy, 0), (triton_cross_entropy, 1)]),
}
EVALUATION: dict[str, tuple[Callable[[int], torch.Tensor], list[Form]]] = {
    "sublayer": (lambda T: sublayer(T, 0.0), [(triton_norm, 3)]),
    "norm": (plain_norm, [(triton_norm, 4)]),
    "embed": (lambda T: embedded(T, 0.0), [(triton_embedding, 2)]),
}


class TestCompiled:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize(("form", "width", "dtype", "capability"), list(cases()), ids=name_of)
    def test_nothing_spills(
        self, form: Form, width: int, dtype: str, capability: int, tmp_path: Path
    ) -> None:
        assert spills(at(form, width, dtype, capability).asm["cubin"], tmp_path) == (0, 0)

    @pytest.mark.parametrize("form", ALL_FORMS, ids=name_of)
    def test_rows_move_as_vectors(self, form: Form) -> None:
        ptx = at(form, WIDTHS[form[0]][0], "bf16", 90).asm["ptx"]
        assert re.findall(r"\bld\.global\.v4\.b32", ptx)
        # but for the one logit of the label
        singles = 1 if form == (triton_cross_entropy, 0) else 0
        assert len(re.findall(r"\bld\.global\.b16", ptx)) == singles
        if form[0] is not triton_parts:
            assert not re.findall(r"\bst\.global\.b16", ptx)

    @pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("form", ALL_FORMS, ids=name_of)
    def test_no_loop_moves_numbers_between_threads_but_to_sum(self, form: Form, dtype: str) -> None:
        """The mask above all: it is drawn by the threads that need it."""
        told = at(form, WIDTHS[form[0]][0], dtype, 90).asm["ttgir"]
        for loop in re.findall(r"scf\.for.*?scf\.yield", told, re.S):
            assert "convert_layout" not in loop

    @pytest.mark.parametrize("name", TRAINING)
    def test_training_launches_the_forms_told_for_any_number_of_tokens(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call, told = TRAINING[name]
        launched = believe_in_a_device(monkeypatch)
        width = V if name == "loss" else H
        expected = [at(form, width, "bf16", 90).asm["cubin"] for form in told]
        for tokens in (1, 2, 3, 16, 33, 400):  # Triton would make special cases of 1 and of 16
            launched.clear()
            with NoWaiting():
                found = call(tokens)
                found.backward(torch.ones_like(found))
            assert launched == expected

    @pytest.mark.parametrize("name", EVALUATION)
    def test_evaluation_launches_the_forms_told(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call, [told] = EVALUATION[name]
        launched = believe_in_a_device(monkeypatch)
        expected = at(told, H, "bf16", 90).asm["cubin"]
        with torch.no_grad(), NoWaiting():
            for tokens in (1, 2, 16):
                call(tokens)
        assert launched == [expected] * 3

    def test_every_form_is_launched_by_something(self) -> None:
        launched = {form for _, told in [*TRAINING.values(), *EVALUATION.values()] for form in told}
        assert launched == set(ALL_FORMS)


class TestTheOtherHalf:
    __test__ = INTERPRETED and not IS_OTHER_HALF

    def test_in_a_process_of_its_own(self) -> None:
        run_other_half(__file__)
