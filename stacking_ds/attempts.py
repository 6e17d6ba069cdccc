"""What became of each attempt at a run, and whether to start it again.

RUN_DIR/attempts.jsonl    one JSON object a line, only ever added to
    begun     rank 0 has entered the run
    ended     how it left the run; an attempt that was killed outright has none
    judged    whether to start the run again, and why

Batch scripts and launchers ask here, so nothing slow is imported.
"""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from stacking_ds.errors import UserError

__all__ = [
    "ATTEMPTS_FILE",
    "Outcome",
    "Verdict",
    "add_again",
    "begun",
    "count",
    "ended",
    "judge",
    "outcome_since",
    "verdict_of_this_job",
]

ATTEMPTS_FILE = "attempts.jsonl"

Outcome = Literal["complete", "stopped", "user_error", "not_finite", "lost", "failed"]

_OUTCOMES = frozenset(get_args(Outcome))
_KEYS: Mapping[str, frozenset[str]] = {
    "begun": frozenset({"step"}),
    "ended": frozenset({"outcome", "step", "message"}),
    "judged": frozenset({"again", "why", "outcome", "step", "saved", "job", "restart_count"}),
}
_USER_ERROR = 2  # the exit code of a command that ended with a UserError
_CHECKPOINT = re.compile(r"step_(\d{8,})")
_LONGEST_MESSAGE = 2000
_TAIL_BYTES = 2**20

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Should the run be started again?"""

    again: bool
    why: str
    outcome: str
    """How the attempt ended: an `Outcome`, "killed" outright, or "not_begun"."""


@dataclass(frozen=True)
class _End:
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
    _add(
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
    _add(run_dir, {"event": "ended", "outcome": outcome, "step": step, "message": message})


def _add(run_dir: Path, record: Record) -> None:
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


def _records(run_dir: Path) -> list[Record]:
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


def _newest_checkpoint(run_dir: Path) -> int | None:
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
    return len(_records(run_dir))


def _last_end(run_dir: Path, records: Sequence[Record]) -> _End | None:
    """How the last attempt in `records` ended; None if none of them began or ended."""
    own = [record for record in records if record["event"] != "judged"]
    if not own:
        return None
    last = own[-1]
    if last["event"] == "begun":
        step = max(int(last["step"]), _last_metrics_step(run_dir))
        return _End("killed", step, "it was killed outright")
    return _End(str(last["outcome"]), int(last["step"]), str(last["message"]))


def outcome_since(run_dir: Path, since: int) -> str | None:
    """How the attempt ended whose records begin at `since`: an `Outcome` or "killed"; None if it
    did not begin.

    Raises:
        UserError: the records cannot be read.
    """
    end = _last_end(run_dir, _records(run_dir)[since:])
    return end.outcome if end else None


# --------------------------------------------------------------------------- judging


def judge(run_dir: Path, exit_status: int, *, since: int = 0) -> Verdict:
    """Should the run be started again? The verdict is recorded too.

    One that was stopped is; one that failed is, unless it has failed so before: twice at the same
    step, or three times without a newer checkpoint. What a person has to mend is not tried again.
    After a verdict of "no" a person has taken over, and failures are counted anew.

    Args:
        run_dir: the run's directory, which need not be there yet.
        exit_status: of the command, or of the launcher around it; 0 alone proves nothing.
        since: the number of records there were when the attempt was started, where that is known;
            what was recorded before the last verdict is never taken for this attempt's.

    Raises:
        UserError: the records cannot be read or written.
    """
    records = _records(run_dir)
    judged = [i for i, record in enumerate(records) if record["event"] == "judged"]
    end = _last_end(run_dir, records[max(since, judged[-1] + 1 if judged else 0) :])
    saved = _newest_checkpoint(run_dir)
    if end is None or (exit_status == _USER_ERROR and end.outcome == "killed"):
        end = _not_begun(exit_status)
    again, why = _decide(end, saved, _failures(records))
    # a folder that is no run's, perhaps given by mistake, is left alone
    if again or (run_dir / ATTEMPTS_FILE).exists() or (run_dir / "config.yaml").exists():
        verdict = {"event": "judged", "again": again, "why": why, "step": end.step}
        _add(run_dir, {**verdict, "outcome": end.outcome, "saved": saved, **_this_job()})
    return Verdict(again, why, end.outcome)


def _not_begun(exit_status: int) -> _End:
    if exit_status == _USER_ERROR:
        return _End("user_error", None, "the job ended before it entered the run")
    return _End("not_begun", None, f"exit status {exit_status} before it entered the run")


def _failures(records: Sequence[Record]) -> list[Record]:
    """The verdicts on failures that still count: since the run last went well, or was given up."""
    failures: list[Record] = []
    for record in records:
        if record["event"] == "judged":
            stays = record["again"] and record["outcome"] != "stopped"
            failures = [*failures, record] if stays else []
        elif record["event"] == "ended" and record["outcome"] in ("stopped", "complete"):
            failures = []
    return failures


def _decide(end: _End, saved: int | None, failures: Sequence[Record]) -> tuple[bool, str]:
    at = "before it began" if end.step is None else f"at step {end.step}"
    goes_on = "it starts anew" if saved is None else f"it goes on from step {saved}"
    if end.outcome == "complete":
        return False, f"the run is complete {at}"
    if end.outcome == "stopped":
        return True, f"the run was asked to stop {at}; {goes_on}"
    if end.outcome == "user_error":
        return False, f"a person has to mend what stopped the run: {end.message}"
    if failures and failures[-1]["step"] == end.step:
        return False, f"the run failed {at} twice, for: {end.message}; mend that and start it again"
    without_gain = [*failures, {"saved": saved}][-3:]
    if len(without_gain) == 3 and all(record["saved"] == saved for record in without_gain):
        place = "a checkpoint" if saved is None else f"a newer checkpoint than that of step {saved}"
        return False, (
            f"the run failed three times in a row without {place}, the last time {at} for: "
            f"{end.message}; mend that, or save more often, and start it again"
        )
    return True, f"the run failed {at} for: {end.message}; {goes_on}"


# --------------------------------------------------------------------------- command


def add_again(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options; it sets `command`, which returns 0 for "start it again"."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(
        "--exit-status",
        type=int,
        required=True,
        metavar="N",
        help="what the job ended with ($? in a batch script)",
    )
    parser.set_defaults(command=_again)


def _again(options: argparse.Namespace) -> int:
    verdict = verdict_of_this_job(options.run_dir) or judge(options.run_dir, options.exit_status)
    print(verdict.why)
    return 0 if verdict.again else 1


def verdict_of_this_job(run_dir: Path) -> Verdict | None:
    """The verdict on what this SLURM job did, if it has been given: a `launch` in the job's
    script has judged before the script asks.

    Raises:
        UserError: the records cannot be read.
    """
    last = (_records(run_dir) or [{"event": ""}])[-1]
    job = _this_job()
    if last["event"] != "judged" or job["job"] is None or any(last[key] != job[key] for key in job):
        return None
    return Verdict(last["again"], last["why"], last["outcome"])


def _this_job() -> dict[str, str | None]:
    # the count tells a job from itself after it was requeued
    return {
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart_count": os.environ.get("SLURM_RESTART_COUNT"),
    }
