"""The rooms of the package in import order: one list, and what is made of it.

`docs/house.yaml` names every module from the top down; a module imports only what stands below it.
`python -m tests.house` writes README's tree of rooms and `docs/files.md` anew from that list and
the first lines of the modules' docstrings.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "stacking_ds"
LIST = REPOSITORY / "docs" / "house.yaml"
README = REPOSITORY / "README.md"
FILES = REPOSITORY / "docs" / "files.md"
_BEGIN, _END = "<!-- the tree: written by `python -m tests.house` -->\n```\n", "```\n<!-- end -->"
_WIDTH = 16


@dataclass(frozen=True)
class Room:
    """A folder of the package, or a module at its top: its job, and its modules from the top down
    as paths below the package."""

    name: str
    job: str
    modules: tuple[str, ...]


def rooms() -> list[Room]:
    """The rooms of `docs/house.yaml`, from the top down."""
    found = []
    for entry in yaml.safe_load(LIST.read_text(encoding="utf-8")):
        name = entry["room"]
        modules = [f"{name}{file}.py" for file in entry["files"]] if "files" in entry else [name]
        found.append(Room(name, entry["job"], tuple(modules)))
    return found


def readme_tree() -> str:
    """One line a room."""
    lines = [f"  {room.name:{_WIDTH}}{room.job}\n" for room in rooms()]
    return "".join(["stacking_ds/\n", *lines])


def files_page() -> str:
    """`docs/files.md`: every module with its docstring's first line."""
    lines = [
        "# Every file of the package\n",
        "From the top down: a module imports only what stands below it. Written by",
        "`python -m tests.house` from `docs/house.yaml` and the modules' docstrings.",
    ]
    for room in rooms():
        lines += [f"\n**{room.name}** {room.job}\n"]
        lines += [f"* `{module}`: {_first_line(PACKAGE / module)}" for module in room.modules]
    return "\n".join(lines) + "\n"


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def with_tree(readme: str) -> str:
    """README with its tree made anew."""
    before, _, rest = readme.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{readme_tree()}{_END}{after}"


if __name__ == "__main__":
    README.write_text(with_tree(README.read_text(encoding="utf-8")), encoding="utf-8")
    FILES.write_text(files_page(), encoding="utf-8")
