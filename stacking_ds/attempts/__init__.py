"""What became of each attempt at a run, and whether to start it again."""

from stacking_ds.attempts.judging import Verdict, add_again, judge, verdict_of_this_job
from stacking_ds.attempts.records import (
    ATTEMPTS_FILE,
    Outcome,
    begun,
    count,
    ended,
    outcome_since,
    passed_over,
    told,
)

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
    "passed_over",
    "told",
    "verdict_of_this_job",
]
