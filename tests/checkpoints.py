"""Small checkpoints without an engine, and a world of one that needs no process group."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stacking_ds.checkpoint import manifest, save
from stacking_ds.distributed.world import World
from stacking_ds.sharding.fragments import MASTER, MOMENTS, Cut, Fragment

__all__ = ["Alone", "contents", "plain_fragments", "rank_fragments", "save_now", "save_state"]


class Alone(World):
    def __init__(self) -> None:
        super().__init__(0, 1, 0, 1, torch.device("cpu"), None)

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def gather_on_first(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def contents(step: int) -> manifest.Contents:
    return manifest.Contents(
        step=step,
        optimizer_step=step,
        loss_scale=128.0,
        num_hidden_layers=2,
        zero_stage=1,
        vocabulary_sha256="v",
        data_sha256="d",
        train_state={"step": step, "samples_seen": 64 * step},
        config={"name": "test"},
    )


def plain_fragments(names: str = "ab", value: float = 0.0, numel: int = 6) -> list[Fragment]:
    """Parameters of 2 rows, whole on one rank; every element of every key is another number."""
    found = []
    for index, name in enumerate(names):
        values = torch.arange(float(numel)) + 10 * index + value
        views = {MASTER: values, "exp_avg": values * 2, "exp_avg_sq": values * values}
        found.append(Fragment(name, (2, numel // 2), 0, numel, views, Cut(numel, numel)))
    return found


def rank_fragments(world: World, value: float, numel: int = 3) -> list[Fragment]:
    """One parameter, of which each rank has `numel` elements that are `value` + its rank."""
    values = torch.full((numel,), value + world.rank)
    cut = Cut(numel * world.size, numel)
    return [Fragment("w", (cut.numel,), *cut.interval(world.rank), {MASTER: values}, cut)]


def save_state(
    run_dir: Path, step: int, fragments: list[Fragment], world: World | None = None
) -> Path:
    saved = contents(step)
    if MOMENTS[0] not in fragments[0].views:
        saved = saved.model_copy(update={"optimizer_step": 0})
    return save_now(run_dir, fragments, world or Alone(), saved)


def save_now(
    run_dir: Path, fragments: Sequence[Fragment], world: World, saved: manifest.Contents
) -> Path:
    """Write the state of all ranks, and wait for it; the new folder. A collective."""
    owned = [fragment.owned_by(world.rank).on_host() for fragment in fragments]
    saving = save.BackgroundSave(run_dir, owned, world, saved)
    saving.finish()
    return saving.folder
