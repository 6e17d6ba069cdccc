"""The only code that knows how DeepSpeed lays out masters and moments: it turns a live engine of
any ZeRO stage into `Fragment`s, writes them back, and frees the engine."""

# ruff: noqa: E402 - the imports below need what is checked first
from stacking_ds.zero.compatibility import require_pinned_deepspeed

require_pinned_deepspeed()

from stacking_ds.zero.binding import (
    accept_under_zero,
    adder_over_ranks,
    gradient_norm_at_step,
    shards,
)
from stacking_ds.zero.gradients import gradient_norm, norm_before_step
from stacking_ds.zero.loss_scale import loss_scale, mend_loss_scaling, set_loss_scale
from stacking_ds.zero.process_group import follow_process_group
from stacking_ds.zero.release import release, return_free_pages
from stacking_ds.zero.start import ValueOf, give_storage, import_muon, without_traffic
from stacking_ds.zero.state import (
    fragments,
    optimizer_step,
    refresh,
    reset_moments,
    seed_moments,
    whole_weights,
    without_stepping,
    write_masters,
    write_whole_weights,
)

__all__ = [
    "ValueOf",
    "accept_under_zero",
    "adder_over_ranks",
    "follow_process_group",
    "fragments",
    "give_storage",
    "gradient_norm",
    "gradient_norm_at_step",
    "import_muon",
    "loss_scale",
    "mend_loss_scaling",
    "norm_before_step",
    "optimizer_step",
    "refresh",
    "release",
    "require_pinned_deepspeed",
    "reset_moments",
    "return_free_pages",
    "seed_moments",
    "set_loss_scale",
    "shards",
    "whole_weights",
    "without_stepping",
    "without_traffic",
    "write_masters",
    "write_whole_weights",
]
