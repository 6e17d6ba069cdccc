"""The model is Hugging Face's BERT: same weights, same logits, losses and gradients."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch.nn import functional

from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention.padded import attend_padded
from stacking_ds.kernels.registry import Compute
from stacking_ds.model.bert import BertForPreTraining, from_rows, pretraining_loss
from stacking_ds.model.bert_config import BertConfig
from tests.bert_samples import BATCHES, TINY, Batch, telling_model
from tests.hugging_face_names import (
    TIED_AT_HUGGING_FACE,
    from_hugging_face,
    to_hugging_face,
)

CONFIGS = {
    "tiny": TINY,
    "one_layer_one_head": TINY.changed(num_hidden_layers=1, num_attention_heads=1),
    "deep_many_heads": TINY.changed(num_hidden_layers=5, num_attention_heads=12),
    "odd_sizes": TINY.changed(vocab_size=101, hidden_size=21, num_attention_heads=3),
    "three_token_types": TINY.changed(type_vocab_size=3, layer_norm_eps=1e-5),
}


def _hugging_face(model: BertForPreTraining) -> transformers.BertForPreTraining:
    config = model.config
    twin = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            layer_norm_eps=config.layer_norm_eps,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",  # another attention than ours, scaled and masked by hand
        )
    )
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    twin.load_state_dict(to_hugging_face(tensors), strict=True)
    return twin


def _run_theirs(twin: transformers.BertForPreTraining, batch: Batch):
    return twin(
        input_ids=batch.ids_BS,
        token_type_ids=batch.types_BS,
        attention_mask=batch.mask_BS.long(),
        labels=batch.labels_BS,
        next_sentence_label=batch.nsp_labels_B,
    )


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_losses_are_hugging_faces(config: BertConfig, lengths: tuple[int, ...]) -> None:
    model, batch = telling_model(config), Batch(config, lengths)
    theirs = _run_theirs(_hugging_face(model), batch)
    everywhere_TV, _ = model(*batch.inputs())
    masked_MV, nsp_B2 = model(*batch.inputs(), batch.positions_M)

    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(everywhere_TV, theirs.prediction_logits[batch.mask_BS], **close)
    torch.testing.assert_close(nsp_B2, theirs.seq_relationship_logits, **close)
    loss = pretraining_loss(masked_MV, batch.labels_M, nsp_B2, batch.nsp_labels_B)
    mean = loss.mlm_sum / len(batch.labels_M) + loss.nsp_sum / len(batch.nsp_labels_B)
    torch.testing.assert_close(mean, theirs.loss, **close)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_hugging_faces(config: BertConfig, lengths: tuple[int, ...]) -> None:
    # in fp64, where only a wrong formula is left to differ; fp32 rounds small gradients at 3e-5
    model, batch = telling_model(config), Batch(config, lengths)
    twin = _hugging_face(model).double()
    model = model.double()
    masked_MV, nsp_B2 = model(*batch.inputs(), batch.positions_M)
    ours = functional.cross_entropy(masked_MV, batch.labels_M)
    (ours + functional.cross_entropy(nsp_B2, batch.nsp_labels_B)).backward()
    _run_theirs(twin, batch).loss.backward()
    their_gradients = {name: value.grad for name, value in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        if "key.bias" in name:  # softmax does not see it
            assert parameter.grad.norm() < 1e-12
            assert their_gradients[name].norm() < 1e-12
            continue
        error = (parameter.grad - their_gradients[name]).norm()
        assert error < 1e-10 * their_gradients[name].norm(), name


def test_names_and_shapes_are_hugging_faces_up_to_the_table() -> None:
    ours = BertForPreTraining(TINY, seed=0)
    theirs = _hugging_face(ours).state_dict()
    names = {name: value.shape for name, value in ours.named_parameters()}
    assert {name: value.shape for name, value in theirs.items()} == {
        **names,
        **{second: names[first] for second, first in TIED_AT_HUGGING_FACE.items()},
    }


def test_their_weights_in_our_model() -> None:
    torch.manual_seed(3)
    twin = _hugging_face(BertForPreTraining(TINY, seed=0))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    ours = BertForPreTraining(TINY, seed=0)
    tensors = from_hugging_face(twin.state_dict())
    assert list(tensors) == [name for name, _ in ours.named_parameters()]
    missing = ours.load_state_dict(tensors, strict=False)
    assert set(missing.missing_keys) == set(TIED_AT_HUGGING_FACE)
    assert not missing.unexpected_keys
    batch = Batch(TINY, BATCHES["padded"])
    theirs = twin(batch.ids_BS, token_type_ids=batch.types_BS, attention_mask=batch.mask_BS.long())
    logits_TV, nsp_B2 = ours(*batch.inputs())
    torch.testing.assert_close(
        logits_TV, theirs.prediction_logits[batch.mask_BS], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(nsp_B2, theirs.seq_relationship_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["post", "pre"])
def test_the_gathered_head_is_the_full_head_at_those_positions(position: str) -> None:
    model = telling_model(TINY.changed(layer_norm_position=position))
    batch = Batch(TINY, BATCHES["padded"])
    everywhere_TV, _ = model(*batch.inputs())
    masked_MV, _ = model(*batch.inputs(), batch.positions_M)
    torch.testing.assert_close(masked_MV, everywhere_TV[batch.positions_M])


def test_a_batch_without_masked_positions_has_zero_loss_and_gradients() -> None:
    model, batch = telling_model(TINY), Batch(TINY, (16, 5))
    nobody = torch.zeros(0, dtype=torch.long)
    logits_MV, nsp_B2 = model(*batch.inputs(), nobody)
    assert logits_MV.shape == (0, TINY.vocab_size)
    loss = pretraining_loss(logits_MV, nobody, nsp_B2, torch.full((2,), -100))
    assert loss.mlm_sum.item() == 0.0
    assert loss.nsp_sum.item() == 0.0
    (loss.mlm_sum + loss.nsp_sum).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def _attention_that_divides_by_zero(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor, **_: float
) -> torch.Tensor:
    """As some kernels are: a row that may attend to nothing becomes NaN."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = scores.exp() * attn_mask
    return weights / weights.sum(-1, keepdim=True) @ value


@pytest.mark.parametrize("kernel", [None, _attention_that_divides_by_zero])
def test_a_row_of_padding_leaves_the_other_rows_and_all_gradients_alone(
    kernel: Callable | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Compute()
    if kernel:
        compute = Compute(attend=attend_padded)
        monkeypatch.setattr(functional, "scaled_dot_product_attention", kernel)
    batch = Batch(TINY, (16, 5, 16))
    batch.mask_BS[2] = False
    both, alone = (telling_model(TINY, compute=compute) for _ in range(2))
    kept = batch.positions_M < 16 + 5
    positions_M, labels_M = batch.positions_M[kept], batch.labels_M[kept]
    nsp_labels_B = torch.tensor([0, 1, -100])
    logits_MV, nsp_B2 = both(*batch.inputs(), positions_M)
    rows = from_rows(batch.ids_BS[:2], batch.types_BS[:2], batch.mask_BS[:2])
    expected_MV, expected_B2 = alone(*rows, positions_M)
    torch.testing.assert_close(logits_MV, expected_MV)
    torch.testing.assert_close(nsp_B2[:2], expected_B2)
    assert nsp_B2.isfinite().all()
    sum(pretraining_loss(logits_MV, labels_M, nsp_B2, nsp_labels_B)).backward()
    sum(pretraining_loss(expected_MV, labels_M, expected_B2, nsp_labels_B[:2])).backward()
    for (name, parameter), expected in zip(
        both.named_parameters(), alone.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


def test_padding_does_not_leak_into_real_tokens() -> None:
    model, batch = telling_model(TINY), Batch(TINY, (16, 5))
    before, _ = model(*batch.inputs())
    batch.ids_BS[1, 5:] = 17
    after, _ = model(*batch.inputs())
    assert torch.equal(before, after)
    batch.mask_BS[1, 5] = True  # and an attended token does show
    changed, _ = model(*batch.inputs())
    assert not torch.allclose(before[16:], changed[16:21], atol=1e-3)


def test_rows_padded_at_their_beginning() -> None:
    model, batch = telling_model(TINY), Batch(TINY, (16, 9))
    batch.mask_BS[1] = torch.arange(16) >= 7
    theirs = _hugging_face(model)(
        batch.ids_BS, token_type_ids=batch.types_BS, attention_mask=batch.mask_BS.long()
    )
    logits_TV, _ = model(*batch.inputs())
    torch.testing.assert_close(
        logits_TV, theirs.prediction_logits[batch.mask_BS], rtol=1e-5, atol=1e-5
    )


def test_the_tied_decoder_is_one_parameter() -> None:
    for model in (BertForPreTraining(TINY, seed=0), BertForPreTraining(TINY, seed=None)):
        head, embeddings = model.cls.predictions, model.bert.embeddings
        assert head.decoder.weight is embeddings.word_embeddings.weight
        assert head.bias is head.decoder.bias
        assert not {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} & set(
            dict(model.named_parameters())
        )
    cast = BertForPreTraining(TINY, seed=0).bfloat16()
    assert cast.cls.predictions.decoder.weight is cast.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("position", ["post", "pre"])
def test_bf16_runs_and_is_close(position: str) -> None:
    config = TINY.changed(layer_norm_position=position, initializer_range=0.1)
    model, batch = telling_model(config), Batch(config, BATCHES["padded"])
    exact_MV, _ = model(*batch.inputs(), batch.positions_M)
    model = model.bfloat16()
    rough_MV, nsp_B2 = model(*batch.inputs(), batch.positions_M)
    assert rough_MV.dtype == torch.bfloat16
    assert (rough_MV - exact_MV).abs().max() < 0.05 * exact_MV.abs().max()
    loss = pretraining_loss(rough_MV, batch.labels_M, nsp_B2, batch.nsp_labels_B)
    assert loss.mlm_sum.dtype == loss.nsp_sum.dtype == torch.float32
    (loss.mlm_sum + loss.nsp_sum).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_training_only(where: str) -> None:
    model, batch = telling_model(TINY.changed(**{where: 0.3})), Batch(TINY, BATCHES["full"])
    torch.manual_seed(0)
    first, _ = model(*batch.inputs())
    second, _ = model(*batch.inputs())
    assert not torch.allclose(first, second, atol=1e-3)
    torch.manual_seed(0)
    assert torch.equal(model(*batch.inputs())[0], first)
    model.eval()
    quiet, _ = model(*batch.inputs())
    assert torch.equal(quiet, model(*batch.inputs())[0])
    assert torch.equal(quiet, telling_model(TINY)(*batch.inputs())[0])


def test_rows_longer_than_the_position_embeddings() -> None:
    batch = Batch(TINY, (17,))
    with pytest.raises(ConfigError, match="17 tokens do not fit max_position_embeddings=16"):
        BertForPreTraining(TINY, seed=0)(*batch.inputs())
