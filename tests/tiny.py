"""A BERT small enough to train in every test, and batches for it."""

from collections.abc import Mapping
from typing import Any

import torch

from stacking_ds.config.sections import LambSection, OptimizerSection
from stacking_ds.engine.ds_json import load_ds_config, resolve_ds_config
from stacking_ds.model.bert import BertForPreTraining, from_rows, pretraining_loss
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.optim.optimizers import build_optimizer

__all__ = [
    "SAMPLES",
    "tiny_batch",
    "tiny_config",
    "tiny_inputs",
    "tiny_loss",
    "tiny_model",
    "tiny_optimizer",
    "tiny_settings",
    "train_tiny",
]

SAMPLES = 12  # rows of every batch: 1, 2, 3, 4, 6 or 12 ranks share them evenly
_SEQUENCE = 7
_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


def tiny_config(depth: int) -> BertConfig:
    # sizes that 2, 3 and 4 ranks do not divide, so that every kind of padding occurs
    return BertConfig(
        vocab_size=33,
        hidden_size=10,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=15,
        max_position_embeddings=_SEQUENCE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )


def tiny_model(depth: int, seed: int = 0) -> BertForPreTraining:
    return BertForPreTraining(tiny_config(depth), seed)


def tiny_optimizer(
    model: torch.nn.Module,
    learning_rate: float = 1e-2,
    name: Any = "adamw",
    # the true gradient of key biases is zero: a large eps keeps Adam from blowing up its noise
    eps: float = 1e-3,
    **lamb: Any,
) -> torch.optim.Optimizer:
    """`lamb`: the recipe's options of LAMB."""
    config = OptimizerSection(
        name=name,
        learning_rate=learning_rate,
        betas=(0.9, 0.99),
        eps=eps,
        weight_decay=0.1,
        max_grad_norm=0.0,
        lamb=LambSection(**lamb) if name == "lamb" else None,
    )
    return build_optimizer(config, model.named_parameters())


def tiny_settings(
    zero_stage: int | str, precision: Any, world_size: int, gas: int = 1, clipping: float = 0.0
) -> dict[str, Any]:
    return resolve_ds_config(
        load_ds_config(f"zero{zero_stage}"),
        micro_batch_size=1,
        gradient_accumulation_steps=gas,
        world_size=world_size,
        gradient_clipping=clipping,
        precision=precision,
    )


def tiny_batch(step: int) -> dict[str, torch.Tensor]:
    """Tokens of SAMPLES rows; each row has another number of masked positions."""
    draw = torch.Generator().manual_seed(1000 + step)
    input_ids = torch.randint(0, 33, (SAMPLES, _SEQUENCE), generator=draw)
    labels = torch.randint(0, 33, (SAMPLES, _SEQUENCE), generator=draw)
    for row in range(SAMPLES):
        labels[row, row % _SEQUENCE + 1 :] = -100
    lengths = torch.randint(3, _SEQUENCE + 1, (SAMPLES, 1), generator=draw)
    return {
        "input_ids": input_ids,
        "token_type_ids": torch.randint(0, 2, (SAMPLES, _SEQUENCE), generator=draw),
        "attention_mask": torch.arange(_SEQUENCE) < lengths,
        "labels": labels,
        "next_sentence_labels": torch.randint(0, 2, (SAMPLES,), generator=draw),
    }


def tiny_inputs(batch: Mapping[str, torch.Tensor], rows: slice = slice(None)) -> tuple[Any, ...]:
    """What the model takes of these rows."""
    return from_rows(*(batch[key][rows] for key in _INPUTS))


def tiny_loss(model: Any, batch: Mapping[str, torch.Tensor], rows: slice) -> torch.Tensor:
    """The rows' share of the global batch's loss: sums over the rows, divided by the counts of
    the whole batch, so that the shares of all rows add up to the loss."""
    mlm_logits, nsp_logits = model(*tiny_inputs(batch, rows))
    labels = batch["labels"][rows][batch["attention_mask"][rows]]
    sums = pretraining_loss(mlm_logits, labels, nsp_logits, batch["next_sentence_labels"][rows])
    masked = int((batch["labels"] != -100).sum())
    return sums.mlm_sum / masked + sums.nsp_sum / SAMPLES


def train_tiny(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, clipping: float = 0.0
) -> list[float]:
    """The reference: plain torch on whole batches; the gradient norm of every step."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        tiny_loss(model, tiny_batch(step), slice(None)).backward()
        limit = clipping if clipping > 0 else float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
    return norms
