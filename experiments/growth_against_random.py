"""Does growth help? Each boundary by stacking, against the same depth initialised anew.

Both arms train the same steps on the same batches with the same learning rates; only what a
boundary does differs. `python -m experiments.growth_against_random --help` makes the table of
docs/results; the test of the same name runs a small version of it.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch

from stacking_ds.config.recipe import load_run_config
from stacking_ds.config.run import RunConfig
from stacking_ds.distributed import process_group
from stacking_ds.distributed.world import World
from stacking_ds.model.parameters import first_value
from stacking_ds.run.metrics_file import read_metrics
from stacking_ds.schedule.stages import Stage
from stacking_ds.train import stage_engine
from stacking_ds.train.loop import train
from stacking_ds.train.plan import open_plan
from stacking_ds.train.stage_engine import StageEngine

__all__ = ["heldout_losses", "table", "train_arm"]

ARMS = ("stacked", "random")


def train_arm(world: World, config: RunConfig, run_dir: Path, arm: str) -> dict[int, float]:
    """Train one arm; the held-out MLM loss by step."""
    grow = StageEngine.grow
    if arm == "random":
        StageEngine.grow = _initialise_anew  # type: ignore[method-assign]
    try:
        train(open_plan(config, world.size), world, run_dir)
    finally:
        StageEngine.grow = grow  # type: ignore[method-assign]
    return heldout_losses(run_dir)


def _initialise_anew(manager: StageEngine, old: Stage, new: Stage) -> None:
    manager.finish_save()
    manager.close()
    # another seed: first values depend on seed and name alone, and would be the old ones again
    stage_engine.first_value = partial(_reseeded, 1000 * new.index)
    try:
        manager.start(new)
    finally:
        stage_engine.first_value = first_value


def _reseeded(offset: int, name: str, shape: torch.Size, seed: int, std: float) -> torch.Tensor:
    return first_value(name, shape, seed + offset, std)


def heldout_losses(run_dir: Path) -> dict[int, float]:
    return {
        line["step"]: line["eval/mlm_loss"]
        for line in read_metrics(run_dir)
        if "eval/mlm_loss" in line
    }


def table(config: RunConfig, results: dict[tuple[int, str], dict[int, float]]) -> str:
    """Markdown: held-out loss of both arms at each evaluation from the first boundary on."""
    seeds = sorted({seed for seed, _ in results})
    schedule = config.stage_schedule()
    head = "| after step | layers | " + " | ".join(
        f"seed {seed}: stacked / random" for seed in seeds
    )
    lines = [f"{head} | mean difference |", "|---" * (len(seeds) + 3) + "|"]
    for step in sorted(results[seeds[0], "stacked"]):
        depth = schedule.at(step - 1).num_hidden_layers
        pairs = [(results[seed, "stacked"][step], results[seed, "random"][step]) for seed in seeds]
        cells = " | ".join(f"{stacked:.3f} / {random:.3f}" for stacked, random in pairs)
        difference = statistics.mean(stacked - random for stacked, random in pairs)
        lines.append(f"| {step} | {depth} | {cells} | {difference:+.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the runs")
    options = parser.parse_args()
    results = {}
    world = process_group.start()
    for seed in options.seeds:
        config = load_run_config(options.recipe, [*options.set, f"seed={seed}"])
        for arm in ARMS:
            results[seed, arm] = train_arm(world, config, options.work / f"{arm}-{seed}", arm)
    process_group.stop()
    print(table(config, results))


if __name__ == "__main__":
    main()
