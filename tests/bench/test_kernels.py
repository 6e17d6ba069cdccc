"""`stacking-ds bench kernels`: what it measures is there, and is what it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking_ds.bench import kernels_clock, kernels_operations
from stacking_ds.bench.kernels_attention import attention_flops, measure_attention, packed_lengths
from stacking_ds.bench.kernels_clock import CpuClock, Entrant, GpuClock, race
from stacking_ds.bench.kernels_operations import OPERATIONS, Sizes, measure_operations, subjects
from stacking_ds.bench.kernels_products import measure_products
from stacking_ds.bench.kernels_table import kernel_targets, kernels_table
from stacking_ds.bench.targets import Target
from stacking_ds.cli import main
from stacking_ds.errors import ConfigError
from stacking_ds.kernels.operations import Operations

CPU = torch.device("cpu")
SIZES = Sizes(tokens=24, hidden_size=16, vocab_size=40, dtype=torch.float32)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU measures")
LEFT_OUT = {"not_measured": "left out by --only"}


# ---------------------------------------------------------------------- the command


@without_gpu
def test_the_command_measures_all_that_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert main(["bench", "kernels", "--quick", f"--json={path}"]) == 0
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert {"command", "commit", "processor", "torch"} <= set(found["machine"])
    assert (found["device"], found["precision"], found["summary"]) == ("cpu", "bf16", "minimum")
    rows = found["operations"]["rows"]
    assert {row["operation"] for row in rows} == set(OPERATIONS)
    measured = {(row["operation"], row["pass"], row["form"]) for row in rows if "seconds" in row}
    assert measured == {
        (operation, way, form)
        for operation in OPERATIONS
        for way in ("forward", "backward")
        for form in ("plain", "torch")
    }
    assert all(row["seconds"] > 0 for row in rows if "seconds" in row)
    reasons = {row["form"]: row["not_measured"] for row in rows if "not_measured" in row}
    assert reasons.keys() == {"triton", "compile"}
    assert "NVIDIA GPU" in reasons["triton"]
    assert "--compile" in reasons["compile"]
    attention = {
        (row["form"], row["longest"], row["dropout"]) for row in found["attention"]["rows"]
    }
    assert attention == {
        (form, longest, dropout)
        for form in ("loops", "padded")
        for longest in (128, 512)
        for dropout in (0.0, 0.1)
    }
    assert "no GPU" in found["products"]["not_measured"]
    assert {target["verdict"] for target in found["targets"]} == {"not measured"}
    for said in (
        "Operations: copies at",
        "cross-entropy in place",
        "Attention: 256 tokens",
        "Products: not measured: no GPU",
        "14 targets, all of a GPU: not measured",
    ):
        assert said in printed


@without_gpu
def test_parts_left_out_are_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels_operations, "measure_operations", None)
    path = tmp_path / "figures.json"
    arguments = ["--quick", "--only=attention", "--precision=fp32", f"--json={path}"]
    assert main(["bench", "kernels", *arguments]) == 0
    found = json.loads(path.read_text())
    assert found["operations"] == found["products"] == LEFT_OUT
    assert "Operations: not measured: left out by --only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only=attention,everything"], "'everything' is none of operations, attention"),
        (["--rounds=0"], "--rounds=0 starts at 1"),
        (["--tokens=0"], "--tokens=0 starts at 1"),
        (["--hidden-size=64,0"], "--hidden-size=0 starts at 1"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "kernels", "--quick", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


def test_a_launchers_ranks_are_sent_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stacking_ds.bench.launch.under_launcher", lambda: True)
    assert main(["bench", "kernels", "--quick"]) == 2
    assert "start it without a launcher" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert main(["bench", "kernels", "--quick", f"--json={path}"]) == 0
    found = json.loads(path.read_text())
    assert (found["device"], found["summary"]) == ("cuda", "median")
    triton = [row for row in found["operations"]["rows"] if row["form"] == "triton"]
    assert len(triton) == 2 * len(OPERATIONS)
    assert all(0 < row["seconds"] < 0.1 for row in triton)
    assert all(row["floor_seconds"] > 0 for row in triton)
    forms = {row["form"] for row in found["attention"]["rows"] if "seconds" in row}
    assert {"flash", "padded"} <= forms
    assert {row["form"] for row in found["products"]["rows"]} == {"bf16", "fp8"}


# ---------------------------------------------------------------------- operations


def _operations(**options: Any) -> dict[str, Any]:
    compiled = options.pop("compiled", False)
    return measure_operations((16,), lambda width: SIZES, CPU, CpuClock(), 1, compiled=compiled)


def test_the_floor_is_the_counted_bytes_at_the_speed_of_the_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="Triton's modules count the bytes")

    class Steady(CpuClock):
        def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
            return 2.0, work()

        def copy_bytes(self, working_set_bytes: int) -> int:
            return 1000

    found = measure_operations((16,), lambda width: SIZES, CPU, Steady(), 1, compiled=False)
    assert found["copy_gb_per_second"] == pytest.approx(1e-6)  # 2000 bytes in 2 seconds
    counted = {(row["operation"], row["pass"]): row["bytes"] for row in found["rows"]}
    T, F, H, M, V = 24, 64, 16, SIZES.masked, 40
    of_tensors = {
        ("gelu", "forward"): 2 * T * F,  # x and y
        ("gelu", "backward"): 3 * T * F,  # x, dy and dx
        ("add_norm", "forward"): 4 * T * H,  # x, residual, sum and y
        ("add_norm", "backward"): 4 * T * H,  # sum, dy, dx and d_residual
        ("norm", "forward"): 2 * T * H,
        ("norm", "backward"): 3 * T * H,
        ("embedding", "forward"): 2 * T * H,  # words and y
        ("embedding", "backward"): 3 * T * H,  # words, dy and d_sum
        ("cross_entropy", "forward"): M * V,  # read once
        ("cross_entropy", "backward"): 2 * M * V,  # read and overwritten
    }
    assert of_tensors.keys() == counted.keys()
    small = 4 * (5 * H + 2 * F) + 8 * (5 * T + 1)  # vectors of parameters, statistics and ids
    small += 4 * H * (kernels_operations.TYPES + kernels_operations.POSITIONS)
    for key, numbers in of_tensors.items():
        assert 4 * numbers <= counted[key] <= 4 * numbers + small, key
    for row in found["rows"]:
        assert row["floor_seconds"] == pytest.approx(row["bytes"] / 1000)


def test_without_triton_there_is_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = [row for row in _operations()["rows"] if "seconds" in row]
    assert len(rows) == 4 * len(OPERATIONS)
    assert all(row["floor_seconds"] is None for row in rows)


def test_a_form_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Operations, x_TH: torch.Tensor, norm: Any) -> torch.Tensor:
        return 1.1 * x_TH + norm.weight_H + norm.bias_H

    monkeypatch.setattr(Operations, "norm", wrong)
    with pytest.raises(AssertionError, match="add_norm: torch is off by"):
        _operations()


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_plain_chain_is_what_is_fused(name: str) -> None:
    """With the bias added in the chain or by the product before, and dropout where it belongs."""
    subject = dict(subjects(SIZES, CPU))[name]
    results = []
    for add in (torch.add, kernels_operations._added):
        subject.prepare()
        made = subject.chain(add, 0.0)
        grads = torch.autograd.grad(made, subject.inputs, subject.gradient)
        results.append([made.detach(), *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    dropped = subject.chain(torch.add, 0.5)
    has_dropout = not torch.equal(dropped, results[0][0])
    assert has_dropout == (name in ("add_norm", "embedding"))


def test_logits_are_put_back_before_each_forward_pass() -> None:
    subject = dict(subjects(SIZES, CPU))["cross_entropy"]
    losses = []
    for _ in range(2):
        subject.prepare()
        loss = subject.by(Operations(), 0.0)
        torch.autograd.grad(loss, subject.inputs, subject.gradient)
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------- the clocks


def _entrant(log: list[str], name: str, error: str = "") -> Entrant:
    x = torch.ones(3, requires_grad=True)

    def forward() -> torch.Tensor:
        if error:
            raise ConfigError(error)
        log.append(name)
        return 2 * x

    return Entrant(forward, (x,), torch.ones(3), lambda: log.append(f"prepare {name}"))


def test_all_take_turns_and_one_that_cannot_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_clock, "_WARM_UPS", 1)
    log: list[str] = []
    entrants = {
        "a": _entrant(log, "a"),
        "b": _entrant(log, "b", error="no dropout"),
        "c": _entrant(log, "c"),
    }
    found = race(entrants, CpuClock(), 2, 8000)
    assert found.not_measured == {"b": "ConfigError: no dropout"}
    assert found.seconds.keys() == {"a", "c"}
    turn = ["prepare a", "a", "prepare c", "c"]
    assert log == ["prepare a", "a", "prepare b", "prepare c", "c", *turn, *turn]
    assert found.copy_bytes_per_second > 0


class _Event:
    """Of a device that is behind the host at the first two times only."""

    queries = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        _Event.queries += 1
        return _Event.queries > 2

    def elapsed_time(self, end: "_Event") -> float:
        return 2.0


def test_the_gpus_clock_tells_when_the_host_was_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr(kernels_clock, "_FLUSH_BYTES", 16)
    monkeypatch.setattr(_Event, "queries", 0)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    clock = GpuClock(CPU)
    for _ in range(4):
        assert clock.time(lambda: "result") == (2e-3, "result")
    assert clock.host_was_behind == 2
    assert slept[0] == slept[1] == slept[2] == slept[3] // 2


# ---------------------------------------------------------------------- attention, products


def test_packed_lengths_fill_the_tokens() -> None:
    for tokens, longest in ((1000, 128), (64, 512), (3, 2)):
        lengths = packed_lengths(tokens, longest)
        assert sum(lengths) == tokens
        assert max(lengths) <= longest
        assert min(lengths[:-1], default=longest) >= longest // 4
        assert lengths == packed_lengths(tokens, longest)


def test_attention_flops_are_the_real_tokens() -> None:
    # two products of 2 x 3 x 3 x 64 each, forward and twice that backward, of two heads
    assert attention_flops([3], heads=2) == 3 * 2 * 2 * 2 * 3 * 3 * 64
    assert attention_flops([3, 4], 1) == attention_flops([3], 1) + attention_flops([4], 1)


def test_attention_needs_whole_heads() -> None:
    with pytest.raises(ConfigError, match="--hidden-size=96 must be a multiple"):
        measure_attention(8, 96, (4,), torch.float32, CPU, CpuClock(), 1)


def test_products_are_of_a_layers_four_maps() -> None:
    found = measure_products(16, 16, CPU, CpuClock(), 1)
    shapes = {(row["inputs"], row["outputs"]) for row in found["rows"]}
    assert shapes == {(16, 48), (16, 16), (16, 64), (64, 16)}
    assert {row["form"] for row in found["rows"]} == {"bf16", "fp8"}
    row = next(row for row in found["rows"] if "seconds" in row)
    flops = 2 * 16 * row["inputs"] * row["outputs"]
    speed = flops / row["seconds"]["forward"] / 1e12
    assert row["forward_tflop_per_second"] == pytest.approx(speed)


# ---------------------------------------------------------------------- targets and table


def _row(operation: str, way: str, form: str, seconds: float, width: int = 768) -> dict[str, Any]:
    return {"operation": operation, "hidden_size": width, "pass": way, "form": form,
            "bytes": 4e8, "floor_seconds": 1e-4, "seconds": seconds}  # fmt: skip


def _found(rows: list[dict[str, Any]], device: str = "cuda", **parts: Any) -> dict[str, Any]:
    return {
        "machine": {"commit": "abc"},
        "device": device,
        "precision": "bf16",
        "sizes": {"tokens": 32768, "hidden_size": [768], "vocab_size": 30522, "rounds": 20},
        "summary": "median",
        "times_the_host_was_behind": 0,
        "operations": {"copy_gb_per_second": 4300.0, "rows": rows},
        "attention": LEFT_OUT,
        "products": LEFT_OUT,
        **parts,
    }


def _targets(found: dict[str, Any]) -> dict[str, Target]:
    return {target.name: target for target in kernel_targets(found)}


def test_targets_are_of_the_slowest_width() -> None:
    rows = [
        _row("gelu", "forward", "triton", 1.25e-4),
        _row("gelu", "forward", "triton", 1.6e-4, width=1024),
        _row("gelu", "backward", "triton", 1.25e-4),
        _row("gelu", "forward", "compile", 1.25e-4),
        _row("gelu", "backward", "compile", 1.5e-4),
        {**_row("norm", "forward", "triton", 1.0), "not_measured": "boom"},
    ]
    del rows[-1]["seconds"]
    targets = _targets(_found(rows))
    forward = targets["GPU: bias + GELU, forward: share of the copy's speed"]
    assert (forward.value, forward.verdict) == (pytest.approx(0.625), "MISSED")
    backward = targets["GPU: bias + GELU, backward: share of the copy's speed"]
    assert (backward.value, backward.verdict) == (pytest.approx(0.8), "met")
    # both passes together, of the widths that both have
    against = targets["GPU: bias + GELU: compile / triton"]
    assert (against.value, against.verdict) == (pytest.approx(1.1), "met")
    norm = targets["GPU: LayerNorm, forward: share of the copy's speed"]
    assert (norm.verdict, norm.note) == ("not measured", "boom")
    assert not [name for name in targets if "embeddings" in name and "backward" in name]
    assert len(targets) == 14


def test_without_a_gpu_no_target_is_measured() -> None:
    rows = [_row("gelu", "forward", "torch", 1e-4), _row("gelu", "forward", "compile", 1e-4)]
    for found in (_found(rows, "cpu"), _found([], operations={"not_measured": "left out"})):
        assert {target.verdict for target in kernel_targets(found)} == {"not measured"}
    assert "14 targets, all of a GPU: not measured (no GPU)" in kernels_table(_found(rows, "cpu"))


def test_the_table_of_a_gpu() -> None:
    rows = [
        _row("gelu", "forward", "plain", 3e-4),
        _row("gelu", "forward", "torch", 3e-4),
        _row("gelu", "forward", "triton", 1.25e-4),
        {"operation": "gelu", "hidden_size": 768, "pass": "forward", "form": "compile",
         "bytes": 4e8, "floor_seconds": 1e-4, "not_measured": "no compiler"},
    ]  # fmt: skip
    seconds = {"forward": 2e-3, "backward": 4e-3}
    attention = [
        {"longest": 128, "filled": 0.6, "dropout": 0.1, "form": "flash", "seconds": seconds,
         "tflop_per_second": 150.0},
        {"longest": 128, "filled": 0.6, "dropout": 0.1, "form": "varlen",
         "not_measured": "it has no dropout"},
    ]  # fmt: skip
    speeds = {"forward_tflop_per_second": 700.0, "backward_tflop_per_second": 650.0}
    products = [
        {"inputs": 1024, "outputs": 4096, "form": form, "seconds": both, **speeds}
        for form, both in (("bf16", seconds), ("fp8", {"forward": 1e-3, "backward": 3e-3}))
    ]
    text = kernels_table(
        _found(
            rows,
            attention={"tokens": 32768, "heads": 12, "head_size": 64, "rows": attention},
            products={"tokens": 16384, "rows": products},
            times_the_host_was_behind=3,
        )
    )
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if "|" in line
    ]
    gelu = next(row for row in cells if row[0] == "bias + GELU")
    assert gelu == ["bias + GELU", "768", "forward", "400.0", "100.0", "300.0", "300.0", "125.0",
                    "0.80", "2.40", "2.40"]  # fmt: skip
    assert ["flash", "128", "0.1", "2.000", "4.000", "150.0"] in cells
    assert ["1024 -> 4096", "fp8", "1,000.0", "3,000.0", "700", "650", "1.50"] in cells
    for said in ("compile: not measured: no compiler", "varlen: not measured: it has no dropout",
                 "3 times the GPU waited for the host", "TFLOP/s of both passes"):  # fmt: skip
        assert said in text
