"""Damage of every kind: found where it is read, named in one sentence, with a way out."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stacking_ds.checkpoint import folders, load, save
from stacking_ds.checkpoint import manifest as checkpoint_manifest
from stacking_ds.distributed.world import World
from stacking_ds.errors import AgreedError, CheckpointError
from stacking_ds.sharding.fragments import MASTER, MOMENTS, Cut, Fragment
from tests.checkpoints import plain_fragments, rank_fragments, save_state
from tests.ranks import run_ranks

FILE = "rank_00000.safetensors"
CHUNK_BYTES = 64


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "CHUNK_BYTES", CHUNK_BYTES)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def _error_of(folder: Path, targets: list[Fragment] | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load.load(folder, targets or plain_fragments())
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------ each kind, named


def _cut(folder: Path) -> None:
    path = folder / FILE
    path.write_bytes(path.read_bytes()[:-8])


def _of_zeros(folder: Path) -> None:
    (folder / FILE).write_bytes(bytes((folder / FILE).stat().st_size))


def _replace_by_a_folder(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


def _write(name: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_cut, f"{FILE} is damaged: it has "),
    "emptied": (_write(FILE, b""), f"{FILE} is damaged: it has 0 bytes instead of "),
    "longer": (_write(FILE, b"x" * 5000), f"{FILE} is damaged: it has 5000 bytes instead of "),
    "zeros": (_of_zeros, f"{FILE} is damaged: the bytes from 0 on are not those that were written"),
    "flipped header": (lambda f: _flip(f / FILE, 12), f"{FILE} is damaged: the bytes from 0 on"),
    "flipped length": (lambda f: _flip(f / FILE, 0), f"{FILE} is damaged: the bytes from 0 on"),
    "flipped value": (lambda f: _flip(f / FILE, -1), f"{FILE} is damaged: the bytes from "),
    "missing": (lambda f: (f / FILE).unlink(), f"{FILE} cannot be read (No such file"),
    "a folder": (_replace_by_a_folder, f"{FILE} is damaged: it is not a regular file"),
    "no manifest": (
        lambda f: (f / "manifest.json").unlink(),
        "manifest.json cannot be read (No such file",
    ),
    "cut manifest": (_write("manifest.json", b'{"step": 3'), "manifest.json is damaged: "),
    "binary manifest": (_write("manifest.json", b"\xff\x00"), "manifest.json is damaged: "),
    "list for manifest": (_write("manifest.json", b"[]"), "it is not a JSON object"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_offered(tmp_path: Path, kind: str) -> None:
    damage, what = DAMAGE[kind]
    for step in (900, 1000, 1100):
        folder = save_state(tmp_path, step, plain_fragments(value=step))
    folder = folder.with_name("step_00001000")
    damage(folder)
    message = _error_of(folder)
    assert message.startswith(str(folder))
    assert what in message
    latest = tmp_path / "checkpoints" / "latest"
    remedy = f"go on from step_00000900: `stacking-ds checkpoint use {tmp_path} step_00000900`, and"
    assert remedy in message
    [problem] = load.problems(folder)
    assert str(problem).startswith(str(folder))
    # the remedy works
    latest.write_text("step_00000900\n")
    found = folders.latest(tmp_path)
    assert found is not None
    targets = plain_fragments()
    load.load(found, targets)
    assert targets[0].views[MASTER][0] == 900


def test_what_is_offered_is_there(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1000, plain_fragments())
    _cut(folder)
    assert "there is no other checkpoint, so start the run again" in _error_of(folder)
    # somebody has gone back to step 1000; what lies beyond may be whole
    save_state(tmp_path, 1100, plain_fragments())
    save_state(tmp_path, 1200, plain_fragments())
    assert "go on from step_00001100: `stacking-ds checkpoint use" in _error_of(folder)
    save_state(tmp_path, 900, plain_fragments())
    assert "go on from step_00000900: " in _error_of(folder)
    (tmp_path / "checkpoints" / "step_00000900" / "manifest.json").unlink()
    assert "go on from step_00001100: " in _error_of(folder)
    copy = tmp_path / "best"
    shutil.copytree(folder, copy)
    assert "bring it back from a copy" in _error_of(copy)


def test_no_byte_of_a_file_can_change_unnoticed(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, plain_fragments("a"))
    original = (folder / FILE).read_bytes()
    for place in range(len(original)):
        _flip(folder / FILE, place)
        assert "is damaged" in _error_of(folder, plain_fragments("a"))
        assert "1 of " in str(load.problems(folder)[0])
        (folder / FILE).write_bytes(original)
    assert load.problems(folder) == []


def test_no_byte_of_a_manifest_can_change_unnoticed(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, plain_fragments("a"))
    path = folder / "manifest.json"
    original, before = path.read_bytes(), checkpoint_manifest.read_manifest(folder)
    noticed = 0
    for place in range(len(original)):
        for bit in (1, 4, 32):
            path.write_bytes(
                original[:place] + bytes([original[place] ^ bit]) + original[place + 1 :]
            )
            try:
                found = checkpoint_manifest.read_manifest(folder)
            except CheckpointError as error:
                noticed += str(error).startswith(f"{path} is ")
            else:
                assert found == before, "only white space may change"
                noticed += 1
    assert noticed == 3 * len(original)


def test_a_checkpoint_of_version_1_is_refused(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, plain_fragments())
    old = {"format_version": 1, "package_versions": {}, "step": 1, "files": []}
    (folder / "manifest.json").write_text(json.dumps(old))
    message = _error_of(folder)
    assert "is of format version 1, and this stacking_ds reads version 2; go on with" in message


def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, plain_fragments())
    manifest = checkpoint_manifest.read_manifest(folder)
    [file] = manifest.files
    a = manifest.parameters["a"]
    for change, what in (
        ({"files": ()}, "0 files of 1 ranks"),
        ({"files": (file.model_copy(update={"checksums": ("0" * 32,)}),)}, "1 of "),
        ({"parameters": {"a": a.model_copy(update={"size": 5})}}, "not all elements of a are in"),
    ):
        (folder / "manifest.json").write_text(manifest.model_copy(update=change).to_json())
        assert what in _error_of(folder)


# ------------------------------------------------------------------ another model's


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, plain_fragments("ab"))
    assert "is of another model: it has no c, " in _error_of(folder, plain_fragments("abc"))
    message = _error_of(folder, plain_fragments("a"))
    assert "is of another model: it has b, which this model lacks; resume with the re" in message
    wider = [Fragment("a", (3, 3), 0, 9, {MASTER: torch.zeros(9)}, Cut(9, 9)), plain_fragments()[1]]
    assert "another model: it has a with shape (2, 3), this model needs" in _error_of(folder, wider)


@pytest.mark.parametrize("names", ["abc", "ba"])  # of other sizes; of the same size
def test_the_manifest_of_another_model_does_not_fit_the_files(tmp_path: Path, names: str) -> None:
    folder = save_state(tmp_path, 2, plain_fragments("ab"))
    other = save_state(tmp_path / "other", 2, plain_fragments(names))
    save_state(tmp_path, 1, plain_fragments("ab"))
    shutil.copy(other / "manifest.json", folder)
    message = _error_of(folder, plain_fragments(names))
    assert f"{folder / FILE} is damaged: " in message
    assert "go on from step_00000001" in message
    assert len(load.problems(folder)) == 1


# ------------------------------------------------------------------ what is read, and no more


def _wide(start: int, stop: int) -> list[Fragment]:
    """The elements [start, stop) of a parameter of 1000."""
    views = {MASTER: torch.arange(1000.0)[start:stop].clone()}
    return [Fragment("w", (1000,), start, stop, views, Cut(1000, 1000))]


def _place_of(folder: Path, element: int) -> int:
    """The first byte of an element of "w"."""
    return (folder / FILE).stat().st_size - 4 * (1000 - element)


def test_damage_matters_where_it_is_read(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, _wide(0, 1000))
    _flip(folder / FILE, _place_of(folder, 500))
    for start, stop in ((0, 450), (550, 1000)):
        targets = _wide(start, stop)
        targets[0].views[MASTER].zero_()
        load.load(folder, targets)
        assert torch.equal(targets[0].views[MASTER], torch.arange(1000.0)[start:stop])
    for start, stop in ((0, 501), (500, 501), (500, 1000)):
        assert FILE in _error_of(folder, _wide(start, stop))
    with pytest.raises(CheckpointError, match="is damaged"):
        dict(load.read_parameters(folder))
    chunk = _place_of(folder, 500) // CHUNK_BYTES
    [problem] = load.problems(folder)
    assert f"{FILE} is damaged: 1 of " in str(problem)
    assert f"the first at byte {chunk * CHUNK_BYTES}" in str(problem)


def test_the_chunks_of_an_interval_are_verified_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_state(tmp_path, 1, _wide(0, 1000))
    hashed: list[bytes] = []

    def checksum(data: memoryview) -> str:
        hashed.append(bytes(data))
        return save.checksum(data)

    monkeypatch.setattr(load, "checksum", checksum)
    reader = load.FragmentReader(folder, checkpoint_manifest.read_manifest(folder))
    view = torch.zeros(100)
    reader.fill(view, MASTER, "w", 200, 300)
    assert torch.equal(view, torch.arange(200.0, 300.0))
    content = (folder / FILE).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    touched = {place // CHUNK_BYTES for place in range(header)}
    touched |= {_place_of(folder, element) // CHUNK_BYTES for element in range(200, 300)}
    expected = [content[n * CHUNK_BYTES : (n + 1) * CHUNK_BYTES] for n in sorted(touched)]
    assert set(hashed) == set(expected)


def _load_part(world: World, run_dir: Path, rank: int) -> str:
    """Load what `rank` of 3 saved."""
    folder = folders.latest(run_dir)
    assert folder is not None
    cut = Cut(9, 3)
    values = torch.zeros(3)
    target = Fragment("w", (9,), *cut.interval(rank), {MASTER: values}, cut)
    try:
        load.load(folder, [target])
    except CheckpointError as error:
        return str(error)
    return str(values.tolist())


def _save_on_ranks(world: World, run_dir: Path) -> None:
    save_state(run_dir, 2, rank_fragments(world, 2.0), world)


def _load_on_ranks(world: World, run_dir: Path) -> str:
    folder = folders.latest(run_dir)
    assert folder is not None
    try:
        load.load(folder, rank_fragments(world, 0.0), world=world)
    except CheckpointError as error:
        return str(error) if isinstance(error, AgreedError) else "on this rank alone"
    return "no error"


def test_only_the_files_of_the_wanted_elements_are_opened(tmp_path: Path) -> None:
    run_ranks(_save_on_ranks, 3, tmp_path)
    folder = tmp_path / "checkpoints" / "step_00000002"
    (folder / "rank_00001.safetensors").unlink()
    _flip(folder / FILE, -1)
    alone = World(0, 1, 0, 1, torch.device("cpu"), None)
    assert _load_part(alone, tmp_path, 2) == "[4.0, 4.0, 4.0]"
    assert "rank_00001.safetensors cannot be read" in _load_part(alone, tmp_path, 1)
    missing, flipped = sorted(map(str, load.problems(folder)), reverse=True)
    assert "rank_00001.safetensors cannot be read" in missing
    assert "rank_00000.safetensors is damaged" in flipped
    for message in run_ranks(_load_on_ranks, 3, tmp_path):
        assert "rank_00000.safetensors is damaged" in message


def test_moments_are_verified_too(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, plain_fragments(numel=100))
    content = (folder / FILE).read_bytes()
    place = content.index(plain_fragments(numel=100)[0].views[MOMENTS[1]].numpy().tobytes())
    _flip(folder / FILE, place + 200)
    targets = plain_fragments(numel=100)
    for target in targets:
        del target.views[MOMENTS[1]]  # type: ignore[attr-defined]
    load.load(folder, targets)
    assert FILE in _error_of(folder, plain_fragments(numel=100))


def test_a_reader_keeps_no_file_open(tmp_path: Path) -> None:
    # a process may open a thousand files, and a run may have more ranks
    folder = save_state(tmp_path, 1, plain_fragments())
    reader = load.FragmentReader(folder, checkpoint_manifest.read_manifest(folder))
    before = len(os.listdir("/proc/self/fd"))
    view = torch.empty(6)
    reader.fill(view, MASTER, "a", 0, 6)
    assert view.tolist() == list(range(6))
    assert len(os.listdir("/proc/self/fd")) == before
