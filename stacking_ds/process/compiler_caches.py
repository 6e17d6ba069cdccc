"""Compiled kernels stay on the node: a thousand ranks must not meet in one home directory."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["keep_caches_on_node"]

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
    root = next(filter(None, (_private_folder(parent, say) for parent in _places())), None)
    if root is None:
        os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
        return
    for variable in missing:
        os.environ[variable] = str(root / _CACHES[variable])


def _places() -> Iterator[Path]:
    given = os.environ.get("SLURM_TMPDIR")
    if given:
        yield Path(given)
    with suppress(FileNotFoundError):  # no place at all can be written
        yield Path(tempfile.gettempdir())


def _private_folder(parent: Path, say: Callable[[str], None]) -> Path | None:
    """A folder in `parent` that is this user's alone; None where nothing can be written there."""
    root = parent / f"stacking-ds-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        if _is_private(root) and os.access(root, os.W_OK):
            return root
    except OSError:
        pass  # a file, or a link that leads nowhere, has its name
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f"{root.name}-", dir=parent))
    except OSError:
        return None
    say(
        f"{root} is not a folder of yours alone, so kernels are compiled anew into {fresh}: have "
        f"it removed, or set TMPDIR to a folder of your own"
    )
    return fresh


def _is_private(folder: Path) -> bool:
    found = folder.lstat()
    return (
        stat.S_ISDIR(found.st_mode)
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        and found.st_uid == os.getuid()
    )
