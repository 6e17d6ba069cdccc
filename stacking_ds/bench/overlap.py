"""What a step costs under ZeRO's settings for sending while computing.

`overlap_comm` sends gradients while the backward pass goes on, at the price of a second bucket;
bucket sizes say how much is sent at once. Which is best depends on links, depth and batch, so
nothing is taken from elsewhere: whoever has the machines measures them there.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from stacking_ds.bench.targets import grid
from stacking_ds.bench.workload import Workload
from stacking_ds.distributed.world import World
from stacking_ds.engine.build import release_engine

_WARM_UP_STEPS = 2


def overlap_options(
    zero_stage: int, buckets: Sequence[int]
) -> Iterator[tuple[bool, int, dict[str, Any]]]:
    """Every overlap with every bucket size, and what it is in the JSON's zero_optimization."""
    for overlap, bucket in itertools.product((False, True), buckets):
        names = ["reduce_bucket_size"]
        names.append("stage3_prefetch_bucket_size" if zero_stage == 3 else "allgather_bucket_size")
        yield overlap, bucket, {"overlap_comm": overlap, **dict.fromkeys(names, bucket)}


def measure_overlap(
    workload: Workload, world: World, buckets: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Whole steps under each setting in turn, by the clock: the slowest rank's, and the median
    over the rounds. A collective."""
    settings = list(overlap_options(workload.zero_stage, buckets))
    variants = [replace(workload, zero_options=options) for _, _, options in settings]
    engines = [variant.trained_engine(world) for variant in variants]
    times: list[list[float]] = [[] for _ in settings]
    for index in range(_WARM_UP_STEPS + rounds):
        for variant, engine, seconds in zip(variants, engines, times, strict=True):
            taken = _step_seconds(variant, engine, world)
            if index >= _WARM_UP_STEPS:
                seconds.append(taken)
    for engine in engines:
        release_engine(engine)
    return [
        {
            "zero_stage": workload.zero_stage,
            "ranks": world.size,
            "overlap_comm": overlap,
            "bucket": bucket,
            "step_seconds": statistics.median(seconds),
            "fastest_seconds": min(seconds),
        }
        for (overlap, bucket, _), seconds in zip(settings, times, strict=True)
    ]


def _step_seconds(workload: Workload, engine: Any, world: World) -> float:
    world.sum([0.0])  # all begin together
    _wait(world.device)
    started = time.perf_counter()
    workload.train_step(engine, world)
    _wait(world.device)
    return float(max(world.gather(time.perf_counter() - started)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def overlap_table(cases: Sequence[dict[str, Any]]) -> str:
    """A row for each setting, the fastest of its ZeRO stage marked."""
    best = {
        stage: min(case["step_seconds"] for case in cases if case["zero_stage"] == stage)
        for stage in {case["zero_stage"] for case in cases}
    }
    head = ("ZeRO", "ranks", "overlap_comm", "bucket, elements", "step, ms", "of the fastest")
    return grid(
        head,
        [
            [
                str(case["zero_stage"]),
                str(case["ranks"]),
                str(case["overlap_comm"]).lower(),
                f"{case['bucket']:,}",
                f"{1e3 * case['step_seconds']:.1f}",
                f"{case['step_seconds'] / best[case['zero_stage']]:.2f}",
            ]
            for case in cases
        ],
    )
