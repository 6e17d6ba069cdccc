"""Metrics, once: to progress bars, TensorBoard, `metrics.jsonl` and `train.log`; rank 0 only."""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from stacking_ds.stages import Stage, StageSchedule

__all__ = [
    "METRICS_FILE",
    "Monitor",
    "measure_matmul_peak",
    "peak_memory_gib",
    "read_metrics",
]

METRICS_FILE = "metrics.jsonl"

logger = logging.getLogger("stacking_ds")


class Monitor:
    """Where a run's numbers go. On ranks other than 0 every method does nothing."""

    def __init__(
        self, run_dir: Path, schedule: StageSchedule, *, completed_steps: int, enabled: bool
    ) -> None:
        """Args:
        run_dir: the run's directory; it exists.
        completed_steps: steps done before this process; later lines of an interrupted run are
            dropped, since those steps will be taken again.
        enabled: True on rank 0.
        """
        self._enabled = enabled
        if not enabled:
            return
        self._schedule = schedule
        self._log_handlers = _open_logs(run_dir)
        self._metrics_path = run_dir / METRICS_FILE
        _drop_after(self._metrics_path, completed_steps)
        self._metrics = self._metrics_path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(run_dir / "tensorboard"),
            purge_step=completed_steps + 1,
        )
        self._bars = _Bars(schedule, completed_steps)

    def stage(self, stage: Stage, completed_steps: int) -> None:
        """Announce the stage that trains from now on."""
        if self._enabled:
            self._bars.stage(stage, completed_steps)

    def step(self, completed_steps: int, loss: float) -> None:
        """Move the bars; `loss` is shown beside them."""
        if self._enabled:
            self._bars.step(completed_steps, loss)

    def record(
        self, metrics: Mapping[str, Any], histograms: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """One line of `metrics.jsonl`, the same numbers to TensorBoard, a short line to the log.

        A number that is not finite (the gradient norm of a step that fp16 skipped) is null. What
        `histograms` has goes to TensorBoard alone.
        """
        if not self._enabled:
            return
        metrics = {key: _finite_or_none(value) for key, value in metrics.items()}
        self._metrics.write(json.dumps(metrics) + "\n")
        self._metrics.flush()
        step = int(metrics["step"])
        for key, value in metrics.items():
            if isinstance(value, int | float):
                tag = key if "/" in key else f"progress/{key}"
                self._tensorboard.add_scalar(tag, value, step)
        for tag, values in (histograms or {}).items():
            self._tensorboard.add_histogram(tag, torch.tensor(values), step)
        self._tensorboard.flush()
        self._bars.remaining(metrics["speed/remaining_seconds"])
        logger.info(_line(metrics, self._schedule.total_steps))

    def say(self, message: str) -> None:
        """A sentence for people, to the console and `train.log`."""
        if self._enabled:
            with tqdm.external_write_mode(file=sys.stderr):
                logger.warning(message)

    def close(self) -> None:
        if self._enabled:
            self._bars.close()
            self._tensorboard.close()
            self._metrics.close()
            for handler in self._log_handlers:
                logger.removeHandler(handler)
                handler.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Bars:
    """Whole run above, stage below; lines in the log instead where there is no terminal."""

    def __init__(self, schedule: StageSchedule, completed_steps: int) -> None:
        self._hidden = not sys.stderr.isatty()
        # tqdm's own estimate takes the steps to come for as fast as the shallow ones
        self._run = self._bar(
            "run",
            schedule.total_steps,
            completed_steps,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._stage: Any = None
        self._stage_start = 0

    def _bar(self, name: str, total: int, initial: int, **options: Any) -> Any:
        return tqdm(
            desc=name,
            total=total,
            initial=initial,
            unit="step",
            dynamic_ncols=True,
            disable=self._hidden,
            **options,
        )

    def stage(self, stage: Stage, completed_steps: int) -> None:
        if self._stage is not None:
            self._stage.close()
        self._stage_start = stage.start_step
        name = f"stage {stage.index} ({stage.num_hidden_layers} layers)"
        done = completed_steps - stage.start_step
        self._stage = self._bar(name, stage.steps, done, position=1, leave=False)

    def step(self, completed_steps: int, loss: float) -> None:
        self._stage.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._stage.update(completed_steps - self._stage_start - self._stage.n)
        self._run.update(completed_steps - self._run.n)

    def remaining(self, seconds: float) -> None:
        self._run.set_postfix_str(f"ETA {tqdm.format_interval(round(seconds))}", refresh=False)

    def close(self) -> None:
        if self._stage is not None:
            self._stage.close()
        self._run.close()


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line cut off by a crash is left out."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _drop_after(path: Path, completed_steps: int) -> None:
    if not path.is_file():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] <= completed_steps]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _open_logs(run_dir: Path) -> list[logging.Handler]:
    logger.setLevel(logging.INFO)
    logger.propagate = False
    to_file = logging.FileHandler(run_dir / "train.log", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    to_console = logging.StreamHandler(sys.stderr)
    to_console.setFormatter(logging.Formatter("%(message)s"))
    # on a terminal the bars show progress already; there only the sentences are printed
    to_console.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    handlers: list[logging.Handler] = [to_file, to_console]
    for handler in handlers:
        logger.addHandler(handler)
    return handlers


def _line(metrics: Mapping[str, Any], total_steps: int) -> str:
    parts = [
        f"step {metrics['step']}/{total_steps}",
        f"stage {metrics['stage']} ({metrics['num_hidden_layers']} layers)",
        f"loss {metrics['train/loss']:.4f}",
        f"lr {metrics['optim/learning_rate']:.2e}",
        f"{metrics['speed/tokens_per_second']:,.0f} tokens/s",
        f"ETA {tqdm.format_interval(int(metrics['speed/remaining_seconds']))}",
    ]
    if "eval/mlm_loss" in metrics:
        parts.append(f"held-out MLM loss {metrics['eval/mlm_loss']:.4f}")
    return "  ".join(parts)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held so far: of the GPU, or resident on the host without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square matrix products: the yardstick of model FLOP
    utilization, measured where and when the run runs."""
    size, rounds = (8192, 5) if device.type == "cuda" else (1024, 5)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(rounds + 1):  # the first one warms up and cannot be the fastest
        with _timed(device) as elapsed:
            left @ right
        best = min(best, elapsed[0])
    return 2 * size**3 / best


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    elapsed = [0.0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    yield elapsed
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed[0] = time.perf_counter() - start
