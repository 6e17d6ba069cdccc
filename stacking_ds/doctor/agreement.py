"""The part of `stacking-ds doctor` that `train` runs by itself: are the nodes alike?"""

from pathlib import Path

from stacking_ds.distributed.world import World
from stacking_ds.doctor.facts import NodeFacts, Subject, alike_facts
from stacking_ds.doctor.node_checks import alike, by_name
from stacking_ds.errors import ConfigError
from stacking_ds.train.plan import Job

__all__ = ["require_alike"]


def require_alike(world: World, job: Job, run_dir: Path) -> None:
    """Make sure that all nodes have the same versions, code, recipe and data, and room at the run
    directory for a checkpoint. A collective.

    Raises:
        ConfigError: on every rank, naming the nodes that differ, in what, and what to do.
    """
    mine = None
    if world.speaks_for_node:
        facts = alike_facts(world, Subject.of(job, run_dir))
        mine = facts.model_dump(exclude={"code_files"})
    told = world.gather_on_first(mine)
    world.on_first(lambda: _require(told))


def _require(told: list[dict[str, object] | None]) -> None:
    nodes = by_name([NodeFacts.model_validate(each) for each in told if each])
    failed = [finding for finding in alike(nodes) if finding.verdict == "FAILED"]
    if failed:
        reasons = "; ".join(f"{each.check}: {each.text} ({each.remedy})" for each in failed)
        raise ConfigError(
            f"the nodes are not fit for this run: {reasons}. `stacking-ds doctor`, started in the "
            f"same way, tells more"
        )
