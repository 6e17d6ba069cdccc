"""Prove every GPU path on a bare machine with one NVIDIA GPU; run it by `make gpu-check`.

It needs no network and installs nothing for good: the wheels of gpu_bundle/ go to a temporary
folder beside the machine's own torch. Each part is run, timed and reported, whatever becomes of
the others; what no longer fits into BUDGET_SECONDS is reported as not run.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu_ground import BUNDLE, ROOT, Ground, PartError, commit
from gpu_parts import PARTS, Part
from gpu_report import Report, Result

BUDGET_SECONDS = 470.0
FAILED, CANNOT_RUN = 1, 2


def main() -> int:
    """The process's exit code: 0 all passed, 1 something failed or was not run, 2 no check is
    possible here."""
    why = obstacle()
    if why is not None:
        print(f"gpu-check: {why}.", file=sys.stderr)
        return CANNOT_RUN
    folder = Path(os.environ.get("OUT") or ROOT)
    started, date = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    machine, checkout = describe_machine(), commit()

    def report(results: Sequence[Result]) -> None:
        Report(date, checkout, machine, time.monotonic() - started, results).write(folder)

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        ground = Ground(Path(work), started + BUDGET_SECONDS)
        try:
            passed = check(PARTS, ground, report)
        finally:
            ground.close()
    print(f"{folder / 'gpu-check.md'}: {'passed' if passed else 'NOT passed'}")
    return 0 if passed else FAILED


def obstacle() -> str | None:
    """Why nothing can be checked here; None if it can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; use a Python that has torch for CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} sees no NVIDIA GPU on this machine"
    if not list(BUNDLE.glob("*.whl")):
        return f"{BUNDLE} has no wheels; `make gpu-bundle` collects them where there is network"
    return None


def check(
    parts: Sequence[Part], ground: Ground, report: Callable[[Sequence[Result]], None]
) -> bool:
    """Run all parts, and report after each what is known so far; True if all passed."""
    results: list[Result] = []
    for place, part in enumerate(parts):
        result = run_part(part, ground)
        results.append(result)
        later = [Result(rest.name, "not run", reason="not yet") for rest in parts[place + 1 :]]
        report([*results, *later])
        line = f"{result.status}: {part.name}, {result.seconds:.1f} s  {result.reason}"
        print("\n".join(filter(None, [line.rstrip(), result.output])), flush=True)
    return all(result.status in ("passed", "skipped") for result in results)


def run_part(part: Part, ground: Ground) -> Result:
    started = time.monotonic()
    left = ground.deadline - started
    if left < part.needs_seconds:
        reason = f"{max(0.0, left):.0f} s were left, it needs {part.needs_seconds:.0f} s"
        return Result(part.name, "not run", reason=reason)
    reason = output = ""
    try:
        figures = part.run(ground)
        status = "skipped" if "skipped" in figures else "passed"
        return Result(part.name, status, time.monotonic() - started, figures)
    except PartError as error:
        reason, output = str(error), error.output
    except Exception as error:  # noqa: BLE001 - a part's own mistake must not stop the later ones
        reason = f"{type(error).__name__}: {error}"
    return Result(part.name, "failed", time.monotonic() - started, reason=reason, output=output)


def describe_machine() -> dict[str, str]:
    import torch

    deepspeed = [wheel.name.split("-")[1] for wheel in BUNDLE.glob("deepspeed-*.whl")]
    return {
        "card": torch.cuda.get_device_name(0),
        "memory": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB",
        "driver": _driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        **{name: _version(name) for name in ("triton", "transformers")},
        "deepspeed": ", ".join(deepspeed),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    sys.exit(main())
