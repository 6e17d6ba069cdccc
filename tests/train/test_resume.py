"""A run that goes on: by its own recipe, from a chosen checkpoint, and never half-changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stacking_ds.checkpoint.folders import choose
from stacking_ds.cli import main
from stacking_ds.errors import CheckpointError
from stacking_ds.run import directory
from tests.prose import tiny_shards
from tests.runs import losses, parameters, small_recipe

Capture = pytest.CaptureFixture[str]
STAGES = "stages=[{num_hidden_layers: 1, steps: 2}, {num_hidden_layers: 2, steps: 2}]"
SHORT = (STAGES, "checkpoint.every_steps=2", "schedule.warmup_steps=1", "evaluation.max_samples=8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `shards`, and a finished `run` with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("place")
    tiny_shards(folder).rename(folder / "shards")
    small_recipe(folder, folder / "shards")
    recipe = ["--recipe", str(folder / "small.yaml"), "--run-dir", str(folder / "run")]
    assert main(["train", *recipe, *(word for key in SHORT for word in ("--set", key))]) == 0
    return folder


@pytest.fixture
def run_dir(place: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(place / "run", tmp_path / "run")
    return tmp_path / "run"


def _did(capsys: Capture, *arguments: str | Path) -> str:
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def _refused(capsys: Capture, *arguments: str | Path) -> str:
    """The last sentence of a command that is refused."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    return (printed.out + printed.err).splitlines()[-1]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def _step(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


# -------------------------------------------------------------------- checkpoint use


def test_a_chosen_checkpoint_is_gone_on_from(place: Path, run_dir: Path, capsys: Capture) -> None:
    said = _did(capsys, "checkpoint", "use", run_dir, "2")
    assert said.startswith(f"whole: {_step(run_dir, 2)}: ")
    assert said.endswith("`latest` names step_00000002: --resume goes on from it\n")
    _did(capsys, "train", "--resume", run_dir)
    assert losses(run_dir) == losses(place / "run")
    ours, theirs = parameters(run_dir), parameters(place / "run")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["step_00000002", "2", "0002"])
def test_a_checkpoint_has_several_names(run_dir: Path, capsys: Capture, name: str) -> None:
    _did(capsys, "checkpoint", "use", run_dir, name)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000002\n"
    inspected = _did(capsys, "checkpoint", "inspect", run_dir, "--checkpoint", name)
    assert "  2 of 4, a boundary: 2 layers come next" in inspected


@pytest.mark.parametrize("name", ["9" * 5_000, "²", "step_²", "-1"])
def test_what_is_no_step_is_no_checkpoint(run_dir: Path, capsys: Capture, name: str) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        choose(run_dir, name)
    if name == "step_²":
        (run_dir / name).mkdir()
        assert "holds no run and is no checkpoint" in _refused(
            capsys, "checkpoint", "list", run_dir / name
        )


def test_only_a_whole_checkpoint_is_used(run_dir: Path, capsys: Capture) -> None:
    _flip(_step(run_dir, 2) / "rank_00000.safetensors")
    said = _refused(capsys, "checkpoint", "use", run_dir, "2")
    assert said.startswith("`latest` names step_00000004, so --resume goes on from it")
    assert "has no checkpoint 'step_00000003'; there is: step_0" in _refused(
        capsys, "checkpoint", "use", run_dir, "3"
    )
    assert "is a checkpoint already" in _refused(
        capsys, "checkpoint", "use", _step(run_dir, 4), "4"
    )
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000004\n"


def test_nothing_is_chosen_while_a_job_trains(run_dir: Path, capsys: Capture) -> None:
    with directory.lock(run_dir):
        said = _refused(capsys, "checkpoint", "use", run_dir, "2")
    assert said.endswith(f"another job is training in {run_dir}; wait for it or stop it first")
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000004\n"


# ------------------------------------------------------------------------- refusals


def _lose(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [_flip, _lose])
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
def test_a_refused_resume_leaves_every_byte(
    run_dir: Path, capsys: Capture, damage: Callable[[Path], None], name: str
) -> None:
    (run_dir / "checkpoints" / "latest").write_text("step_00000002\n")
    damage(_step(run_dir, 2) / name)
    before = _files(run_dir)
    records = before.pop("attempts.jsonl")
    said = _refused(capsys, "train", "--resume", run_dir, "--set", "logging.every_steps=2")
    assert f"{_step(run_dir, 2) / name} " in said
    # 4 lies beyond what was gone back to, and is whole
    command = f"stacking-ds checkpoint use {run_dir} step_00000004"
    assert said.endswith(f"go on from step_00000004: `{command}`, and then --resume")
    after = _files(run_dir)
    # whoever starts runs again has to know of it, whatever a launcher exits with
    begun, ended = after.pop("attempts.jsonl").removeprefix(records).splitlines()
    assert after == before
    assert json.loads(begun)["event"] == "begun"
    record = json.loads(ended)
    assert (record["outcome"], record["message"]) == ("user_error", said.partition("error: ")[2])
    assert main(["again", str(run_dir), "--exit-status", "1"]) == 1
    _did(capsys, *command.split()[1:])
    _did(capsys, "train", "--resume", run_dir)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["fifo", "folder"])
def test_metrics_that_cannot_be_read_are_refused_before_anything_is_written(
    run_dir: Path, capsys: Capture, make: Callable[[Path], None]
) -> None:
    _did(capsys, "checkpoint", "use", run_dir, "2")
    (run_dir / "metrics.jsonl").unlink()
    make(run_dir / "metrics.jsonl")
    before = _files(run_dir)
    said = _refused(capsys, "train", "--resume", run_dir, "--set", "logging.every_steps=2")
    assert "metrics.jsonl is damaged: it is not a regular file; move it aside" in said
    assert _files(run_dir) | {"attempts.jsonl": b""} == before | {"attempts.jsonl": b""}


def test_a_refused_new_run_leaves_nothing(place: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(place / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "train-00000-000.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:2000] + b"\0\0" + content[2002:])
    small_recipe(tmp_path, tmp_path / "shards")
    train = ["train", "--recipe", tmp_path / "small.yaml", "--run-dir", tmp_path / "run"]
    assert "is not the file its manifest describes" in _refused(capsys, *train)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()  # somebody's own, perhaps with permissions of its own
    _refused(capsys, *train)
    assert list((tmp_path / "run").iterdir()) == []


# ------------------------------------------------------------------- the run's recipe


def test_a_lost_recipe_is_in_the_checkpoint(run_dir: Path, capsys: Capture) -> None:
    path = run_dir / "config.yaml"
    whole = path.read_text()
    command = f"stacking-ds checkpoint use {run_dir} step_00000004"
    for content in ("", " \n", "seed: [", "\0", "name: 3"):
        path.write_text(content)
        for words in (("train", "--resume"), ("export",), ("evaluate",)):
            said = _refused(capsys, *words, run_dir)
            assert said.endswith(f"`{command}` writes it anew, as that checkpoint has it")
    path.unlink()
    assert f"{path} is missing; `{command}`" in _refused(capsys, "train", "--resume", run_dir)
    assert f"{path} is written anew" in _did(capsys, *command.split()[1:])
    assert path.read_text() == whole
    assert "written anew" not in _did(capsys, *command.split()[1:])


def test_the_options_that_say_which_run_it_is(run_dir: Path, capsys: Capture) -> None:
    _did(capsys, "train", f"--resume={run_dir}")
    _did(capsys, "train", "--resume", "--run-dir", run_dir)
    _did(capsys, "train", "--resume", run_dir, "--set", "logging.every_steps=3")
    assert directory.read_config(run_dir).logging.every_steps == 3
    said = _refused(capsys, "train", "--resume", run_dir, "--run-dir", run_dir.parent)
    assert "are two runs; give one" in said
    assert "holds another run (seed: 3 -> 4)" in _refused(
        capsys, "train", "--resume", run_dir, "--set", "seed=4"
    )
    for words in ((), ("--resume",), ("--run-dir", run_dir)):
        said = _refused(capsys, "train", *words)
        assert said.endswith("or the directory of a run to go on with: --resume RUN_DIR")
    assert "holds no run" in _refused(capsys, "train", "--resume", run_dir / "checkpoints")
    assert "holds no run" in _refused(capsys, "train", "--resume", run_dir / "nowhere")
    for words in (("train", "--resume"), ("report",), ("export",)):
        assert "holds no run" in _refused(capsys, *words, run_dir / "config.yaml")


# ---------------------------------------------------------------- without its shards


def test_a_run_is_exported_without_its_shards(
    place: Path, run_dir: Path, capsys: Capture, tmp_path: Path
) -> None:
    shards, moved, out = place / "shards", place / "moved", tmp_path / "out"
    shards.rename(moved)
    try:
        _did(capsys, "export", run_dir, "--out", out)
        assert _files(out) == _files(place / "run" / "export")
        option = f"the token shards of {run_dir} are not in {shards}; say with "
        assert f"{option}--data FOLDER" in _refused(capsys, "evaluate", run_dir)
        said = _refused(capsys, "train", "--resume", run_dir)
        assert f"{option}--set data.path=FOLDER" in said
        _did(capsys, "train", "--resume", run_dir, "--dry-run", "--without-data")
        result = json.loads(_did(capsys, "evaluate", run_dir, "--data", moved).splitlines()[-1])
        assert result["mlm_loss"] > 0
        # its tokenizer is damaged, and then it is as an earlier version left it
        _flip(run_dir / "tokenizer" / "tokenizer.json")
        said = _refused(capsys, "export", run_dir)
        assert "tokenizer.json is missing or damaged; delete " in said
        shutil.rmtree(run_dir / "tokenizer")
        assert "keeps no tokenizer of its own" in _refused(capsys, "export", run_dir)
        _did(capsys, "export", run_dir, "--data", moved)
        _did(capsys, "train", "--resume", run_dir, "--set", f"data.path={moved}")
        assert (run_dir / "tokenizer" / "vocab.txt").exists(), "it is kept from now on"
    finally:
        moved.rename(shards)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["fifo", "folder"])
def test_an_export_needs_no_losses(
    run_dir: Path, capsys: Capture, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = run_dir / "metrics.jsonl"
    path.unlink()
    make(path)
    assert main(["export", str(run_dir), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"exported: {tmp_path / 'out'}\n"
    assert printed.err.startswith(
        f"stacking-ds: warning: whether the model has learned is not known: {path} is damaged: "
    )


def test_another_vocabulary_is_not_exported(run_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tiny_shards(tmp_path, vocab_size=300)
    said = _refused(capsys, "export", run_dir, "--data", other)
    assert f"was trained with another vocabulary than that of {other}" in said
