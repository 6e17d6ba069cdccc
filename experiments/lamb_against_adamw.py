"""LAMB, AdamW, LAMB under ZeRO 2, and LAMB on flat partitions, at a batch of 4,096 rows.

    python -m experiments.lamb_against_adamw train ARM LEARNING_RATE --data SHARDS --work FOLDER
    python -m experiments.lamb_against_adamw table --work FOLDER
    python -m experiments.lamb_against_adamw draw --work FOLDER --svg FILE

`train` is one run (under `torchrun --nproc-per-node 2 -m …` where its name says zero2), `table` and
`draw` what docs/results/lamb_against_adamw.md shows of all that are in the folder. The test of the
same name runs a small version of it.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from stacking_ds.config.recipe import load_run_config
from stacking_ds.config.run import RunConfig
from stacking_ds.config.sections import OptimizerSection
from stacking_ds.distributed import process_group
from stacking_ds.distributed.world import World
from stacking_ds.optim.groups import parameter_groups
from stacking_ds.optim.lamb.optimizer import Lamb
from stacking_ds.optim.optimizers import build_optimizer
from stacking_ds.run.metrics_file import read_metrics
from stacking_ds.sharding.fragments import Shard, Span
from stacking_ds.train import stage_engine
from stacking_ds.train.loop import train
from stacking_ds.train.plan import open_plan

__all__ = ["ARMS", "FlatPartitionLamb", "Run", "runs_in", "table", "train_arm", "write_recipe"]

RECIPE: dict[str, Any] = {
    "seed": 1,
    "data": {"sequence_length": 32, "loader_workers": 0},
    "model": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 32,
        # dropout differs between numbers of ranks
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.08,
    },
    "stages": [{"num_hidden_layers": 2, "steps": 200}],
    "schedule": {"shape": "linear", "warmup_steps": 20},
    "batch": {"global_batch_size": 4096, "micro_batch_size": 512},
    "checkpoint": {"every_steps": 1000, "keep_last": 1, "export_at_end": False},
    "evaluation": {"every_steps": 50, "max_samples": 4096},
    "logging": {"every_steps": 1},
}


class FlatPartitionLamb(Lamb):
    """Our LAMB with one ratio for each flat partition of a rank, which is the tensor that ZeRO
    hands an optimizer."""

    def bind(
        self,
        shards: Sequence[Shard],
        add_over_ranks: Callable[[torch.Tensor], None] | None,
        gradient_norm: Callable[[], torch.Tensor] | None,
        is_same_on_all_ranks: Callable[[float], bool] | None = None,
    ) -> None:
        flat = [
            Shard(shard.flat, (Span(str(place), place, 0, shard.flat.numel()),), shard.low)
            for place, shard in enumerate(shards)
        ]
        super().bind(flat, None, gradient_norm, is_same_on_all_ranks)


def _flat_partition_lamb(
    config: OptimizerSection, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """Over the two groups, decay and no decay, that users make."""
    merged: dict[float, dict[str, Any]] = {}
    for group in parameter_groups(named_parameters, config.weight_decay):
        merged.setdefault(group["weight_decay"], {**group, "params": []})
        merged[group["weight_decay"]]["params"] += group["params"]
    return FlatPartitionLamb(
        list(merged.values()), lr=config.learning_rate, betas=config.betas, eps=config.eps
    )


# arm -> optimizer, DeepSpeed JSON, ranks, what builds the optimizer
ARMS: dict[str, tuple[str, str, int, Callable[..., torch.optim.Optimizer]]] = {
    "lamb": ("lamb", "zero0", 1, build_optimizer),
    "adamw": ("adamw", "zero0", 1, build_optimizer),
    "lamb-zero2": ("lamb", "zero2", 2, build_optimizer),
    "flat-zero2": ("lamb", "zero2", 2, _flat_partition_lamb),
}


def write_recipe(folder: Path, data: Path, arm: str, learning_rate: float) -> Path:
    optimizer, deepspeed, _, _ = ARMS[arm]
    recipe = {
        **RECIPE,
        "name": f"{arm}-{learning_rate:g}",
        "data": {**RECIPE["data"], "path": str(data)},
        "optimizer": {"name": optimizer, "learning_rate": learning_rate},
        "engine": {"deepspeed": deepspeed, "precision": "fp32"},
    }
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def train_arm(world: World, config: RunConfig, run_dir: Path, arm: str) -> None:
    stage_engine.build_optimizer = ARMS[arm][3]  # type: ignore[assignment]
    try:
        train(open_plan(config, world.size), world, run_dir)
    finally:
        stage_engine.build_optimizer = build_optimizer


# ------------------------------------------------------------------ what came of it


class Run:
    """One run's losses: of every step, and held out at the end."""

    def __init__(self, run_dir: Path) -> None:
        found = re.fullmatch(r"(.*?)-([0-9.e-]+)", run_dir.name)
        assert found is not None, run_dir
        self.arm, self.learning_rate = found[1], float(found[2])
        lines = list(read_metrics(run_dir))
        self.losses = [line["train/loss"] for line in lines]
        self.heldout = {
            line["step"]: line["eval/mlm_loss"] for line in lines if "eval/mlm_loss" in line
        }

    @property
    def final(self) -> float:
        return self.heldout[len(self.losses)]


def runs_in(work: Path) -> list[Run]:
    folders = [path.parent for path in work.glob("*/metrics.jsonl")]
    return sorted(map(Run, folders), key=lambda run: (list(ARMS).index(run.arm), run.learning_rate))


def table(runs: Sequence[Run]) -> str:
    """Markdown: every run's losses, and how far the sharded runs are from the unsharded one."""
    steps = sorted(runs[0].heldout)
    head = " | ".join(f"held out, step {step}" for step in steps)
    lines = [
        f"| arm | peak learning rate | {head} | last 20 training losses | from `lamb` at most |",
        "|---" * (len(steps) + 4) + "|",
    ]
    unsharded = {run.learning_rate: run for run in runs if run.arm == "lamb"}
    for run in runs:
        best = min((r for r in runs if r.arm == run.arm), key=lambda r: r.final) is run
        mark = "**" if best else ""
        cells = [f"{mark}{run.heldout[step]:.4f}{mark}" for step in steps]
        recent = run.losses[-20:]
        beside = unsharded.get(run.learning_rate)
        far = "-"
        if beside is not None and run.arm.endswith("zero2"):
            pairs = zip(run.losses, beside.losses, strict=True)
            far = f"{max(abs(ours - theirs) for ours, theirs in pairs):.1e}"
        lines.append(
            f"| `{run.arm}` | {run.learning_rate:g} | {' | '.join(cells)} | "
            f"{sum(recent) / len(recent):.4f} | {far} |"
        )
    return "\n".join(lines)


def draw(runs: Sequence[Run], path: Path) -> None:
    """The training losses of every run, as an SVG; needs matplotlib, as nothing else here."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lamb", "font.size": 9})
    colors = dict(zip(ARMS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    rates = sorted({run.learning_rate for run in runs})
    for run in runs:
        best = min((r for r in runs if r.arm == run.arm), key=lambda r: r.final) is run
        style = (":", "-", "-.")[rates.index(run.learning_rate) % 3]
        axes.plot(
            range(1, len(run.losses) + 1),
            run.losses,
            color=colors[run.arm],
            linewidth=1.5 if best else 0.7,
            alpha=1.0 if best else 0.45,
            linestyle="--" if run.arm == "lamb-zero2" else style,  # it lies on another curve
            label=f"{run.arm}, {run.learning_rate:g}",
        )
    axes.set(xlabel="step", ylabel="training loss (MLM + NSP), nats", ylim=(6.6, 8.5))
    axes.legend(ncols=2)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("arm", choices=tuple(ARMS))
    one.add_argument("learning_rate", type=float)
    one.add_argument("--data", type=Path, required=True, help="what `stacking-ds prepare` wrote")
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    commands.add_parser("table")
    commands.add_parser("draw").add_argument("--svg", type=Path, required=True)
    for command in commands.choices.values():
        command.add_argument("--work", type=Path, required=True, help="where the runs are")
    options = parser.parse_args()
    if options.command == "table":
        print(table(runs_in(options.work)))
        return
    if options.command == "draw":
        draw(runs_in(options.work), options.svg)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    world = process_group.start()
    path = world.on_first(
        lambda: write_recipe(options.work, options.data, options.arm, options.learning_rate)
    )
    assert world.size == ARMS[options.arm][2], f"{options.arm} is a run of {ARMS[options.arm][2]}"
    train_arm(world, load_run_config(str(path), options.set), options.work / path.stem, options.arm)
    process_group.stop()


if __name__ == "__main__":
    main()
