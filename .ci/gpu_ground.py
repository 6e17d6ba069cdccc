"""Where the parts of `make gpu-check` run: a temporary folder, one interpreter, a deadline."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

__all__ = [
    "BUNDLE",
    "COMMIT_NOTE",
    "ROOT",
    "Ground",
    "PartError",
    "commit",
    "free_port",
    "tail",
    "together",
]

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "gpu_bundle"
COMMIT_NOTE = BUNDLE / "COMMIT"
TAIL_CHARACTERS = 6000
T = TypeVar("T")
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
    _begun: dict[str, Future[Any]] = field(default_factory=dict)

    @property
    def site(self) -> Path:
        """What the bundle is installed into."""
        return self.work / "site"

    def python(self, *arguments: object, limit_seconds: float, **options: Any) -> str:
        """As `run`, of this interpreter."""
        return self.run(sys.executable, *arguments, limit_seconds=limit_seconds, **options)

    def run(
        self,
        *command: object,
        limit_seconds: float,
        may_build: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command in the repository's root; what it printed.

        Args:
            limit_seconds: from now; it ends with the deadline at the latest.
            may_build: whether DeepSpeed may build an op, which only a comparison with DeepSpeed's
                own may.
            environment: what is to be set beside the usual.

        Raises:
            PartError: it failed, ran too long, or had DeepSpeed build an op.
        """
        extensions = self.work / f"extensions-{uuid4().hex}"  # where DeepSpeed would build one
        limit_seconds = max(0.0, min(limit_seconds, self.deadline - time.monotonic()))
        code, output = _run(
            list(map(str, command)),
            {
                **self._environment(),
                "TORCH_EXTENSIONS_DIR": str(extensions),
                **(environment or {}),
            },
            limit_seconds,
        )
        problems = []
        if code is None:
            problems.append(f"stopped after {limit_seconds:.0f} s")
        elif code != 0:
            problems.append(f"exit code {code}")
        built = sorted({path.parent.name for path in extensions.rglob("*") if path.is_file()})
        shutil.rmtree(extensions, ignore_errors=True)
        if built and not may_build:
            problems.append(f"DeepSpeed compiled {', '.join(built)}, which training must not need")
        if problems:
            raise PartError("; ".join(problems), tail(output))
        return output

    def begin(self, name: str, work: Callable[[], Any]) -> None:
        """Go on with the next parts meanwhile; `outcome` has what comes of it."""
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._begun[name] = executor.submit(work)
        executor.shutdown(wait=False)

    def outcome(self, name: str) -> Any:
        """What the work called `name` returned, or raised, once it has ended; a command of it ends
        by the deadline.

        Raises:
            PartError: it was not begun, since the part that should have done so failed.
        """
        if name not in self._begun:
            raise PartError(f"{name}: never begun")
        return self._begun[name].result()

    def close(self) -> None:
        """Wait for what was begun, so that nothing is left behind."""
        for future in self._begun.values():
            future.exception()

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        path = [str(self.site), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",  # what a part printed before it was stopped is worth reading
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


def together(works: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """All at the same time, and what they returned.

    Raises:
        PartError: one failed; with the reasons of all that did.
    """
    with ThreadPoolExecutor(max_workers=len(works)) as executor:
        begun = {name: executor.submit(work) for name, work in works.items()}
    failed = {name: error for name, one in begun.items() if (error := one.exception())}
    if failed:
        raise PartError(
            "; ".join(f"{name}: {error}" for name, error in failed.items()),
            "\n\n".join(getattr(error, "output", "") for error in failed.values()).strip(),
        ) from next(iter(failed.values()))
    return {name: one.result() for name, one in begun.items()}


def tail(output: str) -> str:
    """The end of an output, without what progress bars wrote over."""
    return re.sub(r"[^\n]*\r(?!\n)", "", output)[-TAIL_CHARACTERS:].strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
