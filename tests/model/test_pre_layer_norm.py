"""A pre-LN model against pre-LN BERT written a second time, plainly."""

import pytest
import torch

from stacking_ds.model.bert_config import BertConfig
from tests.bert_samples import BATCHES, TINY, Batch, telling_model


def _plain_pre_layer_norm(
    tensors: dict[str, torch.Tensor], config: BertConfig, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-LN BERT once more: plain functions, explicit softmax, one head at a time."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        unit = centred / (variance + config.layer_norm_eps).sqrt()
        return unit * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    embeddings = "bert.embeddings"
    hidden = tensors[f"{embeddings}.word_embeddings.weight"][batch.ids_BS]
    hidden = hidden + tensors[f"{embeddings}.token_type_embeddings.weight"][batch.types_BS]
    length = batch.ids_BS.shape[1]
    hidden = hidden + tensors[f"{embeddings}.position_embeddings.weight"][:length]
    hidden = norm(hidden, f"{embeddings}.LayerNorm")
    width = config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{index}"
        entering = norm(hidden, f"{layer}.attention.LayerNorm")
        query, key, value = (
            dense(entering, f"{layer}.attention.self.{part}") for part in ("query", "key", "value")
        )
        heads = []
        for head in range(config.num_attention_heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / width**0.5
            scores = scores.masked_fill(~batch.mask_BS[:, None, :], -1e9)
            heads.append(scores.softmax(-1) @ value[..., part])
        hidden = hidden + dense(torch.cat(heads, -1), f"{layer}.attention.output.dense")
        entering = norm(hidden, f"{layer}.LayerNorm")
        inner = gelu(dense(entering, f"{layer}.intermediate.dense"))
        hidden = hidden + dense(inner, f"{layer}.output.dense")
    hidden = norm(hidden, "bert.encoder.LayerNorm")
    pooled = torch.tanh(dense(hidden[:, 0], "bert.pooler.dense"))
    transformed = gelu(dense(hidden, "cls.predictions.transform.dense"))
    transformed = norm(transformed, "cls.predictions.transform.LayerNorm")
    decoder = tensors["bert.embeddings.word_embeddings.weight"]
    logits = transformed @ decoder.T + tensors["cls.predictions.bias"]
    return logits, dense(pooled, "cls.seq_relationship")


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_pre_layer_norm_equals_a_plain_reference(lengths: tuple[int, ...]) -> None:
    config = TINY.changed(layer_norm_position="pre", num_hidden_layers=3)
    model, batch = telling_model(config), Batch(config, lengths)
    tensors = dict(model.named_parameters())
    unused = set(tensors)

    class Recording(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            unused.discard(name)
            return tensors[name]

    expected_BSV, expected_B2 = _plain_pre_layer_norm(Recording(), config, batch)
    logits_TV, nsp_B2 = model(*batch.inputs())
    assert not unused
    torch.testing.assert_close(logits_TV, expected_BSV[batch.mask_BS], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nsp_B2, expected_B2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        model(*batch.inputs())[1], telling_model(TINY)(*batch.inputs())[1], atol=1e-2
    )
