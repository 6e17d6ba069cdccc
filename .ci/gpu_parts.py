"""What `make gpu-check` proves and measures, in order: proofs before measurements, what is cheap
before what is dear. A new check is a function and a line in PARTS."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_benches import (
    BASE_STEPS,
    LARGE_STEPS,
    begin_fused_lamb,
    bench_growth,
    bench_kernels,
    bench_kernels_compiled,
    bench_lamb,
    bench_step,
)
from gpu_ground import BUNDLE, ROOT, Ground, PartError, together
from gpu_runs import begin_prepare, demo, lamb_runs, prepare, short_runs
from gpu_sanitizer import begin_sanitizer, sanitizer

__all__ = ["PARTS", "Figures", "Part", "count_tests", "gpu_test_files"]

Figures = dict[str, Any]

ENGINES = "test_gpu.py"  # half of the tests' time


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


def begin(ground: Ground) -> Figures:
    """What needs the processor more than the GPU, or nobody's time but its own."""
    begin_prepare(ground)
    begin_sanitizer(ground)
    begin_fused_lamb(ground)
    return {}


def gpu_test_files(folder: Path) -> list[Path]:
    """The other files may import what this machine does not have."""
    return [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text()]


def gpu_tests(ground: Ground) -> Figures:
    """In two processes, which share the GPU."""
    files = gpu_test_files(ROOT / "tests")
    halves = {
        "engines": [path for path in files if path.name == ENGINES],
        "kernels_and_benches": [path for path in files if path.name != ENGINES],
    }
    works = {name: partial(_pytest, ground, name, paths) for name, paths in halves.items()}
    found = together(works)
    reasons = sorted({why for counts in found.values() for why in counts["skipped_because"]})
    rows = [
        {"half": name, **{key: counts[key] for key in ("passed", "failed", "skipped")}}
        for name, counts in found.items()
    ]
    return {"tests": rows, "skipped_because": reasons}


def _pytest(ground: Ground, name: str, files: Iterable[Path]) -> Figures:
    junit = ground.work / f"tests-{name}.xml"
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
    return {
        "passed": total - failures - errors - skipped,
        "failed": failures + errors,
        "skipped": skipped,
        "skipped_because": sorted({e.get("message", "") for e in suite.iter("skipped")}),
    }


PARTS = (
    Part("install the bundle", install, 10),
    Part("begin what takes its time beside the tests", begin, 1),
    Part("tests marked gpu", gpu_tests, 80),
    Part("every Triton kernel under compute-sanitizer", sanitizer, 15),
    Part("prepare the embedded corpus", prepare, 5),
    Part("LAMB on packed rows at ZeRO 0, 1, 2, 3, bf16", lamb_runs, 60),
    Part("FP8 and activation checkpointing", short_runs, 10),
    Part("the demo: AdamW at ZeRO 1, bf16", demo, 30),
    Part("bench lamb", bench_lamb, 25),
    Part("bench kernels", bench_kernels, 30),
    Part("bench growth", bench_growth, 30),
    Part("bench step: BERT-base", partial(bench_step, cases=BASE_STEPS, rounds=3), 60),
    Part("bench kernels beside torch.compile", bench_kernels_compiled, 40),
    Part("bench step: BERT-large", partial(bench_step, cases=LARGE_STEPS, rounds=3), 45),
)
