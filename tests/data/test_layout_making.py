"""Making layouts: once for all who need them, whole or not at all, the same rows for ever."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from stacking_ds.config.sections import DataSection
from stacking_ds.data import rows
from stacking_ds.data.loader import PretrainingData
from stacking_ds.data.rows import LAYOUT_VERSION, LayoutSpec, find_layout, open_layout
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import DataError
from stacking_ds.train.plan import open_plan
from tests.runs import small_recipe
from tests.token_shards import make_shards

DOCUMENTS = [[7, 9, 3], [30, 4], [5], [6, 6, 6, 6], [50], [2, 2], [11, 3, 9], [4, 8]] * 4
SPEC = LayoutSpec(examples="pairs", sequence_length=24, packed=True)

# For each kind, variant and length: what stands in the rows. A change of these is a change of every
# run that goes on with them: raise LAYOUT_VERSION with it.
ROWS_OF_VERSION_1 = {
    "pairs-24-packed-0": "2def71e7b4d2ff8d",
    "pairs-24-packed-1": "7fe720e7e27e2aa5",
    "pairs-40-single-0": "3a112b25f4df7a9c",
    "documents-24-packed-0": "87b7712216866876",
    "documents-24-packed-1": "e5b8d002395b3be8",
}


def _rows_hash(folder: Path, name: str) -> str:
    kind, length, packed, variant = name.split("-")
    split = make_shards(folder, DOCUMENTS, documents_per_shard=3).split("train")
    spec = LayoutSpec(
        examples=kind,
        sequence_length=int(length),
        packed=packed == "packed",
        variant=int(variant),
    )
    found = open_layout(split, spec)
    assert len(found.record.parts) > 1
    counts, examples = found.examples_of(np.arange(found.num_rows))
    columns = [counts, *(getattr(examples, field) for field in examples.__dataclass_fields__)]
    content = b"".join(column.astype(np.int64).tobytes() for column in columns)
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize("name", ROWS_OF_VERSION_1)
def test_the_rows_of_this_version_stay_what_they_are(tmp_path, monkeypatch, name):
    monkeypatch.setattr(rows, "_TOKENS_PER_PART", 100)
    assert LAYOUT_VERSION == 1, "pin the rows of the new version here"
    assert _rows_hash(tmp_path, name) == ROWS_OF_VERSION_1[name]


def _open_and_say_who_made_it(folder: Path, barrier, answers) -> None:
    split = TokenShards.open(folder).split("train")
    made = []
    write = rows._write
    rows._write = lambda *arguments: made.append(1) or write(*arguments)
    barrier.wait()
    found = open_layout(split, SPEC)
    answers.put((len(made), found.num_rows, str(found.folder)))


def test_many_processes_that_need_a_layout_make_it_once(tmp_path):
    make_shards(tmp_path, DOCUMENTS * 20)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(6), context.Queue()
    processes = [
        context.Process(target=_open_and_say_who_made_it, args=(tmp_path, barrier, answers))
        for _ in range(6)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(made for made, _, _ in found) == 1
    assert len({answer[1:] for answer in found}) == 1


def test_without_a_lock_the_layout_of_the_faster_node_stays(tmp_path, monkeypatch):
    split = make_shards(tmp_path, DOCUMENTS).split("train")
    first = open_layout(split, SPEC)
    inode = first.folder.stat().st_ino
    again = rows._write(first.folder, split, SPEC, first.record.identity, 1)
    assert first.folder.stat().st_ino == inode, "somebody may have mapped it"
    assert again.record == first.record
    (first.folder / "layout.json").write_text("{")
    mended = open_layout(split, SPEC)
    assert mended.record == first.record
    assert [path for path in (tmp_path / "layouts").iterdir() if "tmp" in path.name] == []


def test_what_a_killed_maker_left_is_removed_and_others_nodes_work_is_not(tmp_path):
    split = make_shards(tmp_path, DOCUMENTS).split("train")
    folder = open_layout(split, SPEC).folder
    shutil.rmtree(folder)
    here = folder.with_name(f"{folder.name}.tmp-{os.uname().nodename}-0123")
    elsewhere = folder.with_name(f"{folder.name}.tmp-another-0123")
    for left in (here, elsewhere):
        left.mkdir()
        (left / "part-00000.arrow").write_bytes(b"x")
    open_layout(split, SPEC)
    assert not here.exists()
    assert elsewhere.exists()


def test_finding_makes_nothing_and_a_damaged_part_is_no_layout(tmp_path):
    split = make_shards(tmp_path, DOCUMENTS).split("train")
    assert find_layout(split, SPEC) is None
    assert not (tmp_path / "layouts").exists()
    made = open_layout(split, SPEC)
    other = SPEC.model_copy(update={"sequence_length": 25})
    assert find_layout(split, other) is None
    path = made.folder / "part-00000.arrow"
    path.write_bytes(bytes(path.stat().st_size))
    assert find_layout(split, SPEC) is None
    assert open_layout(split, SPEC).record == made.record


def test_nobody_needs_a_home(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    split = make_shards(tmp_path, DOCUMENTS).split("train")
    assert open_layout(split, SPEC).num_rows
    shutil.rmtree(tmp_path / "layouts")
    (tmp_path / "layouts").write_text("in the way")
    with pytest.raises(DataError, match="cannot be laid out"):
        open_layout(split, SPEC)


def test_attention_counts_the_tokens_of_the_own_example(tmp_path):
    found = open_layout(make_shards(tmp_path, DOCUMENTS).split("train"), SPEC)
    _, examples = found.examples_of(np.arange(found.num_rows))
    seen = np.repeat(examples.slots, examples.slots)
    assert found.mean_attended_slots == pytest.approx(seen.mean())


def test_a_run_lays_out_the_variants_that_it_reaches(tmp_path):
    shards = make_shards(tmp_path, DOCUMENTS)
    options = DataSection(
        path="-", sequence_length=24, mlm_probability=0.15, packing=True, variants=4
    )
    data = PretrainingData(shards, "train", options, seed=1)
    rows = data.layout(0).num_rows
    said = []
    data.lay_out(rows, said.append)
    assert said == []
    data.lay_out(rows + 1, said.append)
    assert [line.partition(", ")[2].partition(", once")[0] for line in said] == [
        "train pairs-24-packed-1"
    ]
    data.step(rows - 1, 1, micro_batch_size=1)
    assert len(data._layouts) == 2
    data.step(rows - 1, 2, micro_batch_size=2)
    data.step(100 * rows, 2, micro_batch_size=2)
    assert len(data._layouts) == 4
    data.lay_out(10**9, said.append)
    assert len(said) == 1


def test_a_job_lays_out_both_splits_before_its_ranks_meet_and_says_so(tmp_path):
    shards = make_shards(tmp_path / "shards", DOCUMENTS * 4)
    phases = "phases=[{from_step: 5, sequence_length: 24}]"
    config = small_recipe(tmp_path, shards.folder, phases, "data.variants=3")
    plan, said = open_plan(config), []
    assert not (shards.folder / "layouts").exists()
    plan.data.lay_out_rows(said.append)
    names = [line.partition(", ")[2].partition(", once")[0] for line in said]
    # a run of so few steps does not reach the second variant
    assert names == [
        f"{split} pairs-{length}-single-0" for length in (24, 32) for split in ("train", "heldout")
    ]
    before = sorted((shards.folder / "layouts").rglob("*"))
    for phase in plan.schedule.phases.phases:
        assert plan.data.heldout_steps(0, 1, phase)
    assert sorted((shards.folder / "layouts").rglob("*")) == before
    said.clear()
    open_plan(config).data.lay_out_rows(said.append)
    assert said == []


def test_rows_of_another_length_have_other_masks(tmp_path):
    shards = make_shards(tmp_path, [[9, 8]] * 60)
    masks = []
    for length in (24, 40):
        options = DataSection(
            path="-", sequence_length=length, mlm_probability=0.3, examples="documents"
        )
        step = PretrainingData(shards, "train", options, seed=1).step(0, 60, micro_batch_size=60)
        masks.append(set(step.micro_batches[0].mlm_labels_M.tolist()))
    assert len(masks[0] & masks[1]) < 0.6 * len(masks[0])


# ------------------------------------------------------------------ in many processes

# Workers import this too, for `write_when_told`: each waits with a part in hand until it may go on.
_MAKER = """
import os, signal, sys, threading, time
from pathlib import Path
from stacking_ds.data import rows
from stacking_ds.data.rows import LayoutSpec
from stacking_ds.data.shards import TokenShards

folder, write = Path(__file__).parent, rows._write_part

def write_when_told(*arguments):
    (folder / f"worker-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    if (folder / "go").read_text() == "full":
        raise OSError(28, "No space left on device")
    return write(*arguments)

def make():
    spec = LayoutSpec(examples="pairs", sequence_length=24, packed=True)
    made = rows.open_layout(TokenShards.open(folder / "shards").split("train"), spec, 2)
    print(made.num_rows, len(made.record.parts))

def main(threaded, held):
    rows._TOKENS_PER_PART, rows._write_part = 400, write_when_told
    if held == "held":
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    (folder / "ready").touch()
    if threaded == "thread":
        maker = threading.Thread(target=make, daemon=True)
        maker.start()
        while maker.is_alive():
            maker.join(0.05)
    else:
        make()
"""


def _until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class _Maker:
    """A program, in a process group of its own, that lays out rows in two processes."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        make_shards(folder / "shards", DOCUMENTS * 10, documents_per_shard=3)
        (folder / "maker.py").write_text(_MAKER)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import maker, sys; maker.main(*sys.argv[1:])", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parents[2]}"},
        )

    @property
    def workers(self) -> list[int]:
        return [int(path.name.partition("-")[2]) for path in self.folder.glob("worker-*")]

    def signal_all(self, *numbers: int) -> None:
        for number in numbers:
            os.killpg(self.process.pid, number)

    def tell(self, word: str) -> None:
        (self.folder / "told").write_text(word)
        (self.folder / "told").rename(self.folder / "go")

    def ended(self) -> tuple[int, str, str]:
        said, complained = self.process.communicate(timeout=60)
        return self.process.returncode, said, complained


@contextmanager
def _maker(folder: Path, *words: str) -> Iterator[_Maker]:
    maker = _Maker(folder, *words)
    try:
        yield maker
    finally:
        maker.tell("on")
        maker.process.kill()
        for worker in maker.workers:
            if _lives(worker):
                os.kill(worker, signal.SIGKILL)


def test_signals_to_every_process_do_not_end_those_that_lay_out_rows(tmp_path):
    """As SLURM sends them, at every moment of the workers' lives and their imports."""
    alone = open_layout(make_shards(tmp_path / "a", DOCUMENTS * 10).split("train"), SPEC)
    with _maker(tmp_path, "thread", "held") as maker:
        _until((tmp_path / "ready").exists)
        while len(maker.workers) < 2:
            assert maker.process.poll() is None, maker.ended()
            maker.signal_all(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
            time.sleep(0.02)
        maker.signal_all(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
        time.sleep(0.2)
        maker.tell("on")
        status, said, complained = maker.ended()
        assert (status, complained) == (0, "")
        rows, parts = map(int, said.split())
        assert parts > 2
        assert abs(rows - alone.num_rows) < parts


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signal.SIGKILL, ("main", "free")),
        (signal.SIGTERM, ("thread", "free")),
        (signal.SIGINT, ("main", "free")),
        (signal.SIGINT, ("thread", "free")),
    ],
)
def test_workers_end_with_their_parent(tmp_path, how, words):
    with _maker(tmp_path, *words) as maker:
        _until(lambda: len(maker.workers) == 2)
        maker.signal_all(how) if how == signal.SIGINT else maker.process.send_signal(how)
        assert maker.ended()[0] not in (0, None)
        _until(lambda: not any(map(_lives, maker.workers)))


def test_a_worker_that_is_killed_is_told_of_and_ends_the_others(tmp_path):
    with _maker(tmp_path, "main", "free") as maker:
        _until(lambda: len(maker.workers) == 2)
        os.kill(maker.workers[0], signal.SIGKILL)
        status, _, complained = maker.ended()
        assert status == 1
        assert (
            "a process that lays out rows was killed by SIGKILL, as when memory runs out"
            in complained
        )
        _until(lambda: not any(map(_lives, maker.workers)))
        left = [path.name for path in (tmp_path / "shards" / "layouts").iterdir()]
        assert not any("tmp" in name for name in left)


def test_an_error_of_a_worker_is_the_parents(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with _maker(tmp_path, "main", "free") as maker:
        _until(lambda: len(maker.workers) == 2)
        maker.tell("full")
        status, _, complained = maker.ended()
        assert status == 1
        assert "cannot be laid out, since nothing can be written" in complained
        assert f"{tmp_path / 'shards' / 'layouts'}: No space left on device" in complained


def test_many_processes_write_the_rows_that_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_TOKENS_PER_PART", 100)
    split = make_shards(tmp_path, DOCUMENTS, documents_per_shard=3).split("train")
    alone = open_layout(split, SPEC)
    shutil.rmtree(alone.folder)
    assert len(alone.record.parts) > 3
    assert open_layout(split, SPEC, 3).record == alone.record
