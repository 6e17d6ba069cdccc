"""A stop that is asked for at any moment is agreed on at the next boundary, and recorded."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stacking_ds.checkpoint import folders, manifest
from stacking_ds.checkpoint import save as checkpoint_save
from stacking_ds.config.run import RunConfig
from stacking_ds.data.shards import TokenShards
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError, NonFiniteError
from stacking_ds.launch import restart_policy
from stacking_ds.process.stop_signals import StopRequest
from stacking_ds.run import directory
from stacking_ds.train import loop, stage_engine
from stacking_ds.train.heldout import HeldOutPasses
from stacking_ds.train.loop import train
from stacking_ds.train.plan import open_plan
from stacking_ds.train.stage_engine import StageEngine
from stacking_ds.train.step import StepResult
from tests.prose import tiny_shards
from tests.ranks import run_ranks
from tests.runs import around_steps, losses, metrics, small_recipe, train_small

RANKS = 2
_OWNERS = {"metrics": HeldOutPasses, "grow": StageEngine, "start": StageEngine}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    config = small_recipe(folder, shards, "evaluation.every_steps=2")
    run_ranks(train_small, RANKS, config, folder / "run")
    return folder / "run"


def _asked_during(world: World, config: RunConfig, run_dir: Path, name: str) -> int:
    """Train; the last rank is asked to stop while all are in the method of this name."""
    owner: Any = _OWNERS[name]
    original: Callable[..., Any] = getattr(owner, name)

    def asked(*arguments: Any, **options: Any) -> Any:
        if world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments, **options)

    setattr(owner, name, asked)
    return train_small(world, config, run_dir)


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "step", "saved"),
    [
        pytest.param("metrics", 2, 2, marks=pytest.mark.slow),  # the first evaluation
        ("grow", 4, 4),  # the first boundary
        pytest.param(
            "start", 0, None, marks=pytest.mark.slow
        ),  # nothing was trained, so there is nothing to save
    ],
)
def test_no_step_is_taken_after_a_stop(
    shards: Path, whole: Path, tmp_path: Path, name: str, step: int, saved: int | None
) -> None:
    config = small_recipe(tmp_path, shards, "evaluation.every_steps=2")
    run = tmp_path / "run"
    assert run_ranks(_asked_during, RANKS, config, run, name) == [step] * RANKS
    found = folders.latest(run)
    assert (found and manifest.read_manifest(found).step) == saved
    assert run_ranks(train_small, RANKS, config, run, True) == [10] * RANKS
    assert losses(run) == losses(whole)
    evaluations = [[line.get("eval/mlm_loss") for line in metrics(r)] for r in (run, whole)]
    assert evaluations[0] == evaluations[1]
    outcomes = [record.get("outcome") for record in _records(run)]
    assert outcomes == [None, "stopped", None, "complete"]
    assert [record["step"] for record in _records(run)] == [0, step, step, 10]


def _asked_before(world: World, config: RunConfig, run_dir: Path) -> int:
    with StopRequest() as request:
        if world.is_first:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train(open_plan(config, world.size), world, run_dir, request=request).step


def test_a_stop_that_was_asked_for_before_the_run_began_holds(shards: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path, shards)
    assert run_ranks(_asked_before, RANKS, config, tmp_path / "run") == [0] * RANKS


def _asked_while_reading_again(world: World, config: RunConfig, run_dir: Path) -> int:
    """Go on with a complete run, and be asked to stop while its end waits for its data."""

    def read_for_long(shards: TokenShards) -> Iterator[None]:
        deadline = time.monotonic() + 10
        asked = False
        while time.monotonic() < deadline:
            # the watch sees whether it gets on
            if not asked and world.pulse.work is threading.current_thread():
                asked = True
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.02)
            yield

    TokenShards.verifying = read_for_long  # type: ignore[method-assign]
    loop._LOOK_SECONDS = 0.1
    return train_small(world, config, run_dir, resume=True)


def test_the_end_of_a_run_that_went_on_waits_for_its_data_and_can_be_stopped(
    shards: Path, whole: Path, tmp_path: Path
) -> None:
    config = small_recipe(tmp_path, shards, "evaluation.every_steps=2")
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "export")
    started = time.monotonic()
    assert run_ranks(_asked_while_reading_again, RANKS, config, run) == [10] * RANKS
    assert time.monotonic() - started < 9
    assert not (run / "export").exists()
    assert restart_policy.judge(run, 0).again
    assert run_ranks(train_small, RANKS, config, run, True) == [10] * RANKS
    assert (run / "export").is_dir()
    outcomes = [record.get("outcome") for record in _records(run)]
    assert outcomes == [None, "complete", None, "stopped", "stopped", None, "complete"]


def _cannot_be_built(world: World, config: RunConfig, run_dir: Path, error: Exception) -> str:
    def begin(*arguments: Any) -> None:
        raise error

    StageEngine.begin = begin  # type: ignore[method-assign]
    with pytest.raises(type(error)):
        train_small(world, config, run_dir, resume=True)
    return "raised"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("CUDA out of memory"), "failed"),
        (CheckpointError("rank_00000.safetensors is damaged"), "user_error"),
        (RuntimeError("[gloo] Connection closed by peer"), None),
    ],
)
def test_what_fails_before_a_run_goes_on_is_recorded_in_it(
    shards: Path, tmp_path: Path, error: Exception, outcome: str | None
) -> None:
    config = small_recipe(tmp_path, shards)
    run = tmp_path / "run"
    run_ranks(_cannot_be_built, 1, config, run, error)
    assert not run.exists(), "a new run leaves nothing"
    run.mkdir()
    directory.write_config(run, config)  # of a start that saved nothing
    run_ranks(_cannot_be_built, 1, config, run, error)
    if outcome is None:
        assert not (run / "attempts.jsonl").exists()
        return
    begun, ended = _records(run)
    assert (begun["event"], begun["step"], begun["world_size"]) == ("begun", 0, 1)
    assert (ended["outcome"], ended["step"], ended["message"]) == (outcome, 0, str(error))


def _slow_saves(
    world: World, config: RunConfig, run_dir: Path, step: float, save: float, grace: float
) -> int:
    stage_engine._STOP_SECONDS = grace
    write = checkpoint_save.save_file

    def slow_step(completed: int, take: Callable[[], StepResult]) -> StepResult:
        time.sleep(step)
        return take()

    def slow_write(tensors: Any, path: Path) -> None:
        time.sleep(save)
        write(tensors, path)

    around_steps(slow_step)
    checkpoint_save.save_file = slow_write
    return train_small(world, config, run_dir)


@pytest.mark.parametrize(
    ("step", "save", "warnings"),
    [
        (0.0, 1.1, 1),  # two of them do not fit
        pytest.param(1.6, 0.3, 1, marks=pytest.mark.slow),  # nor with a step before
        (0.7, 0.0, 0),  # a checkpoint that long steps keep from being published is not slow
    ],
)
def test_saves_that_a_launcher_would_cut_off_are_warned_of_once(
    shards: Path, tmp_path: Path, step: float, save: float, warnings: int
) -> None:
    config = small_recipe(tmp_path, shards, "stages.0.steps=3", "checkpoint.every_steps=1")
    config = config.model_copy(update={"stages": config.stages[:1]})
    run_ranks(_slow_saves, RANKS, config, tmp_path / "run", step, save, 2.0)
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("a launcher gives a rank that is to stop about 2 s") == warnings
    assert "DeepSpeed" not in log, "nor does srun have one"


def _fails(world: World, config: RunConfig, run_dir: Path, error: Exception) -> str:
    def step(completed: int, take: Callable[[], StepResult]) -> StepResult:
        if completed == 5:
            raise error
        return take()

    around_steps(step)
    with pytest.raises(type(error)):
        train_small(world, config, run_dir)
    return "raised"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (NonFiniteError("the loss is nan"), "not_finite"),
        (RuntimeError("CUDA out of memory"), "failed"),
        (OSError(28, "No space left on device"), "user_error"),
        (OSError(116, "Stale file handle"), "failed"),  # nothing a person can mend
        # which rank it was is known to the watch alone, which records it
        (RuntimeError("[gloo] Connection closed by peer"), None),
    ],
)
def test_how_an_attempt_ended_is_recorded(
    shards: Path, tmp_path: Path, error: Exception, outcome: str | None
) -> None:
    config = small_recipe(tmp_path, shards)
    run_ranks(_fails, RANKS, config, tmp_path / "run", error)
    begun, *ended = _records(tmp_path / "run")
    assert (begun["step"], begun["world_size"]) == (0, RANKS)
    told = [(record["outcome"], record["step"], record["message"]) for record in ended]
    assert told == ([] if outcome is None else [(outcome, 5, str(error))])
