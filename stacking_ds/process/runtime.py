"""Settings of this process: waiting OpenMP threads, compilers' caches, freed host memory."""

import ctypes
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

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


_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def keep_caches_on_node(say: Callable[[str], None]) -> None:
    """Point the caches of compilers, where nobody has, to the node's own disk. Before torch is
    imported.

    That is SLURM_TMPDIR, else TMPDIR. Compiled code is run, so the folder has to be this user's
    alone: where another user has made it first, a new one is taken, which no one can foresee, and
    kernels are compiled anew; `say` is told. What the compilers would choose by themselves can be
    foreseen too, so where nothing can be written they keep no cache.
    """
    missing = [variable for variable in _CACHES if variable not in os.environ]
    if not missing:
        return
    places = [os.environ.get("SLURM_TMPDIR", "")]
    with suppress(FileNotFoundError):  # no place at all can be written
        places.append(tempfile.gettempdir())
    folders = (_private_folder(Path(place), say) for place in places if place)
    root = next(filter(None, folders), None)
    if root is None:
        os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
        return
    for variable in missing:
        os.environ[variable] = str(root / _CACHES[variable])


def _private_folder(parent: Path, say: Callable[[str], None]) -> Path | None:
    """A folder in `parent` that is this user's alone; None where nothing can be written there."""
    root = parent / f"stacking-ds-{os.getuid()}"
    with suppress(OSError):  # a file, or a link that leads nowhere, has its name
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
        others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        own = stat.S_ISDIR(found.st_mode) and not others_write and found.st_uid == os.getuid()
        if own and os.access(root, os.W_OK):
            return root
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f"{root.name}-", dir=parent))
    except OSError:
        return None
    say(
        f"{root} is not a folder of yours alone, so kernels are compiled anew into {fresh}: have "
        f"it removed, or set TMPDIR to a folder of your own"
    )
    return fresh


# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for this process; whether it does (another C library does not).

    glibc by itself gives large blocks back at once, and the operating system clears their pages
    for the next step, which takes CPU time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *setting: 0)
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Give what is free at present back to the machine."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: 0)(0)
