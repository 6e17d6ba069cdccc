"""Names and consoles that are not UTF-8, names too long and links in a circle: one sentence."""

import os
import subprocess
import sys

import pytest

from stacking_ds.cli import main
from stacking_ds.console import check_names, is_utf8, readable_name

LATIN = os.fsdecode(b"caf\xe9")
COMMANDS = {
    "prepare": ["prepare", "NAME.txt", "--out", "out"],
    "prepare-out": ["prepare", "embedded", "--out", "NAME"],
    "prepare-vocab": ["prepare", "embedded", "--vocab", "NAME", "--out", "out"],
    "prepare-heldout": ["prepare", "embedded", "--heldout", "NAME.txt", "--out", "out"],
    "data": ["data", "inspect", "NAME"],
    "recipe": ["train", "--recipe", "NAME.yaml"],
    "list": ["checkpoint", "list", "NAME"],
    "verify": ["checkpoint", "verify", "NAME"],
    "inspect": ["checkpoint", "inspect", "NAME"],
    "evaluate": ["evaluate", "NAME"],
    "export": ["export", "NAME"],
    "report": ["report", "NAME"],
    "hostfile": ["launch", "--hostfile", "NAME", "train", "--recipe", "demo"],
    "again": ["again", "NAME", "--exit-status", "1"],
}
MORE = {
    "run-dir": ["train", "--recipe", "demo", "--run-dir", "NAME"],
    "set": ["train", "--recipe", "demo", "--set", "data.path=NAME"],
    "doctor": ["doctor", "--run-dir", "NAME"],
}


def said_by(command, name, capsys):
    assert main([word.replace("NAME", name) for word in command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("stacking-ds: error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("command", (COMMANDS | MORE).values(), ids=COMMANDS | MORE)
def test_every_command_refuses_names_that_are_not_utf8(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert r"caf\xe9" in said_by(command, LATIN, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_names_too_long_and_links_in_a_circle(command, tmp_path, monkeypatch, capsys):
    if command[0] == "again":
        pytest.skip("it looks for what is there, and nothing is")
    monkeypatch.chdir(tmp_path)
    for name in ("loop", "loop.txt", "loop.yaml"):
        (tmp_path / name).symlink_to(name)
    said_by(command, "loop", capsys)
    said_by(command, "x" * 300, capsys)


def test_the_working_directory_counts_too(tmp_path, monkeypatch, capsys):
    here = os.path.join(tmp_path, LATIN)
    os.mkdir(here)
    monkeypatch.chdir(here)
    assert r"working directory" in said_by(["report", "run"], "", capsys)
    os.rmdir(here)
    assert "the working directory is gone" in said_by(["report", "run"], "", capsys)


def test_names_are_shown_as_people_write_them():
    assert (is_utf8(LATIN), is_utf8("café")) == (False, True)
    assert (readable_name(LATIN), readable_name("café")) == (r"caf\xe9", "café")
    check_names(["café", "--out", "東京"])


def run(code, redirection="", **environment):
    """What a Python program of one line ends with, and prints."""
    line = f'exec "$0" -c "$1" {redirection}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, f"from stacking_ds.console import *\n{code}"],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )


def test_a_console_that_lacks_a_letter_is_given_its_number():
    code = "print('a ≥ b')"
    assert b"UnicodeEncodeError" in run(code, PYTHONIOENCODING="ascii:strict").stderr
    ended = run(f"steady_streams()\n{code}", PYTHONIOENCODING="ascii:strict")
    assert (ended.returncode, ended.stdout) == (0, b"a \\u2265 b\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_leads_nowhere_and_not_into_files(closed, tmp_path):
    code = f"""
import os, sys
steady_streams()
file = open({str(tmp_path / "a")!r}, "w")
assert file.fileno() > 2
print("said"); print("cried", file=sys.stderr); os.system("echo outside; echo it >&2")
assert not sys.stderr.isatty() and not sys.stdout.isatty()
"""
    ended = run(code, closed)
    assert ended.returncode == 0
    assert (tmp_path / "a").read_text() == ""
    assert (b"said" in ended.stdout) == (">&-" not in closed.replace("2>&-", ""))
