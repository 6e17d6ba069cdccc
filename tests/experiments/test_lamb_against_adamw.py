"""The comparison of docs/results/lamb_against_adamw.md in small: its arms are what they say."""

from pathlib import Path

import pytest

from experiments.lamb_against_adamw import ARMS, runs_in, table, train_arm, write_recipe
from stacking_ds.config.recipe import load_run_config
from stacking_ds.distributed.world import World
from tests.prose import tiny_shards
from tests.ranks import run_ranks

SMALL = (
    "batch.global_batch_size=24",
    "batch.micro_batch_size=4",
    "stages=[{num_hidden_layers: 2, steps: 6}]",
    "schedule.warmup_steps=2",
    "evaluation.every_steps=3",
    "evaluation.max_samples=24",
)
LEARNING_RATE = 0.02


def _train(world: World, data: Path, work: Path, arm: str) -> None:
    path = world.on_first(lambda: write_recipe(work, data, arm, LEARNING_RATE))
    train_arm(world, load_run_config(str(path), SMALL), work / path.stem, arm)


@pytest.mark.slow
def test_sharded_lamb_follows_and_lamb_on_flat_partitions_does_not(tmp_path: Path) -> None:
    data = tiny_shards(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    for arm, (_, _, ranks, _) in ARMS.items():
        run_ranks(_train, ranks, data, work, arm)
    runs = {run.arm: run for run in runs_in(work)}
    assert list(runs) == list(ARMS)
    assert all(run.learning_rate == LEARNING_RATE for run in runs.values())
    assert all(len(run.losses) == 6 and list(run.heldout) == [3, 6] for run in runs.values())
    unsharded = runs["lamb"].losses
    assert runs["lamb-zero2"].losses == pytest.approx(unsharded, rel=1e-5)
    for arm in ("adamw", "flat-zero2"):
        assert runs[arm].losses[0] == pytest.approx(unsharded[0], rel=1e-6)
        assert abs(runs[arm].losses[-1] - unsharded[-1]) > 1e-3
    lines = table(runs_in(work)).splitlines()
    assert lines[0].startswith("| arm | peak learning rate | held out, step 3 | held out, step 6 |")
    assert [line.split("`")[1] for line in lines[2:]] == list(ARMS)
    far = {line.split("`")[1]: line.split("|")[-2].strip() for line in lines[2:]}
    assert far["lamb"] == far["adamw"] == "-"
    assert float(far["lamb-zero2"]) < 1e-4 < 1e-3 < float(far["flat-zero2"])
