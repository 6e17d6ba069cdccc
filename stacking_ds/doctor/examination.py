"""Examines a cluster: all checks in turn, each told as soon as it is made, so that what hangs later
hides nothing; and before every run those that compare nodes."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stacking_ds.distributed.world import World
from stacking_ds.doctor import checks
from stacking_ds.doctor.checks import Finding
from stacking_ds.doctor.facts import (
    Examinee,
    NodeFacts,
    RankFacts,
    node_facts,
    open_examinee,
    rank_facts,
)
from stacking_ds.doctor.shared_folder import probe
from stacking_ds.doctor.speed import Matmul, clock_offset, measure_all_reduce, measure_matmul
from stacking_ds.errors import ConfigError
from stacking_ds.train.plan import TrainingPlan

_NOT_TOLD = {"code_files"}  # long, and its sha256 says the same


@dataclass
class Examination:
    """Findings so far; on rank 0."""

    nodes: dict[str, NodeFacts]
    ranks: list[RankFacts]
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(finding.verdict == "FAILED" for finding in self.findings)

    def to_record(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "failed": self.failed,
            "findings": [asdict(finding) for finding in self.findings],
            "measured": self.measured,
            "nodes": {
                name: node.model_dump(exclude=_NOT_TOLD) for name, node in self.nodes.items()
            },
            "ranks": [facts.model_dump() for facts in self.ranks],
        }


def examine(
    world: World,
    recipe: str | None,
    overrides: Sequence[str],
    run_dir: Path | None,
    *,
    greet: Callable[[Examination], None],
    say: Callable[[Finding], None],
) -> Examination:
    """Examine the cluster, and the recipe and run directory if they are given. A collective.

    Args:
        greet: called on rank 0 when all nodes have been heard, before the first finding.
        say: called on rank 0 with each finding.

    Returns:
        What was found, complete on rank 0 alone.
    """
    examinee, node = Examinee(run_dir), None
    if world.speaks_for_node:
        examinee = open_examinee(recipe, overrides, run_dir, world.size)
        node = node_facts(world, examinee).model_dump()
    sent = world.gather_on_first((node, rank_facts(world).model_dump()))
    found = Examination(
        nodes=checks.by_name(NodeFacts.read(each for each, _ in sent)),
        ranks=RankFacts.read(each for _, each in sent),
    )
    if world.is_first:
        greet(found)
    precision = examinee.config.engine.precision if examinee.config else "bf16"
    for finding in _checks(world, examinee, world.broadcast(precision), found):
        found.findings.append(finding)
        say(finding)
    return found


def _checks(
    world: World, examinee: Examinee, precision: str, found: Examination
) -> Iterator[Finding]:
    """The findings, on rank 0; every rank has to go through all of it."""
    names, first = {node.rank: name for name, node in found.nodes.items()}, world.is_first
    backend = str(dist.get_backend())
    if first:
        yield from checks.alike(found.nodes)
    probing = probe(world, examinee.run_dir)
    if probing is not None:
        yield checks.run_directory(probing, names)
        if not probing.problem:
            yield checks.locks(probing, names)
    if first:
        yield from checks.sufficient_on_each_node(found.nodes, found.ranks)
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        yield checks.network(found.nodes, backend, place)
    offsets = world.gather_on_first(clock_offset(world))
    if first:
        yield checks.clocks({names[rank]: offsets[rank] for rank in names})
    products = world.gather_on_first(measure_matmul(world, precision).model_dump())
    if first:
        found.measured["matrix_products"] = products
        yield checks.matrix_products(Matmul.read(products))
    if world.any(first and found.findings[-1].verdict == "FAILED"):
        return  # a rank that cannot compute would keep the others waiting
    speed = measure_all_reduce(world)
    if first:
        if speed is not None:
            figures = {"bus_bytes_per_second": speed.bus_bytes_per_second}
            found.measured["all_reduce"] = asdict(speed) | figures
        yield checks.all_reduce(speed, backend)


def require_alike(world: World, plan: TrainingPlan, run_dir: Path) -> None:
    """Make sure that all nodes have the same versions, code, recipe and data, and room at the run
    directory for a checkpoint: the part of the doctor that `train` runs by itself. A collective.

    Raises:
        ConfigError: on every rank, naming the nodes that differ, in what, and what to do.
    """
    mine = None
    if world.speaks_for_node:
        examinee = Examinee(run_dir, plan.config, plan.ds_json, plan)
        mine = node_facts(world, examinee, only_alike=True).model_dump(exclude=_NOT_TOLD)
    sent = world.gather_on_first(mine)
    world.on_first(lambda: _require(sent))


def _require(sent: Sequence[Mapping[str, Any] | None]) -> None:
    findings = checks.alike(checks.by_name(NodeFacts.read(sent)))
    reasons = [
        f"{each.check}: {each.text} ({each.remedy})"
        for each in findings
        if each.verdict == "FAILED"
    ]
    if reasons:
        raise ConfigError(
            f"the nodes are not fit for this run: {'; '.join(reasons)}. `stacking-ds doctor`, "
            f"started in the same way, tells more"
        )
