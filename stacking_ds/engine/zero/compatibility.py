"""Import DeepSpeed, refuse a version whose private layout the package does not know.

Everything in `engine/zero` was read in, and tested with, one DeepSpeed release. Another one
may keep the names and change their meaning, so it is refused before any number is moved. What
the others use of DeepSpeed they import from here, so that it has been looked at before.
"""

# ruff: noqa: E402 - DeepSpeed's insides are imported after its version has been looked at
import os
import pkgutil
import sys
from contextlib import redirect_stdout
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist

from stacking_ds.errors import ConfigError

if not torch.cuda.is_available():  # DeepSpeed would warn, in every process, that it found none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with redirect_stdout(sys.stderr):  # for results alone; its logger keeps what it finds there
    import deepspeed as deepspeed


PINNED_VERSION = "0.19.8"


class Masters(Enum):
    """Places in which DeepSpeed keeps the fp32 masters, by the class of `engine.optimizer`."""

    MODULE = "torch optimizer on the module's own parameters (ZeRO 0, fp32)"
    UNFUSED = "FP16_UnfusedOptimizer"  # ZeRO 0, bf16 or fp16: one master per parameter
    FUSED = "FP16_Optimizer"  # the same with a fused Adam: one flat master per group
    GROUPS = "DeepSpeedZeroOptimizer"  # ZeRO 1 and 2: each flat group cut among the ranks
    PARAMETERS = "DeepSpeedZeroOptimizer_Stage3"  # ZeRO 3: each parameter cut among the ranks


_REQUIRED = {
    Masters.MODULE: "",
    Masters.UNFUSED: "fp16_groups fp32_groups loss_scale_config",
    Masters.FUSED: "fp16_groups fp32_groups_flat fp16_groups_flat",
    Masters.GROUPS: (
        "round_robin_bit16_groups round_robin_bit16_offsets single_partition_of_fp32_groups "
        "parallel_partitioned_bit16_groups partition_size real_dp_process_group update_lp_params "
        "scaled_global_norm _hp_optimizer_states_linked _lazy_init_hp_params_optimizer_state "
        "has_overflow averaged_gradients dp_process_group cpu_offload device"
    ),
    Masters.PARAMETERS: (
        "fp16_groups fp32_partitioned_groups_flat fp16_partitioned_groups_flat _global_grad_norm "
        "grad_position get_param_id _get_param_partition_rank _partition_all_parameters "
        "_reassign_or_swap_out_partitioned_parameters "
        "has_overflow _get_norm_groups averaged_gradients dp_process_group offload_optimizer device"
    ),
}
"""The private attributes that are read of each, beside those below."""

# what is not an attribute of the optimizer wrapper that `initialize` makes
_PRIVATE_NAMES = (
    "deepspeed.ops:_probe_compatible_ops",  # what reading __compatible_ops__ would call
    "deepspeed.comm.comm:cdb",
    "deepspeed.runtime.compiler:compile",
    "deepspeed.runtime.engine:DeepSpeedEngine._broadcast_model",
    "deepspeed.runtime.zero.parameter_offload:FWD_MODULE_STACK",
    "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param",
    "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator",
    "deepspeed.runtime.zero.utils:ZERO_SUPPORTED_OPTIMIZERS",
    "deepspeed.utils.groups:_release_process_group_references",
)


def require_pinned_deepspeed() -> None:
    """Raises ConfigError unless DeepSpeed is the one this package was proved with, and has each
    private name that it needs."""
    if deepspeed.__version__ != PINNED_VERSION:
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} is installed, but growth reads DeepSpeed's "
            f"private buffers and is proved with {PINNED_VERSION} alone: "
            f"pip install deepspeed=={PINNED_VERSION}"
        )
    for name in _PRIVATE_NAMES:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(_changed(f"DeepSpeed has no {name} ({error})")) from None


def _changed(what: str) -> str:
    return (
        f"{what}: this is not the DeepSpeed {PINNED_VERSION} the package was proved with; "
        f"reinstall that version: pip install --force-reinstall deepspeed=={PINNED_VERSION}"
    )


def masters_of(engine: Any) -> Masters:
    """The place in which a live engine keeps its masters; every private attribute needed is there.

    Raises:
        ConfigError: the engine's optimizer wrapper is one whose layout is not known.
    """
    wrapper = engine.optimizer
    masters = Masters.MODULE
    if wrapper is not engine.basic_optimizer:
        try:
            masters = Masters(type(wrapper).__name__)
        except ValueError:
            raise ConfigError(
                f"DeepSpeed chose {type(wrapper).__name__}, whose buffers this package does not "
                f"know; start from a bundled DeepSpeed JSON (zero0 … zero3)"
            ) from None
    missing = [name for name in _REQUIRED[masters].split() if not hasattr(wrapper, name)]
    if missing:
        name = type(wrapper).__name__
        raise ConfigError(_changed(f"DeepSpeed's {name} has no {', '.join(missing)}"))
    return masters


require_pinned_deepspeed()

from deepspeed.runtime import compiler as compiler
from deepspeed.runtime.engine import DeepSpeedEngine as DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload as parameter_offload
from deepspeed.runtime.zero import partition_parameters as partition_parameters
from deepspeed.runtime.zero import partitioned_param_coordinator as partitioned_param_coordinator
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS as ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import groups as groups

_followed: Any = None


def follow_process_group() -> None:
    """Make the present process group DeepSpeed's, before an engine is built.

    DeepSpeed remembers the first one that it met for the life of the process; a program that leaves
    its group and joins another, a notebook that trains twice say, would build on one that is gone.
    """
    global _followed  # noqa: PLW0603 - what DeepSpeed keeps is global too
    if _followed is not None and _followed is not dist.group.WORLD:
        groups._release_process_group_references()
        deepspeed.comm.comm.cdb = None
    _followed = dist.group.WORLD
    # it wraps the group that is there; ZeRO 3 counts ranks before `initialize` would have done so
    deepspeed.init_distributed(dist_backend=dist.get_backend())
