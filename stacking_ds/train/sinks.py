"""Metrics, once: to progress bars, TensorBoard, `metrics.jsonl` and `train.log`; rank 0 only.

A file that cannot be written, as on a full disk, ends no run: that is for checkpoints to do.
"""

import io
import json
import logging
import math
import os
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.summary import histogram
from tqdm import tqdm

from stacking_ds.files import without_waiting
from stacking_ds.run.metrics_file import (
    METRICS_FILE,
    Course,
    finite_or_none,
    read_metrics,
    shown,
)
from stacking_ds.schedule.stages import Stage, StageSchedule

_EVENTS = "events.out.tfevents."
_EDGES = 1e-12 * 1.1 ** np.arange(774)
_BINS = np.concatenate([-_EDGES[::-1], [0.0], _EDGES])  # TensorBoard's own


def events_name(folder: Path) -> str:
    """A name after those that are there: TensorBoard reads a folder's files in the order of their
    names, whatever the clock has said since."""
    seconds, rest = divmod(max(time.time(), 0.0), 1.0)
    whose = f"{rest:.6f}"[1:] + f".{socket.gethostname()}.{os.getpid()}"
    last = max((path.name for path in folder.glob(f"{_EVENTS}[0-9]*")), default="")
    name = f"{_EVENTS}{int(seconds):010d}{whose}"
    if name > last:
        return name
    digits = re.match(r"[0-9]+", last.removeprefix(_EVENTS))
    assert digits is not None, last
    following = str(int(digits[0]) + 1).zfill(len(digits[0]))
    # after nines only a longer number follows, which sorts so for no other
    return f"{_EVENTS}{following if len(following) == len(digits[0]) else digits[0] + '0'}{whose}"


def first_events(next_step: int) -> bytes:
    """The beginning of a file: from `next_step` on, what earlier files of the run say is void."""
    start = SessionLog(status=SessionLog.START)
    return _records(
        Event(wall_time=time.time(), step=next_step, file_version="brain.Event:2"),
        Event(wall_time=time.time(), step=next_step, session_log=start),
    )


def event_record(metrics: Mapping[str, Any], histograms: Mapping[str, Sequence[float]]) -> bytes:
    """One line of metrics as scalars, what is no number left out, and the histograms beside it."""
    summary = Summary()
    for key, value in metrics.items():
        if isinstance(value, int | float):
            summary.value.add(tag=key if "/" in key else f"progress/{key}", simple_value=value)
    for tag, values in histograms.items():
        # one whose values all lie outside the bins is an error to TensorBoard
        seen = torch.tensor([value for value in values if not math.isnan(value)])
        if len(seen):
            seen = seen.clamp(_BINS[0], _BINS[-1])
            bars: Any = histogram(tag, seen, _BINS)  # type: ignore[no-untyped-call]
            summary.MergeFrom(bars)
    return _records(Event(wall_time=time.time(), step=int(metrics["step"]), summary=summary))


def _records(*events: Any) -> bytes:
    buffer = io.BytesIO()
    for event in events:
        RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


_MOST_HELD_BYTES = 2**24
_MOST_HELD_LINES = 2**20

logger = logging.getLogger("stacking_ds")


class Monitor:
    """The sinks of a run's numbers. On ranks other than 0 every method does nothing."""

    def __init__(
        self,
        run_dir: Path,
        schedule: StageSchedule,
        *,
        completed_steps: int,
        enabled: bool,
        log: "RunLog | None" = None,
    ) -> None:
        """Args:
        run_dir: the run's directory; it exists.
        completed_steps: steps done before this process, where `metrics.jsonl` ends.
        enabled: True on rank 0.
        log: what has been said before; it is closed with this.
        """
        self._enabled = enabled
        if not enabled:
            return
        self._schedule = schedule
        self._course = Course(read_metrics(run_dir))
        failing: set[Path] = set()
        self._log = _Appended(run_dir / "train.log", failing)
        self._run_log = log or RunLog().__enter__()
        self._run_log.write_to(self._log)
        self._metrics = _Appended(run_dir / METRICS_FILE, failing)
        events = run_dir / "tensorboard"
        self._tensorboard = _Appended(events / events_name(events), failing)
        self._metrics.add(b"")
        self._tensorboard.add(first_events(completed_steps + 1))
        self._bars = _Bars(schedule, completed_steps)

    def stage(self, stage: Stage, completed_steps: int) -> None:
        """Announce the stage that trains from now on."""
        if self._enabled:
            self._bars.stage(stage, completed_steps)

    def step(self, completed_steps: int, mlm_loss: float | None) -> None:
        """Move the bars; `mlm_loss`, where a step has one, is shown beside them."""
        if self._enabled:
            self._bars.step(completed_steps, mlm_loss)

    def record(
        self, metrics: Mapping[str, Any], histograms: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """One line of `metrics.jsonl`, the same numbers to TensorBoard, a short line to the log.

        A number that is not finite (the gradient norm of a step that fp16 skipped, a held-out loss
        of weights that overflow) is null. What `histograms` has goes to TensorBoard alone.
        """
        if not self._enabled:
            return
        metrics = {key: finite_or_none(value) for key, value in metrics.items()}
        before, found = self._course.judgement, self._course.add(metrics)
        metrics["diverged"] = found.has_diverged
        self._metrics.write(json.dumps(metrics) + "\n")
        self._tensorboard.add(event_record(metrics, histograms or {}))
        self._bars.remaining(metrics["speed/remaining_seconds"] or 0.0)
        logger.info(_line(metrics, self._schedule.total_steps))
        if found.has_diverged and not before.has_diverged:
            self.say(f"the run has {found.sentence}")
        elif before.has_diverged and not found.has_diverged:
            self.say(f"the run has recovered: {found.why}")

    def conclude(self) -> None:
        """Say what the losses of a run that is complete mean, if it has not learned."""
        if self._enabled and self._course.judgement.warning:
            self.say(self._course.judgement.warning)

    def say(self, message: str) -> None:
        """A sentence for people, to the console and `train.log`."""
        if self._enabled:
            with tqdm.external_write_mode(file=sys.stderr):
                logger.warning(message)

    def close(self) -> None:
        if self._enabled:
            self._bars.close()
            for file in (self._metrics, self._tensorboard, self._log):
                file.add(b"")  # what it still holds
            self._run_log.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class RunLog:
    """Takes what the package logs on rank 0 while it is entered, or until it is closed: to the
    console at once, and to `train.log` from the first line on, which is said before that file may
    be opened. Where a start is refused, the console has shown sentences alone."""

    def __enter__(self) -> "RunLog":
        logger.setLevel(logging.INFO)
        logger.propagate = False
        self._console = _Console(sys.stderr)
        self._console.setFormatter(logging.Formatter("%(message)s"))
        self._console.setLevel(logging.WARNING)
        # until there is a file for it
        self._held = MemoryHandler(_MOST_HELD_LINES, logging.CRITICAL + 1, flushOnClose=False)
        self._handlers: list[logging.Handler] = [self._console, self._held]
        for handler in self._handlers:
            logger.addHandler(handler)
        return self

    def write_to(self, file: Any) -> None:
        """Write what was said so far, and all that follows, to `file`, which has `write`."""
        to_file = logging.StreamHandler(file)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.removeHandler(self._held)
        self._handlers.append(to_file)
        logger.addHandler(to_file)
        # on a terminal the bars show progress already; there only the sentences are printed
        shows_lines = not sys.stderr.isatty()
        for record in self._held.buffer:
            to_file.handle(record)
            if shows_lines and record.levelno < logging.WARNING:
                self._console.handle(record)
        if shows_lines:
            self._console.setLevel(logging.INFO)
        self._held.buffer.clear()

    def close(self) -> None:
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._handlers.clear()

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Console(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        # its reader is gone, or its disk full: a traceback for every line helps nobody
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Appended:
    """A file that grows by whole pieces. What cannot be written now is held, told of once, and
    written before the next piece. It is opened for each, since a file system that comes back may
    know nothing of files that were open."""

    def __init__(self, path: Path, failing: set[Path]) -> None:
        """`failing`: those of the run's files that cannot be written; one sentence is for all."""
        self._path, self._failing = path, failing
        self._held = b""
        self._whole: int | None = None
        """Its size without what a write that failed has left."""

    def write(self, text: str) -> None:
        self.add(text.encode("utf-8", "backslashreplace"))

    def add(self, piece: bytes) -> None:
        if len(self._held) < _MOST_HELD_BYTES:
            self._held += piece
        try:
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "ab", opener=without_waiting) as file:
                size = file.seek(0, os.SEEK_END)
                if self._whole is not None:
                    size = file.truncate(min(size, self._whole))
                self._whole = size
                file.write(self._held)
        except OSError as error:
            self._tell(error)
        else:
            self._held, self._whole = b"", None
            self._failing.discard(self._path)

    def _tell(self, error: OSError) -> None:
        first = not self._failing
        self._failing.add(self._path)  # the warning goes to such a file too
        if first:
            logger.warning(
                "metrics are not written to %s (%s): make room; training goes on, and they follow "
                "when they can be written",
                self._path,
                error.strerror or error,
            )


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

    def step(self, completed_steps: int, mlm_loss: float | None) -> None:
        if mlm_loss is not None:
            self._stage.set_postfix_str(f"train MLM loss {mlm_loss:.3f}", refresh=False)
        self._stage.update(completed_steps - self._stage_start - self._stage.n)
        self._run.update(completed_steps - self._run.n)

    def remaining(self, seconds: float) -> None:
        self._run.set_postfix_str(f"ETA {tqdm.format_interval(round(seconds))}", refresh=False)

    def close(self) -> None:
        if self._stage is not None:
            self._stage.close()
        self._run.close()


def _line(metrics: Mapping[str, Any], total_steps: int) -> str:
    parts = [
        f"step {metrics['step']}/{total_steps}",
        f"stage {metrics['stage']} ({metrics['num_hidden_layers']} layers)",
        f"train MLM loss {shown(metrics, 'train/mlm_loss', '.4f')}",
        f"lr {metrics['optim/learning_rate']:.2e}",
        f"{metrics['speed/tokens_per_second']:,.0f} tokens/s",
        f"ETA {tqdm.format_interval(int(metrics['speed/remaining_seconds'] or 0))}",
    ]
    if "eval/mlm_loss" in metrics:
        parts.append(f"held-out MLM loss {shown(metrics, 'eval/mlm_loss', '.4f')}")
    return "  ".join(parts)
