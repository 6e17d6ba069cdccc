"""Report of a run, as a table for people."""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stacking_ds.console import aligned
from stacking_ds.errors import CheckpointError, UserError
from stacking_ds.files import PassedOver, is_count, is_number
from stacking_ds.run import attempts, directory
from stacking_ds.run.metrics_file import METRICS_FILE, Course, read_metrics, shown
from stacking_ds.schedule.stages import Stage

_COLUMNS = ("stage", "layers", "steps", "tokens", "train MLM loss", "held-out MLM loss",
            "tokens/s", "boundary s")  # fmt: skip
_FLOOR = "eval/unigram_mlm_loss"
_COUNTS = ("stage", "num_hidden_layers", "stage/tokens")
_NUMBERS = ("stage/train_seconds", "stage/boundary_seconds", "wall_seconds")


def run_table(run_dir: Path) -> str:
    """Table of each stage so far, the unigram floor, and what the shallow stages spared. Raises
    `CheckpointError`: there is no run, or it has not come far enough to say anything."""
    config = directory.read_config(run_dir)
    schedule = config.stage_schedule()
    passed_over = PassedOver(run_dir / METRICS_FILE)
    lines_so_far = list(
        read_metrics(run_dir, passed_over, lambda line: _is_told(line, schedule.stages))
    )
    last_of_stage = dict(sorted({line["stage"]: line for line in lines_so_far}.items()))
    if not last_of_stage:
        damage = f" ({passed_over.sentence})" if passed_over.sentence else ""
        raise CheckpointError(f"{run_dir} has no metrics yet; train it first{damage}")
    *_, last = last_of_stage.values()
    steps = [line["step"] - schedule.stages[k].start_step for k, line in last_of_stage.items()]
    rows = list(map(_row, last_of_stage.values(), steps))
    lines = [*aligned([_COLUMNS, *rows], left=()), ""]
    floors = [line[_FLOOR] for line in lines_so_far if line.get(_FLOOR) is not None]
    if floors:
        lines.append(
            f"unigram floor: {floors[-1]:.3f} held-out MLM loss of word frequencies alone, on the "
            f"same masked tokens"
        )
    lines.append(f"state: {Course(lines_so_far).judgement.sentence}")
    depths = [line["num_hidden_layers"] for line in last_of_stage.values()]
    spent = sum(map(operator.mul, depths, steps))
    full = schedule.stages[-1].num_hidden_layers * sum(steps)
    lines += [
        f"layer-steps: {spent:,} against {full:,} at full depth for as many steps "
        f"({1 - spent / full:.0%} fewer; a count of work, not a quality claim)",
        f"steps: {last['step']} of {schedule.total_steps}; {last['wall_seconds']:.0f} s in all",
        *_attempts(run_dir),
        f"run: {run_dir}",
        f"watch: tensorboard --logdir {run_dir / 'tensorboard'}",
        *([passed_over.sentence] if passed_over.sentence else []),
    ]
    return "\n".join(lines)


def _attempts(run_dir: Path) -> list[str]:
    try:
        told, damage = attempts.summary(run_dir), attempts.passed_over(run_dir)
    except UserError as error:  # the run can be told of without
        return [str(error)]
    return list(filter(None, (told, damage)))


def _is_told(line: dict[str, Any], stages: Sequence[Stage]) -> bool:
    """True for a line that holds what a table is made of, and of a step of its stage."""
    if not all(is_count(line.get(key)) for key in _COUNTS) or line["stage"] >= len(stages):
        return False
    stage = stages[line["stage"]]
    return (
        stage.start_step < line["step"] <= stage.end_step
        and all(is_number(line.get(key)) for key in _NUMBERS)
        and line["stage/train_seconds"] > 0
    )


def _row(line: dict[str, Any], steps: int) -> tuple[str, ...]:
    boundary = line["stage/boundary_seconds"]
    return (
        str(line["stage"]),
        str(line["num_hidden_layers"]),
        str(steps),
        f"{line['stage/tokens']:,}",
        shown(line, "train/mlm_loss", ",.3f"),
        shown(line, "eval/mlm_loss", ",.3f"),
        f"{line['stage/tokens'] / line['stage/train_seconds']:,.0f}",
        f"{boundary:.2f}" if line["stage"] else "-",
    )
