"""Ranks that die, hang or fail end the others soon, and the others say which rank it was."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from stacking_ds.distributed.heartbeat import FailureDetector
from stacking_ds.distributed.world import World
from stacking_ds.errors import EXIT_LOST_RANK, AgreedError, ConfigError, LostRankError
from tests.ranks import run_ranks, spawn_ranks

RANKS, BAD, STEP = 3, 2, 5
HOST = socket.gethostname()


def _watch(world: World, timeout: float = 600.0, silence: float = 3.0) -> FailureDetector:
    detector = FailureDetector(world, timeout_seconds=timeout, silence_seconds=silence)
    detector.record = lambda verdict: print(f"told: {verdict}", flush=True)
    return detector


def _steps(world: World, harm: Callable[[], None]) -> None:
    """Steps with a collective each; the bad rank comes to harm after some."""
    for step in range(1000):
        world.pulse.step = step
        if step == STEP and world.rank == BAD:
            harm()
        world.sum([1.0])
        time.sleep(0.01)


def _killed(world: World) -> None:
    with _watch(world):
        _steps(world, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _stopped(world: World) -> None:
    with _watch(world):
        _steps(world, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _until_told(world: World, folder: Path) -> None:
    with _watch(world):
        while not world.any((folder / "enough").exists()):
            (folder / f"under way {world.rank}").touch()
            time.sleep(0.01)


def _asleep(world: World) -> None:
    with _watch(world, timeout=6.0):
        _steps(world, lambda: time.sleep(1000))


def _fail() -> None:
    raise OSError(28, "No space left on device")


def _failing(world: World) -> None:
    with _watch(world):
        _steps(world, _fail)


def _first_killed(world: World) -> None:
    with _watch(world):
        for step in range(1000):
            world.pulse.step = step
            if step == STEP and world.is_first:
                os.kill(os.getpid(), signal.SIGKILL)
            world.sum([1.0])


def _codes(processes: list[ForkServerProcess], seconds: float) -> list[int | None]:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def _log(folder: Path, rank: int) -> str:
    return (folder / f"rank_{rank}.log").read_text()


@pytest.mark.parametrize(
    ("harm", "said", "ends_itself"),
    [
        (_killed, f"rank 2 on {HOST} is gone or cut off: last heard of", True),
        (_failing, f"rank 2 on {HOST} failed after step 5: OSError: [Errno 28]", True),
        pytest.param(
            *(_stopped, f"rank 2 on {HOST} is gone or cut off: last heard of", False),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_rank_that_is_lost_is_named_and_the_others_end(
    tmp_path: Path, harm: Callable[[World], None], said: str, ends_itself: bool
) -> None:
    with spawn_ranks(harm, RANKS, tmp_path) as processes:
        codes = _codes(processes if ends_itself else processes[:BAD], seconds=60)
        assert None not in codes, [_log(tmp_path, rank) for rank in range(RANKS)]
        assert 0 not in codes
    assert said in _log(tmp_path, 0)
    assert "after step 5" in _log(tmp_path, 0)


@pytest.mark.slow
def test_a_job_that_was_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    with spawn_ranks(_until_told, RANKS, tmp_path, tmp_path) as processes:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("under way *"))) < RANKS and time.monotonic() < deadline:
            time.sleep(0.05)
        for number, seconds in ((signal.SIGSTOP, 8.0), (signal.SIGCONT, 5.0)):
            for process in processes:
                os.kill(process.pid or 0, number)
            time.sleep(seconds)
        (tmp_path / "enough").touch()
        codes = _codes(processes, seconds=30)
    assert codes == [0] * RANKS, [_log(tmp_path, rank) for rank in range(RANKS)]


@pytest.mark.slow
def test_a_main_thread_that_is_stuck_is_told_of_and_shown(tmp_path: Path) -> None:
    with spawn_ranks(_asleep, RANKS, tmp_path) as processes:
        assert _codes(processes, seconds=60) == [EXIT_LOST_RANK] * RANKS
    assert "told: rank 2" in _log(tmp_path, 0)
    assert "stacking-ds: error: rank 2" in _log(tmp_path, 0)
    assert "stacking-ds: error" not in _log(tmp_path, 1), "every rank says the same"
    assert "time.sleep(1000)" in _log(tmp_path, BAD), "where it is stuck"


def test_without_rank_0_the_others_know(tmp_path: Path) -> None:
    with spawn_ranks(_first_killed, RANKS, tmp_path) as processes:
        codes = _codes(processes, seconds=60)
    assert codes[0] == -signal.SIGKILL
    assert all(code not in (0, None) for code in codes[1:])
    for rank in (1, 2):
        assert re.search(rf"LostRank(Told)?Error: rank 0 on {HOST}", _log(tmp_path, rank))


def _first_stopped(world: World) -> None:
    with _watch(world):
        for step in range(1000):
            world.pulse.step = step
            if step == STEP and world.is_first:
                os.kill(os.getpid(), signal.SIGSTOP)
            world.sum([1.0])


@pytest.mark.slow
def test_a_rank_0_that_only_its_store_answers_for_is_noticed(tmp_path: Path) -> None:
    with spawn_ranks(_first_stopped, RANKS, tmp_path) as processes:
        assert _codes(processes[1:], seconds=60) == [EXIT_LOST_RANK] * 2
    # of the ranks on rank 0's node, the first that can
    assert f"stacking-ds: error: rank 0 on {HOST} does not answer" in _log(tmp_path, 1)
    assert "stacking-ds: error" not in _log(tmp_path, 2)


def _hanging_file_system(world: World) -> None:
    with _watch(world, timeout=6.0):
        world.pulse.step = STEP
        world.on_first(lambda: time.sleep(1000))


@pytest.mark.slow
def test_work_that_hangs_while_others_wait_is_noticed(tmp_path: Path) -> None:
    with spawn_ranks(_hanging_file_system, RANKS, tmp_path) as processes:
        assert _codes(processes, seconds=60) == [EXIT_LOST_RANK] * RANKS
    assert f"rank 0 on {HOST} is stuck after step 5 while the others wait" in _log(tmp_path, 0)


def _busy(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        sum(range(1000))


def _long_work(world: World) -> float:
    with _watch(world, timeout=3.0):
        world.on_first(lambda: _busy(8.0))
        world.on_all(lambda: _busy(8.0 * world.rank))
        return world.sum([1.0])[0]


@pytest.mark.slow
def test_work_that_gets_on_may_take_longer_than_the_time_out() -> None:
    assert run_ranks(_long_work, 2) == [2.0, 2.0]


def _deaf(world: World) -> None:
    with _watch(world, timeout=5.0) as detector:
        detector.record = lambda verdict: time.sleep(1000)
        _steps(world, lambda: time.sleep(1000))


@pytest.mark.slow
def test_what_is_told_last_cannot_keep_the_process(tmp_path: Path) -> None:
    with spawn_ranks(_deaf, RANKS, tmp_path) as processes:
        assert _codes(processes, seconds=60) == [EXIT_LOST_RANK] * RANKS


def _slow_to_leave(world: World) -> float:
    with _watch(world, silence=2.0):
        if world.is_first:
            time.sleep(5.0)  # a log that is closed, a last line that is written
    return world.sum([1.0])[0]


def test_who_has_more_to_tidy_up_is_waited_for() -> None:
    assert run_ranks(_slow_to_leave, 2) == [2.0, 2.0]


def _twice(world: World) -> float:
    with _watch(world):
        world.barrier()
    with _watch(world):
        return world.sum([1.0])[0]


def test_a_watch_may_follow_another() -> None:
    assert run_ranks(_twice, 2) == [2.0, 2.0]


def _same_error(world: World) -> str:
    def fail() -> None:
        raise ConfigError("no such recipe")

    try:
        with _watch(world):
            world.on_all(fail)
    except ConfigError as error:
        return f"{error} {isinstance(error, AgreedError)}"
    return "nothing"


def test_an_error_that_all_have_leaves_the_watch_at_once() -> None:
    assert run_ranks(_same_error, 2) == ["no such recipe True"] * 2


def _one_fails(world: World) -> str:
    def fail() -> None:
        if world.rank == 1:
            raise ConfigError("no such recipe")

    try:
        world.on_all(fail)
    except ConfigError as error:
        return f"{error} {isinstance(error, AgreedError)}"
    return "nothing"


def test_an_error_of_one_rank_is_raised_on_all_with_its_node() -> None:
    assert run_ranks(_one_fails, 3) == [f"rank 1 on {HOST}: no such recipe True"] * 3


def _alone(world: World) -> bool:
    try:
        with _watch(world):
            raise LostRankError("of its own")
    except LostRankError as error:
        return str(error) == "of its own"


def test_a_rank_by_itself_is_not_watched() -> None:
    assert run_ranks(_alone, 1) == [True]
