"""The commands that collect, run and report the GPU checks, as far as no GPU is needed."""

# ruff: noqa: E402 -- the folder of the commands has to be put on the path first

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / ".ci"))

import gpu_check
import gpu_ground
import gpu_wheels
from gpu_ground import Ground, PartError, together
from gpu_parts import PARTS, Part, gpu_test_files

MACHINE = {"card": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0"}


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path / "work", deadline=time.monotonic() + 60)


def _raise(error: Exception) -> dict[str, Any]:
    raise error


# ------------------------------------------------------------------ the driver


def _main(monkeypatch: pytest.MonkeyPatch, out: Path, parts: Sequence[Part]) -> int:
    monkeypatch.setattr(gpu_check, "obstacle", lambda: None)
    monkeypatch.setattr(gpu_check, "describe_machine", lambda: MACHINE)
    monkeypatch.setattr(gpu_check, "commit", lambda: "abc123")
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setenv("OUT", str(out))
    return gpu_check.main()


def test_a_failing_part_stops_nothing_and_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"stage": 0, "tokens_per_second": 12345.6}, {"stage": 1, "tokens_per_second": 0.5}]
    parts = [
        Part("first", lambda ground: _raise(PartError("exit code 7", "Traceback: boom")), 0),
        Part("second", lambda ground: _raise(KeyError("loss")), 0),
        Part("third", lambda ground: {"stages": rows, "unigram_mlm_loss": 6.25}, 0),
        Part("fourth", lambda ground: {}, needs_seconds=10_000),
    ]
    assert _main(monkeypatch, tmp_path / "out", parts) == 1
    found = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert [part["status"] for part in found["results"]] == [
        "failed",
        "failed",
        "passed",
        "not run",
    ]
    assert not found["passed"]
    assert found["machine"] == MACHINE
    assert (found["commit"], found["command"]) == ("abc123", "make gpu-check")
    assert found["results"][0]["output"] == "Traceback: boom"
    assert found["results"][1]["reason"] == "KeyError: 'loss'"
    assert found["results"][2]["figures"]["stages"] == rows
    assert "it needs 10000 s" in found["results"][3]["reason"]
    text = (tmp_path / "out" / "gpu-check.md").read_text()
    first = text.splitlines()[0]
    for said in ("NVIDIA H200", found["date"], "abc123", "make gpu-check"):
        assert said in first
    assert "NOT passed" in text
    assert "| stage | tokens per second |" in text
    assert "|     1 |               0.5 |" in text
    assert "unigram mlm loss: 6.25" in text
    assert "Traceback: boom" in text
    assert "boom" in capsys.readouterr().out


def test_all_passed_is_exit_code_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _main(monkeypatch, tmp_path, [Part("only", lambda ground: {}, 0)]) == 0
    assert json.loads((tmp_path / "gpu-check.json").read_text())["passed"]


def test_what_is_known_is_written_after_each_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def look(ground: Ground) -> dict[str, Any]:
        found = json.loads((tmp_path / "gpu-check.json").read_text())
        seen.extend(part["status"] for part in found["results"])
        return {}

    _main(monkeypatch, tmp_path, [Part("first", lambda ground: {}, 0), Part("second", look, 0)])
    assert seen == ["passed", "not run"]


def test_without_a_gpu_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    command = [sys.executable, str(ROOT / ".ci" / "gpu_check.py")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "sees no NVIDIA GPU on this machine" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_without_the_bundle_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "BUNDLE", tmp_path)
    assert "make gpu-bundle" in (gpu_check.obstacle() or "")


def test_the_commit_travels_with_the_bundle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_ground, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_ground, "COMMIT_NOTE", tmp_path / "COMMIT")
    monkeypatch.setenv("COMMIT", "from-the-environment")
    assert gpu_ground.commit() == "from-the-environment"
    (tmp_path / "COMMIT").write_text("from-the-bundle\n")
    assert gpu_ground.commit() == "from-the-bundle"


# ------------------------------------------------------------------ running commands


def test_a_command_that_fails_shows_its_end(ground: Ground) -> None:
    code = "import sys; print('x' * 9000, 'bar 1%\\rbar 2%\\rthe end'); sys.exit(7)"
    with pytest.raises(PartError, match="exit code 7") as failure:
        ground.python("-c", code, limit_seconds=30)
    assert failure.value.output.endswith("the end")
    assert "bar 1%" not in failure.value.output
    assert len(failure.value.output) <= 6000


def test_a_command_that_hangs_is_stopped_with_its_children(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "pid"
    code = (
        "import os, subprocess, time; child = subprocess.Popen(['sleep', '600']); "
        f"print('waiting', flush=True); open({str(note)!r} + '.tmp', 'w').write(str(child.pid)); "
        f"os.replace({str(note)!r} + '.tmp', {str(note)!r}); time.sleep(600)"
    )
    wait = subprocess.Popen.wait

    def time_is_up_when_it_hangs(process: Any, timeout: float | None = None) -> int:
        if timeout is None:
            return wait(process)
        _until(note.exists)
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", time_is_up_when_it_hangs)
    with pytest.raises(PartError, match="stopped after 30 s") as failure:
        ground.python("-c", code, limit_seconds=30)
    assert failure.value.output == "waiting"
    _until(lambda: _is_dead(int(note.read_text())))


def _until(condition: Callable[[], bool]) -> None:
    """Wait, however slow the machine is; the test's own timeout ends it."""
    while not condition():
        time.sleep(0.01)


def _is_dead(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # killed, not yet reaped by whoever adopted it


def test_an_op_that_was_built_fails_its_part_only(ground: Ground) -> None:
    code = (
        "import os, pathlib; op = pathlib.Path(os.environ['TORCH_EXTENSIONS_DIR'], 'py', 'utils'); "
        "op.mkdir(parents=True); (op / 'build.ninja').touch()"
    )
    with pytest.raises(PartError, match="compiled utils"):
        ground.python("-c", code, limit_seconds=30)
    ground.python("-c", "pass", limit_seconds=30)
    ground.python("-c", code, limit_seconds=30, may_build=True)
    ground.python("-c", "pass", limit_seconds=30)


def test_what_runs_at_the_same_time_fails_with_all_reasons() -> None:
    assert together({"a": lambda: 1, "b": lambda: 2}) == {"a": 1, "b": 2}
    works: dict[str, Callable[[], Any]] = {
        "a": lambda: _raise(PartError("exit code 1", "out of a")),
        "b": lambda: 2,
        "c": lambda: _raise(KeyError("loss")),
    }
    with pytest.raises(PartError, match=r"a: exit code 1; c: 'loss'") as failure:
        together(works)
    assert failure.value.output == "out of a"


def test_what_was_begun_ends_in_a_later_part(ground: Ground) -> None:
    ground.begin("good", lambda: ground.python("-c", "print('done')", limit_seconds=30))
    ground.begin("bad", lambda: _raise(PartError("exit code 1", "said")))
    assert ground.outcome("good") == "done\n"
    with pytest.raises(PartError, match="exit code 1"):
        ground.outcome("bad")
    with pytest.raises(PartError, match="never begun"):
        ground.outcome("other")
    ground.close()


def test_commands_see_the_bundle_first_and_no_launcher(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", "mine")
    code = "import os; print(os.environ['PYTHONPATH'], os.environ.get('RANK'), os.getcwd())"
    path, rank, folder = ground.python("-c", code, limit_seconds=30).split()
    assert path == os.pathsep.join([str(ground.site), str(ROOT), "mine"])
    assert (rank, folder) == ("None", str(ROOT))


# ------------------------------------------------------------------ the parts


def test_proofs_come_before_measurements() -> None:
    is_bench = [part.name.startswith("bench") for part in PARTS]
    assert is_bench == sorted(is_bench)


def test_the_files_of_gpu_tests_import_what_the_machine_has() -> None:
    files = gpu_test_files(ROOT / "tests")
    assert {"test_gpu.py", "bench/test_kernels.py", "optim/test_lamb_triton.py"} <= {
        str(path.relative_to(ROOT / "tests")) for path in files
    }
    bundled = {name.replace("-", "_") for name in (*gpu_wheels.BUILT, *gpu_wheels.DOWNLOADED)}
    there = {"hypothesis", "numpy", "psutil", "pyarrow", "pytest", "safetensors", "tokenizers"}
    there |= {"torch", "transformers", "triton", "yaml", "stacking_ds", *bundled}
    for path in _with_what_they_import(files):
        missing = set(_imported(path)) - there - sys.stdlib_module_names - {"tests"}
        assert not missing, f"{path.name} imports {sorted(missing)}"


def _with_what_they_import(files: Sequence[Path]) -> set[Path]:
    """The files, and the test modules that they import, and so on."""
    found, fresh = set(files), list(files)
    while fresh:
        names = [name for path in fresh for name in _modules(path) if name.startswith("tests.")]
        paths = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
        fresh = [path for path in paths - found if path.is_file()]
        found.update(fresh)
    return found


def _imported(path: Path) -> list[str]:
    """The packages that a file imports when it is imported itself."""
    return [name.partition(".")[0] for name in _modules(path)]


def _modules(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_parts_have_names_of_their_own_and_fit_the_budget() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert sum(part.needs_seconds for part in PARTS) < gpu_check.BUDGET_SECONDS < 480


# ------------------------------------------------------------------ the bundle


def test_a_bundle_too_large_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "deepspeed-1-py3-none-any.whl"
    wheel.write_bytes(b"0" * 2_000_000)
    gpu_wheels.check_size([wheel], limit_bytes=2_000_000)
    with pytest.raises(SystemExit, match=r"2\.0 MB.*leave out"):
        gpu_wheels.check_size([wheel], limit_bytes=1_999_999)


def test_every_bundled_package_is_pinned() -> None:
    pins = gpu_wheels.read_pins((ROOT / "constraints.txt").read_text())
    assert {*gpu_wheels.BUILT, *gpu_wheels.DOWNLOADED} <= pins.keys()
    assert gpu_wheels.read_pins("# a==1\nTyping_Extensions==4.1\nb>=2\n") == {
        "typing-extensions": "4.1"
    }


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pip was asked for, in place of pip: an empty wheel of each."""
    asked: list[str] = []

    def fake(command: str, *arguments: object, **environment: str) -> None:
        name, version = str(arguments[-1]).split("==")
        folder = Path(str(arguments[arguments.index("--no-deps") + 2]))
        (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").touch()
        asked.append(f"{command} {name}")

    monkeypatch.setattr(gpu_wheels, "_pip", fake)
    return asked


def test_wheels_that_are_there_are_kept_and_stale_ones_go(tmp_path: Path, pip: list[str]) -> None:
    wanted = {"deepspeed": "0.1", "pydantic-core": "2.0"}
    collect: Callable[[Path, dict[str, str]], list[Path]] = gpu_wheels.collect
    assert len(collect(tmp_path, wanted)) == 2
    assert pip == ["wheel deepspeed", "download pydantic-core"]
    collect(tmp_path, wanted)
    assert len(pip) == 2
    names = [wheel.name for wheel in collect(tmp_path, {**wanted, "pydantic-core": "2.1"})]
    assert names == ["deepspeed-0.1-py3-none-any.whl", "pydantic_core-2.1-py3-none-any.whl"]
    assert pip[2:] == ["download pydantic-core"]


def _installed(name: str, version: str, *requires: str) -> Any:
    return SimpleNamespace(name=name, version=version, requires=list(requires))


@pytest.mark.parametrize(
    ("requirement", "what"),
    [
        ("pydantic-core==2.1", "but 2.0 is bundled"),
        ("datasets>=4", "which nothing provides"),
        ("torch>=2", None),
        ("datasets; extra == 'all'", None),
        ("datasets; python_version < '3.12'", None),
    ],
)
def test_what_the_wheels_need_is_there(requirement: str, what: str | None) -> None:
    wheels = [_installed("pydantic", "2.9", requirement), _installed("pydantic_core", "2.0")]
    if what is None:
        gpu_wheels.check_requirements(wheels)
    else:
        with pytest.raises(SystemExit, match=what):
            gpu_wheels.check_requirements(wheels)
