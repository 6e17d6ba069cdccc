"""What a growth will move and how long that takes, at any number of ranks, without starting one."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from stacking_ds.config.sections import Precision
from stacking_ds.engine.zero.flat_buffers import predicted_layout
from stacking_ds.errors import ConfigError
from stacking_ds.growth.operators import layer_map, source_name
from stacking_ds.model.bert import BertForPreTraining
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.optim.groups import parameter_groups
from stacking_ds.sharding.fragments import MOMENTS, Integers, Layout, traffic

MODELS: Mapping[str, Mapping[str, Any]] = {
    # Devlin et al. 2019 §3
    "bert-base": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "bert-large": {
        "vocab_size": 30522,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}

_MASTER_BYTES = 4
_STATE_BYTES = _MASTER_BYTES * (1 + len(MOMENTS))
_WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_GIB = 2**30

Groups = list[list[tuple[str, int]]]
"""Name and number of elements of every parameter, by parameter group."""


@dataclass(frozen=True)
class Growth:
    """What is to be priced."""

    model: str
    layers: int
    new_layers: int
    ranks: int
    new_ranks: int
    zero_stage: int
    new_zero_stage: int
    operator: str = "stack"
    moments: Literal["carry", "reset"] = "carry"
    precision: Precision = "bf16"

    def groups(self, depth: int) -> Groups:
        """Of the model at a depth, in the optimizer's order."""
        config = BertConfig(num_hidden_layers=depth, **MODELS[self.model])
        model = BertForPreTraining(config, seed=None)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return [
            [(names[id(parameter)], parameter.numel()) for parameter in group["params"]]
            for group in parameter_groups(model.named_parameters(), weight_decay=0.01)
        ]


class PerRank(NamedTuple):
    """Bytes of one kind: the rank with least, the mean, the rank with most."""

    least: int
    mean: float
    most: int

    @classmethod
    def of(cls, by_rank: Integers) -> "PerRank":
        return cls(int(by_rank.min()), float(by_rank.mean()), int(by_rank.max()))


@dataclass(frozen=True)
class Price:
    """Bytes of masters and moments by rank, and the time that moving them takes."""

    parameters: tuple[int, int]
    captured: PerRank
    """Host memory of the captured state, on the old ranks."""
    kept: PerRank
    """What a new rank needs and has."""
    sent: PerRank
    received: PerRank
    refreshed: int
    """Low-precision weights that each rank sends after the masters have arrived."""
    host_seconds: float
    link_seconds: float
    cpu_seconds: float
    """What the pricing itself took, on one core."""


def price(growth: Growth, host_gib_per_second: float, link_gib_per_second: float) -> Price:
    """Plan every element's way, and add up for the rank that has most to do.

    Host memory is written when the state is captured and when it is installed, once more for what
    comes from other ranks; a link carries both ways at once. Releasing and building engines is
    not in it.

    Raises:
        ConfigError: less than one rank, or a bandwidth that is not above 0.
        StageError: a depth that the operator does not reach.
    """
    _require_possible(growth, host_gib_per_second, link_gib_per_second)
    started = time.process_time()
    layers = layer_map(growth.operator, growth.layers, growth.new_layers)
    old_groups, new_groups = growth.groups(growth.layers), growth.groups(growth.new_layers)
    old = predicted_layout(growth.zero_stage, old_groups, growth.ranks)
    new = predicted_layout(growth.new_zero_stage, new_groups, growth.new_ranks)
    moved = traffic(old, new, partial(source_name, layers=layers))
    element_bytes = _STATE_BYTES if growth.moments == "carry" else _MASTER_BYTES
    kept, sent, received = (
        element_bytes * elements for elements in (moved.kept, moved.sent, moved.received)
    )
    captured = np.zeros_like(kept)
    captured[: growth.ranks] = _STATE_BYTES * _held(old)
    refreshed = _refreshed_bytes(growth, new_groups)
    host, link = captured + kept + 2 * received, np.maximum(sent, received) + refreshed
    return Price(
        parameters=(_elements(old_groups), _elements(new_groups)),
        captured=PerRank.of(captured[: growth.ranks]),
        kept=PerRank.of(kept[: growth.new_ranks]),
        sent=PerRank.of(sent[: growth.ranks]),
        received=PerRank.of(received[: growth.new_ranks]),
        refreshed=refreshed,
        host_seconds=float(host.max()) / _GIB / host_gib_per_second,
        link_seconds=float(link.max()) / _GIB / link_gib_per_second,
        cpu_seconds=time.process_time() - started,
    )


def _require_possible(growth: Growth, host: float, link: float) -> None:
    for name, value in (("--ranks", growth.ranks), ("--new-ranks", growth.new_ranks)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    for name, speed in (("--host-gib-per-second", host), ("--link-gib-per-second", link)):
        if not speed > 0:
            raise ConfigError(f"{name}={speed} must be above 0")


def _elements(groups: Groups) -> int:
    return sum(numel for group in groups for _, numel in group)


def _held(layout: Layout) -> Integers:
    """Elements of each rank."""
    total = np.zeros(layout.ranks, np.int64)
    for name in layout.cuts:
        starts, stops = layout.held(name)
        total += stops - starts
    return total


def _refreshed_bytes(growth: Growth, groups: Groups) -> int:
    """What a rank sends of the weights of the forward pass once its masters are there.

    ZeRO 1 and 2 keep them whole on every rank: a boundary between these carries them, and coming
    from elsewhere they have to be gathered.
    """
    stays_whole = growth.zero_stage in (1, 2) and growth.ranks == growth.new_ranks
    if growth.new_zero_stage in (0, 3) or stays_whole:
        return 0
    weights = _WEIGHT_BYTES[growth.precision] * _elements(groups)
    return weights * (growth.new_ranks - 1) // growth.new_ranks


def price_table(growth: Growth, found: Price, speeds: str) -> str:
    """The price for people; `speeds` says where the bandwidths come from."""
    old, new = (f"{count / 1e6:.1f} M" for count in found.parameters)
    elsewhere = (growth.zero_stage, growth.ranks) != (growth.new_zero_stage, growth.new_ranks)
    after = f" -> ZeRO {growth.new_zero_stage} on {growth.new_ranks:,}" if elsewhere else ""
    rows = [
        ("captured on the host", found.captured),
        ("needed and already there", found.kept),
        ("sent to other ranks", found.sent),
        ("received from other ranks", found.received),
    ]
    lines = [
        f"{growth.model}, {growth.layers} -> {growth.new_layers} layers ({old} -> {new} "
        f"parameters) by {growth.operator}, moments: {growth.moments}, {growth.precision}",
        f"ZeRO {growth.zero_stage} on {growth.ranks:,}{after} ranks",
        "",
        f"{'bytes of a rank':<26}{'least':>16}{'mean':>16}{'most':>16}",
        *(f"{name:<26}{row.least:>16,}{round(row.mean):>16,}{row.most:>16,}" for name, row in rows),
        f"{'sent to refresh weights':<26}" + f"{found.refreshed:>16,}" * 3,
        "",
        f"predicted: {1000 * (found.host_seconds + found.link_seconds):.3g} ms for the busiest "
        f"rank: {1000 * found.host_seconds:.3g} ms of host copies, "
        f"{1000 * found.link_seconds:.3g} ms on its link,",
        f"at {speeds}; latencies and the building of engines come on top",
        f"priced in {found.cpu_seconds:.2f} s of one core",
    ]
    return "\n".join(lines)
