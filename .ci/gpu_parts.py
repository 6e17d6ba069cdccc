"""What `make gpu-check` proves and measures; a new check is a function and a line in PARTS."""

import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_ground import BUNDLE, ROOT, Ground, PartError, tail

__all__ = ["PARTS", "Figures", "Part", "count_tests", "lamb_figures", "run_figures"]

STAGE_STEPS = (300, 100, 100)  # the demo's with a shorter last stage: four runs have to fit
MOST_KERNELS = 12  # of a LAMB step, however many tensors
MARGIN = 0.1  # in nats below the unigram model's loss; on the CPU these steps reach 0.4

Figures = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """`run` returns figures or raises; with less than `needs_seconds` left it is not started."""

    name: str
    run: Callable[[Ground], Figures]
    needs_seconds: float


def install(ground: Ground) -> Figures:
    wheels = sorted(BUNDLE.glob("*.whl"))
    ground.python(
        *("-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-index", "--no-deps", "--no-cache-dir", "--target", ground.site, *wheels),
        limit_seconds=120,
    )
    return {"wheels": [wheel.name for wheel in wheels]}


def gpu_tests(ground: Ground) -> Figures:
    junit = ground.work / "tests.xml"
    # the other files may import what this machine does not have
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    try:
        ground.python(
            *("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=5"),
            *(f"--junitxml={junit}", *files),
            limit_seconds=240,
        )
    except PartError as error:
        counts = count_tests(junit) if junit.is_file() else "no test ended"
        raise PartError(f"{error}: {counts}", error.output) from None
    counts = count_tests(junit)
    if not counts["passed"]:
        raise PartError(f"no test ran: {counts}")
    return counts


def count_tests(junit: Path) -> Figures:
    """From pytest's JUnit file."""
    suite = next(ElementTree.parse(junit).iter("testsuite"))
    total, failures, errors, skipped = (
        int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
    )
    figures: Figures = {
        "passed": total - failures - errors - skipped,
        "failed": failures + errors,
        "skipped": skipped,
    }
    if skipped:
        figures["skipped_because"] = sorted({e.get("message", "") for e in suite.iter("skipped")})
    return figures


def prepare(ground: Ground) -> Figures:
    cli = "import sys; from stacking_ds.cli import main; sys.exit(main(sys.argv[1:]))"
    output = ground.python(
        *("-c", cli, "prepare", "embedded", "--out", ground.work / "shards"),
        *("--vocab-size", 4096),
        limit_seconds=120,
    )
    return {"shards": tail(output).splitlines()[-1].partition("shards: ")[2]}


def demo(ground: Ground, zero_stage: int) -> Figures:
    """The demo through the launcher, at a ZeRO stage, in bf16, through all its depths."""
    run_dir = ground.work / f"demo-zero{zero_stage}"
    overrides = {
        "data.path": ground.work / "shards",
        "engine.deepspeed": f"zero{zero_stage}",
        "engine.precision": "bf16",
        **{f"stages.{index}.steps": steps for index, steps in enumerate(STAGE_STEPS)},
    }
    ground.python(
        # the launcher's own script lies in a folder that is not on the PATH
        *("-m", "deepspeed.launcher.runner", "--num_gpus", 1, "train.py"),
        *("--recipe", "demo", "--run-dir", run_dir),
        *(word for key, value in overrides.items() for word in ("--set", f"{key}={value}")),
        limit_seconds=100,
    )
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return run_figures([json.loads(line) for line in lines], STAGE_STEPS)


def run_figures(metrics: Sequence[dict[str, Any]], stage_steps: Sequence[int]) -> Figures:
    """A row for each stage, from the lines of a run's metrics.jsonl; speeds are medians.

    Raises:
        PartError: the run did not train through all stages, or did not learn.
    """
    rows = []
    for index in range(len(stage_steps)):
        lines = [line for line in metrics if line["stage"] == index]
        if not lines or lines[-1]["step"] != sum(stage_steps[: index + 1]):
            raise PartError(f"stage {index} was not trained to its end")
        rows.append(_stage_row(lines, stage_steps[index]))
    if not all(math.isfinite(line["train/loss"]) for line in metrics):
        raise PartError("a training loss is not finite")
    unigram, heldout = metrics[-1]["eval/unigram_mlm_loss"], rows[-1]["heldout_mlm_loss"]
    if not heldout < unigram - MARGIN:
        raise PartError(
            f"the held-out loss is {heldout:.4g} in the end; a model of word "
            f"frequencies alone has {unigram:.4g}"
        )
    return {
        "stages": rows,
        "unigram_mlm_loss": unigram,
        "wall_seconds": metrics[-1]["wall_seconds"],
    }


def _stage_row(lines: Sequence[dict[str, Any]], steps: int) -> Figures:
    last = lines[-1]
    return {
        "stage": last["stage"],
        "layers": last["num_hidden_layers"],
        "steps": steps,
        "train_loss": last["train/loss"],
        "heldout_mlm_loss": last["eval/mlm_loss"],
        "tokens_per_second": statistics.median(line["speed/tokens_per_second"] for line in lines),
        "model_flops_utilization": statistics.median(
            line["speed/model_flops_utilization"] for line in lines
        ),
        "boundary_seconds": last["stage/boundary_seconds"],
        "peak_memory_gib": last["memory/peak_gib"],
    }


def bench_lamb(ground: Ground) -> Figures:
    return _bench_lamb(ground, "--only=communication,gpu", limit_seconds=90)


def bench_fused_lamb(ground: Ground) -> Figures:
    """Beside DeepSpeed's FusedLamb, which it has to compile first."""
    options = ("--only=gpu", "--deepspeed-fused-lamb")
    return _bench_lamb(ground, *options, limit_seconds=160, may_build=True)


def _bench_lamb(ground: Ground, *options: str, **limits: Any) -> Figures:
    path = ground.work / "bench-lamb.json"
    ground.python("-m", "stacking_ds", "bench", "lamb", *options, "--json", path, **limits)
    return lamb_figures(json.loads(path.read_text(encoding="utf-8")))


def lamb_figures(found: Figures) -> Figures:
    """A row for each form of the step and for each target, from the bench's JSON.

    Raises:
        PartError: our form launches too many kernels, makes the host wait, or was not measured.
    """
    gpu = found["gpu"]
    if "not_measured" in gpu:
        raise PartError(f"the step on the GPU was not measured: {gpu['not_measured']}")
    for name in ("triton", "triton_by_group"):
        kernels = gpu["steps"][name]["kernels"]
        if kernels is None:
            raise PartError("the kernels of a step were not counted: torch.profiler saw none")
        if kernels > MOST_KERNELS:
            raise PartError(f"{name} launches {kernels} kernels, {MOST_KERNELS} are allowed")
    if gpu["synchronisation"] is not None:
        raise PartError(f"a step makes the host wait for the device: {gpu['synchronisation']}")
    return {
        "copy_gb_per_second": gpu["copy_gb_per_second"],
        "floor_ms": 1e3 * gpu["floor_seconds"],
        "steps": [
            _step_row(name, step, gpu["floor_seconds"]) for name, step in gpu["steps"].items()
        ],
        "targets": [
            {
                "target": target["name"],
                "should_be": f"{target['relation']} {target['limit']:g}",
                "is": "-" if target["value"] is None else target["value"],
                "verdict": f"{target['verdict']} {target['note']}".strip(),
            }
            for target in found["targets"]
        ],
    }


def _step_row(name: str, step: Figures, floor_seconds: float) -> Figures:
    if "not_measured" in step:
        columns = ("host_ms", "wall_ms", "times_the_floor", "kernels", "copies")
        reason = f"not measured: {step['not_measured']}"
        return {"step": name, "device_ms": reason, **dict.fromkeys(columns, "-")}
    device_seconds = step["device_seconds"]["median"]
    return {
        "step": name,
        "device_ms": 1e3 * device_seconds,
        "host_ms": 1e3 * step["host_seconds"]["median"],
        "wall_ms": 1e3 * step["wall_seconds"]["median"],
        "times_the_floor": device_seconds / floor_seconds,
        "kernels": "-" if step["kernels"] is None else step["kernels"],
        "copies": "-" if step["copies"] is None else step["copies"],
    }


PARTS = (
    Part("install the bundle", install, 10),
    Part("tests marked gpu", gpu_tests, 60),
    Part("prepare the embedded corpus", prepare, 30),
    *(
        Part(f"demo at ZeRO {stage}, bf16", functools.partial(demo, zero_stage=stage), 45)
        for stage in (0, 1, 2, 3)
    ),
    Part("bench lamb", bench_lamb, 60),
    Part("bench lamb beside DeepSpeed's FusedLamb", bench_fused_lamb, 110),
)
