"""What became of each attempt at a run.

RUN_DIR/attempts.jsonl    one JSON object a line, only ever added to
    begun     rank 0 has entered the run
    ended     how it left the run; an attempt that was killed outright has none
    judged    whether to start the run again, and why

Batch scripts and launchers ask here, so nothing slow is imported.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from stacking_ds.errors import UserError

__all__ = [
    "ATTEMPTS_FILE",
    "End",
    "Outcome",
    "Record",
    "add",
    "begun",
    "count",
    "ended",
    "last_end",
    "newest_checkpoint",
    "outcome_since",
    "read_records",
    "told",
]

ATTEMPTS_FILE = "attempts.jsonl"

Outcome = Literal["complete", "stopped", "user_error", "not_finite", "lost", "failed"]

_OUTCOMES = frozenset(get_args(Outcome))
_KEYS: Mapping[str, frozenset[str]] = {
    "begun": frozenset({"step"}),
    "ended": frozenset({"outcome", "step", "message"}),
    "judged": frozenset({"again", "why", "outcome", "step", "saved", "job", "restart_count"}),
}
_CHECKPOINT = re.compile(r"step_(\d{8,})")
_LONGEST_MESSAGE = 2000
_TAIL_BYTES = 2**20

Record = Mapping[str, Any]


@dataclass(frozen=True)
class End:
    """How one attempt ended, as far as the records tell."""

    outcome: str
    step: int | None
    message: str


# --------------------------------------------------------------------------- writing


def begun(run_dir: Path, step: int, world_size: int, hosts: Sequence[str]) -> None:
    """Record that an attempt has entered the run at `step`. On rank 0, once `metrics.jsonl` ends
    there: a later line of it is taken for this attempt's.

    Raises:
        UserError: the record cannot be written.
    """
    add(
        run_dir,
        {
            "event": "begun",
            "step": step,
            "world_size": world_size,
            "hosts": list(hosts),
            "job": os.environ.get("SLURM_JOB_ID"),
        },
    )


def ended(run_dir: Path, outcome: Outcome, step: int, message: str) -> None:
    """Record how the attempt left the run, after `step` steps. On rank 0.

    Raises:
        UserError: the record cannot be written.
    """
    assert outcome in _OUTCOMES, outcome
    message = message[:_LONGEST_MESSAGE]
    add(run_dir, {"event": "ended", "outcome": outcome, "step": step, "message": message})


def add(run_dir: Path, record: Record) -> None:
    path = run_dir / ATTEMPTS_FILE
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"event": record["event"], "time": now, **record}) + "\n"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = "\n" + line  # a crash has cut the last line off, and this is not its rest
            data = line.encode()
            # in one call, so that rank 0 and a launcher cannot write into each other's line
            if os.write(descriptor, data) != len(data):
                raise OSError(f"{path} took only a part of a line")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room, or mend the permissions "
            f"of {run_dir}"
        ) from None


# --------------------------------------------------------------------------- reading


def read_records(run_dir: Path) -> list[Record]:
    """All whole lines, in order; one that a crash cut off is left out."""
    path = run_dir / ATTEMPTS_FILE
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(path, error) from None
    found: list[Record] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        keys = _KEYS.get(str(record.get("event"))) if isinstance(record, dict) else None
        if keys is not None and keys <= record.keys():
            found.append(record)
    return found


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read {path} ({error.strerror}); give a run's directory, or mend its permissions"
    )


def newest_checkpoint(run_dir: Path) -> int | None:
    """The step a resumed run goes on from."""
    # not `checkpoint.latest`: to import it takes seconds, of torch
    root = run_dir / "checkpoints"
    try:
        named = _CHECKPOINT.fullmatch((root / "latest").read_text(encoding="utf-8").strip())
        if named and (root / named[0]).is_dir():
            return int(named[1])
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unreadable(root / "latest", error) from None
    steps = [_CHECKPOINT.fullmatch(path.name) for path in root.glob("step_*")]
    return max((int(step[1]) for step in steps if step), default=None)


def _last_metrics_step(run_dir: Path) -> int:
    """The step of the last whole line of `metrics.jsonl`; 0 without one."""
    path = run_dir / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _unreadable(path, error) from None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            continue
    return 0


def count(run_dir: Path) -> int:
    """How many records there are: what `since` below is given.

    Raises:
        UserError: they cannot be read.
    """
    return len(read_records(run_dir))


def last_end(run_dir: Path, records: Sequence[Record]) -> End | None:
    """How the last attempt in `records` ended; None if none of them began or ended."""
    own = [record for record in records if record["event"] != "judged"]
    if not own:
        return None
    last = own[-1]
    if last["event"] == "begun":
        step = max(int(last["step"]), _last_metrics_step(run_dir))
        return End("killed", step, "it was killed outright")
    return End(str(last["outcome"]), int(last["step"]), str(last["message"]))


def outcome_since(run_dir: Path, since: int) -> str | None:
    """How the attempt ended whose records begin at `since`: an `Outcome` or "killed"; None if it
    did not begin.

    Raises:
        UserError: the records cannot be read.
    """
    end = last_end(run_dir, read_records(run_dir)[since:])
    return end.outcome if end else None


def told(run_dir: Path) -> str | None:
    """How often the run was begun and how that ended, for people; None after a single attempt.

    Raises:
        UserError: the records cannot be read.
    """
    records = read_records(run_dir)
    starts = [i for i, record in enumerate(records) if record["event"] == "begun"]
    if len(starts) < 2:
        return None
    spans = zip(starts, [*starts[1:], len(records)], strict=True)
    ends = [last_end(run_dir, records[start:end]) for start, end in spans]
    outcomes = Counter(end.outcome for end in ends if end is not None)
    return f"{len(starts)} attempts: " + ", ".join(
        f"{times} {outcome.replace('_', ' ')}" for outcome, times in outcomes.items()
    )
