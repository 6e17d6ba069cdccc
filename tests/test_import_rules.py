"""The house rules that a machine can read: who imports whom, and how large things may grow."""

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import FILES, PACKAGE, README, files_page, rooms, with_tree

PLACE = {
    module: place
    for place, module in enumerate(module for room in rooms() for module in room.modules)
}
ROOM_PLACE = {
    room.name.removesuffix("/").removesuffix(".py"): max(PLACE[module] for module in room.modules)
    for room in rooms()
}
MAY_IMPORT_DEEPSPEED = {"engine", "bench"}
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
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _place(module: str, room: str) -> float:
    """Where in the list a dotted module of the package stands. Of a package it is the last of its
    modules, and for those of its own room below them all."""
    parts = module.split(".")[1:]
    path = "/".join(parts)
    for end in (f"{path}.py", f"{'/'.join(parts[:-1])}.py"):
        if end in PLACE:
            return PLACE[end]
    return math.inf if parts[0] == room else ROOM_PLACE[parts[0]]


def _backward_arrows(path: Path, module: str) -> list[str]:
    """The imports of the file that stands where `module` does, of what stands above it."""
    return [
        f"{path.name}:{line} {module} -> {target}"
        for line, target in _imports(path)
        if target.startswith("stacking_ds.") and target != "stacking_ds.__version__"
        if _place(target, module.partition("/")[0]) <= PLACE[module]
    ]


def test_the_list_names_every_module() -> None:
    there = {str(path.relative_to(PACKAGE)) for path in _sources() if path.name != "__init__.py"}
    assert set(PLACE) == there
    assert len(PLACE) == sum(len(room.modules) for room in rooms()), "one is named twice"


def test_imports_point_down_the_list() -> None:
    arrows = [arrow for module in PLACE for arrow in _backward_arrows(PACKAGE / module, module)]
    assert arrows == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("model/bert.py", "from stacking_ds import cli"),
        ("model/bert.py", "from stacking_ds.cli import main"),
        ("model/bert.py", "import stacking_ds.cli"),
        ("model/layer.py", "from stacking_ds.model import bert"),
        ("model/layer.py", "from stacking_ds.model.bert import BertForPreTraining"),
        ("model/layer.py", "from stacking_ds.model.layer import layer"),
    ],
)
def test_a_backward_arrow_is_noticed(tmp_path: Path, module: str, line: str) -> None:
    guilty = tmp_path / "guilty.py"
    guilty.write_text(line + "\n")
    assert len(_backward_arrows(guilty, module)) == 1
    assert _backward_arrows(guilty, "__main__.py") == []


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


def test_what_is_made_of_the_list_is_up_to_date() -> None:
    readme = README.read_text(encoding="utf-8")
    assert with_tree(readme) == readme, "run `python -m tests.house`"
    assert FILES.read_text(encoding="utf-8") == files_page(), "run `python -m tests.house`"


def test_every_module_says_its_job() -> None:
    silent = [
        module
        for module in PLACE
        if not ast.get_docstring(ast.parse((PACKAGE / module).read_text(encoding="utf-8")))
    ]
    assert silent == []


# what nobody searches for: a question, or the answer to one that the reader has to guess
RIDDLE = re.compile(r"(?:Who|Whose|What|Where|Which|When|Why|How|Whether|Is|Are|Does|Has)\b|.*\?$")


def _first_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Of the docstrings of a module and its public classes and functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            name = path.name if isinstance(node, ast.Module) else node.name
            docstring = ast.get_docstring(node) or ""
            if not name.startswith("_") and docstring:
                yield f"{path.name} {name}", docstring.splitlines()[0]


def test_docstrings_begin_with_a_verb_or_a_noun_and_are_no_riddles() -> None:
    riddles = [
        f"{place}: {line}"
        for path in _sources()
        if _room(path) != "bench"
        for place, line in _first_lines(path)
        if RIDDLE.match(line)
    ]
    assert riddles == []


@pytest.mark.parametrize("line", ["Who is still there.", "Is it whole?", "Learned, or diverged?"])
def test_a_riddle_is_noticed(tmp_path: Path, line: str) -> None:
    guilty = tmp_path / "guilty.py"
    guilty.write_text(f'"""{line}"""\n')
    assert [RIDDLE.match(first) is not None for _, first in _first_lines(guilty)] == [True]
