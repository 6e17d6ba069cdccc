"""Caches of compilers go to the node's own disk, and never where another user may write."""

import os
import tempfile
from pathlib import Path

import pytest

from stacking_ds.node_scratch import keep_caches_on_node


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_caches_are_on_the_node_and_private(tmp_path: Path) -> None:
    keep_caches_on_node()
    root = Path(os.environ["TRITON_CACHE_DIR"]).parent
    assert root.parent == tmp_path
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == root
    assert root.stat().st_mode & 0o777 == 0o700


def test_what_a_person_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_caches_on_node()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / f"stacking-ds-{os.getuid()}"
    root.mkdir()
    root.chmod(0o777)
    keep_caches_on_node()
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / f"stacking-ds-{os.getuid()}").symlink_to(tmp_path, target_is_directory=True)
    keep_caches_on_node()
    assert "TRITON_CACHE_DIR" not in os.environ
