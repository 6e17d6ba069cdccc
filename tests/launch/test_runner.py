"""The command lines that DeepSpeed's runner is started with, as its own parser reads them."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stacking_ds.commands.launch import tracked_run
from stacking_ds.errors import ConfigError, UserError
from stacking_ds.launch.environment import decode_arguments
from stacking_ds.launch.hosts import Host
from stacking_ds.launch.runner import LaunchRequest, prepare
from stacking_ds.launch.supervise import with_resume
from stacking_ds.launch.sweep import MARKER_VARIABLE
from tests.runs import small_recipe

HOSTS = [Host("node1", 2), Host("node2", 4)]
TRAIN = ("train", "--recipe", "base")
OWN = {"PATH": "/usr/bin", "HOME": "/nowhere"}


@pytest.fixture(scope="module")
def deepspeed_runner() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return importlib.import_module("deepspeed.launcher.runner")


def on_hosts(
    folder: Path,
    command: tuple[str, ...] = TRAIN,
    own: dict[str, str] | None = None,
    **options: Any,
) -> tuple[list[str], dict[str, str]]:
    request = LaunchRequest(command, hostfile=Path("hosts"), **options)
    return prepare(request, command, HOSTS, folder, "f00d", own or OWN)


def local(ranks: int, folder: Path, **own: str) -> tuple[list[str], dict[str, str]]:
    request = LaunchRequest(TRAIN, ranks=ranks, env=("A=b c",))
    return prepare(request, TRAIN, [], folder, "f00d", {**OWN, **own})


def test_pdsh(tmp_path: Path, deepspeed_runner: Any) -> None:
    arguments, environment = on_hosts(tmp_path, ssh_port=2222, master_port=29501)
    assert arguments[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    parsed = deepspeed_runner.parse_args(arguments[3:])
    assert deepspeed_runner.fetch_hostfile(parsed.hostfile) == {"node1": 2, "node2": 4}
    assert (parsed.launcher, parsed.launcher_args, parsed.force_multi) == ("pdsh", "", True)
    assert (parsed.ssh_port, parsed.master_port, parsed.master_addr) == (2222, 29501, "")
    assert (parsed.module, parsed.no_local_rank, parsed.log_level) == (True, True, "warning")
    assert (parsed.user_script, parsed.user_args) == ("stacking_ds", list(TRAIN))
    assert environment["PDSH_SSH_ARGS_APPEND"] == (
        "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o BatchMode=yes"
    )
    assert environment[MARKER_VARIABLE] == "f00d"


def test_what_pdsh_is_told_is_kept(tmp_path: Path) -> None:
    _, environment = on_hosts(tmp_path, own={**OWN, "PDSH_SSH_ARGS_APPEND": "-4"})
    assert environment["PDSH_SSH_ARGS_APPEND"].startswith("-4 -o ServerAlive")


def test_variables_are_found_where_deepspeed_looks(tmp_path: Path) -> None:
    _, environment = on_hosts(tmp_path, env=("A=b c",))
    path = environment["DS_ENV_FILE"]
    assert os.path.join(os.path.expanduser("~"), path) == path
    read = dict(line.rstrip("\n").split("=", maxsplit=1) for line in open(path))  # noqa: SIM115
    assert read == {
        "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin",
        "A": "b c",
        MARKER_VARIABLE: "f00d",
    }


def test_an_odd_command_is_one_word(tmp_path: Path, deepspeed_runner: Any) -> None:
    command = (*TRAIN, "--set", "data.path=/my data/%h")
    arguments, _ = on_hosts(tmp_path, command)
    flag, word = deepspeed_runner.parse_args(arguments[3:]).user_args
    assert flag == "--encoded"
    assert decode_arguments(word) == list(command)


@pytest.mark.parametrize(("user", "as_root"), [(0, True), (1000, False)])
def test_openmpi(
    tmp_path: Path,
    deepspeed_runner: Any,
    monkeypatch: pytest.MonkeyPatch,
    user: int,
    as_root: bool,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    arguments, _ = on_hosts(
        tmp_path,
        launcher="openmpi",
        launcher_args="--mca btl_tcp_if_include 'ib0'",
        ssh_port=2222,
        master_address="10.0.0.1",
        verbose=True,
    )
    parsed = deepspeed_runner.parse_args(arguments[3:])
    assert (parsed.launcher, parsed.master_addr, parsed.log_level) == (
        "openmpi",
        "10.0.0.1",
        "info",
    )
    # validate_args of DeepSpeed's Open MPI runner refuses them
    assert (parsed.include, parsed.exclude, parsed.num_nodes, parsed.num_gpus) == ("", "", -1, -1)
    given = shlex.split(parsed.launcher_args)
    assert ("--allow-run-as-root" in given) is as_root
    assert given[-3:] == ["--mca", "btl_tcp_if_include", "ib0"]
    assert given[given.index("plm_rsh_args") + 1].endswith("-o BatchMode=yes -p 2222")


def test_a_persons_own_ssh_options_for_mpirun_are_the_only_ones(tmp_path: Path) -> None:
    given = "--mca plm_rsh_args -4"
    arguments, _ = on_hosts(tmp_path, launcher="openmpi", launcher_args=given)
    assert " ".join(arguments).count("plm_rsh_args") == 1


def test_on_this_machine(tmp_path: Path, deepspeed_runner: Any) -> None:
    arguments, environment = local(2, tmp_path)
    parsed = deepspeed_runner.parse_args(arguments[3:])
    assert (parsed.num_gpus, parsed.include) == (2, "")
    assert not Path(parsed.hostfile).exists(), "not the machine's /job/hostfile"
    assert parsed.user_args == list(TRAIN)
    assert environment["A"] == "b c"
    assert environment["PATH"] == f"{os.path.dirname(sys.executable)}:/usr/bin"
    assert environment[MARKER_VARIABLE] == "f00d"


def test_the_gpus_that_are_shown_are_taken(tmp_path: Path, deepspeed_runner: Any) -> None:
    arguments, _ = local(2, tmp_path, CUDA_VISIBLE_DEVICES="5, 3,1")
    parsed = deepspeed_runner.parse_args(arguments[3:])
    assert (parsed.num_gpus, parsed.include) == (-1, "localhost:5,3")
    arguments, _ = local(2, tmp_path, CUDA_VISIBLE_DEVICES="5", DS_ACCELERATOR="cpu")
    assert "--num_gpus" in arguments


@pytest.mark.parametrize(
    ("visible", "says"), [("5", "--ranks 2 needs as many GPUs"), ("GPU-1f,GPU-2f", "by number")]
)
def test_gpus_that_cannot_be_taken_are_an_error(tmp_path: Path, visible: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        local(2, tmp_path, CUDA_VISIBLE_DEVICES=visible)


# ------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"command": ()}, "launch what"),
        ({"command": ("--verbose",)}, "launch what"),
        ({"command": ("launch", "train")}, "cannot launch itself"),
        ({"ranks": None}, "either --hostfile FILE or --ranks N"),
        ({"hostfile": Path("hosts")}, "either --hostfile FILE or --ranks N"),
        ({"ranks": 0}, "--ranks 0 must be 1 or more"),
        ({"restarts": -1}, "--restarts -1 must be 0 or more"),
        ({"min_nodes": 1}, "--min-nodes is for --hostfile"),
        ({"env": ("A",)}, "--env: 'A' sets no variable"),
    ],
)
def test_impossible_requests_are_sentences(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LaunchRequest(**{"command": TRAIN, "ranks": 2, **options}).check()


@pytest.mark.parametrize(("launcher", "program"), [("pdsh", "pdsh"), ("openmpi", "mpirun")])
def test_a_launcher_that_is_not_installed_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, launcher: str, program: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=f"needs {program}, .* try --launcher"):
        LaunchRequest(TRAIN, hostfile=Path("hosts"), launcher=launcher).check()


def test_a_folder_that_hosts_shells_would_read_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "my work"
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(ConfigError, match=r"working directory '.*/my work' has characters"):
        LaunchRequest(TRAIN, hostfile=Path("hosts")).check()
    LaunchRequest(TRAIN, ranks=1).check()


def test_arguments_for_the_launcher_have_to_be_words() -> None:
    with pytest.raises(ConfigError, match="close its quotes"):
        LaunchRequest(TRAIN, hostfile=Path("hosts"), launcher_args="'a").check()


def test_a_launcher_is_not_started_by_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="is itself rank 1"):
        LaunchRequest(TRAIN, ranks=1).check()


@pytest.mark.parametrize(
    ("command", "run_dir"),
    [
        ("train --recipe base --run-dir a --run-dir=b --resume", "b"),
        ("train --resume runs/a", "runs/a"),
        ("train --resume=runs/a --set data.path=b", "runs/a"),
        ("train --recipe small.yaml --resume", "runs/small"),
        ("train --recipe small.yaml", "runs/small"),
        ("train --recipe small.yaml --set name=other --set seed=1", "runs/other"),
        ("train --recipe small.yaml --dry-run", None),
        ("train --help", None),
        ("doctor --run-dir a", None),
        ("evaluate runs/a", None),
    ],
)
def test_which_run_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, run_dir: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    small_recipe(tmp_path, tmp_path)
    assert tracked_run(command.split()) == (None if run_dir is None else Path(run_dir))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train", "needs --recipe"),
        ("train --resume", "needs --recipe"),
        ("train --resume a --run-dir b", "are two runs; give one"),
        ("train --run-dir", "expected one argument; see `stacking-ds train --help`"),
        ("train --recipe not-there", "no recipe 'not-there'"),
    ],
)
def test_a_run_that_cannot_be_told_is_a_sentence(command: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tracked_run(command.split())


def test_resume_is_added_once() -> None:
    assert with_resume(TRAIN) == (*TRAIN, "--resume")
    assert with_resume(with_resume(TRAIN)) == (*TRAIN, "--resume")
    for words in (("train", "--resume", "runs/a"), ("train", "--resume=runs/a")):
        assert with_resume(words) == words


def test_the_launcher_needs_no_torch() -> None:
    """It waits for days beside the ranks."""
    code = (
        "import sys, stacking_ds.launch.supervise; print({'torch', 'deepspeed'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
