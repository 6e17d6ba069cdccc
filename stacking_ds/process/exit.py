"""How a program ends: each error as a sentence, said once, and an exit code."""

import multiprocessing
import os
import sys
import threading

from stacking_ds.errors import (
    EXIT_FAILURE,
    EXIT_LOST_RANK,
    EXIT_NOT_FINITE,
    EXIT_USER_ERROR,
    LoaderError,
    LostRankError,
    NonFiniteError,
    UserError,
    is_mendable,
    mended_by,
)
from stacking_ds.process.launcher_env import local_rank_from_environment, rank_from_environment
from stacking_ds.process.stop_signals import INTERRUPTED

# ---- Worker processes that end when the process that started them does.


def end_with_parent() -> None:
    """Call it in a process of `multiprocessing`'s. Nobody else ends a worker that hears no signals;
    it would wait for work, or for who takes it, for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def tell(error: BaseException) -> int | None:
    """Say the error as a sentence, on rank 0 if all ranks have it, else on the rank that has it;
    the exit code. None for an error that is no user's, whose traceback says more.

    0 done (or stopped when asked), 1 a process of the loader is lost, 2 something the user can
    mend, 3 a loss that is not finite, 4 another rank is lost, 130 interrupted.
    """
    everywhere = getattr(error, "on_all_ranks", False)
    if isinstance(error, UserError):
        _say(f"stacking-ds: error: {error}", everywhere)
        return EXIT_USER_ERROR
    if isinstance(error, OSError) and is_mendable(error):
        _say(f"stacking-ds: error: {mended_by(error)}", everywhere)
        return EXIT_USER_ERROR
    if isinstance(error, NonFiniteError):
        _say(f"stacking-ds: error: {error}", everywhere)
        return EXIT_NOT_FINITE
    if isinstance(error, LoaderError):
        _say(f"stacking-ds: error: {error}", everywhere)
        return EXIT_FAILURE
    if isinstance(error, LostRankError):
        if not error.said_elsewhere and _first_of_node():
            _say(f"stacking-ds: error: {error}", False)
        return EXIT_LOST_RANK
    if isinstance(error, KeyboardInterrupt):
        _say("stacking-ds: interrupted", True)
        return INTERRUPTED
    return None


def _first_of_node() -> bool:
    # on rank 0's own node, rank 0 may be the one that is lost
    return local_rank_from_environment() == 0 or rank_from_environment() == 1


def _say(message: str, everywhere: bool) -> None:
    rank = rank_from_environment()
    if rank == 0 or not everywhere:
        prefix = "" if rank == 0 else f"[rank {rank}] "
        try:
            print(prefix + message, file=sys.stderr, flush=True)
        except OSError:  # the launcher that read it is gone
            return
