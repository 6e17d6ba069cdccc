"""Whole runs small enough for a test: a recipe, its shards, and what came of it."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from stacking_ds.checkpoint import folders, load
from stacking_ds.config.recipe import load_run_config
from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.train import loop
from stacking_ds.train.loop import train
from stacking_ds.train.plan import open_plan
from stacking_ds.train.step import StepResult

__all__ = [
    "around_steps",
    "losses",
    "metrics",
    "parameters",
    "small_recipe",
    "train_small",
    "train_until",
]

_RECIPE: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "data": {"sequence_length": 32, "mlm_probability": 0.2, "loader_workers": 0},
    "model": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "stages": [
        {"num_hidden_layers": 1, "steps": 4},
        {"num_hidden_layers": 2, "steps": 3},
        {"num_hidden_layers": 4, "steps": 3},
    ],
    "growth": {"moments": "carry"},
    "optimizer": {"learning_rate": 2e-3, "eps": 1e-6},
    "schedule": {"warmup_steps": 2},
    "batch": {"global_batch_size": 10, "micro_batch_size": 4},
    "engine": {"deepspeed": "zero1", "precision": "fp32"},
    "checkpoint": {"every_steps": 3},
    "evaluation": {"max_samples": 40},
    "logging": {"every_steps": 1},
}


def small_recipe(folder: Path, shards: Path, *overrides: str, name: str = "small") -> RunConfig:
    """The small recipe with its data, after `key=value` overrides."""
    path = folder / f"{name}.yaml"
    recipe = {**_RECIPE, "name": name, "data": {**_RECIPE["data"], "path": str(shards)}}
    path.write_text(yaml.safe_dump(recipe))
    return load_run_config(str(path), overrides)


def train_small(world: World, config: RunConfig, run_dir: Path, resume: bool = False) -> int:
    """Train on these ranks; the steps that are then completed."""
    return train(open_plan(config, world.size), world, run_dir, resume=resume).step


def train_until(world: World, config: RunConfig, run_dir: Path, stop: str, at_step: int) -> int:
    """Train, and at `at_step` be asked to stop ("term") or die ("kill")."""

    def step(completed: int, take: Callable[[], StepResult]) -> StepResult:
        if completed == at_step and world.rank == world.size - 1:
            if stop == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGTERM)
        return take()

    around_steps(step)
    return train_small(world, config, run_dir)


def around_steps(around: Callable[[int, Callable[[], StepResult]], StepResult]) -> None:
    """From now on this process takes a step as `around(completed_steps, take)` does."""
    original = loop.training_step

    def step(*arguments: Any, **options: Any) -> StepResult:
        completed: int = options["world"].pulse.step
        return around(completed, lambda: original(*arguments, **options))

    loop.training_step = step


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(run_dir)]


def parameters(run_dir: Path) -> dict[str, Any]:
    """The fp32 parameters of the run's newest checkpoint."""
    found = folders.latest(run_dir)
    assert found is not None
    return dict(load.read_parameters(found))
