"""Files and folders appear whole or not at all, and lines are said though nobody reads them."""

import errno
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from stacking_ds.files import published, write_whole


def _fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_cannot_be_written_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest"
    write_whole(path, "one")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", _fail)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "two")
    assert path.read_text() == "one"
    write_whole(path, b"three", tmp_path / "other name")
    assert path.read_text() == "three"
    assert os.listdir(tmp_path) == ["latest"]


def test_a_folder_is_replaced_as_a_whole_or_stays(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with published(folder) as partial:
        (partial / "old").write_text("1")
        assert not folder.exists()
    (tmp_path / ".export.partial").mkdir()  # what a killed process has left
    with suppress(KeyError), published(folder) as partial:
        (partial / "new").write_text("2")
        raise KeyError
    assert os.listdir(folder) == ["old"]
    with published(folder) as partial:
        (partial / "new").write_text("2")
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["export"]


def test_who_reads_no_further_ends_nothing() -> None:
    program = (
        "import sys\nfrom stacking_ds.console import say\n"
        "for line in range(100_000): say(str(line))\n"
        "sys.exit(7)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 7
