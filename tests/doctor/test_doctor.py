"""`stacking-ds doctor` on real gloo ranks, each made to look like a node of its own."""

import argparse
import contextlib
import errno
import fcntl
import io
import json
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.commands.doctor import add_doctor, report
from stacking_ds.config.run import RunConfig
from stacking_ds.distributed.world import World
from stacking_ds.doctor import facts, trials
from stacking_ds.doctor.examination import require_alike
from stacking_ds.errors import AgreedError, ConfigError
from stacking_ds.train.plan import open_plan
from tests.ranks import run_ranks
from tests.runs import small_recipe
from tests.token_shards import make_shards

Faults = tuple[Callable[[], None], ...]

DOCUMENTS = [[5, 6, 7]] * 12
_seconds = time.time
_flock = fcntl.flock
_write_text = Path.write_text
_code = facts._code


# ------------------------------------------------------- what can be wrong with a node


def _another_torch() -> None:
    torch.__version__ = "2.12.0"


def _another_trainer() -> None:
    facts._code = lambda: _code() | {"stacking_ds/train/loop.py": "0" * 64}


def _a_full_disk() -> None:
    facts._free_bytes = lambda folder: 1000


def _a_clock_ahead() -> None:
    trials._clock = lambda: _seconds() + 5


def _a_clock_behind() -> None:
    trials._clock = lambda: _seconds() - 5


def _a_lost_gpu() -> None:
    facts._gpus = lambda: ["NVIDIA H100, 80 GiB"] * 7


def _a_hidden_name() -> None:
    del os.environ["GLOO_SOCKET_IFNAME"]
    facts._address_of = lambda host: "127.0.1.1"


def _no_name() -> None:
    del os.environ["GLOO_SOCKET_IFNAME"]

    def unknown(host: str) -> str:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    facts._address_of = unknown


def _few_open_files() -> None:
    facts._open_files = lambda: 1024


def _slow() -> None:
    trials.measure_matmul_peak = lambda device, dtype: 1e9


def _no_memory() -> None:
    def fail(device: torch.device, dtype: torch.dtype) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory\nand much more")

    trials.measure_matmul_peak = fail


def _read_only() -> None:
    def write(path: Path, *arguments: Any, **options: Any) -> int:
        if path.parent.name.startswith(".stacking-ds-doctor"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return _write_text(path, *arguments, **options)

    Path.write_text = write  # type: ignore[method-assign]


def _writes_nobody_else_sees() -> None:
    def write(path: Path, *arguments: Any, **options: Any) -> int:
        # its own cache of a file system has it, and no other node
        return 0 if path.name == "1" else _write_text(path, *arguments, **options)

    Path.write_text = write  # type: ignore[method-assign]


def _locks_of_its_own() -> None:
    fcntl.flock = lambda file, operation: None


def _no_locks() -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock


# -------------------------------------------------------------------------- the tests


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Every node's own folder with the data at the same relative path; the recipe beside them."""
    for rank in range(3):
        make_shards(tmp_path / f"node{rank}" / "shards", DOCUMENTS)
    small_recipe(tmp_path, Path("shards"))
    return tmp_path


def _as_node(world: World, cluster: Path) -> World:
    name = f"node{world.rank}"
    socket.gethostname = lambda: name
    os.chdir(cluster / name)
    # what is measured is no matter here, and the machine may be busy or small
    trials._SECONDS_EACH = 0.01
    trials.measure_matmul_peak = lambda device, dtype: 2e10
    trials._PATIENCE_SECONDS = 1.0
    facts._free_bytes = lambda folder: 1 << 40
    facts._open_files = lambda: 10_000
    return replace(world, local_rank=0, local_size=1)


def _visit(
    world: World,
    cluster: Path,
    faults: Faults = (),
    faulty: int = 1,
    arguments: tuple[str, ...] = ("--recipe", "../small.yaml", "--run-dir", "../run"),
) -> tuple[int, str]:
    """The exit code, and what is printed."""
    world = _as_node(world, cluster)
    if world.rank == faulty:
        for fault in faults:
            fault()
    parser = argparse.ArgumentParser()
    add_doctor(parser)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = report(world, parser.parse_args(arguments))
    return code, printed.getvalue()


def _lines(text: str, verdict: str) -> list[str]:
    """The checks of a verdict, each with all of its lines."""
    paragraphs: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and paragraphs:
            paragraphs[-1] += " " + line.strip()
        else:
            paragraphs.append(" ".join(line.split()))
    return [line for line in paragraphs if re.match(rf"[a-z -]+ {verdict} ", line)]


def _contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_sound_cluster_is_told_so(cluster: Path) -> None:
    before = _contents(cluster)
    results = run_ranks(_visit, 3, cluster)
    assert [code for code, _ in results] == [0, 0, 0]
    assert [text for _, text in results[1:]] == ["", ""]
    printed = results[0][1]
    assert printed.startswith("3 nodes, 3 ranks: node0, node1 and node2\n")
    assert [line.split(" ok")[0] for line in _lines(printed, "ok")] == [
        "versions",
        "code",
        "recipe",
        "data",
        "disk space",
        "run directory",
        "file locks",
        "temporary space",
        "devices",
        "cores",
        "open files",
        "network",
        "clocks",
        "matrix products",
        "all-reduce",
    ]
    assert printed.endswith("\nall is well: a run can start\n")
    assert _contents(cluster) == before, "the run directory was not there, and is not"


def test_all_that_would_stop_a_run_is_told_with_the_node(cluster: Path) -> None:
    before = _contents(cluster)
    faults = (_another_torch, _another_trainer, _a_full_disk, _read_only, _no_memory)
    results = run_ranks(_visit, 3, cluster, faults)
    assert [code for code, _ in results] == [2, 2, 2]
    _assert_told(
        _lines(results[0][1], "FAILED"),
        "versions FAILED node1: torch 2.12.0, the other 2 nodes 2.1",
        "code FAILED node1: stacking_ds/train/loop.py, other than on the other 2 nodes",
        "disk space FAILED node1: 1000 bytes free at the run directory, one checkpoint takes",
        "run directory FAILED node1: cannot write into",
        "matrix products FAILED node1: cannot compute (OutOfMemoryError: CUDA out of memory) ->",
    )
    assert "all-reduce" not in results[0][1], "it would wait for a rank that cannot compute"
    assert results[0][1].endswith(
        "\n5 FAILED, 1 warning: a run would stop, or be wrong, for what has FAILED\n"
    )
    assert _contents(cluster) == before


@pytest.mark.slow
def test_what_a_run_can_live_with_is_a_warning(cluster: Path) -> None:
    faults = (_a_clock_ahead, _a_hidden_name, _few_open_files, _slow, _locks_of_its_own)
    results = run_ranks(_visit, 3, cluster, (*faults, _a_lost_gpu))
    assert [code for code, _ in results] == [0, 0, 0]
    warnings = _lines(results[0][1], "warning")
    _assert_told(
        warnings,
        "file locks warning node1: got a lock that rank 0 holds",
        "devices warning node1: 7 x NVIDIA H100, 80 GiB, the other 2 nodes no GPU",
        "open files warning node1: a process may open 1,024",
        "network warning gloo, met at 127.0.0.1:",
        "clocks warning node1: 5.0 s ahead of rank 0's",
        "matrix products warning node1: 1 GFLOP/s on rank 1, the median is 20 GFLOP/s",
    )
    assert "node1: its own name resolves to 127.0.1.1" in warnings[3]
    assert "-> set GLOO_SOCKET_IFNAME to the interface" in warnings[3]


def _assert_told(lines: list[str], *beginnings: str) -> None:
    assert len(lines) == len(beginnings), lines
    for line, beginning in zip(lines, beginnings, strict=True):
        assert line.startswith(beginning)
        assert " -> " in line, "the remedy"
        assert "node0:" not in line
        assert "node2:" not in line


@pytest.mark.slow
def test_a_node_whose_name_is_unknown_or_whose_clock_is_behind(cluster: Path) -> None:
    results = run_ranks(_visit, 3, cluster, (_no_name, _a_clock_behind), 2)
    network, clocks = _lines(results[0][1], "warning")
    assert "node2: its own name does not resolve (gaierror: " in network
    assert clocks.startswith("clocks warning node2: 5.0 s behind rank 0's")


@pytest.mark.slow
def test_data_is_compared_and_has_to_be_there(cluster: Path) -> None:
    make_shards(cluster / "node1" / "shards", [[4, 4, 4]] * 12)
    [line] = _lines(run_ranks(_visit, 3, cluster)[0][1], "FAILED")
    assert line.startswith("data FAILED node1: data ")
    assert "the other 2 nodes" in line

    (cluster / "node1" / "shards" / "manifest.json").unlink()
    results = run_ranks(_visit, 3, cluster)
    assert {code for code, _ in results} == {2}
    [line] = _lines(results[0][1], "FAILED")
    assert line.startswith("data FAILED node1: shards holds no prepared data")
    assert "recipe" in " ".join(_lines(results[0][1], "ok")), "the recipe itself is the same"


def _visit_with_own_recipe(world: World, cluster: Path, rank: int, value: str) -> tuple[int, str]:
    override = ("--set", value) if world.rank == rank else ()
    arguments = ("--recipe", "../small.yaml", "--run-dir", "../run", *override)
    return _visit(world, cluster, arguments=arguments)


@pytest.mark.slow
def test_recipes_are_compared(cluster: Path) -> None:
    other = run_ranks(_visit_with_own_recipe, 3, cluster, 2, "optimizer.learning_rate=1e-3")
    [line] = _lines(other[0][1], "FAILED")
    assert line.startswith("recipe FAILED node2: recipe ")
    wrong = run_ranks(_visit_with_own_recipe, 3, cluster, 0, "optimizer.learning_rat=1e-3")
    assert {code for code, _ in wrong} == {2}
    [line] = _lines(wrong[0][1], "FAILED")
    assert "recipe FAILED node0: " in line
    assert "did you mean optimizer.learning_rate?" in line


def test_a_run_directory_of_each_node_is_noticed(cluster: Path) -> None:
    arguments = ("--run-dir", "runs/own")
    before = _contents(cluster)
    results = run_ranks(_visit, 3, cluster, (), 1, arguments)
    assert {code for code, _ in results} == {2}
    [line] = _lines(results[0][1], "FAILED")
    assert "run directory FAILED node1 and node2: does not see what rank 0 has written" in line
    assert _contents(cluster) == before


@pytest.mark.slow
def test_rank_0_has_to_see_what_the_nodes_write(cluster: Path) -> None:
    arguments = ("--run-dir", "../run")
    results = run_ranks(_visit, 3, cluster, (_writes_nobody_else_sees,), 1, arguments)
    assert {code for code, _ in results} == {2}
    [line] = _lines(results[0][1], "FAILED")
    assert line.startswith("run directory FAILED node1: writes into ")


@pytest.mark.slow
def test_a_run_directory_that_is_there_is_left_as_it_was(cluster: Path) -> None:
    (cluster / "run").mkdir()
    (cluster / "run" / "config.yaml").write_text("name: x\n")
    before = _contents(cluster)
    [line] = [
        line
        for line in _lines(run_ranks(_visit, 3, cluster)[0][1], "ok")
        if line.startswith("run directory")
    ]
    assert f"all 3 nodes see and write: {cluster}" in line
    assert "where it will be made" not in line
    assert _contents(cluster) == before


@pytest.mark.slow
def test_where_there_are_no_locks_a_run_can_start_and_is_warned(cluster: Path) -> None:
    results = run_ranks(_visit, 3, cluster, (_no_locks,), 0)
    assert {code for code, _ in results} == {0}
    [line] = [line for line in _lines(results[0][1], "warning") if line.startswith("file locks")]
    assert "No locks available" in line


def test_all_of_it_is_written_as_json(cluster: Path) -> None:
    arguments = ("--json", "../doctor.json")
    run_ranks(_visit, 3, cluster, (_another_torch,), 1, arguments)
    assert [path.name for path in cluster.glob("*doctor*")] == ["doctor.json"]
    record = json.loads((cluster / "doctor.json").read_text())
    assert record["failed"] is True
    [versions] = [each for each in record["findings"] if each["verdict"] == "FAILED"]
    assert (versions["check"], versions["nodes"]) == ("versions", ["node1"])
    assert record["nodes"]["node1"]["versions"]["torch"] == "2.12.0"
    assert [each["host"] for each in record["ranks"]] == ["node0", "node1", "node2"]
    assert record["measured"]["all_reduce"]["bus_bytes_per_second"] > 0


def _refused(world: World, cluster: Path, arguments: tuple[str, ...]) -> tuple[str, bool]:
    try:
        _visit(world, cluster, arguments=arguments)
    except ConfigError as error:
        return str(error), isinstance(error, AgreedError)
    return "", False


def test_a_json_file_without_a_folder_is_refused_before_anything_is_measured(cluster: Path) -> None:
    results = run_ranks(_refused, 2, cluster, ("--json", "nowhere/doctor.json"))
    assert [on_all for _, on_all in results] == [True, True]
    assert "nowhere/doctor.json" in results[0][0]


# ---------------------------------------------------------------------- before a run


def _start_train(
    world: World, cluster: Path, config: RunConfig, faults: Faults = ()
) -> tuple[str, bool]:
    """Four ranks on two nodes, the second of which is faulty."""
    name = f"node{world.rank // 2}"
    socket.gethostname = lambda: name
    os.chdir(cluster / name)
    facts._free_bytes = lambda folder: 1 << 40
    # a rank that does not speak for its node is not asked
    if world.rank in (1, 2):
        for fault in faults:
            fault()
    world = replace(world, local_rank=world.rank % 2, local_size=2)
    try:
        require_alike(world, open_plan(config), Path("../run"))
    except ConfigError as error:
        return str(error), isinstance(error, AgreedError)
    return "", False


def test_nodes_that_are_alike_may_start(cluster: Path) -> None:
    config = small_recipe(cluster, Path("shards"))
    assert run_ranks(_start_train, 4, cluster, config) == [("", False)] * 4
    assert not (cluster / "run").exists()


def test_nodes_that_differ_may_not_start(cluster: Path) -> None:
    config = small_recipe(cluster, Path("shards"))
    make_shards(cluster / "node1" / "shards", [[4, 4, 4]] * 12)
    faults = (_another_torch, _another_trainer, _a_full_disk)
    results = run_ranks(_start_train, 4, cluster, config, faults)
    assert len(set(results)) == 1, "the same on every rank"
    message, is_agreed = results[0]
    assert is_agreed
    assert "versions: node1: torch 2.12.0, node0 2." in message
    assert "code: node1: stacking_ds " in message
    assert "data: node1: data " in message
    assert "disk space: node1: 1000 bytes free at the run directory" in message
    assert "recipe" not in message.partition("disk space")[0]
    assert "stacking-ds doctor" in message
