"""Runs that are killed with -9 at random moments and resumed end as if nothing had happened."""

import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.checkpoint import folders, load
from stacking_ds.checkpoint import manifest as checkpoint_manifest
from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.sharding.fragments import Fragment
from stacking_ds.train import loop
from stacking_ds.train.heldout import HeldOutPasses
from stacking_ds.train.stage_engine import StageEngine
from tests.prose import tiny_shards
from tests.ranks import RankError, run_ranks
from tests.runs import losses, small_recipe, train_small

RANKS = 2
KILLS = 15  # at each ZeRO stage
RECIPE = (
    "stages.0.steps=3",
    "stages.1.steps=2",
    "stages.2.steps=2",
    "checkpoint.every_steps=1",
    "evaluation.max_samples=10",
)
STEPS = 7
# a save begins with a copy and ends, one step later, with a switch and a removal
_SAVE_SECONDS, _BOUNDARY_SECONDS = 0.15, 0.1


# ------------------------------------------------------------------ on ranks


def _train_traced(
    world: World, config: RunConfig, run_dir: Path, traces: Path, resume: bool
) -> float:
    """Train, and write down what this rank is at, one line a change; the seconds it took."""
    with (traces / f"rank_{world.rank}").open("a", buffering=1) as trace:
        for owner, name, phase in [
            (loop, "training_step", "step"),
            (HeldOutPasses, "metrics", "evaluation"),
            (loop, "export_if_missing", "export"),
            (StageEngine, "start", "start"),
            (StageEngine, "restore", "restoring"),
            (StageEngine, "save", "save"),
            (StageEngine, "grow", "boundary"),
        ]:
            setattr(owner, name, _traced(getattr(owner, name), phase, trace))
        world.barrier()
        started = time.perf_counter()
        trace.write(f"{os.getpid()}\n")
        train_small(world, config, run_dir, resume)
        return time.perf_counter() - started


def _traced(original: Any, phase: str, trace: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        trace.write(f"{phase}\n")
        try:
            return original(*arguments, **options)
        finally:
            trace.write("between\n")

    return call


# ------------------------------------------------------------------ the killer


@dataclass(frozen=True)
class Moment:
    """So long after training begins, or after the n-th save or boundary of the attempt does."""

    victims: tuple[int, ...]
    seconds: float
    after: str = "begin"
    nth: int = 1


class _Killer(threading.Thread):
    """Kills ranks from outside, so that it hits them anywhere."""

    def __init__(self, moment: Moment, run_dir: Path, traces: Path) -> None:
        super().__init__()
        self._moment, self._run_dir, self._traces = moment, run_dir, traces
        self._over = threading.Event()
        self._since = time.time()
        self.killed = False

    def run(self) -> None:
        while not self._due():
            if self._over.wait(0.0005):
                return
        if not self._over.wait(self._moment.seconds):
            for victim in self._moment.victims:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(int(self._lines(victim)[0]), signal.SIGKILL)
                    self.killed = True

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _lines(self, rank: int) -> list[str]:
        path = self._traces / f"rank_{rank}"
        # what follows the last line break may be half a line
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def _due(self) -> bool:
        if not all(self._lines(rank) for rank in range(RANKS)):
            return False
        if self._moment.after == "begin":
            return True
        return self._lines(self._moment.victims[0]).count(self._moment.after) >= self._moment.nth

    def landed_in(self) -> str:
        """What the victim was at, and whether a save was under way."""
        phase = self._lines(self._moment.victims[0])[1:][-1:] or ["entry"]
        hidden = (self._run_dir / "checkpoints").glob(".*")
        saving = any(path.stat().st_ctime > self._since for path in hidden)
        return f"{phase[0]}{' + saving' if saving else ''}"

    def saves_begun(self) -> int:
        return self._lines(0).count("save")


def _moments(draw: random.Random, seconds: float) -> list[Moment]:
    """A third spread evenly over the run, a third in saves, a third in boundaries."""
    moments = []
    for index in range(KILLS):
        victims = draw.choice([(0,), (1,), (0, 1)])
        turn, kind = divmod(index, 3)
        if kind == 0:
            share = (turn + draw.random()) / (KILLS // 3)
            moments.append(Moment(victims, share * seconds))
        elif kind == 1:
            delay = draw.uniform(0, _SAVE_SECONDS)
            moments.append(Moment(victims, delay, "save", draw.randint(1, 4)))
        else:
            delay = draw.uniform(0, _BOUNDARY_SECONDS)
            moments.append(Moment(victims, delay, "boundary", draw.randint(1, 2)))
    draw.shuffle(moments)
    return moments


# ------------------------------------------------------------------ attempts


class _Attempts:
    """One run after the other, each killed and resumed until it is complete."""

    def __init__(self, config: RunConfig, folder: Path, whole: Path) -> None:
        self._config, self._folder, self._whole = config, folder, whole
        self._attempts = self._runs = 0
        self._landed: list[str] = []
        self._run_dir = folder / "run_0"
        self._step = 0  # of its newest checkpoint

    def kill_at(self, moment: Moment) -> None:
        """Until the kill lands: where the run is complete before, it comes sooner in the next."""
        for _ in range(10):
            traces = self._folder / f"traces_{self._attempts}"
            traces.mkdir()
            killer = _Killer(moment, self._run_dir, traces)
            killer.start()
            try:
                self._train(traces)
            except RankError:
                killer.stop()
                if not killer.killed:
                    raise
                self._landed.append(killer.landed_in())
                print(f"{self._run_dir.name}: {moment} landed in {killer.landed_in()}")
                self._check(at_least=self._step + killer.saves_begun() - 2)
                return
            finally:
                killer.stop()
            self._end_run()
            moment = replace(moment, seconds=0.8 * moment.seconds)
        raise AssertionError(f"{moment} never came")

    def complete(self) -> Counter[str]:
        """Resume the last run to its end; how many kills landed in what."""
        traces = self._folder / f"traces_{self._attempts}"
        traces.mkdir()
        self._train(traces)
        self._end_run()
        return Counter(self._landed)

    def _train(self, traces: Path) -> None:
        self._attempts += 1
        resume = self._run_dir.exists()
        run_ranks(_train_traced, RANKS, self._config, self._run_dir, traces, resume)

    def _check(self, at_least: int) -> None:
        """Every checkpoint that is there is whole, and what the uninterrupted run had; none is
        lost but the one under way, and the one before it if that was not waited for."""
        newest = folders.latest(self._run_dir)
        steps = folders.saved_steps(self._run_dir)
        assert (newest is None) == (not steps)
        there = {self._run_dir / "checkpoints" / folders.folder_name(step) for step in steps}
        for folder in there if newest is None else {newest, *there}:
            assert load.problems(folder) == []
            step = checkpoint_manifest.read_manifest(folder).step
            ours = _state(folder)
            theirs = _state(self._whole / "checkpoints" / folders.folder_name(step))
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert torch.equal(ours[name], value), (folder, name)
        step = checkpoint_manifest.read_manifest(newest).step if newest else 0
        assert step >= max(self._step, at_least)
        self._step = step

    def _end_run(self) -> None:
        self._check(at_least=STEPS)
        assert losses(self._run_dir) == losses(self._whole)
        for folder in ("checkpoints", "export"):
            names = [{p.name for p in (d / folder).iterdir()} for d in (self._run_dir, self._whole)]
            assert names[0] <= names[1]
        model = "export/model.safetensors"
        assert (self._run_dir / model).read_bytes() == (self._whole / model).read_bytes()
        self._runs += 1
        self._run_dir, self._step = self._folder / f"run_{self._runs}", 0


def _state(folder: Path) -> dict[str, torch.Tensor]:
    """Masters and moments, whole."""
    manifest = checkpoint_manifest.read_manifest(folder)
    targets = []
    for name, parameter in manifest.parameters.items():
        cut = parameter.cut
        views = {key: torch.empty(cut.numel) for key in manifest.keys}
        targets.append(Fragment(name, parameter.shape, 0, cut.numel, views, cut))
    load.load(folder, targets)
    return {f"{key}/{f.name}": view for f in targets for key, view in f.views.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, zero_stage: int) -> None:
    shards = tiny_shards(tmp_path)
    engine = f"engine.deepspeed=zero{zero_stage}"
    whole, traces = tmp_path / "whole", tmp_path / "traces"
    traces.mkdir()
    keeps_all = small_recipe(tmp_path, shards, engine, *RECIPE, "checkpoint.keep_last=9")
    seconds = run_ranks(_train_traced, RANKS, keeps_all, whole, traces, False)[0]
    config = small_recipe(tmp_path, shards, engine, *RECIPE, "checkpoint.keep_last=1")
    attempts = _Attempts(config, tmp_path, whole)
    for moment in _moments(random.Random(zero_stage), seconds):
        attempts.kill_at(moment)
    landed = attempts.complete()
    print(landed)
    assert landed.total() == KILLS
    # how many depends on the machine's speed; test_kill_save leaves no operation of a save out
    assert any("saving" in phase for phase in landed)
    assert any("boundary" in phase for phase in landed)
