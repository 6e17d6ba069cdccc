"""Where the parts of `make gpu-check` run: a temporary folder, one interpreter, a deadline."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUNDLE", "COMMIT_NOTE", "ROOT", "Ground", "PartError", "commit", "tail"]

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "gpu_bundle"
COMMIT_NOTE = BUNDLE / "COMMIT"
TAIL_CHARACTERS = 6000
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


class PartError(Exception):
    """A part failed; `output` is what to show of its output."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


@dataclass(frozen=True)
class Ground:
    """`work` is a temporary folder: what one part leaves in it the next ones find. `deadline` is
    on the monotonic clock."""

    work: Path
    deadline: float

    @property
    def site(self) -> Path:
        """What the bundle is installed into."""
        return self.work / "site"

    @property
    def extensions(self) -> Path:
        """Where DeepSpeed would build an op."""
        return self.work / "torch_extensions"

    def python(self, *arguments: object, limit_seconds: float, may_build: bool = False) -> str:
        """Run this interpreter in the repository's root; what it printed.

        Raises:
            PartError: it failed, ran longer than `limit_seconds` or past the deadline, or had
                DeepSpeed build an op, which only a comparison with DeepSpeed's own `may_build`.
        """
        command = [sys.executable, *map(str, arguments)]
        limit_seconds = max(0.0, min(limit_seconds, self.deadline - time.monotonic()))
        code, output = _run(command, self._environment(), limit_seconds)
        problems = []
        if code is None:
            problems.append(f"stopped after {limit_seconds:.0f} s")
        elif code != 0:
            problems.append(f"exit code {code}")
        if (built := self._take_built_ops()) and not may_build:
            problems.append(f"DeepSpeed compiled {built}, which training must not need")
        if problems:
            raise PartError("; ".join(problems), tail(output))
        return output

    def _take_built_ops(self) -> str:
        """The ops built since the last call, forgotten so that the next part is not blamed."""
        files = [path for path in self.extensions.rglob("*") if path.is_file()]
        shutil.rmtree(self.extensions, ignore_errors=True)
        return ", ".join(sorted({path.parent.name for path in files}))

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        path = [str(self.site), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",  # what a part printed before it was stopped is worth reading
            "TORCH_EXTENSIONS_DIR": str(self.extensions),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            # all ranks are here, and there may be no other interface
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }


def _run(
    command: Sequence[str], environment: dict[str, str], limit_seconds: float
) -> tuple[int | None, str]:
    """Exit code, None if it had to be stopped, and output; no process of it is left behind."""
    code: int | None = None
    # newline: a progress bar's carriage returns stay what they are
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", newline="") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=limit_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read()


def tail(output: str) -> str:
    """The end of an output, without what progress bars wrote over."""
    return re.sub(r"[^\n]*\r(?!\n)", "", output)[-TAIL_CHARACTERS:].strip()


def commit() -> str:
    """The commit checked out, marked where files differ from it; where the history did not travel
    with the files, the one the bundle was made at, or the environment's COMMIT."""
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            head = _git("rev-parse", "HEAD")
            changed = _git("status", "--porcelain", "--untracked-files=no")
            return f"{head}-changed" if changed else head
    if COMMIT_NOTE.is_file():
        return COMMIT_NOTE.read_text(encoding="utf-8").strip()
    return os.environ.get("COMMIT", "unknown")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
