"""Keep DeepSpeed on the process group of now.

DeepSpeed remembers the first process group it met for the life of the process. A program that
leaves its group and joins another, a notebook that trains twice say, would build its second engine
on a group that is gone.
"""

from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups

from stacking_ds.engine.zero.compatibility import deepspeed

__all__ = ["follow_process_group"]

_followed: Any = None


def follow_process_group() -> None:
    """Before an engine is built: make the present group DeepSpeed's, and no earlier one."""
    global _followed  # noqa: PLW0603 - what DeepSpeed keeps is global too
    if _followed is not None and _followed is not dist.group.WORLD:
        groups._release_process_group_references()
        deepspeed.comm.comm.cdb = None
    _followed = dist.group.WORLD
    # it wraps the group that is there; ZeRO 3 counts ranks before `initialize` would have done so
    deepspeed.init_distributed(dist_backend=dist.get_backend())
