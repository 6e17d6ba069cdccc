"""Measure what a training step costs, beside transformers, torch.compile and a plain loop.

All who take the same case's step do so in turn, on the same rows. What is compared are whole
optimizer steps; their rate is in tokens, of which padding is none.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stacking_ds.bench.lamb_rivals import reason_of
from stacking_ds.bench.step_batch import StepBatch, case_batches, dense_batches
from stacking_ds.bench.step_case import StepCase
from stacking_ds.bench.step_clock import (
    Step,
    interleaved,
    matmul_peak,
    statistic_of,
    threads_for,
    timed_on,
    timing,
)
from stacking_ds.bench.step_rivals import (
    OurStep,
    PlainStep,
    TheirStep,
    TrainingStep,
    ds_settings,
    our_compute,
)
from stacking_ds.config.sections import KernelsName
from stacking_ds.distributed.world import World
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.registry import DTYPES

_WARM_UP_STEPS = {"cpu": 1, "cuda": 3}
_MICRO_STEPS = 4
_PEAK = "peak"


@dataclass(frozen=True)
class How:
    """What is the same for all cases."""

    kernels: KernelsName
    zero_stage: int
    rounds: int
    with_compile: bool


def measure_cases(cases: Sequence[StepCase], how: How, world: World) -> list[dict[str, Any]]:
    """All who can take the cases' steps. The cases differ in their fill alone, so that the same
    engines take them.

    Raises:
        ConfigError: rows too short for a case, or kernels that cannot run here.
    """
    device = world.device
    rows = [_rows_of(case, device) for case in cases]
    with threads_for(device):
        steps, absent = built(_makers(cases[0], how, world, rows[0]), device, must_run=("ours",))
        found = [
            _measure_case(case, rows_of, steps, absent, how, device)
            for case, rows_of in zip(cases, rows, strict=True)
        ]
    free(steps.values(), device)
    return found


def _rows_of(case: StepCase, device: torch.device) -> dict[str, list[StepBatch]]:
    """The case's micro-batches, and the full rows it is compared with."""
    rows = {"case": case_batches(case, device)}
    if case.with_dense_twin:
        rows["dense"] = dense_batches(case, device)
    return rows


def _measure_case(
    case: StepCase,
    rows: Mapping[str, Sequence[StepBatch]],
    steps: Mapping[str, TrainingStep],
    absent: Mapping[str, str],
    how: How,
    device: torch.device,
) -> dict[str, Any]:
    for name, step in steps.items():
        step.batches = rows.get(name, rows["case"])
    dtype = DTYPES[case.precision]
    peaks = [matmul_peak(device, dtype)]
    taken: dict[str, Step] = {**steps, _PEAK: lambda: peaks.append(matmul_peak(device, dtype))}
    clock = timed_on(device)
    _, unfit = interleaved(taken, 1, clock, must_run=("ours",))  # warms up on these rows
    fit = {name: step for name, step in taken.items() if name not in unfit}
    times, given_up = interleaved(fit, how.rounds, clock)
    figures = {
        name: rates(case, rows.get(name, rows["case"]), timing(times[name]), device, max(peaks))
        for name in steps
        if name in times
    }
    reasons = {**absent, **unfit, **given_up}
    reasons.pop(_PEAK, None)
    batches, model = rows["case"], case.model
    return {
        "name": case.name,
        "model": model.name,
        "hidden_size": model.hidden_size,
        "layers": model.layers,
        "vocab_size": model.vocab_size,
        "sequence_length": case.sequence_length,
        "rows": case.rows,
        "micro_steps": case.micro_steps,
        "is_full": case.is_full,
        "fill": _tokens(batches) / (case.rows * case.sequence_length * case.micro_steps),
        "precision": case.precision,
        "peak_flops_per_second": max(peaks),
        "steps": figures | {name: {"not_measured": why} for name, why in reasons.items()},
    }


def _makers(
    case: StepCase, how: How, world: World, rows: Mapping[str, Sequence[StepBatch]]
) -> dict[str, Callable[[], TrainingStep]]:
    """Ours first, which prepares the process for other engines."""
    config, device, batches = case.config, world.device, rows["case"]
    settings = ds_settings(how.zero_stage, case.rows, case.micro_steps, case.precision)

    def ours(
        kernels: KernelsName, batches: Sequence[StepBatch], settings: dict[str, Any] = settings
    ) -> TrainingStep:
        compute = our_compute(kernels, case.precision, device, config)
        return OurStep(config, batches, compute, settings, world)

    def plain() -> TrainingStep:
        compute = our_compute(how.kernels, case.precision, device, config)
        return PlainStep(config, batches, compute, device)

    makers: dict[str, Callable[[], TrainingStep]] = {
        "ours": lambda: ours(how.kernels, batches),
        "transformers": lambda: TheirStep(config, batches, settings),
    }
    if how.with_compile:
        makers["compile"] = lambda: ours("compile", batches)
    if case.with_plain_loop:
        makers["plain"] = plain
        unsharded = ds_settings(0, case.rows, case.micro_steps, case.precision)
        makers["zero0"] = lambda: ours(how.kernels, batches, unsharded)
    if "dense" in rows:
        makers["dense"] = lambda: ours(how.kernels, rows["dense"])
    return makers


def built(
    makers: Mapping[str, Callable[[], TrainingStep]],
    device: torch.device,
    must_run: Sequence[str] = (),
) -> tuple[dict[str, TrainingStep], dict[str, str]]:
    """The steps, warmed up, and why others are not there.

    Raises:
        ConfigError: why one that `must_run` cannot; memory is an excuse.
    """
    # a rival that falls back to running uncompiled would be none
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    steps: dict[str, TrainingStep] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        step = None
        try:
            step = make()
            for _ in range(_WARM_UP_STEPS[device.type]):
                step()
            steps[name] = step
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
        except Exception as error:
            if name in must_run:
                raise
            absent[name] = reason_of(error)
        if name in absent:  # here no error's traceback holds on to its memory any longer
            free([] if step is None else [step], device)
    return steps, absent


def free(steps: Any, device: torch.device) -> None:
    """Their memory back to the device, so that the next case finds it."""
    for step in steps:
        step.release()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rates(
    case: StepCase,
    batches: Sequence[StepBatch],
    found: Mapping[str, Mapping[str, float]],
    device: torch.device,
    peak_flops_per_second: float,
) -> dict[str, Any]:
    """Of one who took the step on these rows: its times, as `timing` has them, and what follows."""
    seconds, tokens = found["seconds"][statistic_of(device)], _tokens(batches)
    flops_per_token = case.config.flops_per_token(
        sum(batch.attended_tokens * batch.tokens for batch in batches) / tokens,
        sum(batch.mlm_targets for batch in batches) / tokens,
    )
    return {
        **found,
        "step_seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "flops_per_token": flops_per_token,
        "model_flops_utilization": flops_per_token * tokens / seconds / peak_flops_per_second,
    }


def _tokens(batches: Sequence[StepBatch]) -> int:
    return sum(batch.tokens for batch in batches)


# -------------------------------------------------------------- gradient accumulation


def measure_accumulation(case: StepCase, how: How, world: World) -> dict[str, Any]:
    """Whether a step of k micro-steps costs k times forward and backward, and one update.

    A step of one micro-step says what the last micro-step, which also reduces gradients, and the
    update cost; the first of two says what any other one costs. Each part of a step is timed by
    itself and the least of its rounds taken, so that the sum of few parts and that of many are
    as free of what the machine does besides.
    """
    micro_steps_of = {"one": 1, "two": 2, "many": _MICRO_STEPS}
    cases = {
        name: replace(case, micro_steps=k, with_plain_loop=False, with_dense_twin=False)
        for name, k in micro_steps_of.items()
    }
    makers = {
        name: _makers(own, how, world, _rows_of(own, world.device))["ours"]
        for name, own in cases.items()
    }
    clock = timed_on(world.device)
    with threads_for(world.device):
        steps, absent = built(makers, world.device, must_run=tuple(makers))
        if absent:
            raise ConfigError(f"gradient accumulation cannot be measured: {absent}")
        rounds = [
            {
                name: [clock(part)["seconds"] for part in step.parts()]
                for name, step in steps.items()
            }
            for _ in range(how.rounds)
        ]
    free(steps.values(), world.device)
    least = {
        name: [min(parts) for parts in zip(*(one[name] for one in rounds), strict=True)]
        for name in makers
    }
    micro_step, with_one = least["two"][0], sum(least["one"])
    return {
        "micro_steps": _MICRO_STEPS,
        "micro_step_seconds": micro_step,
        "step_of_one_seconds": with_one,
        "step_seconds": sum(least["many"]),
        "expected_seconds": (_MICRO_STEPS - 1) * micro_step + with_one,
    }
