"""What people do today to change an engine's depth: gather everything, or go through the disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from stacking_ds.engine.zero import sharded_state
from stacking_ds.growth.operators import source_name
from stacking_ds.sharding.fragments import MASTER, MOMENTS

WholeState = Mapping[str, Mapping[str, torch.Tensor]]
"""By parameter and key ("master", "exp_avg", "exp_avg_sq"), whole, in host memory."""

_TAG = "boundary"


def gather_whole(engine: Any) -> WholeState:
    """Every rank gets the whole training state with DeepSpeed's own functions (ZeRO 1, 2, 3)."""
    whole: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in engine.module.named_parameters():
        values = {MASTER: safe_get_full_fp32_param(parameter)}
        for key in MOMENTS:
            values[key] = safe_get_full_optimizer_state(parameter, key)
        whole[name] = {key: value.cpu() for key, value in values.items()}
    return whole


@torch.no_grad()
def set_from_whole(engine: Any, whole: WholeState, layers: tuple[int, ...], step: int) -> None:
    """Fill a deeper engine. Through our fragments, since DeepSpeed's own setters fail for ZeRO-3
    parameters that the ranks do not divide."""
    sharded_state.seed_moments(engine, step)
    for fragment in sharded_state.fragments(engine):
        source = whole[source_name(fragment.name, layers)]
        for key, view in fragment.views.items():
            view.copy_(source[key].view(-1)[fragment.start : fragment.stop])
    sharded_state.refresh(engine)


def save_stock(engine: Any, folder: Path) -> None:
    """DeepSpeed's checkpoint; it does not wait for the disk."""
    engine.save_checkpoint(str(folder), tag=_TAG)


def load_stock(engine: Any, folder: Path) -> None:
    """Into an engine of the depth that saved: DeepSpeed cannot load another depth."""
    path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    assert path is not None, f"DeepSpeed did not find its own checkpoint in {folder}"
