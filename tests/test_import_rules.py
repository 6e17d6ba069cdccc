"""The house rules that a machine can read: who imports whom, and how large things may grow."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "stacking_ds"

# A module imports from lines above its own, or from its own folder; never from its neighbours.
ORDER = (
    ("text_table",),
    ("errors", "small_files"),
    (
        "stages",
        "phases",
        "fragments",
        "bundled",
        "host_memory",
        "utf8",
        "yaml_text",
        "metrics_file",
        "run_log",
        "launched",
        "waiting_threads",
        "node_scratch",
        "divergence",
        "tensorboard_events",
    ),
    ("config", "stop_request"),
    ("recipe", "ending", "ds_json"),
    ("distributed",),
    ("kernels",),
    ("data", "model", "optim", "growth"),
    ("zero",),
    ("engine", "boundary"),
    ("checkpoint",),
    ("attempts",),
    ("run_directory", "run_tokenizer"),
    ("which_run",),
    ("job",),
    ("monitor", "meter"),
    ("evaluate", "export", "report"),
    ("from_checkpoint", "checkpoint_commands", "doctor"),
    ("stage_manager", "resume"),
    ("trainer",),
    ("bench", "launch", "slurm_command", "train_command"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MAY_IMPORT_DEEPSPEED = {"zero", "engine", "bench"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}


def _sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            module = node.module or ""
            if module == "stacking_ds":
                yield from ((node.lineno, f"stacking_ds.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def _backward_arrows(path: Path, room: str) -> list[str]:
    arrows = []
    for line, module in _imports(path):
        parts = module.split(".")
        if parts[0] != "stacking_ds" or len(parts) < 2 or parts[1] == "__version__":
            continue
        target = parts[1]
        if target != room and LEVEL[target] >= LEVEL[room]:
            arrows.append(f"{path.name}:{line} {room} -> {target}")
    return arrows


def test_imports_point_one_way() -> None:
    arrows = [
        arrow
        for path in _sources()
        if path != PACKAGE / "__init__.py"
        for arrow in _backward_arrows(path, _room(path))
    ]
    assert arrows == []


def test_a_backward_arrow_is_noticed(tmp_path: Path) -> None:
    guilty = tmp_path / "bert.py"
    guilty.write_text("from stacking_ds.engine import build_engine\n")
    assert _backward_arrows(guilty, "model") == ["bert.py:1 model -> engine"]


def test_neighbours_do_not_import_each_other(tmp_path: Path) -> None:
    guilty = tmp_path / "loader.py"
    guilty.write_text("from stacking_ds import model\n")
    assert _backward_arrows(guilty, "data") == ["loader.py:1 data -> model"]


def test_deepspeed_is_known_to_its_rooms_alone() -> None:
    importers = {
        _room(path)
        for path in _sources()
        for _, module in _imports(path)
        if module.split(".")[0] == "deepspeed"
    }
    assert importers <= MAY_IMPORT_DEEPSPEED


def test_files_and_functions_stay_small() -> None:
    long_files = [path.name for path in _sources() if len(path.read_text().splitlines()) > 500]
    assert long_files == []
    long_functions = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in _sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 70
    ]
    assert long_functions == []


def test_no_drawers() -> None:
    names = {part.removesuffix(".py") for path in _sources() for part in path.parts}
    assert names & FORBIDDEN_NAMES == set()


def test_the_readme_tree_names_every_module() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    tree = re.findall(r"^[ ]*([\w./-]+)[ ]{2,}\S", readme, flags=re.MULTILINE)
    named = {name.rstrip("/").split("/")[-1] for name in tree}
    missing = [
        str(path.relative_to(REPOSITORY))
        for path in _sources()
        if path.name not in named and path.name != "__init__.py"
    ]
    assert missing == []


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_its_job(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
