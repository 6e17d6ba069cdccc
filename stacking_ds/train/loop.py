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
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stacking_ds.data.batches import RankStep
from stacking_ds.data.counter_random import derive_key
from stacking_ds.data.loader import load_steps
from stacking_ds.data.prefetch import Patience
from stacking_ds.data.rereading import Rereading
from stacking_ds.distributed.world import StopFlag, World
from stacking_ds.engine.build import set_learning_rate, take_step
from stacking_ds.errors import CheckpointError, NonFiniteError, StageError
from stacking_ds.kernels.registry import DTYPES, choose_compute
from stacking_ds.model.loss import pretraining_loss
from stacking_ds.process.device import measure_matmul_peak, peak_memory_gib
from stacking_ds.process.stop_signals import StopRequest
from stacking_ds.run.log import RunLog
from stacking_ds.schedule.phases import Phase
from stacking_ds.schedule.stages import Stage
from stacking_ds.train.from_checkpoint import export_if_missing, is_export_due
from stacking_ds.train.heldout import HeldOutPasses
from stacking_ds.train.metrics import Interval, StepResult, TrainState, metrics_line
from stacking_ds.train.plan import Job
from stacking_ds.train.resume import claim, enter
from stacking_ds.train.sinks import Monitor
from stacking_ds.train.stage_engine import StageManager

_LOOK_SECONDS = 1.0


def train(
    job: Job,
    world: World,
    run_dir: Path,
    *,
    resume: bool = False,
    request: StopRequest | None = None,
) -> TrainState:
    """Train `job` to its end, or until asked to stop. A collective.

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
        compute = world.on_all(
            lambda: choose_compute(job.config.engine, world.device, job.config.model)
        )
        request = request or held.enter_context(StopRequest())
        found, state, attempt = enter(job, world, run_dir, resume, held)
        stages = StageManager(job, world, compute)
        held.callback(stages.close)
        if state.step < job.schedule.total_steps:
            stages.begin(found, job.schedule.stages[state.stage_index])
        # all that may be refused has been looked at: what is written goes back to `found` only now
        monitor = held.enter_context(_claimed(job, world, run_dir, state.step, log))
        attempt.begin()
        first_step, unfinished = state.step, state.step < job.schedule.total_steps
        rereading = held.enter_context(
            Rereading(
                job.shards,
                job.train_data.values(),
                # not for a run that has long been finished
                enabled=world.is_first
                and found is not None
                and (unfinished or is_export_due(job, run_dir)),
            )
        )
        if unfinished:
            if found is not None:
                monitor.say(f"resumed from {found}")
            run = _Run(job, world, stages, run_dir, state, monitor, request, rereading, started)
            try:
                run.train()
            except (NonFiniteError, StageError) as error:
                error.on_all_ranks = True
                with suppress(CheckpointError):
                    run.stages.finish_save()  # it is good
                raise
        else:
            monitor.say(f"{run_dir} is complete at step {state.step}; re-using it")
        if state.step == job.schedule.total_steps:
            attempt.complete = _read_to_the_end(world, rereading, StopFlag(world, request))
            if attempt.complete:
                world.on_first(lambda: rereading.require_whole(first_step))
                _conclude(job, world, run_dir, monitor)
            else:
                monitor.say(
                    f"stopped at step {state.step}, its last, while the data are still being read "
                    f"again; --resume goes on"
                )
    return state


def _claimed(
    job: Job, world: World, run_dir: Path, completed_steps: int, log: RunLog | None
) -> Monitor:
    """Make the directory this run's, and open what is written in it. A collective."""
    damage = claim(job, world, run_dir, completed_steps)
    monitor = Monitor(
        run_dir, job.schedule, completed_steps=completed_steps, enabled=world.is_first, log=log
    )
    if damage is not None:
        monitor.say(damage)
    return monitor


def _read_to_the_end(world: World, rereading: Rereading, stop: StopFlag) -> bool:
    """Wait for what is left to be read again; False if asked to stop before. A collective."""
    with world.waiting_for(rereading.thread):
        while world.any(rereading.goes_on(_LOOK_SECONDS)):
            if stop.agreed():
                return False
    return True


def _conclude(job: Job, world: World, run_dir: Path, monitor: Monitor) -> None:
    monitor.conclude()
    # if this is where the run is cut off, the next call makes up for it
    exported = world.on_first(lambda: export_if_missing(job, run_dir))
    if exported is not None:
        monitor.say(exported)


class _Run:
    def __init__(
        self,
        job: Job,
        world: World,
        stages: StageManager,
        run_dir: Path,
        state: TrainState,
        monitor: Monitor,
        request: StopRequest,
        rereading: Rereading,
        started: float,
    ) -> None:
        self.job, self.world, self.run_dir = job, world, run_dir
        self.state, self.monitor, self.request = state, monitor, request
        self.rereading, self.first_step = rereading, state.step
        self.clock_start = started - state.wall_seconds
        self.stages = stages
        self.heldout = HeldOutPasses(job, world)
        self.interval = Interval()

    # ---------------------------------------------------------------- the story

    def train(self) -> None:
        present = self.job.schedule.stages[self.state.stage_index]
        self.monitor.say(_ground(self.world))
        self.monitor.say(self.job.draw())
        self.request.hold_all()
        stop = StopFlag(self.world, self.request)
        for stage in self.job.schedule.remaining(self.state.step):
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
        growth = self.job.config.growth
        self.monitor.say(
            f"boundary at step {self.state.step}: {old.num_hidden_layers} -> "
            f"{new.num_hidden_layers} layers by {growth.operator}, moments {growth.moments}, "
            f"{self.state.boundary_seconds:.2f} s"
        )

    def train_stage(self, stage: Stage, stop: StopFlag) -> bool:
        """Train to the end of `stage`; False if asked to stop before."""
        self.monitor.stage(stage, self.state.step)
        for phase, end_step in self.job.phases.between(self.state.step, stage.end_step):
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
                    result = self.train_step(rank_step)
                    self.count(result, phase, time.perf_counter() - started, waited)
                    if not self.after_step(stage, phase, end_step, stop):
                        return False
        return True

    def after_step(self, stage: Stage, phase: Phase, end_step: int, stop: StopFlag) -> bool:
        """Evaluate, write metrics and save where they are due; False if asked to stop.

        A phase ends as a stage does, at `end_step`, but without a checkpoint of its own.
        """
        config, step = self.job.config, self.state.step
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
        finished = step == self.job.schedule.total_steps
        if evaluating and not stopping and not finished:
            stopping = stop.agreed()  # an evaluation may have taken as long as many steps
            saving = saving or stopping
        if saving:
            self.save(stage, wait=finished or stopping)
        return not stopping or finished

    def train_step(self, rank_step: RankStep) -> StepResult:
        """One optimizer step on one global batch.

        The loss is MLM sum / MLM targets + NSP sum / NSP targets, with the counts of the *global*
        batch. DeepSpeed averages gradients over ranks and micro-steps; the scale undoes that. A
        batch without targets of one kind trains on the other; one without any is passed over.
        """
        step, engine = self.state.step, self.stages.engine
        mlm_targets, nsp_targets, tokens, damaged = self.world.sum(
            [
                rank_step.mlm_targets,
                rank_step.nsp_targets,
                rank_step.real_tokens,
                self.rereading.failed,
            ]
        )
        if damaged:
            self.world.on_first(lambda: self.rereading.require_whole(self.first_step))
        learning_rate = self.job.learning_rates.at(step)
        if not mlm_targets + nsp_targets:  # the same on all ranks
            return StepResult(None, None, 0, round(tokens), 0.0, learning_rate)
        set_learning_rate(engine, learning_rate)
        # dropout is a function of (seed, step, rank), so nothing of it has to be saved
        torch.manual_seed(derive_key(self.job.config.seed, step, self.world.rank).item())
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        scale = self.world.size * self.stages.accumulation_steps
        for index, micro_batch in enumerate(rank_step.micro_batches):
            self.world.pulse.move()
            if index > 0:
                take_step(engine)  # between micro-steps DeepSpeed only counts
            batch = micro_batch.to(self.world.device)
            mlm_logits_MV, nsp_logits_E2 = engine(*batch.model_inputs)
            mlm_sum, nsp_sum = pretraining_loss(
                mlm_logits_MV,
                batch.mlm_labels_M,
                nsp_logits_E2,
                batch.next_sentence_label_E,
                self.stages.operations,
            )
            sums += torch.stack([mlm_sum.detach(), nsp_sum.detach()])
            loss = mlm_sum / max(mlm_targets, 1) + nsp_sum / max(nsp_targets, 1)
            engine.backward(scale * loss)
        mlm_total, nsp_total = self.world.sum(sums.tolist())
        mlm_loss = mlm_total / mlm_targets if mlm_targets else None
        nsp_loss = nsp_total / nsp_targets if nsp_targets else None
        self.require_finite("loss", (mlm_loss or 0.0) + (nsp_loss or 0.0))
        grad_norm = take_step(engine)
        assert grad_norm is not None
        if self.job.config.engine.precision != "fp16":  # there loss scaling skips such steps
            self.require_finite("gradient norm", grad_norm)
        return StepResult(
            mlm_loss, nsp_loss, round(mlm_targets), round(tokens), grad_norm, learning_rate
        )

    # ----------------------------------------------------- what happens around it

    def require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            stage = self.job.schedule.stages[self.state.stage_index]
            raise NonFiniteError(
                f"the {what} is {value} after {self.state.step} steps (stage {stage.index}, "
                f"{stage.num_hidden_layers} layers); nothing is saved after that. Start again "
                f"with a lower optimizer.learning_rate, more schedule.warmup_steps or "
                f"engine.precision=fp32"
            )

    def batches(self, phase: Phase, end_step: int) -> closing[Any]:
        """An iterator over this rank's share of the steps up to `end_step`."""
        request, seconds = self.request, self.job.config.cluster.timeout_seconds
        return closing(
            load_steps(
                self.job.training_steps(self.world.rank, self.world.size, phase),
                range(self.state.step, end_step),
                workers=self.job.config.data.loader_workers,
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
        memory = {"memory/peak_gib": peak_memory_gib(self.world.device)}
        self.monitor.record(
            metrics_line(
                self.state,
                self.interval,
                num_hidden_layers=stage.num_hidden_layers,
                phase=phase.index,
                sequence_length=phase.sequence_length,
                flops_per_token=self.job.model_config(stage.num_hidden_layers).flops_per_token(
                    self.job.train_data[phase.sequence_length].mean_attended_slots,
                    self.interval.mlm_targets / max(self.interval.tokens, 1),
                ),
                peak_flops_per_second=self.peak_flops_per_second,
                slots_per_step=phase.slots_per_step,
                remaining_work=self.job.work(self.state.step),
                extra={**memory, **optimizer, **evaluation},
            ),
            histograms,
        )
        self.interval = Interval()

    @cached_property
    def peak_flops_per_second(self) -> float:
        dtype = DTYPES[self.job.config.engine.precision]
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
