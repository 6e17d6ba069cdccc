"""`stacking-ds bench lamb`: what it measures is there, and is what it says."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stacking_ds.bench import lamb as bench_lamb
from stacking_ds.bench.lamb import Sizes, count_launches, measure_gpu
from stacking_ds.bench.lamb_rivals import Tensors, our_step, our_step_by_group
from stacking_ds.bench.lamb_table import lamb_table, lamb_targets
from stacking_ds.bench.lamb_traffic import measure_communication
from stacking_ds.bench.targets import Target
from stacking_ds.cli import main
from stacking_ds.distributed.world import World
from stacking_ds.optim.lamb.blocked import BlockedLamb
from stacking_ds.optim.lamb.optimizer import _KERNELS, Lamb
from stacking_ds.sharding.fragments import Shard
from tests.ranks import run_ranks

SIZES = Sizes(hidden_size=16, layers=2, vocab_size=40)
CPU = torch.device("cpu")
GROUPS = 2 * (SIZES.layers + 1)
LEFT_OUT = {"not_measured": "left out"}
ABSENT = {"communication": LEFT_OUT, "cpu": LEFT_OUT, "gpu": LEFT_OUT}


def _targets(**parts: Any) -> dict[str, Target]:
    return {target.name: target for target in lamb_targets({**ABSENT, **parts})}


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPU prints")
def test_the_command_measures_all_that_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert main(["bench", "lamb", "--quick", f"--json={path}"]) == 0
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert {"command", "commit", "processor", "torch", "deepspeed"} <= set(found["machine"])
    traffic = found["communication"]
    assert (traffic["ranks"], [case["zero_stage"] for case in traffic["cases"]]) == (
        2,
        [0, 1, 2, 3],
    )
    expected = [{"operation": "allreduce", "bytes": 2 * traffic["parameter_tensors"] * 8}]
    for case in traffic["cases"]:
        assert case["parameter_groups"] == 2 * (traffic["layers"] + 1)
        assert case["calls"] == (case["parameter_groups"] if case["zero_stage"] else 1)
        assert case["collectives"] == (expected if case["zero_stage"] else [])
    cpu = found["cpu"]
    for name in ("loop", "blocked", "copy"):
        assert 0 < cpu["seconds"][name]["minimum"] <= cpu["seconds"][name]["median"]
        assert cpu["seconds"][name]["system_of_minimum"] >= 0
    by_hand = 42 * cpu["parameters"] / (1e9 * cpu["copy_gb_per_second"])
    assert cpu["floor_seconds"] == pytest.approx(by_hand)
    assert 0 < cpu["floor_seconds"] < cpu["seconds"]["blocked"]["minimum"]
    assert found["gpu"] == {"not_measured": "no GPU"}
    verdicts = {target["name"]: target["verdict"] for target in found["targets"]}
    assert {verdict for name, verdict in verdicts.items() if name.startswith("GPU")} == {
        "not measured"
    }
    assert verdicts["all-reduces of a step at ZeRO 1, 2, 3"] == "met"
    for said in ("Communication: what", "CPU: 0.2 M parameters", "GPU: not measured: no GPU"):
        assert said in printed
    for target in found["targets"]:
        assert f"{target['name']}: target {target['relation']} {target['limit']:g}: " in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only=cpu,everything"], "--only=cpu,everything: 'everything' is none of communication"),
        (["--rounds=0"], "--rounds=0 must be at least 1"),
        (["--hidden-size=0"], "hidden_size must be at least 1, not 0"),
        (["--layers=0"], "num_hidden_layers must be at least 1, not 0"),
        (["--only=cpu", "--deepspeed-fused-lamb"], "add gpu to --only"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "lamb", "--quick", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


def test_a_launchers_ranks_measure_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stacking_ds.bench.launch.under_launcher", lambda: True)
    assert main(["bench", "lamb", "--quick"]) == 2
    assert "under a launcher say --only=communication" in capsys.readouterr().err


def test_parts_left_out_are_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stacking_ds.bench.launch.run_on_ranks", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(bench_lamb, "measure_cpu", None)
    assert main(["bench", "lamb", "--quick", "--only=gpu", f"--json={tmp_path / 'found'}"]) == 0
    found = json.loads((tmp_path / "found").read_text())
    assert found["cpu"] == found["communication"] == {"not_measured": "left out by --only"}
    assert "CPU: not measured: left out by --only" in capsys.readouterr().out


# -------------------------------------------------------------------- communication


def _with_a_talkative_optimizer(world: World) -> list[dict[str, Any]]:
    step = Lamb.step

    def one_more(optimizer: Lamb, closure: None = None) -> None:
        step(optimizer)
        dist.all_reduce(torch.zeros(2, dtype=torch.float64))

    Lamb.step = one_more  # type: ignore[method-assign]
    by_group = measure_communication(world, [0, 1])

    def gathering(optimizer: Lamb, closure: None = None) -> None:
        step(optimizer)
        if not optimizer._offered:
            dist.all_gather([torch.zeros(3), torch.zeros(3)], torch.zeros(3))

    Lamb.step = gathering  # type: ignore[method-assign]
    return [by_group, measure_communication(world, [3])]


def test_what_an_optimizer_sends_too_much_is_noticed() -> None:
    by_rank = run_ranks(_with_a_talkative_optimizer, 2)
    assert by_rank[0] == by_rank[1]  # every rank knows all
    by_group, gathering = by_rank[0]
    unsharded, sharded = by_group["cases"]
    small = {"operation": "allreduce", "bytes": 16}
    assert unsharded["collectives"] == [small]
    groups = sharded["parameter_groups"]
    assert sharded["collectives"].count(small) == groups
    assert len(sharded["collectives"]) == groups + 1
    targets = _targets(communication=by_group)
    for name, value in (
        ("collectives of a step at ZeRO 0", 1),
        ("all-reduces of a step at ZeRO 1, 2, 3", groups + 1),
        (
            "bytes of them for each parameter tensor",
            16 + 16 * groups / by_group["parameter_tensors"],
        ),
    ):
        assert (targets[name].value, targets[name].verdict) == (pytest.approx(value), "MISSED")
    other = gathering["cases"][0]["collectives"]
    assert other[1:] == [{"operation": "allgather", "bytes": 24}]
    assert _targets(communication=gathering)["other collectives there"].verdict == "MISSED"


# -------------------------------------------------------------------------- targets


def test_a_step_that_sends_nothing_where_it_must_misses_the_target() -> None:
    reduce = {"operation": "allreduce", "bytes": 32}
    cases = [
        {"zero_stage": stage, "collectives": [] if stage == 2 else [reduce]} for stage in (1, 2, 3)
    ]
    targets = _targets(communication={"cases": cases, "parameter_tensors": 2})
    reduces = targets["all-reduces of a step at ZeRO 1, 2, 3"]
    assert (reduces.value, reduces.verdict) == (0, "MISSED")
    assert targets["bytes of them for each parameter tensor"].value == 0


def _gpu_figures(**changes: Any) -> dict[str, Any]:
    def step(device: float, kernels: int | None) -> dict[str, Any]:
        times = {"minimum": device, "median": device}
        wall = {"minimum": device + 1e-4, "median": device + 1e-4}
        counts = {"host_is_ahead": True, "kernels": kernels, "copies": 2}
        return {"device_seconds": times, "host_seconds": times, "wall_seconds": wall, **counts}

    steps = {"triton": step(1.2e-3, 4), "triton_by_group": step(1.3e-3, 5), "apex": step(2e-3, 30)}
    steps["deepspeed"] = step(3e-3, 600)
    return {
        "device": "NVIDIA H200",
        "rounds": 50,
        "steps": {**steps, **changes.pop("steps", {})},
        "synchronisation": None,
        "parameters": 110_000_000,
        "parameter_tensors": 206,
        "copy_gb_per_second": 4300.0,
        "floor_seconds": 1e-3,
        **changes,
    }


def test_targets_are_met_or_missed() -> None:
    met = lamb_targets({**ABSENT, "gpu": _gpu_figures()})
    assert {target.verdict for target in met if target.name.startswith("GPU")} == {"met"}
    slow = _gpu_figures(floor_seconds=0.7e-3, synchronisation="RuntimeError: called a …")
    slow["steps"]["triton"] |= {"kernels": 13}
    slow["steps"]["apex"]["device_seconds"]["median"] = 1.5e-3
    slow["steps"]["deepspeed"] = {"not_measured": "OSError: CUDA_HOME does not exist"}
    targets = _targets(
        gpu=slow, cpu={"seconds": {"loop": {"minimum": 1.0}, "blocked": {"minimum": 0.8}}}
    )
    found = {name: (target.value, target.verdict) for name, target in targets.items()}
    assert found["CPU: blocked / plain loop"] == (0.8, "MISSED")
    assert found["GPU: ours / time of 42 B a parameter"] == (pytest.approx(1.714, 1e-3), "MISSED")
    assert found["GPU: wall time from an idle device / floor"] == (pytest.approx(2.0), "MISSED")
    assert found["GPU: kernels of a step, however many calls"] == (13, "MISSED")
    assert found["GPU: waits of the host for the device"] == (1, "MISSED")
    assert found["GPU: apex amp_C.multi_tensor_lamb / ours"] == (pytest.approx(1.25), "MISSED")
    fused = targets["GPU: DeepSpeed FusedLamb / ours"]
    assert (fused.value, fused.verdict) == (None, "not measured")
    assert fused.line().endswith("target >= 2: not measured (OSError: CUDA_HOME does not exist)")
    unseen = _gpu_figures()
    unseen["steps"]["triton"]["kernels"] = None
    assert (
        "torch.profiler saw no kernel"
        in _targets(gpu=unseen)["GPU: kernels of a step, however many calls"].line()
    )


def test_the_table_of_a_gpu() -> None:
    gpu = _gpu_figures(steps={"apex": {"not_measured": "ConfigError: NVIDIA's apex is not there"}})
    gpu["steps"]["deepspeed"]["host_is_ahead"] = False
    text = lamb_table({**ABSENT, "gpu": gpu}, SIZES.__dict__, {"commit": "abc"})
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if "|" in line
    }
    cells = [cell.strip() for cell in rows["ours in Triton, one call"]]
    assert cells[:7] == ["1.200", "1.20", "1.300", "1.20", "1.00", "4", "2"]
    assert "wall: from an idle device to the end of its work" in text
    assert rows["DeepSpeed FusedLamb, bf16 copies"][0].strip() == "3.000*"
    assert "* the host cannot get ahead" in text
    assert "apex amp_C.multi_tensor_lamb: not measured: ConfigError: NVIDIA's apex is not" in text


# ------------------------------------------------------------------ who takes the step


class _Spy(BlockedLamb):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.hypers = 0

    def accumulate(self, items: Any, *arguments: Any) -> None:
        self.calls.append(f"accumulate {len(items)}")
        self.hypers = len({id(item.hyper) for item in items})
        super().accumulate(items, *arguments)

    def apply(self, items: Any, squares_2P: torch.Tensor) -> None:
        self.calls.append(f"apply {len(items)}")
        super().apply(items, squares_2P)


@pytest.mark.parametrize("flat_groups", [False, True])
def test_a_step_is_two_passes_over_all_however_many_calls_it_takes(
    monkeypatch: pytest.MonkeyPatch, flat_groups: bool
) -> None:
    spy = _Spy()
    monkeypatch.setitem(_KERNELS.makers, "triton", lambda device: spy)
    tensors = Tensors.of(SIZES.config, CPU, flat_groups=flat_groups)
    assert tensors.numel == SIZES.config.num_parameters
    count = len(tensors.shards)
    assert (count == GROUPS) == flat_groups
    by_group = our_step_by_group(tensors, "triton")
    tensors.require_stepped(by_group if flat_groups else our_step(tensors, "triton")[1])
    assert spy.calls == [f"accumulate {count}", f"apply {count}"]
    assert spy.hypers == GROUPS, "a group's numbers are to be sent once"


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (lambda shard: None, "left weights as they were"),
        (lambda shard: shard.flat.add_(1.0), "stale bf16 copies"),
        (lambda shard: shard.flat.fill_(float("nan")), "not finite"),
    ],
)
def test_a_step_that_does_not_do_its_work_is_not_timed(broken: Any, what: str) -> None:
    tensors = Tensors.of(SIZES.config, CPU, flat_groups=False)

    @torch.no_grad()
    def step() -> None:
        for shard in tensors.shards:
            broken(shard)

    with pytest.raises(AssertionError, match=what):
        tensors.require_stepped(step)


# ------------------------------------------------------- the GPU part, without a GPU


class _Event:
    """Of a device that is behind the host from the second try on."""

    queries = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        _Event.queries += 1
        return _Event.queries == 1

    def elapsed_time(self, end: "_Event") -> float:
        return 2.0


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU of straw: the sync debug modes that were set, in order."""
    modes: list[str] = []
    monkeypatch.setattr(_Event, "queries", 0)
    monkeypatch.setattr(bench_lamb, "_gpu", lambda: CPU)
    monkeypatch.setitem(bench_lamb._COPY_BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(_KERNELS.makers, "triton", lambda device: BlockedLamb())
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "straw")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def _profiled(monkeypatch: pytest.MonkeyPatch, events: Sequence[Any]) -> None:
    class Profile:
        def __init__(self, activities: Any) -> None: ...
        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *exception: object) -> None: ...
        def events(self) -> Sequence[Any]:
            return events

    monkeypatch.setattr(bench_lamb, "profile", Profile)


def _event(name: str, device: str = "CUDA", annotation: bool = False) -> Any:
    return SimpleNamespace(
        name=name, device_type=SimpleNamespace(name=device), is_user_annotation=annotation
    )


EVENTS = [
    _event("aten::zeros", "CPU"),
    _event("Optimizer.step#Lamb.step", annotation=True),
    _event("Memcpy HtoD (Pinned -> Device)"),
    _event("Memset (Device)"),
    _event("accumulate_kernel"),
]


def test_launches_are_kernels_on_the_device() -> None:
    assert count_launches(EVENTS) == {"kernels": 2, "copies": 1}
    assert count_launches(EVENTS[:2]) == {"kernels": None, "copies": None}


def _fused_lamb(
    p: torch.Tensor, out: Any, m: Any, v: Any, grad: torch.Tensor, lr: float, *_: Any
) -> Any:
    assert grad.dtype == p.dtype == torch.float32
    p.sub_(grad, alpha=lr + 1.0)
    return torch.tensor(1.0)


def _multi_tensor_lamb(chunk: int, noop: Any, lists: list[list[torch.Tensor]], *_: Any) -> None:
    assert len({len(tensors) for tensors in lists}) == 1
    for gradient, weight in zip(*lists[:2], strict=True):
        weight.sub_(gradient)


def test_all_who_can_step_are_timed(monkeypatch: pytest.MonkeyPatch, no_gpu: list[str]) -> None:
    amp_c = ModuleType("amp_C")
    vars(amp_c).update(multi_tensor_lamb=_multi_tensor_lamb, multi_tensor_l2norm=lambda: None)
    monkeypatch.setitem(sys.modules, "amp_C", amp_c)
    builder = SimpleNamespace(load=lambda: SimpleNamespace(lamb=_fused_lamb))
    monkeypatch.setattr("deepspeed.ops.lamb.fused_lamb.FusedLambBuilder", lambda: builder)
    _profiled(monkeypatch, EVENTS)
    found = measure_gpu(SIZES, 1, fused_lamb=True)
    assert set(found["steps"]) == {"triton", "triton_by_group", "apex", "deepspeed"}
    for step in found["steps"].values():
        assert (step["kernels"], step["copies"]) == (2, 1)
        assert step["device_seconds"] == {"minimum": 2e-3, "median": 2e-3}
        assert step["host_seconds"]["minimum"] > 0
        assert 0 < step["wall_seconds"]["minimum"] <= step["wall_seconds"]["median"]
    assert (found["rounds"], found["parameters"]) == (10, SIZES.config.num_parameters)
    assert found["copy_gb_per_second"] == pytest.approx(2 * 2**12 / 2e-3 / 1e9)
    # one try more than there were measurements: the first found the device ahead
    assert _Event.queries == 5 * 10 + 1
    assert found["synchronisation"] is None
    assert no_gpu == ["error", "default"]
    text = lamb_table({**ABSENT, "gpu": found}, SIZES.__dict__, {})
    assert "GPU: straw, 0.0 M parameters" in text


def test_rivals_that_are_not_there_say_why(
    monkeypatch: pytest.MonkeyPatch, no_gpu: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", None)
    _profiled(monkeypatch, [])
    steps = measure_gpu(SIZES, 1, fused_lamb=False)["steps"]
    assert "apex" in steps["apex"]["not_measured"]
    assert "--deepspeed-fused-lamb" in steps["deepspeed"]["not_measured"]
    assert steps["triton"]["kernels"] is None
    builder = SimpleNamespace(load=lambda: (_ for _ in ()).throw(OSError("no nvcc\nand more")))
    monkeypatch.setattr("deepspeed.ops.lamb.fused_lamb.FusedLambBuilder", lambda: builder)
    steps = measure_gpu(SIZES, 1, fused_lamb=True)["steps"]
    assert steps["deepspeed"]["not_measured"] == "OSError: no nvcc"


def test_a_step_that_waits_is_told(monkeypatch: pytest.MonkeyPatch, no_gpu: list[str]) -> None:
    class Waiting(BlockedLamb):
        def apply(self, items: Sequence[Any], squares_2P: torch.Tensor) -> None:
            if no_gpu == ["error"]:
                raise RuntimeError("called a synchronizing CUDA operation")
            super().apply(items, squares_2P)

    class Busy(_Event):
        def query(self) -> bool:
            return True

    monkeypatch.setitem(_KERNELS.makers, "triton", lambda device: Waiting())
    monkeypatch.setattr(torch.cuda, "Event", Busy)
    _profiled(monkeypatch, EVENTS)
    found = measure_gpu(SIZES, 1, fused_lamb=False)
    assert found["synchronisation"] == "RuntimeError: called a synchronizing CUDA operation"
    assert no_gpu == ["error", "default"]
    assert not found["steps"]["triton"]["host_is_ahead"]


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert main(["bench", "lamb", "--quick", "--only=gpu", f"--json={path}"]) == 0
    found = json.loads(path.read_text())["gpu"]
    ours = found["steps"]["triton"]
    assert ours["host_is_ahead"]
    assert found["synchronisation"] is None
    for step in ("triton", "triton_by_group"):
        assert 1 <= found["steps"][step]["kernels"] <= 12
        assert 0 < found["steps"][step]["device_seconds"]["minimum"] < 1
        assert 0 < found["steps"][step]["wall_seconds"]["minimum"] < 1


def test_shards_have_bf16_copies_and_gradients() -> None:
    tensors = Tensors.of(SIZES.config, CPU, flat_groups=True)
    for shard in tensors.shards:
        assert isinstance(shard, Shard)
        assert shard.low is not None
        assert shard.low.dtype == torch.bfloat16
        assert sum(span.numel for span in shard.spans) == shard.flat.numel()
    assert len(tensors.gradients) == len(tensors.shards)
