"""Measure what a step costs as a function of the depth, which growing is to save.

t(L) = outside + L * layer, if all layers cost the same and nothing grows faster than the depth.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stacking_ds.bench.step import How, built, free, rates
from stacking_ds.bench.step_batch import case_batches
from stacking_ds.bench.step_case import StepCase
from stacking_ds.bench.step_clock import Times, matmul_peak, threads_for, timed_on, timing_of_parts
from stacking_ds.bench.step_rivals import (
    OurStep,
    PlainStep,
    TrainingStep,
    ds_settings,
    our_compute,
)
from stacking_ds.distributed.world import World
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.registry import DTYPES

Maker = Callable[[], TrainingStep]


def measure_growth(cases: Sequence[StepCase], how: How, world: World) -> dict[str, Any]:
    """The same step at each depth; in fp32 beside a plain loop, which has no masters to keep.

    Raises:
        ConfigError: kernels that cannot run here, or too little memory for all depths at once.
    """
    batches = case_batches(cases[0], world.device)
    makers: dict[str, Maker] = {}
    for case in cases:
        makers[f"engine-{case.model.layers}"] = _engine(case, how, world)
        if case.precision == "fp32":
            makers[f"plain-{case.model.layers}"] = _plain(case, how, world)
    with threads_for(world.device):
        steps, absent = built(makers, world.device, must_run=tuple(makers))
        dtype = DTYPES[cases[0].precision]
        peak = matmul_peak(world.device, dtype)
        rounds = _rounds(steps, how.rounds, world.device) if not absent else {}
        peak = max(peak, matmul_peak(world.device, dtype))
    free(steps.values(), world.device)
    if absent:
        raise ConfigError(
            f"the depths have to take turns, but {', '.join(absent)} ran out of memory; choose a "
            f"smaller --hidden-size or --sequence-length"
        )
    return {
        "precision": cases[0].precision,
        "peak_flops_per_second": peak,
        "rows": cases[0].rows,
        "micro_steps": cases[0].micro_steps,
        "sequence_length": cases[0].sequence_length,
        "hidden_size": cases[0].model.hidden_size,
        "vocab_size": cases[0].model.vocab_size,
        "depths": [
            {
                "layers": case.model.layers,
                "parameters": case.config.num_parameters,
                **{
                    who: rates(case, batches, timing_of_parts(rounds[name]), world.device, peak)
                    for who in ("engine", "plain")
                    if (name := f"{who}-{case.model.layers}") in rounds
                },
            }
            for case in cases
        ],
    }


def _rounds(
    steps: Mapping[str, TrainingStep], rounds: int, device: torch.device
) -> dict[str, list[list[Times]]]:
    """The times of the parts of each step in each round."""
    clock = timed_on(device)
    found: dict[str, list[list[Times]]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            # a GPU takes a step as a whole: to wait for it after each part would cost time
            parts = [steps[name]] if device.type == "cuda" else steps[name].parts()
            found[name].append([clock(part) for part in parts])
    return found


def _engine(case: StepCase, how: How, world: World) -> Maker:
    def make() -> TrainingStep:
        compute = our_compute(how.kernels, case.precision, world.device, case.config)
        settings = ds_settings(how.zero_stage, case.rows, case.micro_steps, case.precision)
        return OurStep(case.config, case_batches(case, world.device), compute, settings, world)

    return make


def _plain(case: StepCase, how: How, world: World) -> Maker:
    def make() -> TrainingStep:
        compute = our_compute(how.kernels, case.precision, world.device, case.config)
        return PlainStep(case.config, case_batches(case, world.device), compute, world.device)

    return make


def growth_ratio(seconds: Mapping[int, float]) -> float:
    """How much more the second growth adds than the first, of three depths and their seconds."""
    shallow, middle, deep = sorted(seconds)
    return (seconds[deep] - seconds[middle]) / (seconds[middle] - seconds[shallow])


def affine_fit(seconds: Mapping[int, float]) -> tuple[float, float]:
    """(outside, layer) of the line outside + layers * layer closest to the seconds."""
    layer, outside = np.polyfit(list(seconds), list(seconds.values()), deg=1)
    return float(outside), float(layer)
