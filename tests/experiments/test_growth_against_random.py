"""Growth must be worth it: lower held-out loss than a deeper model initialised anew."""

import statistics
from pathlib import Path

import pytest

from experiments.growth_against_random import table, train_arm
from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from tests.prose import tiny_shards
from tests.ranks import run_ranks
from tests.runs import small_recipe

SEEDS = (1, 2, 3)
STAGES = "stages=[{num_hidden_layers: 1, steps: 60}, {num_hidden_layers: 2, steps: 20}, \
{num_hidden_layers: 4, steps: 20}]"
BOUNDARIES = (60, 80)
RECOVERY_STEPS = 5


def _both_arms(
    world: World, config: RunConfig, folder: Path
) -> tuple[dict[int, float], dict[int, float]]:
    return (
        train_arm(world, config, folder / "stacked", "stacked"),
        train_arm(world, config, folder / "random", "random"),
    )


@pytest.mark.slow
def test_a_stacked_model_is_ahead_right_after_recovery(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path)
    results = {}
    for seed in SEEDS:
        config = small_recipe(
            tmp_path, shards, STAGES, f"seed={seed}", "batch.global_batch_size=16",
            "batch.micro_batch_size=16", "optimizer.learning_rate=5e-3", "schedule.warmup_steps=5",
            "schedule.shape=constant", f"evaluation.every_steps={RECOVERY_STEPS}",
            "checkpoint.export_at_end=false", "checkpoint.every_steps=1000",
        )  # fmt: skip
        [(stacked, random)] = run_ranks(_both_arms, 1, config, tmp_path / str(seed))
        results[seed, "stacked"], results[seed, "random"] = stacked, random
        before_the_first_boundary = [step for step in stacked if step <= BOUNDARIES[0]]
        assert all(stacked[step] == random[step] for step in before_the_first_boundary)
        for boundary in BOUNDARIES:
            recovered = boundary + RECOVERY_STEPS
            assert stacked[recovered] < random[recovered], (seed, boundary)
    for boundary in BOUNDARIES:
        ends = boundary + 20
        assert (
            statistics.mean(
                results[seed, "stacked"][ends] - results[seed, "random"][ends] for seed in SEEDS
            )
            < 0
        )
    rows = table(config, results).splitlines()
    assert rows[0].count("stacked / random") == len(SEEDS)
    assert len(rows) == 2 + len(results[SEEDS[0], "stacked"])
