"""`metrics.jsonl`: reading it again, past damaged lines, and one rule that says whether its run has
learned or diverged.

All in nats of MLM loss. F is what word frequencies alone give on the held-out targets
(`eval/unigram_mlm_loss`), ln V what a blind guess over the vocabulary gives
(`eval/uniform_mlm_loss`), "learned" how far the lowest held-out loss so far is below F.

        ln V + 1  --------------------  a held-out loss above: diverged
               F  --------------------  not below, and never was: no better than word frequencies
F - learned / 2   - - - - - - - - - -   risen above, by 0.2 or more: diverged
     F - learned  ____________________  the lowest so far

and diverged as well: a held-out loss that is not finite, and a train loss 2 above its lowest line.
Where the train loss of the same line is below F - learned / 2, the held-out loss has risen for
another reason: the model overfits.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    regular file. Only its end is read. Raises `UnreadableError`: it cannot be read."""
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


def shown(line: Mapping[str, Any], name: str, form: str) -> str:
    """A metric of the line for people."""
    if name not in line:  # no step of the line had anything to predict
        return "-"
    return "not finite" if line[name] is None else format(line[name], form)


def drop_after(run_dir: Path, completed_steps: int) -> str | None:
    """Leave the lines up to that step, since later ones will be written again; a sentence on those
    that were none, if any. Raises `CheckpointError`: it is no regular file, or cannot be read;
    `OSError`: it cannot be written."""
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


# ------------------------------------------------------------------------ judging

_ABOVE_BLIND_NATS = 1.0  # fresh weights are up to half of it above ln V
_LOST_SHARE, _LOST_NATS = 0.5, 0.2  # a boundary that works costs a tenth
_TRAIN_RISE_NATS = 2.0  # a line may be of one small batch

State = Literal[
    "not evaluated", "learning", "no better than word frequencies", "overfitted", "diverged"
]


@dataclass(frozen=True)
class Judgement:
    """Judgement of the losses up to some step."""

    state: State
    why: str
    """With the numbers, for people."""
    remedy: str = ""

    @property
    def has_diverged(self) -> bool:
        return self.state == "diverged"

    @property
    def sentence(self) -> str:
        return f"{self.state}: {self.why}{self.remedy}"

    @property
    def warning(self) -> str | None:
        """A warning for who takes the model of that step; None if there is nothing to warn of."""
        if self.state in ("learning", "not evaluated"):
            return None
        verb = "is" if self.state == "no better than word frequencies" else "has"
        return f"the run {verb} {self.sentence}"


@dataclass(frozen=True)
class _Evaluation:
    step: int
    stage: int
    depth: int
    loss: float
    floor: float

    @property
    def excess(self) -> float:
        return self.loss - self.floor


class Course:
    """The losses of a run by the lines of its `metrics.jsonl`, in their order."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._by_heldout = Judgement("not evaluated", "no held-out loss yet")
        self._by_training: Judgement | None = None
        self._lowest: _Evaluation | None = None
        self._before: _Evaluation | None = None
        """The one before the first that was diverged, if there was one."""
        self._at_boundary = False
        self._lowest_train: tuple[float, int] | None = None
        for line in lines:
            self.add(line)

    @property
    def judgement(self) -> Judgement:
        if self._by_heldout.has_diverged or self._by_training is None:
            return self._by_heldout
        return self._by_training

    def add(self, line: Mapping[str, Any]) -> Judgement:
        """Take in one more line, and judge anew; what it lacks says nothing."""
        step, train = _count(line, "step"), _number(line, "train/mlm_loss")
        if train is not None:
            self._by_training = self._of_training(train, step)
            self._lowest_train = min(self._lowest_train or (train, step), (train, step))
        loss, floor = _number(line, "eval/mlm_loss"), _number(line, "eval/unigram_mlm_loss")
        if loss is None and "eval/mlm_loss" in line:
            self._by_heldout = Judgement(
                "diverged", f"held-out MLM loss is not finite at step {step}", _LOWER
            )
        elif loss is not None and floor is not None:
            stage, depth = _count(line, "stage"), _count(line, "num_hidden_layers")
            found = _Evaluation(step, stage, depth, loss, floor)
            self._by_heldout = self._of_heldout(found, train, _number(line, _BLIND))
            if not self._by_heldout.has_diverged:
                self._before, self._at_boundary = found, False
            if self._lowest is None or found.excess < self._lowest.excess:
                self._lowest = found
        return self.judgement

    def _of_training(self, train: float, step: int) -> Judgement | None:
        if self._lowest_train is None or train <= self._lowest_train[0] + _TRAIN_RISE_NATS:
            return None
        lowest, then = self._lowest_train
        told = f"train MLM loss is {train:,.3f} at step {step}"
        return Judgement("diverged", f"{told}, and was {lowest:.3f} at step {then}", _LOWER)

    def _of_heldout(
        self, found: _Evaluation, train: float | None, blind: float | None
    ) -> Judgement:
        learned = max(0.0, -self._lowest.excess) if self._lowest else 0.0
        lost = found.excess + learned
        told = f"held-out MLM loss is {found.loss:,.3f} at step {found.step}"
        is_high = blind is not None and found.loss > blind + _ABOVE_BLIND_NATS
        if is_high or (learned > 0 and lost > max(_LOST_SHARE * learned, _LOST_NATS)):
            if train is not None and train - found.floor < -_LOST_SHARE * learned:
                why = f"{told}, and train MLM loss {train:.3f}"
                return Judgement("overfitted", why, "; train on more text, or for fewer steps")
            why, remedy = self._how_diverged(found, blind if is_high else None)
            return Judgement("diverged", f"{told}, and {why}", remedy)
        state: State = "learning" if found.excess < 0 else "no better than word frequencies"
        return Judgement(state, f"{told}, and that of word frequencies alone {found.floor:.3f}")

    def _how_diverged(self, found: _Evaluation, blind: float | None) -> tuple[str, str]:
        """Why, and the remedy."""
        before, floor = self._before, f"word frequencies alone give {found.floor:.3f}"
        if before is not None and not self._by_heldout.has_diverged:
            self._at_boundary = before.stage < found.stage  # a stage ends with an evaluation
        if before is not None and self._at_boundary:
            grew = f"before it grew from {before.depth} to {found.depth} layers"
            return f"was {before.loss:.3f} at step {before.step}, {grew}; {floor}", _THROWN_BACK
        if blind is not None:
            return f"a blind guess over the vocabulary has {blind:.3f}", _LOWER
        assert self._lowest is not None
        return f"was {self._lowest.loss:.3f} at step {self._lowest.step}; {floor}", _LOWER


_BLIND = "eval/uniform_mlm_loss"
_LOWER = (
    "; train again with a lower optimizer.learning_rate, more schedule.warmup_steps or "
    "optimizer.max_grad_norm=1"
)
_THROWN_BACK = (
    ". The boundary threw it back: train again with a lower optimizer.learning_rate, "
    "schedule.at_boundary=rewarm, or a stage in between"
)


def finite_or_none(value: Any) -> Any:
    """`value` as JSON has it, which knows no NaN and no infinity: None in their place."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _count(line: Mapping[str, Any], name: str) -> int:
    return int(_number(line, name) or 0)


def _number(line: Mapping[str, Any], name: str) -> float | None:
    value = line.get(name)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None
