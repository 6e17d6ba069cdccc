"""What must hold of the model's kernels on a GPU, as plain functions of a `World`.

`test_gpu.py` calls them.
"""

import itertools
from typing import Any

import pytest
import torch

from stacking_ds.data.batches import Batch
from stacking_ds.distributed.world import World
from stacking_ds.growth.operators import layer_map, source_name
from stacking_ds.kernels.attention.choice import choose_attention
from stacking_ds.kernels.attention.sequences import Sequences
from stacking_ds.kernels.registry import DTYPES, Compute, choose_operations
from stacking_ds.model.bert import BertForPreTraining, pretraining_loss
from tests.bert_samples import telling_model
from tests.gpu_checks import RELATIVE_ERROR, WIDE, relative_error

__all__ = ["check_activation_checkpointing", "check_kernels"]

_PACKED = ((50, 78), (128,), (30, 40, 20), (1, 2, 100))


def _packed_batch(device: torch.device) -> Batch:
    """Rows of 128 with these examples."""
    draw = torch.Generator().manual_seed(11)
    lengths = [length for row in _PACKED for length in row]
    tokens = sum(lengths)
    masked_M = (torch.rand(tokens, generator=draw) < 0.2).nonzero().flatten()
    starts_E1 = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Batch(
        Sequences(starts_E1, 128, 128 * len(_PACKED)),
        torch.randint(1, WIDE.vocab_size, (tokens,), generator=draw),
        torch.randint(0, 2, (tokens,), generator=draw),
        torch.cat([torch.arange(length) for length in lengths]),
        masked_M,
        torch.randint(1, WIDE.vocab_size, masked_M.shape, generator=draw),
        torch.arange(len(lengths)) % 2,
    ).to(device)


def _compute(world: World, operations: str, dtype: torch.dtype, **options: Any) -> Compute:
    """The named form on a GPU, what the CPU has on the CPU."""
    on_gpu = world.device.type == "cuda"
    attention: Any = "loops"
    if on_gpu:
        attention = "padded" if dtype == torch.float32 else "flash"
    name: Any = operations if on_gpu else "torch"
    return Compute(
        choose_operations(name, world.device),
        choose_attention(attention, world.device, dtype),
        **options,
    )


def _loss_and_gradients(
    model: BertForPreTraining, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """By parameter's name; "loss" is the loss, the mean over the batch's targets."""
    model.to(device, dtype)
    batch = _packed_batch(device)
    labels_M, pairs_E = batch.mlm_labels_M, batch.next_sentence_label_E
    mlm_logits, nsp_logits = model(*batch.model_inputs)
    sums = pretraining_loss(mlm_logits, labels_M, nsp_logits, pairs_E, model.compute.operations)
    loss = sums.mlm_sum / len(labels_M) + sums.nsp_sum / len(pairs_E)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def check_kernels(world: World, precision: str) -> None:
    """On packed rows, before and after a growth, the model on the fused kernels has the CPU's loss
    and gradients, as nearly as it has on plain torch in the same precision."""
    small, dtype = telling_model(WIDE), DTYPES[precision]
    weights = {name: p.detach().clone() for name, p in small.named_parameters()}
    for depth in (2, 4):
        layers = (0, 1) if depth == 2 else layer_map("stack", 2, depth)
        found = {}
        for form, device in (("cpu", "cpu"), ("torch", ""), ("triton", "")):
            on, kind = torch.device(device or world.device), torch.float32 if device else dtype
            compute = Compute() if device else _compute(world, form, kind)
            config = WIDE.changed(num_hidden_layers=depth)
            model = BertForPreTraining(config, seed=0, compute=compute)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[source_name(name, layers)])
            found[form] = _loss_and_gradients(model, on, kind)
        for name, expected in found["cpu"].items():
            if name.endswith("key.bias"):
                continue  # the true gradient is zero
            plain, fused = (
                relative_error(found[form][name], expected) for form in ("torch", "triton")
            )
            # of a sum that nearly cancels out both forms have noise alone
            assert fused < max(2 * plain, RELATIVE_ERROR[precision]), (depth, name, plain, fused)
        assert float(found["triton"]["loss"]) == pytest.approx(
            float(found["cpu"]["loss"]), rel=RELATIVE_ERROR[precision]
        )


def check_activation_checkpointing(world: World, precision: str) -> None:
    """With dropout, what is computed once more for the backward pass is drawn once more."""
    dtype = DTYPES[precision]
    config = WIDE.changed(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    found = {}
    for kept in ("none", "selective", "full"):
        compute = _compute(world, "triton", dtype, activation_checkpointing=kept)
        model = BertForPreTraining(config, seed=0, compute=compute)
        torch.manual_seed(5)
        found[kept] = _loss_and_gradients(model, world.device, dtype)
    torch.manual_seed(6)
    model = BertForPreTraining(config, seed=0, compute=_compute(world, "triton", dtype))
    other = _loss_and_gradients(model, world.device, dtype)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert relative_error(other[name], found["none"][name]) > 0.1, "there is no dropout"
    for kept in ("selective", "full"):
        for name, expected in found["none"].items():
            if not name.endswith("key.bias"):
                error = relative_error(found[kept][name], expected)
                assert error < RELATIVE_ERROR[precision], (kept, name, error)
