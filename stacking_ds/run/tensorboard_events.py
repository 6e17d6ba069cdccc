"""TensorBoard's event files, written as its own reader takes them: one for each attempt at a run.

Each is appended to with whole records, so a crash cuts off the last one at most.
"""

import io
import math
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.summary import histogram

__all__ = ["event_record", "events_name", "first_events"]

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
    """What a file begins with: from `next_step` on, what earlier files of the run say is void."""
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
