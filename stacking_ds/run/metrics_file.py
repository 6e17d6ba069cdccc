"""`metrics.jsonl`: what is read of it again, past lines that are damaged."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from stacking_ds.errors import CheckpointError, UnreadableError, unreadable
from stacking_ds.files import (
    DamagedFileError,
    PassedOver,
    is_count,
    is_number,
    open_regular,
    parse_json,
    read_json_lines,
    write_whole,
)

METRICS_FILE = "metrics.jsonl"
_TAIL_BYTES = 2**20


def read_metrics(
    run_dir: Path,
    passed_over: PassedOver | None = None,
    is_wanted: Callable[[dict[str, Any]], bool] = lambda line: True,
) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`: each has a step, and every metric (`train/loss`) is a finite
    number or null. Lines that are none, such as a last one that a crash has cut off, and those that
    are not wanted are left out and added to `passed_over`.

    Raises:
        CheckpointError: it is no regular file, or cannot be read.
    """
    try:
        yield from read_json_lines(
            run_dir / METRICS_FILE, passed_over, lambda line: _is_line(line) and is_wanted(line)
        )
    except FileNotFoundError:
        return
    except DamagedFileError as damage:
        raise CheckpointError(f"{damage}; move it aside and try again") from None
    except OSError as error:
        raise unreadable(UnreadableError, run_dir / METRICS_FILE, error) from None


def last_step(run_dir: Path) -> int:
    """The step of the last line of `metrics.jsonl`; 0 where no line is near its end, or it is no
    regular file. Only its end is read.

    Raises:
        UnreadableError: it cannot be read.
    """
    path = run_dir / METRICS_FILE
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).splitlines()
    except (FileNotFoundError, DamagedFileError):
        return 0
    except OSError as error:
        raise unreadable(UnreadableError, path, error) from None
    for line in reversed(lines):
        with suppress(ValueError):
            found = parse_json(line)
            if isinstance(found, dict) and _is_line(found):
                return int(found["step"])
    return 0


def _is_line(found: dict[str, Any]) -> bool:
    return is_count(found.get("step")) and all(
        value is None or isinstance(value, bool) or is_number(value)
        for key, value in found.items()
        if "/" in key
    )


def drop_after(run_dir: Path, completed_steps: int) -> str | None:
    """Leave the lines up to that step, since later ones will be written again; a sentence on those
    that were none, if any.

    Raises:
        CheckpointError: it is no regular file, or cannot be read.
        OSError: it cannot be written.
    """
    path = run_dir / METRICS_FILE
    if not os.path.lexists(path):
        return None
    passed_over = PassedOver(path)
    lines = read_metrics(run_dir, passed_over)
    kept = [line for line in lines if line["step"] <= completed_steps]
    try:
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    except OSError as error:  # a full disk is told of without a path
        raise OSError(error.errno, error.strerror, str(path)) from None
    return passed_over.sentence
