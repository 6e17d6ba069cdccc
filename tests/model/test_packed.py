"""Packed rows train the same model: per example the loss, and over all the gradient."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from stacking_ds.config.sections import DataSection
from stacking_ds.data.batches import Batch
from stacking_ds.data.loader import PretrainingData
from stacking_ds.data.shards import TokenShards
from stacking_ds.model.bert import BertForPreTraining, pretraining_loss
from stacking_ds.model.bert_config import BertConfig
from tests.bert_samples import telling_model
from tests.token_shards import make_shards

DOCUMENTS = [[3, 4, 5], [2, 2], [9, 3, 6, 4], [1], [5, 5, 5, 5], [12], [2, 6], [7, 1, 7]] * 3
LENGTH = 32


def _losses(model: BertForPreTraining, batch: Batch) -> dict[tuple[int, ...], torch.Tensor]:
    """For each example, known by its unmasked tokens: its MLM loss and its NSP loss."""
    mlm_logits_MV, nsp_logits_E2 = model(*batch.model_inputs)
    mlm_M = functional.cross_entropy(mlm_logits_MV, batch.mlm_labels_M, reduction="none")
    nsp_E = functional.cross_entropy(
        nsp_logits_E2, batch.next_sentence_label_E, reduction="none", ignore_index=-100
    )
    ids = batch.input_ids_T.index_put((batch.mlm_positions_M,), batch.mlm_labels_M)
    found = {}
    for example, (start, stop) in enumerate(pairwise(batch.sequences.starts_E1.tolist())):
        inside = (batch.mlm_positions_M >= start) & (batch.mlm_positions_M < stop)
        key = tuple(ids[start:stop].tolist())
        found[key] = torch.stack([mlm_M[inside].sum(), nsp_E[example]])
    return found


def _config(shards: TokenShards, layer_norm_position: str = "post") -> BertConfig:
    return BertConfig(
        vocab_size=shards.manifest.vocab_size,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        layer_norm_position=layer_norm_position,
    )


@pytest.mark.parametrize("layer_norm_position", ["post", "pre"])
@pytest.mark.parametrize("examples", ["pairs", "documents"])
def test_packed_examples_have_the_losses_and_gradients_of_rows_of_their_own(
    tmp_path: Path, examples: str, layer_norm_position: str
) -> None:
    shards = make_shards(tmp_path, DOCUMENTS)
    config = _config(shards, layer_norm_position)
    options = DataSection(path="-", sequence_length=LENGTH, mlm_probability=0.3, examples=examples)
    losses, gradients, slots = [], [], []
    for packed in (False, True):
        data = PretrainingData(shards, "train", options.changed(packing=packed), seed=3)
        batch = (
            data.step(0, data.num_rows, micro_batch_size=data.num_rows).micro_batches[0].to("cpu")
        )
        model = telling_model(config)
        losses.append(_losses(model, batch))
        mlm_logits, nsp_logits = model(*batch.model_inputs)
        sums = pretraining_loss(
            mlm_logits, batch.mlm_labels_M, nsp_logits, batch.next_sentence_label_E
        )
        (sums.mlm_sum + sums.nsp_sum).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        slots.append(batch.sequences.slots)
    single, together = losses
    assert slots[1] < slots[0], "several examples share a row"
    assert single.keys() == together.keys()
    for key, expected in single.items():
        torch.testing.assert_close(together[key], expected, rtol=1e-5, atol=1e-5)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-4)


def test_the_tokens_of_another_example_in_the_row_change_nothing(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, DOCUMENTS)
    options = DataSection(path="-", sequence_length=LENGTH, mlm_probability=0.3, packing=True)
    data = PretrainingData(shards, "train", options, seed=3)
    batch = data.step(0, data.num_rows, micro_batch_size=data.num_rows).micro_batches[0].to("cpu")
    model = telling_model(_config(shards))
    starts_E1 = batch.sequences.starts_E1.tolist()
    second = torch.zeros(len(batch.input_ids_T), dtype=torch.bool)
    second[starts_E1[1] : starts_E1[2]] = True
    assert starts_E1[2] <= LENGTH, "two examples share the first row"
    other = replace(batch, input_ids_T=torch.where(second, 7, batch.input_ids_T))
    before, after = (model(*each.model_inputs[:4])[0] for each in (batch, other))
    assert not torch.allclose(before[second], after[second])
    torch.testing.assert_close(before[~second], after[~second], rtol=0, atol=0)
