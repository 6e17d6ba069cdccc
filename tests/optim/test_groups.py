"""Parameter groups: one pair per layer, by name, each parameter once."""

import torch
from torch import nn

from stacking_ds.optim.groups import parameter_groups


def _bert(num_hidden_layers: int) -> list[tuple[str, nn.Parameter]]:
    names = ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.weight"]
    for index in range(num_hidden_layers):
        layer = f"bert.encoder.layer.{index}"
        names += [
            f"{layer}.attention.self.query.weight",
            f"{layer}.attention.self.query.bias",
            f"{layer}.output.LayerNorm.weight",
            f"{layer}.output.LayerNorm.bias",
        ]
    names += ["bert.pooler.dense.weight", "cls.predictions.bias"]
    return [(name, nn.Parameter(torch.zeros(1))) for name in names]


def _by_name(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[tuple]:
    names = {id(parameter): name for name, parameter in named}
    return [
        (group["name"], group["weight_decay"], [names[id(p)] for p in group["params"]])
        for group in parameter_groups(named, weight_decay)
    ]


def test_one_pair_per_layer_and_one_for_the_rest() -> None:
    query, norm = "attention.self.query", "output.LayerNorm"
    one, two = "bert.encoder.layer.0", "bert.encoder.layer.1"
    # fmt: off
    assert _by_name(_bert(2), 0.01) == [
        ("outside/decay",    0.01, ["bert.embeddings.word_embeddings.weight",
                                    "bert.pooler.dense.weight"]),
        ("outside/no_decay", 0.0,  ["bert.embeddings.LayerNorm.weight", "cls.predictions.bias"]),
        ("layer.0/decay",    0.01, [f"{one}.{query}.weight"]),
        ("layer.0/no_decay", 0.0,  [f"{one}.{query}.bias", f"{one}.{norm}.weight",
                                    f"{one}.{norm}.bias"]),
        ("layer.1/decay",    0.01, [f"{two}.{query}.weight"]),
        ("layer.1/no_decay", 0.0,  [f"{two}.{query}.bias", f"{two}.{norm}.weight",
                                    f"{two}.{norm}.bias"]),
    ]
    # fmt: on


def test_the_order_does_not_depend_on_how_the_layers_come() -> None:
    named = _bert(12)
    names = [name for name, *_ in _by_name(named, 0.1)]
    assert names == [name for name, *_ in _by_name(named[::-1], 0.1)]
    assert names[-2:] == ["layer.11/decay", "layer.11/no_decay"]  # by number, not by text


def test_stacking_leaves_the_shallow_groups_as_they_were() -> None:
    shallow, deep = _by_name(_bert(2), 0.01), _by_name(_bert(4), 0.01)
    assert deep[: len(shallow)] == shallow
    for (_, _, below), (_, _, above) in zip(deep[2:6], deep[6:], strict=True):
        rise = {"layer.0": "layer.2", "layer.1": "layer.3"}
        assert above == [name.replace(name[13:20], rise[name[13:20]]) for name in below]


def test_a_tied_parameter_appears_once_under_its_first_name() -> None:
    shared = nn.Parameter(torch.zeros(2))
    groups = parameter_groups(
        [("bert.embeddings.word_embeddings.weight", shared), ("cls.decoder.bias", shared)], 0.01
    )
    assert [(group["name"], len(group["params"])) for group in groups] == [("outside/decay", 1)]


def test_every_parameter_of_a_module_is_in_exactly_one_group() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList([layer])})})
    groups = parameter_groups(model.named_parameters(), 0.01)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
