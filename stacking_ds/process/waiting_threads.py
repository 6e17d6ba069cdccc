"""Threads of OpenMP sleep while they wait for one another, instead of keeping a core busy."""

import os

__all__ = ["let_waiting_threads_sleep"]

# any of them says how threads wait: OpenMP's own, GNU's, and that of LLVM and Intel
_CHOSEN_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_waiting_threads_sleep() -> None:
    """Set OMP_WAIT_POLICY, where nobody has chosen how threads wait; for this process and those it
    starts. Before torch is imported, with which the library reads it.

    By default a thread spins for a moment before it sleeps. Where a core is wanted by another
    program too, that is time taken from the very thread that is waited for.
    """
    if not any(name in os.environ for name in _CHOSEN_BY):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
