"""Shared run directory, tried by all nodes: each sees what the others write, and locks hold.

    PLACE/.stacking-ds-doctor-TOKEN/    made and removed by rank 0
        0                               what rank 0 writes, and every node looks for
        16                              what the first rank of another node writes, and rank 0 reads
        lock                            held by rank 0; another node must not get it

PLACE is the run directory, or where it is not there yet the nearest folder above it that is.
"""

import fcntl
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from stacking_ds.distributed.world import World
from stacking_ds.doctor.facts import WireRecord, nearest_existing

# network file systems show a new file a little later
_PATIENCE_SECONDS = 10.0
_LOCK = "lock"


class Answer(WireRecord, frozen=False):
    """The answer of the first rank of a node: what it has met there."""

    rank: int
    problem: str = ""
    lock: str = ""  # what is wrong with rank 0's; nothing where it holds or need not be tried


class Probing(WireRecord, frozen=False):
    """A probe: what rank 0 asks the nodes to look at, and knows in the end."""

    place: str
    token: str = ""
    levels_up: int = 0  # from the run directory to the place, also on nodes that have it elsewhere
    problem: str = ""  # why rank 0 itself cannot write
    lock_problem: str = ""
    answers: tuple[Answer, ...] = ()
    left: str = ""  # what could not be removed

    @property
    def exists(self) -> bool:
        """True if the run directory is there, and `place` is it."""
        return self.levels_up == 0

    def folder(self, run_dir: Path) -> Path:
        absolute = run_dir.absolute()
        place = (absolute, *absolute.parents)[: self.levels_up + 1][-1]
        return place / f".stacking-ds-doctor-{self.token}"


def probe(world: World, run_dir: Path | None) -> Probing | None:
    """Try `run_dir` on all nodes, and leave nothing of it; the outcome on rank 0, None elsewhere or
    if it knows none. A collective."""
    with ExitStack() as held:
        begun = _begin(run_dir, held).model_dump() if world.is_first and run_dir else None
        begun = world.broadcast(begun)
        if begun is None:
            return None
        call = Probing.model_validate(begun)
        mine = None
        if world.speaks_for_node and not call.problem:
            mine = _answer(run_dir, call, world.rank).model_dump()
        sent = world.gather_on_first(mine)
        if run_dir is None or not world.is_first:
            return None
        folder = call.folder(run_dir)
        call.answers = tuple(Answer.read(sent))
        for answer in call.answers:
            if not answer.problem and not _appears(folder / str(answer.rank), call.token):
                answer.problem = f"writes into {call.place} what rank 0 does not see"
    call.left = str(folder) if folder.exists() else ""
    return call


def _begin(run_dir: Path, held: ExitStack) -> Probing:
    """Rank 0's part, undone when `held` is closed."""
    begun = Probing(token=secrets.token_hex(8), place=str(run_dir.absolute()))
    try:
        found, absolute = nearest_existing(run_dir), run_dir.absolute()
        begun.place = str(found.resolve())
        begun.levels_up = (absolute, *absolute.parents).index(found)
        folder = begun.folder(run_dir)
        folder.mkdir()
        held.callback(_remove, folder)
        (folder / "0").write_text(begun.token)
        lock = held.enter_context((folder / _LOCK).open("a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            begun.lock_problem = error.strerror or str(error)
    except OSError as error:
        begun.problem = error.strerror or str(error)
    return begun


def _answer(run_dir: Path | None, call: Probing, rank: int) -> Answer:
    answer = Answer(rank=rank)
    if run_dir is None:
        answer.problem = "cannot name the run directory: the recipe could not be read there"
        return answer
    folder = call.folder(run_dir)
    if not _appears(folder / "0", call.token):
        answer.problem = f"does not see what rank 0 has written into {call.place}"
    elif rank:  # a second lock of rank 0's own process tells nothing over NFS
        try:
            (folder / str(rank)).write_text(call.token)
            answer.lock = "" if call.lock_problem else _try_lock(folder / _LOCK)
        except OSError as error:
            answer.problem = f"cannot write into {folder.parent} ({error.strerror})"
    return answer


def _try_lock(path: Path) -> str:
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"no lock to be had ({error.strerror})"
    return "got a lock that rank 0 holds"


def _appears(path: Path, token: str) -> bool:
    for _ in _tries():
        with suppress(OSError):
            if path.read_text() == token:
                return True
    return False


def _remove(folder: Path) -> None:
    # a network file system keeps what another node has only just closed for a moment
    for _ in _tries():
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _tries() -> Iterator[None]:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    yield
    while time.monotonic() <= deadline:
        time.sleep(0.1)
        yield
