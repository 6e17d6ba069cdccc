"""torch.compile computes what plain torch does, from one compilation for all layers and depths."""

import shutil
from typing import Any

import pytest
import torch

from stacking_ds.kernels.registry import Compute, choose_operations
from stacking_ds.model.bert import BertForPreTraining, pretraining_loss
from tests.bert_samples import TINY, Batch, telling_model

pytestmark = [
    pytest.mark.slow,  # a C++ compiler runs for a minute
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


def _gradients(model: BertForPreTraining, lengths: tuple[int, ...]) -> dict[str, Any]:
    batch = Batch(model.config, lengths)
    logits_MV, nsp_B2 = model(*batch.inputs(), batch.positions_M)
    sum(pretraining_loss(logits_MV, batch.labels_M, nsp_B2, batch.nsp_labels_B)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("position", ["post", "pre"])
def test_gradients_at_each_depth_and_length_from_one_compilation(position: str) -> None:
    compute = Compute(choose_operations("compile", torch.device("cpu")))
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for depth in (1, 2, 4):
        config = TINY.changed(num_hidden_layers=depth, layer_norm_position=position)
        for lengths in ((16, 5, 9), (16, 16), (7,)):
            found = _gradients(telling_model(config, compute=compute), lengths)
            for name, expected in _gradients(telling_model(config), lengths).items():
                if "key.bias" not in name:  # softmax does not see it
                    assert (found[name] - expected).norm() < 1e-4 * expected.norm(), name
            graphs.append(counters["unique_graphs"])
    assert graphs[0] > 0
    assert graphs == graphs[:1] * len(graphs)
