"""All ranks stop at the same step, whichever of them was asked to."""

from stacking_ds.distributed.world import World
from stacking_ds.process.stop_signals import StopRequest

__all__ = ["StopFlag"]


class StopFlag:
    """Asked by all ranks at step, evaluation and growth boundaries."""

    def __init__(self, world: World, request: StopRequest) -> None:
        self._world, self._request = world, request

    def agreed(self) -> bool:
        """True on every rank once any rank was asked to stop (a collective).

        Raises:
            KeyboardInterrupt: this rank is to end at once, and what it did has swallowed that.
        """
        self._request.raise_if_interrupted()
        return self._world.any(self._request.made)
