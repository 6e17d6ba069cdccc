"""What the documentation says is there, and is filled in."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "ds_configs").glob("*.md"),
    )
    if path.is_file()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_no_figure_is_left_open(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
    assert not re.search(r"@[A-Z0-9]+@|\bTODO\b|\bTBD\b|\bXXX\b", text)


# what names files of the repository; CHANGELOG speaks of earlier ones too
SOURCES_NAMED_IN = [page for page in PAGES if page.name != "CHANGELOG.md"]
_FILE = re.compile(r"(?<![\w<>/.-])(\w[\w./*-]*\.py)\b(?:::(\w+))?")
_FOLDER = re.compile(r"`((?:[\w-]+/)+)`")
_MODULE = re.compile(r"python -m ((?:tests|experiments)\.\w+)")
_FOLDERS_OF_USERS = {"books/"}


def _holds_files(folder: Path) -> bool:
    """More than what Python leaves where modules were."""
    return any(path.is_file() and "__pycache__" not in path.parts for path in folder.rglob("*"))


def _missing(text: str, beside: Path) -> list[str]:
    """The files, folders and names in them that a page names and that are not there."""
    roots = [ROOT, ROOT / "stacking_ds", ROOT / "stacking_ds" / "engine", beside]
    missing = [
        path
        for path in _FOLDER.findall(text)
        if path not in _FOLDERS_OF_USERS and not any(_holds_files(root / path) for root in roots)
    ]
    names = [(path.replace(".", "/") + ".py", "") for path in _MODULE.findall(text)]
    for path, name in [*_FILE.findall(text), *names]:
        # a bare name stands for the one module that is called so
        found = [file for root in roots for file in root.glob(path)]
        found = found or ([] if "/" in path else list((ROOT / "stacking_ds").rglob(path)))
        defines = re.compile(rf"^\s*(?:def|class) {name}\b|^{name}\b" if name else "", re.MULTILINE)
        if not any(defines.search(file.read_text(encoding="utf-8")) for file in found):
            missing.append(f"{path}::{name}" if name else path)
    return missing


@pytest.mark.parametrize("page", SOURCES_NAMED_IN, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_pages_name_of_the_sources_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert _missing(text, page.parent) == []
    assert "facts/" not in text


@pytest.mark.parametrize(
    "text",
    ["`train/gone.py`", "`train/loop.py::gone`", "gone.py", "`attempts/`", "python -m tests.gone"],
)
def test_a_path_that_is_not_there_is_noticed(text: str) -> None:
    assert len(_missing(text, ROOT)) == 1


def test_readme_fits_on_a_few_screens() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
