"""What becomes of host memory that is freed: glibc's allocator, told when to keep it and when not.

Where the C library is another one, nothing happens.
"""

import ctypes
from typing import Any

__all__ = ["keep_freed_memory", "return_freed_memory"]

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """From now on what is freed stays this process's; whether it does.

    glibc by itself gives large blocks back at once, and the operating system clears their pages
    for the next step, which takes CPU time.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Give what is free at present back to the machine."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
