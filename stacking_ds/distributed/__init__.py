"""Ranks: who they are, what they say to one another, when they stop, and who is missing."""

from stacking_ds.distributed.joining import DEFAULT_TIMEOUT, start, stop
from stacking_ds.distributed.stop_flag import StopFlag
from stacking_ds.distributed.watch import EXIT_LOST, Watch, is_lost_contact
from stacking_ds.distributed.world import Pulse, World

__all__ = [
    "DEFAULT_TIMEOUT",
    "EXIT_LOST",
    "Pulse",
    "StopFlag",
    "Watch",
    "World",
    "is_lost_contact",
    "start",
    "stop",
]
