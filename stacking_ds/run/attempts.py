"""Attempts at a run: records of when each began, how it ended, and what was judged of it.

RUN_DIR/attempts.jsonl    one JSON object a line, only ever added to
    begun     rank 0 has entered the run
    ended     how it left the run; an attempt that was killed outright has none
    judged    whether to start the run again, and why

Batch scripts and launchers ask here, so nothing slow is imported. Whoever reads records or adds one
raises a `UserError` where that cannot be done.
"""

import itertools
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from stacking_ds.errors import UserError
from stacking_ds.files import (
    DamagedFileError,
    PassedOver,
    is_count,
    read_json_lines,
    without_waiting,
)
from stacking_ds.run.metrics_file import last_step

ATTEMPTS_FILE = "attempts.jsonl"

Outcome = Literal["complete", "stopped", "user_error", "not_finite", "lost", "failed"]

_NONE = type(None)
_KEYS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "begun": {"step": (int,)},
    "ended": {"outcome": (str,), "step": (int,), "message": (str,)},
    "judged": {
        "again": (bool,),
        **dict.fromkeys(("why", "outcome"), (str,)),
        **dict.fromkeys(("step", "saved"), (int, _NONE)),
        **dict.fromkeys(("job", "restart_count"), (str, _NONE)),
    },
}
"""Keys that a record of each event has to hold, and the types they may be of: int is a count."""

_LONGEST_MESSAGE = 2000

Record = Mapping[str, Any]


@dataclass(frozen=True)
class End:
    """End of one attempt, as far as the records tell."""

    outcome: str
    step: int | None
    message: str


# --------------------------------------------------------------------------- writing


def begun(run_dir: Path, step: int, world_size: int, hosts: Sequence[str]) -> None:
    """Record that an attempt has entered the run at `step`. On rank 0, once `metrics.jsonl` ends
    there: a later line of it is taken for this attempt's."""
    who = {"world_size": world_size, "hosts": list(hosts), "job": os.environ.get("SLURM_JOB_ID")}
    add(run_dir, {"event": "begun", "step": step, **who})


def ended(run_dir: Path, outcome: Outcome, step: int, message: str) -> None:
    """Record how the attempt left the run, after `step` steps. On rank 0."""
    end = {"outcome": outcome, "step": step, "message": message[:_LONGEST_MESSAGE]}
    add(run_dir, {"event": "ended", **end})


def add(run_dir: Path, record: Record) -> None:
    path = run_dir / ATTEMPTS_FILE
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"event": record["event"], "time": now, **record}) + "\n"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0, opener=without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{path} is not a regular file")
            if found.st_size and os.pread(file.fileno(), 1, found.st_size - 1) != b"\n":
                line = "\n" + line  # a crash has cut the last line off, and this is not its rest
            # in one call, so that rank 0 and a launcher cannot write into each other's line
            if file.write(line.encode()) != len(line.encode()):
                raise OSError(f"{path} took only a part of a line")
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room, mend the permissions of "
            f"{run_dir}, or move aside what is in its place"
        ) from None


# --------------------------------------------------------------------------- reading


def read_records(run_dir: Path, passed_over: PassedOver | None = None) -> list[Record]:
    """All records, in order. Lines that are none, such as one that a crash has cut off, are left
    out and added to `passed_over`."""
    path = run_dir / ATTEMPTS_FILE
    try:
        return list(read_json_lines(path, passed_over, _is_record))
    except FileNotFoundError:
        return []
    except DamagedFileError as damage:
        raise UserError(
            f"{damage}; move it aside: what became of earlier attempts is not known then"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); give a run's directory, or mend its "
            f"permissions"
        ) from None


def _is_record(found: Mapping[str, Any]) -> bool:
    event = found.get("event")
    keys = _KEYS.get(event) if isinstance(event, str) else None
    return keys is not None and all(
        key in found
        and type(found[key]) in types
        and (type(found[key]) is not int or is_count(found[key]))
        for key, types in keys.items()
    )


def passed_over(run_dir: Path) -> str | None:
    """A sentence on the lines of `attempts.jsonl` that are no records; None if there are none."""
    found = PassedOver(run_dir / ATTEMPTS_FILE)
    read_records(run_dir, found)
    return found.sentence


def last_end(run_dir: Path, records: Sequence[Record]) -> End | None:
    """End of the last attempt in `records`; None if none of them began or ended."""
    last = next((each for each in reversed(records) if each["event"] != "judged"), None)
    if last is None:
        return None
    if last["event"] == "begun":
        step = max(int(last["step"]), last_step(run_dir))
        return End("killed", step, "it was killed outright")
    return End(str(last["outcome"]), int(last["step"]), str(last["message"]))


def outcome_since(run_dir: Path, since: int) -> str | None:
    """Outcome of the attempt whose records begin at `since`: an `Outcome` or "killed"; None if
    it did not begin."""
    end = last_end(run_dir, read_records(run_dir)[since:])
    return end.outcome if end else None


def summary(run_dir: Path) -> str | None:
    """Count how often the run was begun and how that ended, for people; None after one attempt."""
    records = read_records(run_dir)
    starts = [i for i, record in enumerate(records) if record["event"] == "begun"]
    if len(starts) < 2:
        return None
    spans = itertools.pairwise([*starts, len(records)])
    ends = [last_end(run_dir, records[start:end]) for start, end in spans]
    outcomes = Counter(end.outcome.replace("_", " ") for end in ends if end is not None)
    told = ", ".join(f"{times} {outcome}" for outcome, times in outcomes.items())
    return f"{len(starts)} attempts: {told}"
