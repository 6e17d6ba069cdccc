"""The umask says who may read what a run writes; and what cannot be read is not damaged."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stacking_ds.checkpoint import folders, load
from stacking_ds.cli import main
from stacking_ds.data.shards import TokenShards
from stacking_ds.errors import DataError, UnreadableError
from stacking_ds.launch import restart_policy
from stacking_ds.run import directory
from tests.checkpoints import plain_fragments, save_state
from tests.prose import tiny_shards
from tests.runs import small_recipe
from tests.token_shards import make_shards

Capture = pytest.CaptureFixture[str]
NOBODY = 65534


def _modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
    }


def _differing(folder: Path, umask: int) -> dict[str, str]:
    """What in the folder is not as the umask says."""
    return {
        name: oct(mode)
        for name, mode in _modes(folder).items()
        if mode != (0o777 if (folder / name).is_dir() else 0o666) & ~umask
    }


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077], indirect=True)
def test_everything_that_is_written_follows_the_umask(umask: int, tmp_path: Path) -> None:
    """From the text to the exported model: shards, layouts, and all that a run leaves."""
    shards = tiny_shards(tmp_path)
    small_recipe(tmp_path, shards)
    one_stage = ["--set", "stages=[{num_hidden_layers: 1, steps: 2}]"]
    run_dir = tmp_path / "run"
    train = ["train", "--recipe", str(tmp_path / "small.yaml"), "--run-dir", str(run_dir)]
    assert main([*train, *one_stage, "--set", "schedule.warmup_steps=1"]) == 0
    assert main(["checkpoint", "use", str(run_dir), "2"]) == 0
    restart_policy.judge(run_dir, 0)
    names = {Path(name).name for name in _modes(tmp_path)}
    assert names >= {
        *("manifest.json", "vocab.txt", "layouts", "rank_00000.safetensors", "latest", ".lock"),
        *("metrics.jsonl", "attempts.jsonl", "train.log", "config.yaml", "model.safetensors"),
    }
    assert _differing(tmp_path, umask) == {}


# ------------------------------------------------------------------- what is forbidden


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that any user may enter, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="stacking-ds-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def _forbidden(path: Path) -> Iterator[None]:
    """Nobody may read `path` meanwhile, this process included."""
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


@pytest.fixture
def run_dir(open_place: Path) -> Path:
    """A run with whole checkpoints at steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save_state(open_place, step, plain_fragments(value=step))
    return open_place


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def _said(capsys: Capture, code: int, *arguments: str | Path) -> list[str]:
    assert main(["checkpoint", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    return (printed.out + printed.err).splitlines()


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json", "."])
def test_what_cannot_be_read_is_not_damaged(run_dir: Path, capsys: Capture, name: str) -> None:
    newest = _folder(run_dir, 3)
    with _forbidden(newest / name):
        verified = _said(capsys, 2, "verify", run_dir)
        every = _said(capsys, 2, "verify", run_dir, "--all")
        listed = _said(capsys, 0, "list", run_dir)
        inspected = _said(capsys, 2, "inspect", run_dir, "--parameters")
        with pytest.raises(UnreadableError, match=r"cannot be read \(Permission denied\); "):
            load.load(newest, plain_fragments())
    assert verified[0].startswith(f"not verified: {newest}/")
    assert "cannot be read (Permission denied)" in verified[0]
    assert verified[1].startswith("what cannot be read may be whole: mend access to it")
    assert [line.split(":")[0] for line in every[:3]] == ["whole", "whole", "not verified"]
    assert "cannot be read (Permission denied)" in inspected[-1]
    said = "\n".join([*verified, *every, *listed, *inspected])
    for wrong in ("damaged", "start the run again", "may be deleted", "go on from"):
        assert wrong not in said
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000003\n"
    assert _said(capsys, 0, "verify", run_dir)[0].startswith("whole: ")


def test_a_run_that_cannot_be_read_is_not_started_anew(open_place: Path) -> None:
    config = small_recipe(open_place, open_place)
    run_dir = open_place / "run"
    save_state(run_dir, 1, plain_fragments())
    directory.write_config(run_dir, config)
    directory.check(run_dir, config, resume=True)
    with _forbidden(run_dir / "checkpoints"):
        for resume in (True, False):
            with pytest.raises(UnreadableError, match=r"checkpoints cannot be read \(Permission"):
                directory.check(run_dir, config, resume=resume)
    with (
        _forbidden(run_dir / "checkpoints" / "latest"),
        pytest.raises(UnreadableError, match=r"latest cannot be read \(Permission denied\); mend"),
    ):
        folders.latest(run_dir)
    with (
        _forbidden(run_dir / "config.yaml"),
        pytest.raises(UnreadableError, match=r"config.yaml cannot be read \(Permission denied\)"),
    ):
        directory.read_config(run_dir)


@pytest.mark.parametrize(
    "name", ["manifest.json", "vocab.txt", "train-00000-000.arrow", "train-duplicates.arrow", "."]
)
def test_shards_that_cannot_be_read_are_not_damaged(open_place: Path, name: str) -> None:
    shards = open_place / "shards"
    make_shards(shards, [[3], [4, 1]])
    with (
        _forbidden(shards / name),
        pytest.raises(
            DataError, match=r"cannot be read \(Permission denied\); mend access"
        ) as said,
    ):
        TokenShards.open(shards).split("train")
    assert str(shards) in str(said.value)
    assert "prepare" not in str(said.value)
    TokenShards.open(shards, verify=True).split("train")
