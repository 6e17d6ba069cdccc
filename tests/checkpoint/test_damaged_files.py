"""Every small file of a run and of its data, damaged in every way, before every command that reads
it: a good answer, or one sentence with exit code 2, within seconds."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stacking_ds.cli import main
from tests.forging import Change, forge_manifest, put
from tests.prose import tiny_shards
from tests.runs import small_recipe

_STAGES = (
    *("--set", "stages=[{num_hidden_layers: 1, steps: 2}, {num_hidden_layers: 2, steps: 1}]"),
    *("--set", "schedule.warmup_steps=1"),
)
_COMMANDS: dict[str, tuple[str, ...]] = {
    "report": ("report", "run"),
    "again": ("again", "run", "--exit-status", "1"),
    "list": ("checkpoint", "list", "run"),
    "verify": ("checkpoint", "verify", "run"),
    "inspect": ("checkpoint", "inspect", "run", "--parameters"),
    "evaluate": ("evaluate", "run"),
    "export": ("export", "run", "--out", "exported"),
    "resume": ("train", "--recipe", "small.yaml", "--run-dir", "run", "--resume", *_STAGES),
    "data": ("data", "inspect", "shards", "--sequence-length", "32", "--verify"),
}
_FROM_CHECKPOINTS = "list verify inspect evaluate export resume"
_FILES = {
    "run/metrics.jsonl": "report again resume",
    "run/attempts.jsonl": "report again resume",
    "run/train.log": "resume",
    "run/.lock": "resume",
    "run/checkpoints/latest": f"report again {_FROM_CHECKPOINTS}",
    "run/checkpoints/step_00000003/manifest.json": _FROM_CHECKPOINTS,
    "run/checkpoints/step_00000003/rank_00000.safetensors": _FROM_CHECKPOINTS,
    "shards/manifest.json": "evaluate export resume data",
    "shards/vocab.txt": "evaluate data",
    "shards/tokenizer.json": "export data",
    "shards/train-00000-000.arrow": "evaluate resume data",
    "shards/train-duplicates.arrow": "evaluate data",
    "shards/layouts/*-heldout-*/layout.json": "evaluate data",
    "shards/layouts/*-heldout-*/part-00000.arrow": "evaluate data",
}


def _content(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _no_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())


_DAMAGE: dict[str, Callable[[Path], object]] = {
    "not UTF-8": _no_utf8,
    "deep": _content(b"[" * 100_000),
    "fifo": _instead(os.mkfifo),
    "circle": _instead(lambda path: path.symlink_to(path)),
    "missing": _instead(lambda path: None),
    "empty": _content(b""),
    "cut": _cut,
    "zeros": _zeros,
    "deep objects": _content(b'{"a":' * 100_000),
    "deep but whole": _content(b"[" * 900 + b"]" * 900),
    "a list": _content(b"[]\n"),
    "a number": _content(b"7\n"),
    "null": _content(b"null\n"),
    "an empty object": _content(b"{}\n"),
    "a huge number": _content(b'{"step": ' + b"9" * 5000 + b"}\n"),
    "infinity": _content(b'{"step": 1e999, "stage": NaN}\n'),
    "device": _instead(lambda path: path.symlink_to("/dev/zero")),
    "terminal": _instead(lambda path: path.symlink_to("/dev/ptmx")),
    "folder": _instead(lambda path: path.mkdir()),
    "a name too long": _instead(lambda path: path.symlink_to("x" * 300)),
}
_FAST = ("not UTF-8", "deep", "fifo")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run beside its shards and recipe, in the working directory of all that follows."""
    folder = tmp_path_factory.mktemp("whole")
    place = folder / "place"
    place.mkdir()
    tiny_shards(folder).rename(place / "shards")
    small_recipe(place, place / "shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(place)
        command = _COMMANDS["resume"]
        assert main(list(command)) == 0
        shutil.copytree(place, folder / "copy")
        yield folder


@pytest.fixture
def place(whole: Path) -> Path:
    """The run as it was left, where it was left."""
    shutil.rmtree(whole / "place")
    shutil.copytree(whole / "copy", whole / "place")
    os.chdir(whole / "place")
    return whole / "place"


def _answer(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and what was said."""
    capsys.readouterr()
    code = main(list(_COMMANDS[command]))
    for handler in list(logging.getLogger("stacking_ds").handlers):
        logging.getLogger("stacking_ds").removeHandler(handler)
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert "Traceback" not in said
    if code == 2 and command != "verify":  # which says on stdout what it finds
        assert printed.err.count("stacking-ds: error: ") == 1
        error = next(line for line in printed.err.splitlines() if "stacking-ds: error: " in line)
        assert len(error) < 1000
    return code, said


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in _FAST else pytest.mark.slow) for k in _DAMAGE]
)
@pytest.mark.parametrize("name", _FILES)
def test_a_damaged_file_is_read_past_or_named(
    place: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in _FILES[name].split():
        [path] = place.glob(name)
        _DAMAGE[kind](path)
        code, said = _answer(command, capsys)
        assert code in ((0, 1, 3) if command == "again" and code != 2 else (0, 2)), said
        if code == 2:
            assert path.name in said or path.parent.name in said or str(place / "run") in said
        shutil.rmtree(place)
        shutil.copytree(place.parent / "copy", place)
        os.chdir(place)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "circle", "cut"])
def test_a_run_does_not_go_on_from_a_damaged_rank_file(
    place: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "run/checkpoints/latest").write_text("step_00000002\n")
    _DAMAGE[kind](place / "run/checkpoints/step_00000002/rank_00000.safetensors")
    code, said = _answer("resume", capsys)
    assert code == 2
    assert "rank_00000.safetensors is damaged: " in said


def test_what_is_passed_over_is_told_by_all_who_read_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("metrics.jsonl", "attempts.jsonl"):
        _no_utf8(place / "run" / name)
    _, report = _answer("report", capsys)
    assert "run/metrics.jsonl: passed over 1 line, which is no record (line 1)" in report
    assert "run/attempts.jsonl: passed over 1 line, which is no record (line 1)" in report
    assert "steps: 3 of 3" in report
    code, again = _answer("again", capsys)
    assert code == 3
    assert "run/attempts.jsonl: passed over 1 line" in again
    code, resumed = _answer("resume", capsys)
    assert code == 0
    assert "run/metrics.jsonl: passed over 1 line" in resumed


def _set(*path: Any, to: Any) -> Change:
    return lambda record: put(record, path, to)


def _another_stage(record: dict[str, Any]) -> None:
    record["train_state"]["stage_index"] = 0


_FORGED: dict[str, tuple[Change, str]] = {
    "a model of many layers": (_set("num_hidden_layers", to=10**11), "evaluate export resume"),
    "a model of no layers": (
        _set("num_hidden_layers", to=0),
        "verify inspect evaluate export resume",
    ),
    "a shallower model": (_set("num_hidden_layers", to=1), "evaluate export resume"),
    "another stage": (_another_stage, "resume"),
    "no such stage": (_set("train_state", "stage_index", to=9), "resume"),
    "half a step": (_set("train_state", "tokens_seen", to=0.5), "resume"),
    "a state of another version": (_set("train_state", to={"step": 3, "epoch": 1}), "resume"),
    "no keys": (_set("keys", to=[]), "verify inspect evaluate export resume"),
    "a file elsewhere": (
        _set("files", 0, "name", to="../../../../shards/vocab.txt"),
        "verify inspect evaluate export resume",
    ),
    "another recipe": (_set("config", to={"stages": 1}), ""),
    "a recipe of other steps": (_set("config", "stages", 0, "steps", to=10**18), ""),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", _FORGED)
def test_a_strangers_checkpoint_is_refused_or_used_as_what_it_is(
    place: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, refused_by = _FORGED[kind]
    forge_manifest(place / "run/checkpoints/step_00000003", change)
    for command in _FROM_CHECKPOINTS.split():
        code, said = _answer(command, capsys)
        assert code == (2 if command in refused_by.split() else 0), (command, said)
        assert code == 0 or "step_00000003" in said
