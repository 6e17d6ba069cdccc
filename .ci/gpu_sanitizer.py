"""Every Triton kernel under NVIDIA's compute-sanitizer: accesses out of bounds, and races."""

import re
import shutil
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

from gpu_ground import ROOT, Ground, PartError, tail, together

__all__ = ["begin_sanitizer", "find_sanitizer", "sanitizer", "verdict"]

NAME = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
FOUND_ERRORS = 99
SCRIPT = ROOT / ".ci" / "gpu_sanitize.py"
PLACES = (
    (Path("/usr/local"), ("cuda*/bin", "cuda*/compute-sanitizer")),
    (Path("/opt/nvidia"), ("*/bin", "compute-sanitizer/*", "*/*/compute-sanitizer")),
    # NVIDIA's wheels
    (Path(sysconfig.get_path("purelib")), ("nvidia/*/bin", "nvidia/*/compute-sanitizer")),
)


def find_sanitizer() -> str | None:
    if on_path := shutil.which(NAME):
        return on_path
    found = (
        path / NAME for root, globs in PLACES for glob in globs for path in sorted(root.glob(glob))
    )
    return next((str(path) for path in found if path.is_file()), None)


def begin_sanitizer(ground: Ground) -> None:
    """Beside the tests, which take their time too."""
    ground.begin(NAME, partial(_sanitize, ground))


def sanitizer(ground: Ground) -> dict[str, Any]:
    """What was begun with the first parts."""
    figures: dict[str, Any] = ground.outcome(NAME)
    return figures


def _sanitize(ground: Ground) -> dict[str, Any]:
    path = find_sanitizer()
    if path is None:
        return {"skipped": f"there is no {NAME} on this machine"}
    found = together({tool: partial(_one, ground, path, tool) for tool in TOOLS})
    skipped = [text for text in found.values() if text.startswith("skipped: ")]
    if skipped:
        return {"skipped": skipped[0].removeprefix("skipped: ")}
    return dict(found)


def _one(ground: Ground, path: str, tool: str) -> str:
    log = ground.work / f"{tool}.log"
    options = (
        *("--target-processes", "application-only", "--error-exitcode", FOUND_ERRORS),
        # torch asks the driver for what may not be there, and goes on
        *("--report-api-errors", "no", "--log-file", log),
    )
    # each tensor has memory of its own, so that what is beyond it is known to be
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = (path, "--tool", tool, *options, sys.executable, SCRIPT)
    problem = ""
    try:
        printed = ground.run(*command, limit_seconds=200, environment=environment)
    except PartError as error:
        problem, printed = str(error), error.output
    said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return verdict(tool, problem, f"{said}\n{printed}")


def verdict(tool: str, problem: str, output: str) -> str:
    """What the tool says in the end, and which kernels it saw; "skipped: " and why, where it does
    not know the device.

    Raises:
        PartError: it found something in one of our kernels, or did not come to an end.
    """
    if "Device not supported" in output:  # in some virtual machines
        return f"skipped: {tool} says that the device is not supported here"
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.MULTILINE)
    launched = re.findall(r"^launched: (.*)$", output, re.MULTILINE)
    if not summaries or not launched:
        said = f"{tool}: {problem or 'it did not come to an end'}"
        raise PartError("; ".join([said, *summaries]), tail(output))
    found = sum(int(count) for count in re.findall(r"(\d+) errors?", summaries[-1]))
    reported = "\n".join(re.findall(r"^=+ .*$", output, re.MULTILINE))
    guilty = [name for name in launched[-1].split(", ") if found and name in reported]
    if guilty:
        raise PartError(f"{tool}: {summaries[-1]}, in {', '.join(guilty)}", tail(reported))
    if problem and not found:
        raise PartError(f"{tool}: {problem}", tail(output))
    elsewhere = "; none in our kernels" if found else ""
    return f"{summaries[-1]}{elsewhere}; {launched[-1]}"
