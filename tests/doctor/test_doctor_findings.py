"""What `stacking-ds doctor` makes of facts: the odd nodes are named, all of them, in few words."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.console import join_names
from stacking_ds.doctor import checks, facts
from stacking_ds.doctor.checks import Finding
from stacking_ds.doctor.facts import NodeFacts, RankFacts, nearest_existing
from stacking_ds.doctor.trials import AllReduce, Answer, Matmul, Probing
from stacking_ds.train.plan import open_plan
from tests.runs import small_recipe
from tests.token_shards import make_shards

GIB = 1 << 30
REPOSITORY = Path(__file__).parents[2]


def _node(number: int, **known: object) -> NodeFacts:
    return NodeFacts.model_validate({"host": f"node{number}", "rank": 8 * number, **known})


def _nodes(*nodes: NodeFacts) -> dict[str, NodeFacts]:
    return checks.by_name(nodes)


# -------------------------------------------------------------------------- comparing


def _versions(
    told: Mapping[str, Mapping[str, str]], problems: Mapping[str, str] | None = None
) -> Finding:
    """What is found of the nodes that tell these versions or have such problems."""
    nodes = {
        name: _node(
            number,
            versions=values,
            problems={"versions": problems[name]} if problems and name in problems else {},
        )
        for number, (name, values) in enumerate(told.items())
    }
    return checks.alike(nodes)[0]


values = st.lists(st.sampled_from("abcde"), min_size=1, max_size=40)


@given(values, values)
def test_exactly_the_odd_nodes_are_blamed(torch: list[str], numpy: list[str]) -> None:
    count = min(len(torch), len(numpy))
    told = {f"n{i}": {"torch": torch[i], "numpy": numpy[i]} for i in range(count)}
    found = _versions(told)
    expected = set()
    for name in ("torch", "numpy"):
        counts = Counter(values[name] for values in told.values())
        usual = next(value for value in counts if counts[value] == max(counts.values()))
        expected |= {node for node, values in told.items() if values[name] != usual}
    assert set(found.nodes) == expected
    assert len(found.nodes) == len(expected)
    assert found.verdict == ("FAILED" if expected else "ok")
    assert bool(found.remedy) == bool(expected)


@given(values, st.sets(st.integers(0, 39)))
def test_nodes_with_a_problem_are_blamed_and_not_compared(torch: list[str], ill: set[int]) -> None:
    names = [f"n{i}" for i in range(len(torch))]
    problems = {names[i]: "broken" for i in ill if i < len(names)}
    told = {
        name: {} if name in problems else {"torch": value}
        for name, value in zip(names, torch, strict=True)
    }
    found = _versions(told, problems)
    well = {name: value["torch"] for name, value in told.items() if value}
    usual = Counter(well.values()).most_common(1)
    odd = {node for node, value in well.items() if value != usual[0][0]}
    assert set(found.nodes) == odd | set(problems)
    assert (found.verdict == "FAILED") == bool(odd or problems)


def test_the_words_for_it() -> None:
    told = {f"node{i}": {"torch": "2.13.0", "numpy": "2.4"} for i in range(4)}
    told["node2"] = {"torch": "2.12.0", "numpy": "2.4"}
    assert _versions(told).text == ("node2: torch 2.12.0, the other 3 nodes 2.13.0")
    told["node3"] = {"torch": "2.12.0"}
    assert _versions(told).text == (
        "node2 and node3: torch 2.12.0, the other 2 nodes 2.13.0; "
        "node3: numpy missing, the other 3 nodes 2.4"
    )
    two = {"node0": {"torch": "2.13.0"}, "node1": {"torch": "2.12.0"}}
    assert _versions(two).text == "node1: torch 2.12.0, node0 2.13.0"
    everywhere = dict.fromkeys(two, "no such package")
    assert _versions(two, everywhere).text.startswith("all 2 nodes: no such package")


@pytest.mark.parametrize("distinct", [1, 2, 4096])
def test_thousands_of_nodes_take_few_words(distinct: int) -> None:
    nodes = _nodes(
        *(
            _node(
                number,
                versions={"torch": f"2.{number % distinct}"},
                code_sha256=f"{number % distinct}",
                free_bytes=number * GIB,
                checkpoint_bytes=2048 * GIB,
                problems={"data": f"no {'x' * 1000} {number % distinct}"},
            )
            for number in range(4096)
        )
    )
    for finding in checks.alike(nodes):
        assert len(finding.text) < 2000
        assert len(set(finding.text.replace(",", " ").replace(":", " ").split()) & set(nodes)) <= 12
    by_check = {finding.check: finding for finding in checks.alike(nodes)}
    assert len(by_check["data"].nodes) == 4096
    assert len(by_check["disk space"].nodes) == 2048
    assert "and 2,045 more" in by_check["disk space"].text
    expected = 4096 - 4096 // distinct
    assert len(by_check["versions"].nodes) == len(by_check["code"].nodes) == expected


def test_names_are_few() -> None:
    assert join_names(["a"]) == "a"
    assert join_names(["a", "b", "c"]) == "a, b and c"
    assert join_names([str(number) for number in range(1234)]) == "0, 1, 2 and 1,231 more"


# ------------------------------------------------------------------------------ nodes


def test_nodes_of_one_name_are_told_apart() -> None:
    same = [_node(0), _node(1).model_copy(update={"host": "node0"}), _node(2)]
    assert list(_nodes(*same)) == ["node0 (rank 0)", "node0 (rank 8)", "node2"]


def test_a_record_of_another_version_is_understood() -> None:
    older = NodeFacts.model_validate({"host": "old", "rank": 8, "what_it_was_called_then": 1})
    nodes = _nodes(_node(0, versions={"torch": "2.13.0"}, code_sha256="a"), older)
    versions, code = checks.alike(nodes)[:2]
    assert versions.text == "old: torch missing, node0 2.13.0"
    assert code.nodes == ("old",)


def test_the_files_that_differ_are_named() -> None:
    here = {"a.py": "1", "b.py": "2"}
    there = {"a.py": "1", "b.py": "3", "c.py": "4"}
    nodes = [_node(number, code_sha256="x", code_files=here) for number in range(3)]
    nodes[1] = _node(1, code_sha256="y", code_files=there)
    [code] = checks.alike(_nodes(*nodes))
    assert code.text == "node1: b.py and c.py, other than on the other 2 nodes"


@pytest.mark.parametrize(
    ("free_gib", "kept_gib", "verdict", "blamed"),
    [(9, 0, "ok", ()), (8, 0, "warning", ("node1",)), (8, 2, "ok", ()), (2, 7, "ok", ()),
     (1, 8, "FAILED", ("node1",))],
)  # fmt: skip
def test_room_for_one_checkpoint_and_for_all(
    free_gib: int, kept_gib: int, verdict: str, blamed: tuple[str, ...]
) -> None:
    sizes = {"checkpoint_bytes": 2 * GIB, "run_bytes": 9 * GIB, "kept_bytes": kept_gib * GIB}
    nodes = _nodes(
        _node(0, free_bytes=50 * GIB, **sizes), _node(1, free_bytes=free_gib * GIB), _node(2)
    )
    [space] = [each for each in checks.alike(nodes) if each.check == "disk space"]
    assert (space.verdict, space.nodes) == (verdict, blamed)


def test_what_checkpoints_take_is_what_is_kept_of_them(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_shards(shards, [[5, 6, 7]] * 12)
    plan = open_plan(small_recipe(tmp_path, shards, "checkpoint.keep_last=3"))
    one, two, four = (12 * plan.model_config(depth).num_parameters for depth in (1, 2, 4))
    found = facts._of_plan(plan)
    assert found["checkpoint_bytes"] == four
    assert found["run_bytes"] == one + two + (3 + 1) * four


def test_scratch_space_is_told_by_place() -> None:
    enough = {"/tmp": 2 * GIB, "/dev/shm": GIB}
    nodes = _nodes(
        _node(0, scratch_bytes=enough),
        _node(1, scratch_bytes={"/tmp": GIB // 2, "/dev/shm": GIB}),
        _node(2, scratch_bytes={"/tmp": 2 * GIB, "/dev/shm": 32 << 20}),
    )
    [scratch] = [
        e for e in checks.sufficient_on_each_node(nodes, RANKS) if e.check == "temporary space"
    ]
    assert scratch.text == ("node1: 512.00 MiB free in /tmp; node2: 32.00 MiB free in /dev/shm")
    assert (scratch.verdict, scratch.nodes) == ("warning", ("node1", "node2"))


RANKS = [RankFacts(host="node0", rank=rank, threads=4, core_mask="ff") for rank in range(2)]


def _devices(*nodes: NodeFacts) -> tuple[str, str]:
    [found] = [
        e for e in checks.sufficient_on_each_node(_nodes(*nodes), RANKS) if e.check == "devices"
    ]
    return found.verdict, found.text


def test_more_ranks_than_gpus_is_a_failure() -> None:
    gpus = {"gpus": "8 x H100, 80 GiB", "gpu_count": 8}
    assert _devices(_node(0, local_size=8, **gpus)) == ("ok", "8 x H100, 80 GiB")
    verdict, text = _devices(_node(0, local_size=8, **gpus), _node(1, local_size=9, **gpus))
    assert (verdict, text) == ("FAILED", "node1: 9 ranks on 8 GPUs")


@pytest.mark.parametrize(
    ("threads", "masks", "verdict"),
    [
        ((4, 4), ("ff", "ff"), "ok"),
        ((4, 5), ("ff", "ff"), "warning"),
        ((4, 4), ("f0", "0f"), "ok"),
        ((4, 4), ("0f", "0f"), "warning"),
    ],
)
def test_threads_are_counted_against_the_cores_of_their_node(
    threads: tuple[int, int], masks: tuple[str, str], verdict: str
) -> None:
    ranks = [
        RankFacts(host="node0", rank=rank, threads=threads[rank], core_mask=masks[rank])
        for rank in range(2)
    ]
    found = checks.sufficient_on_each_node(_nodes(_node(0), _node(1)), ranks)
    assert [each.verdict for each in found if each.check == "cores"] == [verdict]


def test_cores_are_no_matter_beside_gpus() -> None:
    ranks = [RankFacts(host="node0", rank=0, threads=99, core_mask="1")]
    nodes = _nodes(_node(0, gpus="1 x H100, 80 GiB", gpu_count=1))
    assert "cores" not in {each.check for each in checks.sufficient_on_each_node(nodes, ranks)}


def test_the_code_is_that_of_the_files() -> None:
    found = facts._code()
    for name in (
        "stacking_ds/train/loop.py",
        "ds_configs/zero1.json",
        "ds_configs/recipes/demo.yaml",
    ):
        assert found[name] == hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest()
    assert list(found) == sorted(found)


def test_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing(tmp_path) == tmp_path


# -------------------------------------------------------------------------- together


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    measured = AllReduce(ranks=4, latency_seconds=3e-5, large_bytes=10**9, large_seconds=0.5)
    assert measured.bus_bytes_per_second == pytest.approx(3e9)
    assert "30 µs for 4 bytes, bus bandwidth 3.0 GB/s" in (checks.all_reduce(measured, "nccl").text)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40))
def test_ranks_slower_than_most_are_blamed(speeds: list[float]) -> None:
    measured = [
        Matmul(host=f"n{rank}", rank=rank, dtype="bf16", flops_per_second=speed * 1e14)
        for rank, speed in enumerate(speeds)
    ]
    median = sorted(speeds)[len(speeds) // 2]
    expected = {f"n{rank}" for rank, speed in enumerate(speeds) if speed < 0.8 * median}
    found = checks.matrix_products(measured)
    assert set(found.nodes) == expected
    assert found.verdict == ("warning" if expected else "ok")


def test_a_clock_is_off_only_beyond_doubt() -> None:
    assert checks.clocks({"a": (0.0, 0.0), "b": (1.2, 0.3)}).verdict == "ok"
    found = checks.clocks({"a": (0.0, 0.0), "b": (1.2, 0.1), "c": (-7.0, 0.1)})
    assert (found.verdict, found.nodes) == ("warning", ("b", "c"))
    assert found.text == "b and c: 7.0 s behind rank 0's on c"


NAMES = {0: "node0", 8: "node1"}
PLACE = {"place": "/runs"}


def test_a_run_directory_that_rank_0_cannot_write() -> None:
    found = checks.run_directory(Probing(**PLACE, problem="Permission denied"), NAMES)
    assert (found.verdict, found.nodes) == ("FAILED", ("node0",))
    assert found.text == "node0: cannot write into /runs (Permission denied)"


def test_what_could_not_be_removed_is_told() -> None:
    probing = Probing(**PLACE, answers=(Answer(rank=0), Answer(rank=8)), left="/runs/.x")
    found = checks.run_directory(probing, NAMES)
    assert (found.verdict, found.text) == ("warning", "node0: /runs/.x cannot be removed")
