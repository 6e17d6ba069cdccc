"""A model trains alike whatever computes its operations: Triton, or matrix products in FP8.

Triton interprets where there is no GPU, which is settled when it is imported: its test then runs
in a process of its own.
"""

from typing import Any

import pytest
import torch

from stacking_ds.kernels.fp8 import linear_fp8
from stacking_ds.kernels.operations import Operations
from stacking_ds.kernels.registry import Compute
from stacking_ds.model.bert import pretraining_loss
from stacking_ds.model.bert_config import BertConfig
from tests.bert_samples import TINY, Batch, telling_model
from tests.cubins import INTERPRETED, IS_OTHER_HALF, run_other_half
from tests.kernel_comparison import DEVICE

RUNS_TRITON = INTERPRETED or DEVICE.type == "cuda"
positions = pytest.mark.parametrize("position", ["post", "pre"])


def _gradients(
    config: BertConfig, compute: Compute, lengths: tuple[int, ...] = (16, 5, 9)
) -> dict[str, torch.Tensor]:
    model, batch = telling_model(config, compute=compute).to(DEVICE), Batch(config, lengths)
    labels_M, nsp_labels_B = batch.labels_M.to(DEVICE), batch.nsp_labels_B.to(DEVICE)
    logits_MV, nsp_B2 = model(*batch.inputs(DEVICE), batch.positions_M.to(DEVICE))
    loss = pretraining_loss(logits_MV, labels_M, nsp_B2, nsp_labels_B, compute.operations)
    (loss.mlm_sum + loss.nsp_sum).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _require_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for name, gradient in expected.items():
        if "key.bias" not in name:  # softmax does not see it
            assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


class TestTriton:
    __test__ = RUNS_TRITON
    pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

    @positions
    def test_gradients_are_those_of_torch(self, position: str) -> None:
        pytest.importorskip("triton", reason="Triton is not installed")
        from stacking_ds.kernels.triton_operations import TritonOperations

        config = TINY.changed(layer_norm_position=position)
        _require_close(
            _gradients(config, Compute(TritonOperations())), _gradients(config, Compute()), 1e-5
        )


@pytest.mark.slow
@pytest.mark.skipif(RUNS_TRITON or IS_OTHER_HALF, reason="Triton's test runs in this process")
def test_triton_in_a_process_of_its_own() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    run_other_half(__file__)


# --------------------------------------------------------------------------- FP8

WIDE = TINY.changed(hidden_size=32, intermediate_size=64)
FP8 = Operations(linear=linear_fp8)


@pytest.mark.skipif(IS_OTHER_HALF, reason="only Triton's test is run here")
class TestFp8:
    @positions
    def test_gradients_are_near_those_of_torch(self, position: str) -> None:
        config = WIDE.changed(layer_norm_position=position, initializer_range=0.1)
        expected = _gradients(config, Compute())
        found = _gradients(config, Compute(FP8))
        _require_close(found, expected, 0.5)
        assert any(not torch.equal(found[name], gradient) for name, gradient in expected.items())

    @pytest.mark.parametrize("kind", ["selective", "full"])
    def test_checkpointing_changes_nothing(self, kind: Any) -> None:
        expected = _gradients(WIDE, Compute(FP8))
        found = _gradients(WIDE, Compute(FP8, activation_checkpointing=kind))
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())

    def test_heads_multiply_in_the_precision_of_the_run(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        products = []

        def count(*arguments: Any, **options: Any) -> torch.Tensor:
            products.append(arguments)
            return multiply(*arguments, **options)

        multiply = torch._scaled_mm
        monkeypatch.setattr(torch, "_scaled_mm", count)
        model, batch = telling_model(WIDE, compute=Compute(FP8)), Batch(WIDE, (16, 5))
        model(*batch.inputs(), torch.zeros(0, dtype=torch.long))  # none is masked: no row at all
        assert len(products) == 4 * WIDE.num_hidden_layers
