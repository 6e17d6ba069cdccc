"""Ranks, collectives and the stop flag, on real gloo ranks."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from stacking_ds.distributed import process_group
from stacking_ds.distributed.process_group import agree
from stacking_ds.distributed.world import StopFlag, World
from stacking_ds.errors import AgreedError, ConfigError, DataError, LostRankError, LostRankToldError
from stacking_ds.process.stop_signals import StopRequest
from tests.ranks import run_ranks


def _collectives(world: World) -> dict[str, Any]:
    return {
        "sum": world.sum([world.rank, 1]),
        "any": world.any(world.rank == 1),
        "none": world.any(False),
        "gather": world.gather({"rank": world.rank}),
        "broadcast": world.broadcast(f"from {world.rank}"),
    }


def test_collectives_agree_on_every_rank() -> None:
    expected = {
        "sum": [3.0, 3.0],
        "any": True,
        "none": False,
        "gather": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        "broadcast": "from 0",
    }
    assert run_ranks(_collectives, 3) == [expected] * 3


def _failing_first_rank(world: World) -> tuple[str, bool]:
    def fail() -> None:
        raise DataError(f"rank {world.rank} found nothing")

    try:
        world.on_first(fail)
    except DataError as error:
        return str(error), isinstance(error, AgreedError)
    return "nothing was raised", False


def test_an_error_on_the_first_rank_reaches_all() -> None:
    assert run_ranks(_failing_first_rank, 2) == [("rank 0 found nothing", True)] * 2


def _one_rank_is_signalled(world: World, number: signal.Signals) -> list[bool]:
    with StopRequest() as request:
        request.hold_all()
        stop = StopFlag(world, request)
        before = stop.agreed()
        if world.rank == 1:
            os.kill(os.getpid(), number)
        return [before, stop.agreed()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all(number: signal.Signals) -> None:
    assert run_ranks(_one_rank_is_signalled, 2, number) == [[False, True]] * 2


def _signals(world: World) -> list[bool]:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    with StopRequest() as request:
        first = signal.getsignal(signal.SIGTERM) == before[1]
        os.kill(os.getpid(), signal.SIGUSR1)  # would end the process
        request.hold_all()
        made = request.made
    after = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    return [first, made, after == before]


def test_slurms_signal_is_held_from_the_start_and_the_others_once_a_stop_saves() -> None:
    assert run_ranks(_signals, 1) == [[True, True, True]]


def _second_interrupt(world: World) -> str:
    with StopRequest() as request:
        request.hold_all()
        os.kill(os.getpid(), signal.SIGINT)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            return "interrupted at once"
    return "still running"


def test_a_second_interrupt_is_immediate() -> None:
    assert run_ranks(_second_interrupt, 1) == ["interrupted at once"]


SOON = timedelta(seconds=5)


def _store(timeout_seconds: float = 5.0, **told: str) -> Any:
    """What the other ranks have said of themselves: r1="nccl node7"."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=timeout_seconds))
    for rank, text in told.items():
        store.set(f"rank/{rank[1:]}", text)
    return store


def test_ranks_that_are_alike_agree() -> None:
    store = _store(r1="gloo node7 ")
    agree(store, 0, 2, "gloo", None, SOON)
    agree(store, 1, 2, "gloo", None, SOON)


def test_ranks_that_do_not_all_see_gpus_are_told_at_once() -> None:
    store = _store(r1="gloo node7 ")
    with pytest.raises(ConfigError, match=r"rank 1 on node7 .1 of 2 ranks.* sees no GPU, while"):
        agree(store, 0, 2, "nccl", None, SOON)
    with pytest.raises(ConfigError, match="mend the driver") as caught:
        agree(store, 1, 2, "gloo", None, SOON)
    assert isinstance(caught.value, AgreedError)


def test_a_rank_that_cannot_take_part_is_not_waited_for() -> None:
    store = _store(r1="gloo node7 local rank 3 has no GPU", r2="gloo node7 ")
    for rank in (0, 2):
        with pytest.raises(ConfigError, match="rank 1 on node7: local rank 3 has no GPU"):
            agree(store, rank, 3, "gloo", None, SOON)


def test_who_does_not_come_is_named() -> None:
    store = _store(0.2, r1="gloo node7 ")
    with pytest.raises(LostRankError, match=r"2 of 4 ranks have not come in time: 2, 3; .*node7"):
        agree(store, 0, 4, "gloo", None, SOON)
    with pytest.raises(LostRankError, match="2 of 4 ranks") as caught:
        agree(store, 1, 4, "gloo", None, SOON)
    assert isinstance(caught.value, LostRankToldError), "rank 0 says it"


def test_half_a_launcher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        process_group.start()


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--master_port"):
            process_group.start()
    process_group.stop()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun here")
def test_ranks_find_one_another_under_mpirun() -> None:
    program = (
        "from stacking_ds.distributed import process_group\n"
        "from stacking_ds.process import launchers\n"
        "size = launchers.world_size_from_environment()\n"
        "rank = launchers.rank_from_environment()\n"
        "world = process_group.start()\n"
        "ranks = world.gather((rank, world.size, world.local_rank, world.local_size, size))\n"
        "world.is_first and print(ranks)\n"
        "process_group.stop()\n"
    )
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]
    done = subprocess.run(
        [*command, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["[(0, 2, 0, 2, 2), (1, 2, 1, 2, 2)]"], done.stderr


def test_srun_without_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(ConfigError, match="let containers pass"):
        process_group.start()
