"""The story of a run: for each stage, for each step; between two stages, the boundary.

step    0          50_000      120_000                  400_000
stage   |---- 0 ----|---- 1 ----|----------- 2 -----------|
layers  |     3     |     6     |           12            |
                    ^           ^
               boundary: capture, release, build, install, go on
"""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stacking_ds.config.run import RunConfig
from stacking_ds.data.batches import RankStep
from stacking_ds.data.counter_random import derive_key
from stacking_ds.data.loader import load_steps
from stacking_ds.data.prefetch import Patience
from stacking_ds.data.rereading import Rereading
from stacking_ds.data.run_data import RunData
from stacking_ds.distributed.world import StopFlag, World
from stacking_ds.errors import CheckpointError, NonFiniteError, StageError, agreed
from stacking_ds.kernels.registry import DTYPES
from stacking_ds.process.device import measure_matmul_peak, peak_memory_gib
from stacking_ds.process.stop_signals import StopRequest
from stacking_ds.schedule.phases import Phase
from stacking_ds.schedule.run_schedule import RunSchedule
from stacking_ds.schedule.stages import Stage
from stacking_ds.train.from_checkpoint import export_if_missing, is_export_due
from stacking_ds.train.heldout import HeldOutPasses
from stacking_ds.train.metrics import Interval, TrainState, metrics_line
from stacking_ds.train.plan import TrainingPlan
from stacking_ds.train.resume import claim, enter
from stacking_ds.train.sinks import Monitor, RunLog
from stacking_ds.train.stage_engine import StageEngine
from stacking_ds.train.step import StepCounts, StepResult, training_step

_LOOK_SECONDS = 1.0


def train(
    plan: TrainingPlan,
    world: World,
    run_dir: Path,
    *,
    resume: bool = False,
    request: StopRequest | None = None,
) -> TrainState:
    """Train `plan` to its end, or until asked to stop. A collective.

    With `resume`, a run that is there goes on: (1) its newest checkpoint says step and stage,
    (2) an engine of that depth is built and loaded, (3) the data goes on with the batch after the
    last one consumed. A run without a checkpoint starts anew. A `request` to stop may have been
    made before.

    Raises:
        ConfigError: the recipe names kernels that cannot run here.
        CheckpointError: the run directory or its checkpoint belongs to another run, or the
            checkpoint of the last step, or two in a row, cannot be written.
        NonFiniteError: the loss or the gradient is not finite; the last checkpoint stays.
    """
    started = time.perf_counter()
    with ExitStack() as held:
        log = held.enter_context(RunLog()) if world.is_first else None
        stages = StageEngine(plan.config, plan.schedule, plan.data, plan.ds_configs, world)
        request = request or held.enter_context(StopRequest())
        found, state, attempt = enter(plan, world, run_dir, resume, held)
        held.callback(stages.close)
        if state.step < plan.schedule.total_steps:
            stages.begin(found, plan.schedule.stages[state.stage_index])
        # all that may be refused has been looked at: what is written goes back to `found` only now
        damage = claim(plan, world, run_dir, state.step)
        monitor = held.enter_context(
            Monitor(
                run_dir,
                plan.schedule.stages,
                completed_steps=state.step,
                enabled=world.is_first,
                log=log,
            )
        )
        if damage is not None:
            monitor.say(damage)
        attempt.begin()
        first_step, unfinished = state.step, state.step < plan.schedule.total_steps
        rereading = held.enter_context(
            Rereading(
                plan.data,
                # not for a run that has long been finished
                enabled=world.is_first
                and found is not None
                and (unfinished or is_export_due(plan.config, run_dir)),
            )
        )
        if unfinished:
            if found is not None:
                monitor.say(f"resumed from {found}")
            parts = plan.config, plan.schedule, plan.data
            run = _Run(*parts, world, stages, run_dir, state, monitor, request, rereading, started)
            run.train()
        else:
            monitor.say(f"{run_dir} is complete at step {state.step}; re-using it")
        if state.step == plan.schedule.total_steps:
            attempt.complete = _read_to_the_end(world, rereading, first_step, request, monitor)
            if attempt.complete:
                _conclude(plan.config, world, run_dir, monitor)
    return state


def _read_to_the_end(
    world: World, rereading: Rereading, first_step: int, request: StopRequest, monitor: Monitor
) -> bool:
    """Wait for what is left to be read again; False if asked to stop before. A collective.

    Raises:
        DataError: what was trained since `first_step` may have seen damaged data.
    """
    stop = StopFlag(world, request)
    with world.waiting_for(rereading.thread):
        while world.any(rereading.goes_on(_LOOK_SECONDS)):
            if stop.agreed():
                monitor.say(
                    f"stopped at step {world.pulse.step}, its last, while the data are still being "
                    f"read again; --resume goes on"
                )
                return False
    world.on_first(lambda: rereading.require_whole(first_step))
    return True


def _conclude(config: RunConfig, world: World, run_dir: Path, monitor: Monitor) -> None:
    monitor.conclude()
    # if this is where the run is cut off, the next call makes up for it
    exported = world.on_first(lambda: export_if_missing(config, run_dir))
    if exported is not None:
        monitor.say(exported)


@dataclass
class _Run:
    """A run under way, from the step at which this attempt begins."""

    config: RunConfig
    schedule: RunSchedule
    data: RunData
    world: World
    stages: StageEngine
    run_dir: Path
    state: TrainState
    monitor: Monitor
    request: StopRequest
    rereading: Rereading
    started: float

    def __post_init__(self) -> None:
        self.first_step = self.state.step
        self.clock_start = self.started - self.state.wall_seconds
        self.heldout = HeldOutPasses(self.data, self.world)
        self.interval = Interval()

    # ---------------------------------------------------------------- the story

    def train(self) -> None:
        try:
            self.train_stages()
        except (NonFiniteError, StageError) as error:
            with suppress(CheckpointError):
                self.stages.finish_save()  # it is good
            raise agreed(error) from None

    def train_stages(self) -> None:
        present = self.schedule.stages[self.state.stage_index]
        self.monitor.say(_ground(self.world))
        self.monitor.say(self.schedule.draw())
        self.request.hold_all()
        stop = StopFlag(self.world, self.request)
        for stage in self.schedule.stages.remaining(self.state.step):
            if stage.index > present.index:
                self.cross_boundary(present, stage)
                present = stage
            # what a boundary or a restore ends with is on disk already
            if stop.agreed() or not self.train_stage(stage, stop):
                self.monitor.say(f"stopped at step {self.state.step}; --resume goes on")
                return

    def cross_boundary(self, old: Stage, new: Stage) -> None:
        started = time.perf_counter()
        self.stages.grow(old, new)
        self.state.enter(new.index, time.perf_counter() - started)
        growth = self.config.growth
        self.monitor.say(
            f"boundary at step {self.state.step}: {old.num_hidden_layers} -> "
            f"{new.num_hidden_layers} layers by {growth.operator}, moments {growth.moments}, "
            f"{self.state.boundary_seconds:.2f} s"
        )

    def train_stage(self, stage: Stage, stop: StopFlag) -> bool:
        """Train to the end of `stage`; False if asked to stop before."""
        self.monitor.stage(stage, self.state.step)
        for phase, end_step in self.schedule.phases.between(self.state.step, stage.end_step):
            self.stages.enter_phase(stage, phase)
            if 0 < phase.start_step == self.state.step:
                self.monitor.say(f"phase {phase.index} at step {self.state.step}: {phase.shape}")
            with self.batches(phase, end_step) as batches:
                while self.state.step < end_step:
                    started = time.perf_counter()
                    self.world.pulse.loading = True
                    rank_step = next(batches)
                    self.world.pulse.loading = False
                    waited = time.perf_counter() - started
                    result = self.advance(rank_step)
                    self.count(result, phase, time.perf_counter() - started, waited)
                    if not self.after_step(stage, phase, end_step, stop):
                        return False
        return True

    def after_step(self, stage: Stage, phase: Phase, end_step: int, stop: StopFlag) -> bool:
        """Evaluate, write metrics and save where they are due; False if asked to stop.

        A phase ends as a stage does, at `end_step`, but without a checkpoint of its own.
        """
        config, step = self.config, self.state.step
        at_end, stopping = step == stage.end_step, stop.agreed()
        self.stages.poll_save(self.interval.seconds / self.interval.steps)
        if stopping:
            self.save(stage, wait=True)  # first of all: a launcher gives little time
        evaluating = step == end_step or (
            not stopping and _due(step, config.evaluation.every_steps)
        )
        saving = not stopping and (at_end or _due(step, config.checkpoint.every_steps))
        if evaluating or saving or stopping or _due(step, config.logging.every_steps):
            found = self.evaluate(phase) if evaluating else {}
            self.record(stage, phase, found)
            self.require_finite("held-out loss", sum(found.values()))
        finished = step == self.schedule.total_steps
        if evaluating and not stopping and not finished:
            stopping = stop.agreed()  # an evaluation may have taken as long as many steps
            saving = saving or stopping
        if saving:
            self.save(stage, wait=finished or stopping)
        return not stopping or finished

    def advance(self, rank_step: RankStep) -> StepResult:
        """One step on this rank's share of a global batch; damage that another thread has found
        in the data ends the run on all ranks."""
        step, world = self.state.step, self.world
        *counts, damaged = world.sum(
            [
                rank_step.mlm_targets,
                rank_step.nsp_targets,
                rank_step.real_tokens,
                self.rereading.failed,
            ]
        )
        if damaged:
            world.on_first(lambda: self.rereading.require_whole(self.first_step))
        return training_step(
            self.stages.engine,
            rank_step.micro_batches,
            StepCounts(*counts),
            learning_rate=self.schedule.learning_rates.at(step),
            # dropout is a function of (seed, step, rank), so nothing of it has to be saved
            seed=derive_key(self.config.seed, step, world.rank).item(),
            world=world,
            require_finite=self.require_finite,
        )

    # ----------------------------------------------------- what happens around it

    def require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            stage = self.schedule.stages[self.state.stage_index]
            raise NonFiniteError(
                f"the {what} is {value} after {self.state.step} steps (stage {stage.index}, "
                f"{stage.num_hidden_layers} layers); nothing is saved after that. Start again "
                f"with a lower optimizer.learning_rate, more schedule.warmup_steps or "
                f"engine.precision=fp32"
            )

    def batches(self, phase: Phase, end_step: int) -> closing[Any]:
        """An iterator over this rank's share of the steps up to `end_step`."""
        request, seconds = self.request, self.config.cluster.timeout_seconds
        return closing(
            load_steps(
                self.data.training_steps(self.world.rank, self.world.size, phase),
                range(self.state.step, end_step),
                workers=self.config.data.loader_workers,
                pin_memory=self.world.device.type == "cuda",
                patience=Patience(seconds, lambda: request.made),
            )
        )

    def count(self, result: StepResult, phase: Phase, seconds: float, waited: float) -> None:
        self.state.count(result, phase.global_batch_size, seconds)
        self.world.pulse.step = self.state.step
        self.interval.count(result, seconds, waited)
        self.monitor.step(self.state.step, result.mlm_loss)
        if result.loss is None and self.state.empty_steps == 1:
            self.monitor.say(
                f"step {self.state.step} is passed over: nothing in its batch can be predicted, as "
                f"where the vocabulary spells no word of it; the step counts, the weights stay, "
                f"and optim/empty_steps counts such steps"
            )

    def record(self, stage: Stage, phase: Phase, evaluation: Mapping[str, float]) -> None:
        self.state.wall_seconds = time.perf_counter() - self.clock_start
        optimizer, histograms = self.stages.optimizer_metrics()
        sizes = self.stages.model_config(stage.num_hidden_layers)
        memory = {"memory/peak_gib": peak_memory_gib(self.world.device)}
        self.monitor.record(
            metrics_line(
                self.state,
                self.interval,
                phase,
                num_hidden_layers=stage.num_hidden_layers,
                flops_per_token=sizes.flops_per_token(
                    self.data.train[phase.sequence_length].layout(0).mean_attended_slots,
                    self.interval.mlm_targets / max(self.interval.tokens, 1),
                ),
                peak_flops_per_second=self.peak_flops_per_second,
                remaining_work=self.schedule.work(self.state.step),
                extra={**memory, **optimizer, **evaluation},
            ),
            histograms,
        )
        self.interval = Interval()

    @cached_property
    def peak_flops_per_second(self) -> float:
        dtype = DTYPES[self.config.engine.precision]
        return self.world.sum([measure_matmul_peak(self.world.device, dtype)])[0]

    def evaluate(self, phase: Phase) -> dict[str, float]:
        found = self.heldout.metrics(self.stages.engine, phase)
        if not found:
            self.monitor.say(
                f"no held-out loss: nothing in the held-out rows of {phase.sequence_length} tokens "
                f"can be masked, as where the vocabulary spells no word of them"
            )
        return found

    def save(self, stage: Stage, *, wait: bool) -> None:
        self.state.wall_seconds = time.perf_counter() - self.clock_start
        self.stages.save(self.run_dir, stage, asdict(self.state), wait=wait)


def _ground(world: World) -> str:
    """What this run computes on, for people: a run that misses its GPUs takes hundreds of times as
    long."""
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    if world.device.type == "cuda":
        return f"{ranks}, a GPU for each ({torch.cuda.get_device_name(world.device)})"
    return f"{ranks} on the CPU, since torch sees no GPU"


def _due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
