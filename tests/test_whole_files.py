"""Files and folders appear whole or not at all, and lines are said though nobody reads them."""

import errno
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stacking_ds.files import published, write_whole


def _fail(*_: object) -> Any:
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


def test_a_folder_that_cannot_be_renamed_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "old").write_text("1")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        return _fail() if path.name.endswith(".partial") else rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space"), published(folder) as partial:
        (partial / "new").write_text("2")
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["export"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").write_text("1")
    folder = tmp_path / "export"
    folder.symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        with published(folder) as partial:
            (partial / "new").write_text("2")
    assert (os.listdir(folder), os.listdir(tmp_path / "elsewhere")) == (["new"], ["old"])
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "export"]


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


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_terminal_that_is_gone_does_not_decide_the_exit_code(stream: str) -> None:
    program = (
        f"import sys\nfrom stacking_ds.console import end_streams\nsys.stdin.readline()\n"
        f"sys.{stream}.write('last words')\nend_streams()\n"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, env=environment, **{stream: theirs}
    ) as process:
        os.close(theirs)
        os.close(ours)
        process.communicate(b"go\n", timeout=60)
    assert process.returncode == 0
