"""A run as a table for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stacking_ds import attempts, run_directory
from stacking_ds.divergence import judge
from stacking_ds.errors import CheckpointError
from stacking_ds.monitor import read_metrics

__all__ = ["run_table"]

_COLUMNS = (
    "stage",
    "layers",
    "steps",
    "tokens",
    "train MLM loss",
    "held-out MLM loss",
    "tokens/s",
    "boundary s",
)
_FLOOR = "eval/unigram_mlm_loss"


def run_table(run_dir: Path) -> str:
    """What happened in each stage so far, the unigram floor, and what the shallow stages spared.

    Raises:
        CheckpointError: there is no run, or it has not come far enough to say anything.
    """
    config = run_directory.read_config(run_dir)
    schedule = config.stage_schedule()
    lines_so_far = list(read_metrics(run_dir))
    last_of_stage = {line["stage"]: line for line in lines_so_far}
    if not last_of_stage:
        raise CheckpointError(f"{run_dir} has no metrics yet; train it first")
    rows = [
        _row(line, line["step"] - schedule.stages[index].start_step)
        for index, line in sorted(last_of_stage.items())
    ]
    last = last_of_stage[max(last_of_stage)]
    lines = [_aligned([_COLUMNS, *rows]), ""]
    floors = [line[_FLOOR] for line in lines_so_far if line.get(_FLOOR) is not None]
    if floors:
        lines.append(
            f"unigram floor: {floors[-1]:.3f} held-out MLM loss of word "
            f"frequencies alone, on the same masked tokens"
        )
    lines.append(f"state: {judge(lines_so_far).sentence}")
    steps = [
        line["step"] - schedule.stages[index].start_step for index, line in last_of_stage.items()
    ]
    depths = [line["num_hidden_layers"] for line in last_of_stage.values()]
    spent = sum(depth * count for depth, count in zip(depths, steps, strict=True))
    full = schedule.stages[-1].num_hidden_layers * sum(steps)
    lines += [
        f"layer-steps: {spent:,} against {full:,} at full depth for as many steps "
        f"({1 - spent / full:.0%} fewer; a count of work, not a quality claim)",
        f"steps: {last['step']} of {schedule.total_steps}; {last['wall_seconds']:.0f} s in all",
        *([told] if (told := attempts.told(run_dir)) else []),
        f"run: {run_dir}",
        f"watch: tensorboard --logdir {run_dir / 'tensorboard'}",
    ]
    return "\n".join(lines)


def _row(line: dict[str, Any], steps: int) -> tuple[str, ...]:
    boundary = line["stage/boundary_seconds"]
    return (
        str(line["stage"]),
        str(line["num_hidden_layers"]),
        str(steps),
        f"{line['stage/tokens']:,}",
        _shown(line, "train/mlm_loss"),
        _shown(line, "eval/mlm_loss"),
        f"{line['stage/tokens'] / line['stage/train_seconds']:,.0f}",
        f"{boundary:.2f}" if line["stage"] else "-",
    )


def _shown(line: dict[str, Any], name: str) -> str:
    if name not in line:
        return "-"
    return "not finite" if line[name] is None else f"{line[name]:,.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
