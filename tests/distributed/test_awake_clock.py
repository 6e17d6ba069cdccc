"""What a failure detector counts as time, and what it makes of who waits for a batch."""

import time

import pytest

from stacking_ds.distributed.lost_ranks import AwakeClock, Missing, RankView, find_missing, sentence


def test_a_pause_of_its_own_hardly_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = AwakeClock(longest_gap_seconds=4.0)
    for _ in range(5):
        now[0] += 2.0
        clock.look()
    assert clock.now() == 10.0
    now[0] += 1.5
    assert clock.now() == 11.5, "also between two looks"
    now[0] += 70.0
    assert clock.now() == 14.0, "who reads it first after the pause, without a look"
    assert clock.look() == 14.0
    now[0] += 2.0
    assert clock.look() == 16.0


def _ranks(*loading: bool) -> list[RankView]:
    return [RankView(heard=50.0, moved=1.0, moves=5, loading=one) for one in loading]


@pytest.mark.parametrize(
    ("loading", "missing"),
    [
        ((False, True), Missing("loading", (1,))),
        ((True, True), Missing("loading", (0, 1))),
        ((False, False), Missing("together", (0, 1))),
    ],
)
def test_who_waits_for_a_batch_is_told_from_a_network_that_is_stuck(
    loading: tuple[bool, ...], missing: Missing
) -> None:
    ranks = _ranks(*loading)
    assert find_missing(ranks, 51.0, silence=45.0, timeout=60.0) is None
    assert find_missing(ranks, 62.0, silence=45.0, timeout=60.0) == missing


def test_the_sentence_names_the_loader() -> None:
    missing, ranks = Missing("loading", (1,)), _ranks(False, True)
    assert sentence(missing, ranks, ["one", "two"], 62.0, 7) == (
        "rank 1 on two is without a batch after step 7: the loader has handed over none for 61 s; "
        "its processes are stopped, or hang in the file system of the token shards"
    )
