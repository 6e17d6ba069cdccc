"""The multi-rank helper itself: results in order, failures named, nothing hangs."""

import os
import time
from typing import Any

import pytest
import torch

from stacking_ds.distributed.world import World
from tests.ranks import RankError, RankTimeoutError, run_ranks


def _who(world: World, offset: int) -> tuple[int, float, torch.Tensor]:
    assert torch.get_num_threads() == 1
    return world.rank + offset, world.sum([1.0])[0], torch.full((2,), world.rank)


def test_results_come_in_rank_order() -> None:
    results = run_ranks(_who, 3, 10)
    assert [result[0] for result in results] == [10, 11, 12]
    assert [result[1] for result in results] == [3.0, 3.0, 3.0]
    assert [result[2].tolist() for result in results] == [[0, 0], [1, 1], [2, 2]]


def _rank_one_raises(world: World) -> None:
    if world.rank == 1:
        raise KeyError("the one that matters")
    world.barrier()


def test_a_raising_rank_ends_the_others_and_shows_its_traceback() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 raised") as caught:
        run_ranks(_rank_one_raises, 3)
    assert "the one that matters" in str(caught.value)
    assert "_rank_one_raises" in str(caught.value)
    assert time.monotonic() - started < 60


def _rank_zero_dies(world: World) -> None:
    if world.rank == 0:
        os._exit(7)
    world.barrier()


def test_a_rank_that_dies_without_a_word_is_named() -> None:
    with pytest.raises(RankError, match="rank 0 died with exit code 7"):
        run_ranks(_rank_zero_dies, 2)


def _rank_one_waits(world: World) -> None:
    if world.rank == 1:
        _wait_in_vain()


def _wait_in_vain() -> None:
    while True:
        time.sleep(0.1)


def test_a_hanging_rank_is_killed_and_found() -> None:
    run_ranks(_who, 1, 0)  # the server is up now: its start does not count
    with pytest.raises(RankTimeoutError, match="from rank 1") as caught:
        run_ranks(_rank_one_waits, 2, timeout_seconds=3)
    assert "_wait_in_vain" in str(caught.value)


def _unsendable(world: World) -> Any:
    return lambda: world


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(RankError, match="rank 0 raised"):
        run_ranks(_unsendable, 1)
