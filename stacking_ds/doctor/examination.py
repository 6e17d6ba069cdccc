"""Examines a cluster: all checks in turn, each told as soon as it is made, so that what hangs later
hides nothing; and before every run those that compare nodes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stacking_ds.distributed.world import World
from stacking_ds.doctor import checks, facts, trials
from stacking_ds.doctor.checks import Finding
from stacking_ds.errors import ConfigError
from stacking_ds.train.plan import TrainingPlan

_NOT_TOLD = {"code_files"}  # long, and its sha256 says the same


class Examination:
    """An examination of the cluster, and of the recipe and run directory if they are given.

    To make one, and to go through `look`, are collectives; what is found is known on rank 0 alone.
    """

    def __init__(
        self, world: World, recipe: str | None, overrides: Sequence[str], run_dir: Path | None
    ) -> None:
        self._world, examinee, node = world, facts.Examinee(run_dir), None
        if world.speaks_for_node:
            examinee = facts.open_examinee(recipe, overrides, run_dir, world.size)
            node = facts.node_facts(world, examinee).model_dump()
        sent = world.gather_on_first((node, facts.rank_facts(world).model_dump()))
        self.nodes = checks.by_name(facts.NodeFacts.read(each for each, _ in sent))
        self.ranks = facts.RankFacts.read(each for _, each in sent)
        precision = examinee.config.engine.precision if examinee.config else "bf16"
        self._run_dir, self._precision = examinee.run_dir, world.broadcast(precision)
        self.findings: list[Finding] = []
        self.measured: dict[str, Any] = {}

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
            "ranks": [rank.model_dump() for rank in self.ranks],
        }

    def look(self) -> Iterator[Finding]:
        """Each finding as soon as it is made, on rank 0."""
        for finding in self._checks():
            self.findings.append(finding)
            yield finding

    def _checks(self) -> Iterator[Finding]:
        world, first, backend = self._world, self._world.is_first, str(dist.get_backend())
        names = {node.rank: name for name, node in self.nodes.items()}
        if first:
            yield from checks.alike(self.nodes)
        probing = trials.probe(world, self._run_dir)
        if probing is not None:
            yield checks.run_directory(probing, names)
            if not probing.problem:
                yield checks.locks(probing, names)
        if first:
            yield from checks.sufficient_on_each_node(self.nodes, self.ranks)
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            yield checks.network(self.nodes, backend, place)
        offsets = world.gather_on_first(trials.clock_offset(world))
        if first:
            yield checks.clocks({names[rank]: offsets[rank] for rank in names})
        products = world.gather_on_first(trials.measure_matmul(world, self._precision).model_dump())
        if first:
            self.measured["matrix_products"] = products
            yield checks.matrix_products(trials.Matmul.read(products))
        if world.any(first and self.findings[-1].verdict == "FAILED"):
            return  # a rank that cannot compute would keep the others waiting
        speed = trials.measure_all_reduce(world)
        if first:
            if speed is not None:
                figures = {"bus_bytes_per_second": speed.bus_bytes_per_second}
                self.measured["all_reduce"] = asdict(speed) | figures
            yield checks.all_reduce(speed, backend)


def require_alike(world: World, plan: TrainingPlan, run_dir: Path) -> None:
    """Make sure that all nodes have the same versions, code, recipe and data, and room at the run
    directory for a checkpoint: the part of the doctor that `train` runs by itself. A collective.

    Raises:
        ConfigError: on every rank, naming the nodes that differ, in what, and what to do.
    """
    mine = None
    if world.speaks_for_node:
        examinee = facts.Examinee(run_dir, plan.config, plan.ds_json, plan)
        mine = facts.node_facts(world, examinee, only_alike=True).model_dump(exclude=_NOT_TOLD)
    sent = world.gather_on_first(mine)
    world.on_first(lambda: _require(sent))


def _require(sent: Sequence[Mapping[str, Any] | None]) -> None:
    findings = checks.alike(checks.by_name(facts.NodeFacts.read(sent)))
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
