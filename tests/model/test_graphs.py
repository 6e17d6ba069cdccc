"""Layers as CUDA graphs compute what the layers do, step after step, from the same memory.

Where there is no GPU, what captures is replaced by something with a graph's manners: its inputs,
outputs and gradients have fixed places, which each replay writes over.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stacking_ds.config.sections import EngineSection
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.attention.sequences import Sequences
from stacking_ds.kernels.registry import Compute, choose_compute
from stacking_ds.model import graphs
from stacking_ds.model.bert import BertForPreTraining, pretraining_loss
from stacking_ds.model.graphs import GraphedLayers, fill_up
from tests.bert_samples import TINY, Batch, telling_model

LENGTHS = [(16, 5, 9), (16, 16, 16), (1, 16, 2), (7, 8, 16)]


def _capture(functions: tuple[Any, ...], samples: tuple[Any, ...]) -> tuple[Any, ...]:
    torch.rand(3)  # warming up draws numbers
    return tuple(map(_replaying, functions, samples))


def _replaying(function: Callable[..., torch.Tensor], sample: tuple[torch.Tensor, ...]) -> Any:
    with torch.enable_grad():
        # what follows in a step writes into what the graph holds: outputs and gradients of old
        outputs: list[torch.Tensor] = [function(*sample).detach()]
    gradients = [torch.zeros_like(t) for t in sample if t.requires_grad]

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                for place, given in zip(sample, inputs, strict=True):
                    assert place.shape == given.shape
                    if place.data_ptr() != given.data_ptr():
                        place.copy_(given)
            with torch.enable_grad():
                own = [t.detach().requires_grad_(t.requires_grad) for t in sample]
                ctx.own, ctx.out = own, function(*own)
            return outputs[0].copy_(ctx.out.detach()).detach()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            wanted = [t for t in ctx.own if t.requires_grad]
            found = torch.autograd.grad(ctx.out, wanted, grad)
            for place, value in zip(gradients, found, strict=True):
                place.copy_(value)
            placed = iter(gradients)
            return tuple(next(placed).detach() if t.requires_grad else None for t in ctx.own)

    return Replay.apply


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Models with graphs get the stand-in; a list that grows with each capture."""
    calls: list[int] = []

    def capture(functions: tuple[Any, ...], samples: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append(len(functions))
        return _capture(functions, samples)

    monkeypatch.setattr(
        "stacking_ds.model.layer.GraphedLayers", lambda layers: GraphedLayers(layers, capture)
    )
    return calls


def _step(model: BertForPreTraining, lengths: tuple[int, ...], seed: int) -> torch.Tensor:
    batch, device = Batch(model.config, lengths, seed), next(model.parameters()).device
    logits_MV, nsp_B2 = model(*batch.inputs(device), batch.positions_M.to(device))
    labels_M, nsp_labels_B = batch.labels_M.to(device), batch.nsp_labels_B.to(device)
    loss = sum(pretraining_loss(logits_MV, labels_M, nsp_B2, nsp_labels_B))
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("position", ["post", "pre"])
def test_gradients_add_up_over_micro_steps_of_any_lengths(
    captured: list[int], position: str
) -> None:
    config = TINY.changed(num_hidden_layers=3, layer_norm_position=position)
    plain, graphed = telling_model(config), telling_model(config, compute=Compute(cuda_graphs=True))
    for seed, lengths in enumerate(LENGTHS):
        expected, found = _step(plain, lengths, seed), _step(graphed, lengths, seed)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert captured == [3]
    for (name, p), q in zip(plain.named_parameters(), graphed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_micro_batch_that_does_not_fit_runs_without(
    captured: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "_SPARE_EXAMPLES", 0)  # no room for filling
    plain, graphed = telling_model(TINY), telling_model(TINY, compute=Compute(cuda_graphs=True))
    for seed, lengths in enumerate(((16, 5), (16, 3))):
        torch.testing.assert_close(_step(graphed, lengths, seed), _step(plain, lengths, seed))
    assert captured == [2]
    assert len(caplog.messages) == 1


def test_evaluation_runs_without(captured: list[int]) -> None:
    config = TINY.changed(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    plain, graphed = telling_model(config), telling_model(config, compute=Compute(cuda_graphs=True))
    inputs = Batch(TINY, (16, 5)).inputs()
    with torch.no_grad():
        graphed(*inputs)
    assert captured == []
    _step(graphed, (16, 5), 0)
    assert captured == [2]
    graphed.eval()
    plain.eval()
    assert torch.equal(graphed(*inputs)[0], plain(*inputs)[0])


def test_each_shape_of_rows_has_graphs_of_its_own(captured: list[int]) -> None:
    """4 rows of 8 slots, then 2 of 16: as many slots, other sequences."""
    plain, graphed = telling_model(TINY), telling_model(TINY, compute=Compute(cuda_graphs=True))
    for lengths in ((8, 5, 8, 2), (16, 9), (8, 1, 3, 8)):
        torch.testing.assert_close(_step(graphed, lengths, 0), _step(plain, lengths, 0))
    assert captured == [2, 2]


def test_there_is_room_for_more_examples_than_the_first_had(
    captured: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    graphs_of = GraphedLayers(telling_model(TINY).bert.encoder.layer, _capture)
    hidden_TH = torch.zeros(32, TINY.hidden_size)
    for ends, fits in (([16, 32], True), ([8, 16, 24, 32], True), (list(range(1, 33)), False)):
        starts_E1 = torch.tensor([0, *ends], dtype=torch.int32)
        assert (graphs_of(hidden_TH, Sequences(starts_E1, 16, 32)) is not None) == fits
    assert "a micro-batch of 32 examples has more than its CUDA graph" in caplog.text


def test_capturing_leaves_the_random_state_alone(captured: list[int]) -> None:
    model = telling_model(TINY, compute=Compute(cuda_graphs=True))
    before = torch.get_rng_state()
    _step(model, (16, 5), 0)
    assert captured
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("starts", "expected"),
    [([0, 5, 9], [0, 5, 9, 17, 24, 24]), ([0, 8, 16, 24], [0, 8, 16, 24, 24, 24])],
)
def test_filling_covers_all_slots(starts: list[int], expected: list[int]) -> None:
    filled = fill_up(torch.tensor(starts, dtype=torch.int32), examples=5, slots=24, longest=8)
    assert filled.tolist() == expected
    assert filled.dtype == torch.int32


def test_without_copies_gradients_would_be_written_over(
    captured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in has the manners that the copies are there for."""
    monkeypatch.setattr(graphs._FreshGradient, "apply", lambda weight: weight)
    plain, graphed = telling_model(TINY), telling_model(TINY, compute=Compute(cuda_graphs=True))
    for seed, lengths in enumerate(LENGTHS):
        _step(plain, lengths, seed)
        _step(graphed, lengths, seed)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.allclose(
        graphed.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=1e-3
    )


def test_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs=true, but the model is on cpu"):
        choose_compute(EngineSection(cuda_graphs=True), torch.device("cpu"), TINY)
    for other in ({"activation_checkpointing": "full"}, {"kernels": "compile"}):
        with pytest.raises(ValueError, match="cuda_graphs"):
            EngineSection(cuda_graphs=True, **other)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    config = TINY.changed(hidden_size=64, num_attention_heads=1, num_hidden_layers=3)
    section = EngineSection(precision="bf16", cuda_graphs=True)
    device = torch.device("cuda")
    graphed = telling_model(config, compute=choose_compute(section, device, config))
    plain = telling_model(
        config,
        compute=choose_compute(section.model_copy(update={"cuda_graphs": False}), device, config),
    )
    for model in (graphed, plain):
        model.to(device, torch.bfloat16)
    for seed, lengths in enumerate(LENGTHS):
        expected, found = _step(plain, lengths, seed), _step(graphed, lengths, seed)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    for p, q in zip(plain.parameters(), graphed.parameters(), strict=True):
        assert (q.grad - p.grad).norm() <= 0.05 * p.grad.norm()
