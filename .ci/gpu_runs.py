"""Whole training runs of `make gpu-check`, started by the launcher as a user starts them."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_ground import Ground, PartError, free_port, tail, together

__all__ = ["Figures", "checkpointing_rows", "lamb_runs", "prepare", "run_figures", "short_runs"]

Figures = dict[str, Any]

SHARDS = "the embedded corpus"
STAGE_STEPS = (300, 100, 100)  # the demo's with a shorter last stage
MARGIN = 0.1  # in nats below the unigram model's loss; on the CPU these steps reach 0.4
LAMB = {
    "data.packing": "true",
    "optimizer.name": "lamb",
    "optimizer.learning_rate": "1e-2",
}
# With 64 rows a step it stays a while where word frequencies are all that it knows.
LAMB_MARGIN = -0.1
# Named and found: what is named is an error where it cannot run, what was found is in the log.
NAMED = {"engine.kernels": "triton", "optimizer.lamb.kernel": "triton"}
FOUND = ("kernels: triton", "LAMB kernel: triton", "attention: ")
SHORT_RUNS = "the short runs"
SHORT_STEPS = (20, 10, 10)
SHORT = {
    "schedule.warmup_steps": 10,
    "schedule.decay_steps": 10,
    "logging.every_steps": 5,
    "data.packing": "true",
    "engine.deepspeed": "zero1",
    # so that what is computed again is drawn again, by a form that all runs share
    "model.hidden_dropout_prob": 0.1,
    "model.attention_probs_dropout_prob": 0.1,
    "engine.attention": "flash",
}
NEAR_LOSS = 0.1  # relative: fewer bits, or other masks of dropout
SAME_LOSS = 1e-2  # relative: bf16 in another order, over 40 steps


def begin_prepare(ground: Ground) -> None:
    cli = "import sys; from stacking_ds.cli import main; sys.exit(main(sys.argv[1:]))"
    command = "-c", cli, "prepare", "embedded", "--out", ground.work / "shards"
    work = partial(ground.python, *command, "--vocab-size", 4096, limit_seconds=150)
    ground.begin(SHARDS, work)


def prepare(ground: Ground) -> Figures:
    """What was begun with the first parts."""
    output: str = ground.outcome(SHARDS)
    return {"shards": tail(output).splitlines()[-1].partition("shards: ")[2]}


def demo(ground: Ground) -> Figures:
    """The demo with AdamW, alone on the machine: its speeds count."""
    run_dir = _train(ground, "demo", STAGE_STEPS, {"engine.deepspeed": "zero1"})
    return run_figures(_metrics(run_dir), STAGE_STEPS)


def lamb_runs(ground: Ground) -> Figures:
    """LAMB on packed rows at all ZeRO stages, at the same time, and beside them the short runs:
    their speeds do not count."""
    ground.begin(SHORT_RUNS, partial(_short_runs, ground))
    settings = {
        zero_stage: {"engine.deepspeed": f"zero{zero_stage}", **LAMB, **(NAMED if named else {})}
        for zero_stage, named in ((0, False), (1, True), (2, False), (3, True))
    }
    folders = together(
        {
            f"ZeRO {stage}": partial(_train, ground, f"lamb-zero{stage}", STAGE_STEPS, overrides)
            for stage, overrides in settings.items()
        }
    )
    rows, chosen = [], []
    for name, run_dir in folders.items():
        found = run_figures(_metrics(run_dir), STAGE_STEPS, LAMB_MARGIN)
        rows += [{"run": name, **_without_speed(row)} for row in found["stages"]]
        log = (run_dir / "train.log").read_text(encoding="utf-8")
        named = "engine.kernels" in settings[int(name[-1])]
        chosen.append({"run": name, "log": "triton by name" if named else chosen_kernels(log)})
    return {"stages": rows, "unigram_mlm_loss": found["unigram_mlm_loss"], "kernels": chosen}


def chosen_kernels(log: str) -> str:
    """What a run's log says that `auto` chose.

    Raises:
        PartError: it was not Triton, or no attention.
    """
    said = [line for line in log.splitlines() if any(start in line for start in FOUND)]
    missing = [start for start in FOUND if not any(start in line for line in said)]
    if missing:
        raise PartError(f"the run's log does not say {missing[0]!r}", tail(log))
    return "; ".join(dict.fromkeys(line[line.index(_first(line)) :] for line in said))


def _first(line: str) -> str:
    return next(start for start in FOUND if start in line)


def _without_speed(row: Mapping[str, Any]) -> Figures:
    slow = ("tokens_per_second", "model_flops_utilization", "boundary_seconds")
    return {name: value for name, value in row.items() if name not in slow}


def short_runs(ground: Ground) -> Figures:
    """What was begun with the runs before."""
    figures: Figures = ground.outcome(SHORT_RUNS)
    return figures


def _short_runs(ground: Ground) -> Figures:
    """A few steps in FP8, with CUDA graphs, and with activations computed again."""
    cases = {
        "bf16": {},
        "fp8": {"engine.fp8": "true"},
        "selective": {"engine.activation_checkpointing": "selective"},
        "full": {"engine.activation_checkpointing": "full"},
        # beside a loader that pins memory, which a capture has to bear
        "graphs": {"engine.cuda_graphs": "true"},
    }
    folders = together(
        {
            name: partial(_train, ground, f"short-{name}", SHORT_STEPS, {**SHORT, **overrides})
            for name, overrides in cases.items()
        }
    )
    lines = {name: _metrics(run_dir) for name, run_dir in folders.items()}
    return checkpointing_rows(lines)


def checkpointing_rows(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figures:
    """A row for each short run, beside the one called bf16.

    Raises:
        PartError: a loss is not finite, or activation checkpointing changes what is computed.
    """
    losses = {name: [line["train/loss"] for line in lines] for name, lines in runs.items()}
    rows = []
    for name, lines in runs.items():
        if not losses[name] or not all(map(math.isfinite, losses[name])):
            raise PartError(f"the losses of {name} are {losses[name]}")
        pairs = list(zip(losses[name], losses["bf16"], strict=True))
        farthest = max(abs(one - other) / other for one, other in pairs)
        if name in ("fp8", "graphs") and not farthest < NEAR_LOSS:
            raise PartError(f"{name} trains otherwise than bf16: losses {pairs}")
        if name in ("selective", "full") and not farthest < SAME_LOSS:
            raise PartError(f"activation checkpointing {name}: losses {pairs} are not the same")
        rows.append(
            {
                "run": name,
                "last_train_loss": losses[name][-1],
                "farthest_from_bf16": farthest,
                "peak_memory_gib": lines[-1]["memory/peak_gib"],
            }
        )
    return {"runs": rows}


def _train(
    ground: Ground, name: str, stage_steps: Sequence[int], overrides: Mapping[str, Any]
) -> Path:
    """The demo's model through its depths in bf16; the run's folder."""
    run_dir = ground.work / name
    settings = {
        "data.path": ground.work / "shards",
        "engine.precision": "bf16",
        **overrides,
        **{f"stages.{index}.steps": steps for index, steps in enumerate(stage_steps)},
    }
    ground.python(
        # the launcher's own script lies in a folder that is not on the PATH
        *("-m", "deepspeed.launcher.runner", "--num_gpus", 1, "--master_port", free_port()),
        *("train.py", "--recipe", "demo", "--run-dir", run_dir),
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
        limit_seconds=120,
    )
    return run_dir


def _metrics(run_dir: Path) -> list[Figures]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run_figures(
    metrics: Sequence[Mapping[str, Any]], stage_steps: Sequence[int], margin: float = MARGIN
) -> Figures:
    """A row for each stage, from the lines of a run's metrics.jsonl; speeds are medians.

    Raises:
        PartError: the run did not train through all stages, or did not learn.
    """
    rows = []
    for index in range(len(stage_steps)):
        lines = [line for line in metrics if line["stage"] == index]
        if not lines or lines[-1]["step"] != sum(stage_steps[: index + 1]):
            raise PartError(f"stage {index} was not trained to its end")
        rows.append(_stage_row(lines, stage_steps[index]))
    if not all(math.isfinite(line["train/loss"]) for line in metrics):
        raise PartError("a training loss is not finite")
    unigram, heldout = metrics[-1]["eval/unigram_mlm_loss"], rows[-1]["heldout_mlm_loss"]
    if not heldout < unigram - margin:
        raise PartError(
            f"the held-out loss is {heldout:.4g} in the end; a model of word "
            f"frequencies alone has {unigram:.4g}"
        )
    return {
        "stages": rows,
        "unigram_mlm_loss": unigram,
        "wall_seconds": metrics[-1]["wall_seconds"],
    }


def _stage_row(lines: Sequence[Mapping[str, Any]], steps: int) -> Figures:
    last = lines[-1]
    return {
        "stage": last["stage"],
        "layers": last["num_hidden_layers"],
        "steps": steps,
        "train_loss": last["train/loss"],
        "heldout_mlm_loss": last["eval/mlm_loss"],
        "tokens_per_second": statistics.median(line["speed/tokens_per_second"] for line in lines),
        "model_flops_utilization": statistics.median(
            line["speed/model_flops_utilization"] for line in lines
        ),
        "boundary_seconds": last["stage/boundary_seconds"],
        "peak_memory_gib": last["memory/peak_gib"],
    }
