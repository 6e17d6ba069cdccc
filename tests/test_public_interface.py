"""What people and their scripts rely on: the words of the command line, exit codes, the files of
a run and what is in them.

`python -m tests.test_public_interface` writes golden/help.txt and golden/run.txt anew; a change
there is a change for everybody, so read the difference before it goes in.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from stacking_ds import errors
from stacking_ds.cli import main
from tests.prose import tiny_shards, write_text
from tests.ranks import run_ranks
from tests.runs import metrics, small_recipe, train_small

HELP = Path(__file__).parent / "golden" / "help.txt"
RUN = Path(__file__).parent / "golden" / "run.txt"


def _exit_code(*words: str) -> int:
    """What the process would end with."""
    try:
        return main(words)
    except SystemExit as end:  # argparse ends by itself
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1


# ------------------------------------------------------------------------------ help


def _root_parser() -> argparse.ArgumentParser:
    """The parser that `main` makes, wherever it makes it."""
    made: list[argparse.ArgumentParser] = []

    def note(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        made.append(parser)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        assert _exit_code() == 0
    return made[0]


def _commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The words of the program and of every command and sub-command it has."""
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from _commands(command, (*words, name))


def _whole_help() -> str:
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        for words in _commands(_root_parser()):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert _exit_code(*words, "--help") == 0, words
            parts.append(f"$ {' '.join(['stacking-ds', *words, '--help'])}\n{said.getvalue()}")
    return "\n".join(parts)


def _paragraphs(text: str) -> list[str]:
    """Without where lines break and how far they are indented, which Pythons do differently."""
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def test_the_help_of_every_command_is_the_golden_one() -> None:
    assert _paragraphs(_whole_help()) == _paragraphs(HELP.read_text("utf-8"))


def test_hidden_options_are_taken() -> None:
    """What launchers pass, and no help shows."""
    for words in _commands(_root_parser()):
        if words in ((), ("train",), ("doctor",)):
            for option in ("--local_rank", "--local-rank"):
                assert _exit_code(*words, f"{option}=0", "--help") == 0


# ------------------------------------------------------------------------ exit codes


STAGES = "stages=[{num_hidden_layers: 1, steps: 2}, {num_hidden_layers: 2, steps: 2}]"
SETTINGS = (STAGES, "schedule.warmup_steps=1", "engine.deepspeed=zero2")


def _make_run(folder: Path) -> None:
    """In `folder`: text, shards, small.yaml and `run`, which has grown, saved and exported."""
    shards = tiny_shards(folder)
    shards.rename(folder / "shards")
    write_text(folder / "text.txt", 20)
    config = small_recipe(folder, folder / "shards", *SETTINGS)
    assert run_ranks(train_small, 2, config, folder / "run") == [4, 4]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    _make_run(folder)
    # before the commands below add to it
    (folder / "left.txt").write_text(_whole_run(folder), "utf-8")
    damaged = folder / "damaged"
    shutil.copytree(folder / "run", damaged)
    for path in (damaged / "checkpoints").glob("step_*/rank_00001.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    (folder / "empty").mkdir()
    (folder / "broken.yaml").write_text("name: [")
    (folder / "prepared").mkdir()
    return folder


NEW = "train --recipe small.yaml --run-dir new"
CASES = {
    "": 2,
    "--help": 0,
    "--version": 0,
    "unknown": 2,
    "tra --help": 2,
    "train": 2,
    "train --unknown": 2,
    "train --recipe nowhere.yaml": 2,
    "train --recipe no_such_recipe": 2,
    "train --recipe broken.yaml": 2,
    "train --recipe small.yaml --run-dir a --resume b": 2,
    "train --resume nowhere": 2,
    "train --resume empty": 2,
    "train --recipe small.yaml --run-dir run": 2,  # without --resume
    "train --recipe small.yaml --run-dir run --resume": 2,  # another run's stages
    "train --recipe small.yaml --run-dir shards": 2,  # a folder, and no run
    "train --resume run --dry-run": 0,
    "train --resume run --set seed=4": 2,
    "train --resume run": 0,  # complete: nothing to do
    "train --resume damaged --set optimizer.name=lamb": 2,
    f"{NEW} --without-data": 2,
    f"{NEW} --dry-run": 0,
    f"{NEW} --dry-run --without-data --set data.path=nowhere": 0,
    f"{NEW} --dry-run --set data.path=nowhere": 2,
    f"{NEW} --set data.path=nowhere": 2,
    f"{NEW} --set unknown.key=1": 2,
    f"{NEW} --set seed": 2,
    f"{NEW} --set seed=many": 2,
    f"{NEW} --set engine.deepspeed=zero9": 2,
    f"{NEW} --set data.sequence_length=64": 2,
    f"{NEW} --set batch.global_batch_size=1000000": 2,
    f"{NEW} --set engine.kernels=triton": 2,
    "data": 2,
    "data inspect nowhere": 2,
    "data inspect shards --verify": 0,
    "data inspect shards --json --recipe small.yaml": 0,
    "data inspect shards --examples-shown=-1": 2,
    "data inspect shards --workers=0": 2,
    "data layout shards": 2,
    "data layout nowhere --recipe small.yaml": 2,
    "data layout shards --recipe small.yaml": 0,
    "prepare text.txt": 2,
    "prepare nowhere.txt --out prepared/none": 2,
    "prepare text.txt --out prepared/text --vocab-size 400 --heldout-fraction 0.1": 0,
    "prepare text.txt --out prepared/many --vocab-size 100000": 2,
    "prepare text.txt --out prepared/few --vocab-size 2": 2,
    "prepare text.txt --out run": 2,
    "report run": 0,
    "report empty": 2,
    "report nowhere": 2,
    "evaluate run": 0,
    "evaluate run --checkpoint 2": 0,
    "evaluate run --checkpoint 1": 2,
    "evaluate run --data nowhere": 2,
    "evaluate damaged": 2,
    "evaluate empty": 2,
    "export run --out exported": 0,
    "export run --checkpoint step_00000003 --out exported": 0,
    "export run --checkpoint many": 2,
    "export run --data nowhere": 2,
    "export damaged --out exported": 2,
    "export empty": 2,
    "checkpoint": 2,
    "checkpoint list run": 0,
    "checkpoint list run --json": 0,
    "checkpoint list empty": 2,
    "checkpoint verify run --all": 0,
    "checkpoint verify run/checkpoints/step_00000002": 0,
    "checkpoint verify run --all --checkpoint 2": 2,
    "checkpoint verify damaged": 2,
    "checkpoint verify empty": 2,
    "checkpoint inspect run --parameters": 0,
    "checkpoint inspect empty": 2,
    "checkpoint use run 4": 0,
    "checkpoint use run 5": 2,
    "checkpoint use damaged 4": 2,
    "again run": 2,
    "again run --exit-status 0": 3,
    "again empty --exit-status 1": 0,
    "again empty --exit-status 2": 1,
    "again empty --exit-status 143": 0,
    "slurm": 2,
    "slurm copy scripts": 0,
    "slurm copy small.yaml": 2,
    "launch train": 2,
    "launch --ranks 2": 2,
    "launch --ranks 0 train --recipe small.yaml": 2,
    "launch --ranks 1 --hostfile hosts train --recipe small.yaml": 2,
    "launch --hostfile nowhere train --recipe small.yaml": 2,
    "launch --ranks 1 --restarts=-1 train --recipe small.yaml": 2,
    "doctor --recipe nowhere.yaml": 2,
    "doctor --unknown": 2,
    "bench": 2,
    "bench unknown": 2,
    "bench planner --json planner.json": 0,
    "bench planner --json nowhere/planner.json": 2,
    "bench overlap --zero-stage=0": 2,
    "bench lamb --only=nothing": 2,
    "bench kernels --only=nothing": 2,
    "bench data nowhere.txt": 2,
}


@pytest.mark.parametrize("line", CASES)
def test_a_command_line_has_its_exit_code(
    line: str, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ground)
    assert _exit_code(*line.split()) == CASES[line]


def test_a_loss_that_is_not_finite_is_3(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ground)
    wild = (
        "optimizer={name: lamb, learning_rate: 100, max_grad_norm: 0.0}",
        "schedule={shape: constant, warmup_steps: 0}",
        "evaluation.every_steps=1",
    )
    words = [word for setting in wild for word in ("--set", setting)]
    assert _exit_code("train", "--recipe", "small.yaml", "--run-dir", "wild", *words) == 3
    assert _exit_code("again", "wild", "--exit-status", "3") == 0
    assert _exit_code("train", "--resume", "wild") == 3
    assert _exit_code("again", "wild", "--exit-status", "3") == 1, "twice at the same step"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.LoaderError("a loader is gone"), 1),
        (errors.UserError("mend it"), 2),
        (errors.ConfigError("mend it"), 2),
        (errors.DataError("mend it"), 2),
        (errors.StageError("mend it"), 2),
        (errors.CheckpointError("mend it"), 2),
        (OSError(28, "No space left on device", "file"), 2),
        (PermissionError(13, "Permission denied", "file"), 2),
        (errors.NonFiniteError("nan"), 3),
        (errors.LostRankError("rank 1 is silent"), 4),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_error_has_its_exit_code(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", fail)
    assert main([]) == code
    assert capsys.readouterr().err.startswith("stacking-ds: ")


def test_an_error_that_nobody_can_mend_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", fail)
    with pytest.raises(OSError, match="Stale"):
        main([])


# ------------------------------------------------------------------ what a run leaves


def _files(folder: Path) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return [re.sub(r"(tfevents)\..*", r"\1.*", name) for name in names]


def _keys(value: Any, key: str = "") -> list[str]:
    """Dotted, in the order of the file; an item of a list is a *."""
    if isinstance(value, dict):
        found = [
            line
            for name, child in value.items()
            for line in _keys(child, f"{key}.{name}" if key else name)
        ]
        return found or [key]
    if isinstance(value, list) and any(isinstance(child, dict) for child in value):
        found = [line for child in value for line in _keys(child, f"{key}.*")]
        return list(dict.fromkeys(found))
    return [key]


def _values(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict) and value:
        return [
            line
            for name, child in value.items()
            for line in _values(child, f"{key}.{name}" if key else name)
        ]
    return [f"{key} = {json.dumps(value)}"]


def _tensors(path: Path) -> list[str]:
    """Name, type and shape of each tensor of a safetensors file, and the keys of its header."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about = header.pop("__metadata__", {})
    return [
        *(f"header: {key}" for key in about),
        *sorted(f"{name} {tensor['dtype']} {tensor['shape']}" for name, tensor in header.items()),
    ]


def _records(path: Path) -> list[str]:
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [f"{record['event']}: {' '.join(record)}" for record in records]


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _whole_run(folder: Path) -> str:
    """The public face of folder/run, and of the shards that it was trained on."""
    run, shards = folder / "run", folder / "shards"
    checkpoint = run / "checkpoints" / "step_00000004"
    manifest = _read(checkpoint / "manifest.json")
    parameters = manifest.pop("parameters")
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    config["data"]["path"] = "SHARDS"
    lines = metrics(run)
    parts = {
        "files of a run": _files(run),
        "files of token shards": _files(shards),
        "keys of the shards' manifest.json": _keys(_read(shards / "manifest.json")),
        "config.yaml": _values(config),
        "what `latest` says": [(run / "checkpoints" / "latest").read_text().strip()],
        "keys of a checkpoint's manifest.json": _keys(manifest),
        "parameters in it": [f"{name} {json.dumps(cut)}" for name, cut in parameters.items()],
        "a rank's file": _tensors(checkpoint / "rank_00001.safetensors"),
        "the exported model": _tensors(run / "export" / "model.safetensors"),
        "keys of its config.json": _keys(_read(run / "export" / "config.json")),
        "keys of metrics.jsonl": [f"step {line['step']}: {' '.join(line)}" for line in lines],
        "keys of attempts.jsonl": _records(run / "attempts.jsonl"),
    }
    return "\n".join("\n".join([f"# {title}", *part, ""]) for title, part in parts.items())


def test_a_run_leaves_the_golden_files(ground: Path) -> None:
    assert (ground / "left.txt").read_text("utf-8") == RUN.read_text("utf-8")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    HELP.write_text(_whole_help(), "utf-8")
    with tempfile.TemporaryDirectory() as place:
        _make_run(Path(place))
        RUN.write_text(_whole_run(Path(place)), "utf-8")
