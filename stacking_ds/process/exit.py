"""Process exit: each error as a sentence, said once, and an exit code.

No other module ends a process by `os._exit`.
"""

import errno
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

from stacking_ds.console import say_on_stderr, shortened
from stacking_ds.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_LOST_RANK,
    EXIT_NOT_FINITE,
    EXIT_USER_ERROR,
    AgreedError,
    LoaderError,
    LostRankError,
    LostRankToldError,
    NonFiniteError,
    UserError,
)
from stacking_ds.process.launchers import is_first_of_node, marked, rank_from_environment

_MENDABLE = {
    *(errno.ENOSPC, errno.EDQUOT),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
}
_CODES: Mapping[type[BaseException], int] = {
    UserError: EXIT_USER_ERROR,
    NonFiniteError: EXIT_NOT_FINITE,
    LoaderError: EXIT_FAILURE,
    LostRankError: EXIT_LOST_RANK,
}


def end_now(code: int) -> NoReturn:
    """End the process at once, from any thread of it: its main thread may be stuck, and the
    interpreter's own end would wait for it."""
    os._exit(code)


def end_with_parent() -> None:
    """End this process of `multiprocessing`'s when the one that started it ends. Nobody else ends a
    worker that hears no signals; it would wait for work, or for who takes it, for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            end_now(EXIT_FAILURE)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def exit_process(error: Exception) -> NoReturn:
    """Report the error and end the process, not by way of the interpreter's end, which may wait
    for collectives that nobody answers."""
    code = report_error(error)
    with suppress(OSError):  # nobody may read any more
        if code is None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    end_now(EXIT_FAILURE if code is None else code)


def report_error(error: BaseException) -> int | None:
    """Print the error as a sentence, on rank 0 if all ranks have it, else on the rank that has it;
    the exit code. None for an unexpected error, which is to keep its traceback.

    1 a process of the loader is lost, 2 something the user can mend, 3 a loss or gradient that is
    not finite, 4 another rank is lost, 130 interrupted.
    """
    if isinstance(error, KeyboardInterrupt):
        if rank_from_environment() == 0:
            say_on_stderr("stacking-ds: interrupted")
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) and is_mendable(error):
        code, text = EXIT_USER_ERROR, mended_by(error)
    else:
        found = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
        if found is None:
            return None
        code, text = found, str(error)
    rank = rank_from_environment()
    if isinstance(error, AgreedError):
        speaks = rank == 0
    elif isinstance(error, LostRankError):
        # one rank of each node; on rank 0's own, rank 0 may be the one that is lost
        speaks = (is_first_of_node() or rank == 1) and not isinstance(error, LostRankToldError)
    else:
        speaks = True
    if speaks:
        say_on_stderr(marked(f"stacking-ds: error: {text}"))
    return code


def is_mendable(error: OSError) -> bool:
    """True where the user can mend it (a full disk, a path, a permission). What a file system does
    by itself, a stale handle or an input/output error, may be gone at the next attempt."""
    return error.errno in _MENDABLE


def mended_by(error: OSError) -> str:
    """The sentence for a mendable error: what it is, and what to do about it."""
    if error.errno == errno.ENAMETOOLONG:
        return f"{error.strerror}: '{shortened(str(error.filename))}'; choose a shorter one"
    return f"{error}; make room, or mend paths and permissions"
