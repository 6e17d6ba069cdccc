"""Kernels are what the recipe names, or the error says what to do."""

import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from stacking_ds.config.sections import EngineSection
from stacking_ds.errors import ConfigError
from stacking_ds.kernels import registry
from stacking_ds.kernels.attention.sequences import Sequences, attend_loops
from stacking_ds.kernels.fp8 import linear_fp8
from stacking_ds.kernels.operations import ApexOperations, Norm
from stacking_ds.kernels.registry import choose_compute, choose_operations
from tests.bert_samples import TINY

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_cpu_computes_by_torch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stacking_ds"):
        chosen = choose_compute(EngineSection(), CPU, TINY)
    assert chosen.operations.name == "torch"
    assert chosen.attend is attend_loops
    assert "kernels: torch (the model is on cpu)" in caplog.messages


def test_checkpointing_and_fp8_come_from_the_recipe() -> None:
    section = EngineSection(activation_checkpointing="selective", fp8=True)
    sizes = TINY.changed(hidden_size=32, intermediate_size=64)
    chosen = choose_compute(section, CPU, sizes)
    assert chosen.activation_checkpointing == "selective"
    assert chosen.operations.linear is linear_fp8


@pytest.mark.parametrize("name", ["triton", "apex"])
def test_what_needs_a_gpu_is_refused_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=f"engine.kernels={name}, but the model is on cpu"):
        choose_operations(name, CPU)


def test_fp8_needs_sizes_that_it_can_multiply() -> None:
    with pytest.raises(ConfigError, match="multiples of 16, not 24"):
        choose_compute(EngineSection(fp8=True), CPU, TINY)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_is_chosen_for_the_precision_of_the_run(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(registry, "choose_attention", lambda *arguments: asked.append(arguments))
    sizes = TINY.changed(attention_probs_dropout_prob=0.1)
    choose_compute(EngineSection(precision=precision), CPU, sizes)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert asked == [("auto", CPU, dtype, 6, 0.1)]


def test_attention_that_nobody_chose_follows_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "attend_padded", lambda *arguments: "padded")
    monkeypatch.setattr(registry, "attend_loops", lambda *arguments: "loops")
    sequences = Sequences(torch.tensor([0, 1], dtype=torch.int32), 1)
    for device, name in (("cpu", "loops"), ("meta", "padded")):
        qkv_T3ND = torch.empty(1, 3, 1, 2, device=device)
        assert registry.attend_anywhere(qkv_T3ND, sequences, 0.0) == name


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"engine\.kernels='cuda' must be one of"):
        choose_operations("cuda", CPU)


def test_compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="needs one of c"):
        choose_operations("compile", CPU)


def test_without_triton_a_gpu_computes_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, logger="stacking_ds"):
        assert choose_operations("auto", CUDA).name == "torch"
    assert "expect a slow step" in caplog.text
    with pytest.raises(ConfigError, match="Triton is not installed"):
        choose_operations("triton", CUDA)


def test_another_apex_is_not_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("apex")
    other.__spec__ = ModuleSpec("apex", None)
    monkeypatch.setitem(sys.modules, "apex", other)
    with pytest.raises(ConfigError, match="fused_layer_norm_cuda"):
        choose_operations("apex", CUDA)


def test_nvidias_apex_normalises(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fused_layer_norm_affine(x, weight, bias, shape, eps):  # type: ignore[no-untyped-def]
        seen.append((shape, eps))
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    module = ModuleType("apex.normalization.fused_layer_norm")
    module.fused_layer_norm_affine = fused_layer_norm_affine  # type: ignore[attr-defined]
    for name in ("fused_layer_norm_cuda", "apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    operations = choose_operations("apex", CUDA)
    assert isinstance(operations, ApexOperations)
    x = torch.randn(3, 8)
    found = operations.linear_add_norm(
        x,
        weights=(torch.eye(8), torch.zeros(8)),  # type: ignore[arg-type]
        residual_TH=x,
        norm=Norm(torch.ones(8), torch.zeros(8), 1e-5),
        dropout_prob=0.0,
    )
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(2 * x, (8,)))
    assert seen == [((8,), 1e-5)]
    module.fused_layer_norm_affine = None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="has no fused_layer_norm_affine"):
        choose_operations("apex", CUDA)
