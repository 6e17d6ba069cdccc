"""Caches of compilers go to the node's own disk, and never where another user may write."""

import os
import tempfile
from pathlib import Path

import pytest

from stacking_ds.process.runtime import keep_caches_on_node

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (*CACHES, "SLURM_TMPDIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def usual(tmp_path: Path) -> Path:
    """The folder that everybody can foresee."""
    return tmp_path / f"stacking-ds-{os.getuid()}"


def test_caches_are_on_the_node_and_private(usual: Path) -> None:
    keep_caches_on_node(print)
    assert {Path(os.environ[name]).parent for name in CACHES} == {usual}
    assert usual.stat().st_mode & 0o777 == 0o700


def test_a_jobs_own_scratch_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "job"
    own.mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(own))
    keep_caches_on_node(print)
    assert Path(os.environ["TRITON_CACHE_DIR"]).parent.parent == own


def test_where_nothing_can_be_written_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "")
    monkeypatch.delenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "absent too"))
    keep_caches_on_node(print)
    assert not set(CACHES) & os.environ.keys()
    assert os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] == "1"


def test_what_a_person_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.setenv(name, "/elsewhere")
    keep_caches_on_node(print)
    assert {os.environ[name] for name in CACHES} == {"/elsewhere"}


@pytest.mark.parametrize("kind", ["others may write", "group may write", "foreign", "link", "file"])
def test_no_folder_is_used_that_another_user_may_have_filled(
    tmp_path: Path,
    usual: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    if kind == "link":
        usual.symlink_to(tmp_path, target_is_directory=True)
    elif kind == "file":
        usual.touch()
    else:
        usual.mkdir()
        usual.chmod({"others may write": 0o757, "group may write": 0o770}.get(kind, 0o700))
    if kind == "foreign":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        usual = usual.rename(tmp_path / f"stacking-ds-{other}")
    keep_caches_on_node(print)
    # neither there nor where the compilers' own defaults are, which can be foreseen too
    folders = {Path(os.environ[name]).parent for name in CACHES}
    assert len(folders) == 1
    [fresh] = folders
    assert fresh not in (usual, tmp_path)
    assert fresh.stat().st_mode & 0o777 == 0o700
    assert str(usual) in capsys.readouterr().out
