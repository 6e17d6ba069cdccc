"""Restart policy: is a run to be started again, by the records of its attempts."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stacking_ds.checkpoint.folders import latest, step_of
from stacking_ds.errors import EXIT_USER_ERROR, CheckpointError, UnreadableError
from stacking_ds.process.stop_signals import STOP_SIGNALS
from stacking_ds.run.attempts import ATTEMPTS_FILE, End, Record, add, last_end, read_records

_MOST_UNSAVED = 9
# a shell and srun add 128, Python puts a minus before it
_ASKED_TO_STOP = {code for number in STOP_SIGNALS for code in (128 + number, -number)}


@dataclass(frozen=True)
class RestartDecision:
    """The decision whether to start the run again, and why."""

    again: bool
    why: str
    outcome: str
    """How the attempt ended: an `Outcome`, "killed" outright, "not_begun", or "stopped_unsaved"
    where a signal that asks to stop has ended it."""


def judge(run_dir: Path, exit_status: int, *, since: int = 0) -> RestartDecision:
    """Decide whether to restart a run, and record the decision.

    Restart one that was stopped, or that failed, unless it failed twice at one step or three times
    without a newer checkpoint. What a person has to mend is not tried again. After a decision of
    "no" a person has taken over, and failures are counted anew. An attempt that was asked to stop
    before it could save says nothing of the run: it is neither.

    Args:
        exit_status: of the command, or of the launcher around it; 0 alone proves nothing.
        since: the number of records there were when the attempt was started, where that is known;
            what was recorded before the last decision is never taken for this attempt's.

    Raises:
        UserError: the records cannot be read or written.
    """
    records = read_records(run_dir)
    judged = [i for i, record in enumerate(records) if record["event"] == "judged"]
    own = records[max(since, judged[-1] + 1 if judged else 0) :]
    end = _by_exit_status(last_end(run_dir, own), exit_status)
    saved = None
    try:
        if (newest := latest(run_dir)) is not None:
            saved = step_of(newest)
    except UnreadableError:
        raise
    except CheckpointError as damage:  # the next attempt would be refused for it
        if end.outcome != "complete":
            end = End("user_error", end.step, str(damage))
    outcomes = (records[i]["outcome"] for i in reversed(judged))
    unsaved = len(list(itertools.takewhile("stopped_unsaved".__eq__, outcomes)))
    again, why = _decide(end, saved, _failures(records), unsaved)
    # a folder that is no run's, perhaps given by mistake, is left alone
    if again or (run_dir / ATTEMPTS_FILE).exists() or (run_dir / "config.yaml").exists():
        decision = {"event": "judged", "again": again, "why": why, "step": end.step}
        add(run_dir, {**decision, "outcome": end.outcome, "saved": saved, **_this_job()})
    return RestartDecision(again, why, end.outcome)


def _by_exit_status(end: End | None, exit_status: int) -> End:
    """What an attempt has said of its own end; what its exit status tells where it said nothing."""
    if end is not None and end.outcome != "killed":
        return end
    status, step = f"exit status {exit_status}", end.step if end else None
    if exit_status in _ASKED_TO_STOP:
        return End("stopped_unsaved", step, status)
    if exit_status == EXIT_USER_ERROR:
        when = "before it entered the run" if end is None else "without a record of why"
        return End("user_error", step, f"it ended with {status} {when}")
    return end or End("not_begun", None, f"{status} before it entered the run")


def _failures(records: Sequence[Record]) -> list[Record]:
    """The decisions on failures that still count: since the run last went well, or was given up."""
    failures: list[Record] = []
    for record in records:
        if record["event"] == "judged" and record["outcome"] != "stopped_unsaved":
            stays = record["again"] and record["outcome"] != "stopped"
            failures = [*failures, record] if stays else []
        elif record["event"] == "ended" and record["outcome"] in ("stopped", "complete"):
            failures = []
    return failures


def _decide(
    end: End, saved: int | None, failures: Sequence[Record], unsaved: int
) -> tuple[bool, str]:
    """`unsaved`: how often in a row before this the run was stopped and could save nothing."""
    at = "before it began" if end.step is None else f"at step {end.step}"
    goes_on = "it starts anew" if saved is None else f"it goes on from step {saved}"
    if end.outcome == "complete":
        return False, f"the run is complete {at}"
    if end.outcome == "stopped":
        return True, f"the run was asked to stop {at}; {goes_on}"
    if end.outcome == "stopped_unsaved" and unsaved >= _MOST_UNSAVED:
        return False, (
            f"the run was asked to stop {unsaved + 1} times in a row before it could save "
            f"({end.message}): give it more time, or lay out its rows ahead (`stacking-ds data "
            f"layout`)"
        )
    if end.outcome == "stopped_unsaved":
        return True, (
            f"the run was asked to stop {at}, before it could save ({end.message}); {goes_on}"
        )
    if end.outcome == "user_error":
        return False, f"a person has to mend what stopped the run: {end.message}"
    for last in failures[-1:]:
        # what was killed may have come further than the last step that it logged
        killed = "killed" in (last["outcome"], end.outcome)
        if last["step"] == end.step and (not killed or last["saved"] == saved):
            return False, (
                f"the run failed {at} twice, for: {end.message}; mend that and start it again"
            )
    if len(failures) >= 2 and all(record["saved"] == saved for record in failures[-2:]):
        place = "a checkpoint" if saved is None else f"a newer checkpoint than that of step {saved}"
        return False, (
            f"the run failed three times in a row without {place}, the last time {at} for: "
            f"{end.message}; mend that, or save more often, and start it again"
        )
    return True, f"the run failed {at} for: {end.message}; {goes_on}"


def decision_of_this_job(run_dir: Path) -> RestartDecision | None:
    """The decision on what this SLURM job did, if it has been taken: a `launch` in the job's
    script has judged before the script asks.

    Raises:
        UserError: the records cannot be read.
    """
    last = (read_records(run_dir) or [{"event": ""}])[-1]
    job = _this_job()
    if last["event"] != "judged" or job["job"] is None or any(last[key] != job[key] for key in job):
        return None
    return RestartDecision(last["again"], last["why"], last["outcome"])


def _this_job() -> dict[str, str | None]:
    # the count tells a job from itself after it was requeued
    return {
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart_count": os.environ.get("SLURM_RESTART_COUNT"),
    }
