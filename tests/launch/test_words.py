"""What reaches other hosts arrives as it was given, or is refused."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_ds.cli import main
from stacking_ds.errors import ConfigError, UserError
from stacking_ds.launch.environment import (
    ENCODED,
    decode_arguments,
    draw_environment,
    encode_arguments,
    hosts_environment,
    parse_assignments,
    passable,
    require_exportable,
    require_plain,
    secret_names,
)

PYTHON = "/env/bin/python"


# ------------------------------------------------------------------ commands


@given(st.lists(st.text()))
def test_any_command_survives_as_one_word(arguments: list[str]) -> None:
    word = encode_arguments(arguments)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", word)
    assert decode_arguments(word) == arguments


def test_a_file_name_that_is_not_text_survives() -> None:
    name = os.fsdecode(b"run-\xff")
    assert decode_arguments(encode_arguments([name])) == [name]


@pytest.mark.parametrize(
    "word", ["", "!", "abc", "bm90IGpzb24", encode_arguments(["a"])[:-1] + "€"]
)
def test_other_words_are_no_command(word: str) -> None:
    with pytest.raises(UserError, match="is no command that `stacking-ds launch` made"):
        decode_arguments(word)


def test_a_list_of_something_else_is_no_command() -> None:
    with pytest.raises(UserError, match="is no command"):
        decode_arguments("WzFd")  # [1]


def test_plain_commands_stay_readable() -> None:
    command = ["train", "--recipe", "base", "--set", "optimizer.learning_rate=1e-3"]
    assert passable(command) == command


@pytest.mark.parametrize(
    "odd", ["two words", "$HOME", "%n", "a;b", "", "~", "it's", 'say "x"', "é"]
)
def test_one_odd_argument_encodes_the_whole_command(odd: str) -> None:
    flag, word = passable(["train", "--run-dir", odd])
    assert flag == ENCODED
    assert decode_arguments(word) == ["train", "--run-dir", odd]


def test_plain_words_mean_themselves_to_a_shell() -> None:
    word = "AZaz09_@+=:,./-"
    require_plain(word, "the folder", "choose another")
    said = subprocess.run(["sh", "-c", f"echo {word}"], capture_output=True, text=True, check=True)
    assert said.stdout == word + "\n"


@pytest.mark.parametrize("word", ["a b", "a%h", "$x", "a'", "", "a\n", "a&", "*", "~/a"])
def test_a_folder_a_shell_would_read_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"the folder .* has characters .*; choose another"):
        require_plain(word, "the folder", "choose another")


# ------------------------------------------------------------------ variables


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A home and a working directory of the test's own."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    return home, work


def merged(*env: str, launcher: str = "pdsh", **own: str) -> dict[str, str]:
    return hosts_environment(
        parse_assignments(env),
        python=PYTHON,
        own={"PATH": "/usr/bin:/bin", **own},
        launcher=launcher,
    )


def test_nearer_settings_win(places: tuple[Path, Path]) -> None:
    home, work = places
    (home / ".deepspeed_env").write_text("# for all\n\nA=home\nB=home\nC=home\n")
    (work / ".deepspeed_env").write_text("B = work\nC=work\n   # here\n")
    assert merged("C=option", "D=a=b") == {
        "PATH": "/env/bin:/usr/bin:/bin",
        "A": "home",
        "B": "work",
        "C": "option",
        "D": "a=b",
    }


def test_defaults_give_way(places: tuple[Path, Path]) -> None:
    assert merged(DS_ACCELERATOR="cpu")["DS_ACCELERATOR"] == "cpu"
    found = merged("DS_ACCELERATOR=cuda", "PATH=/mine", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="3")
    assert found == {"DS_ACCELERATOR": "cuda", "PATH": "/mine"}


def test_this_interpreters_programs_come_first_and_once(places: tuple[Path, Path]) -> None:
    assert merged(PATH="/usr/bin:/env/bin:/bin")["PATH"] == "/env/bin:/usr/bin:/bin"


def test_a_file_of_another_name_is_read_as_deepspeed_would(places: tuple[Path, Path]) -> None:
    home, _ = places
    (home / "other").write_text("A=1\n")
    assert merged(DS_ENV_FILE="other")["A"] == "1"
    assert merged(DS_ENV_FILE=str(home / "other"))["A"] == "1"


def test_names_of_secrets_are_found_wherever_they_are_set(places: tuple[Path, Path]) -> None:
    home, work = places
    (home / ".deepspeed_env").write_text("HF_TOKEN=1\nTOKENIZERS_PARALLELISM=false\n")
    (work / ".deepspeed_env").write_text("WANDB_API_KEY=2\nKEYBOARD=us\nPASSAGE=1\n")
    own = {"MLFLOW_TRACKING_PASSWORD": "3", "NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "4"}
    given = {"my_secret": "5", "OMP_NUM_THREADS": "2"}
    # DeepSpeed leaves at home what begins with AWS
    assert secret_names(given, own) == [
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "WANDB_API_KEY",
        "my_secret",
    ]


def test_a_refused_secret_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="variable HF_TOKEN cannot be given") as raised:
        require_exportable("HF_TOKEN", "hf_$abc", "pdsh")
    assert "abc" not in str(raised.value)


@pytest.mark.parametrize("line", ["export A=1", "A", "=1", "1A=x", "A-B=1"])
def test_lines_that_set_nothing_are_named(places: tuple[Path, Path], line: str) -> None:
    (places[1] / ".deepspeed_env").write_text(f"# one\nOK=1\n{line}\n")
    with pytest.raises(ConfigError, match=rf"work/.deepspeed_env:3: '{line}' sets no variable"):
        merged()
    with pytest.raises(ConfigError, match=rf"--env: '{line}' sets no variable"):
        merged(line)


@pytest.mark.parametrize("value", ['say "x"', "$HOME", "`id`", "a\\b", "one\ntwo"])
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_values_that_a_shell_would_read_are_refused(value: str, launcher: str) -> None:
    with pytest.raises(ConfigError, match=r"variable A .* cannot be given .*--env A=VALUE"):
        require_exportable("A", value, launcher)


def test_what_deepspeed_sends_by_itself_is_looked_at_too(places: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="variable PYTHONPATH"):
        merged(PYTHONPATH="/a:$b")
    assert "OTHER" not in merged(OTHER="$b")


def test_pdsh_and_mpirun_change_different_values(places: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="pdsh would replace"):
        require_exportable("A", "log-%h", "pdsh")
    require_exportable("A", "log-%h", "openmpi")
    with pytest.raises(ConfigError, match="between quotes"):
        require_exportable("A", "two words", "openmpi")
    require_exportable("A", "two words; (50%)", "pdsh")


@given(st.text(st.characters(codec="ascii", min_codepoint=32, exclude_characters='"$`\\%')))
def test_what_is_not_refused_arrives(value: str) -> None:
    """Through DeepSpeed's parser and its quotes, and a shell."""
    value = value.strip()
    require_exportable("A", value, "pdsh")
    (line,) = draw_environment({"A": value}).splitlines(keepends=True)
    name, text = line.split("=", maxsplit=1)
    text = text.strip()
    if re.search(r"[^\w@%+=:,./-]", text):
        text = f'"{text}"'
    script = f"export {name}={text}; printenv A"
    # like a login shell that ssh starts
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    assert done.stdout.decode() == value + "\n"


@pytest.mark.parametrize("words", [["--encoded"], ["--encoded", "zzz"]])
def test_what_launch_has_not_written_is_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert "is no command that `stacking-ds launch` made" in capsys.readouterr().err
