"""Ranks: who they are, what they say to one another, when they stop, and who is missing."""

from stacking_ds.distributed.joining import start, stop
from stacking_ds.distributed.stop_flag import StopFlag
from stacking_ds.distributed.watch import Watch, is_lost_contact, is_raised_by_all
from stacking_ds.distributed.world import Pulse, World

__all__ = [
    "Pulse",
    "StopFlag",
    "Watch",
    "World",
    "is_lost_contact",
    "is_raised_by_all",
    "start",
    "stop",
]
