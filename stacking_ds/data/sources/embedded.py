"""The corpus every installation carries: CPython's help topics and the docstrings of the standard
library and of this package's dependencies.

Nothing is imported or downloaded: source files are parsed, not run. A document is one help topic
or one module. The order follows the hash of the documents' names, so it depends neither on the
file system nor on where packages are installed. A few packages are held out whole. They are read
first, and a sentence whose words have nearly all been read before is dropped, so nothing that is
held out remains in the training split.
"""

import ast
import gc
import hashlib
import importlib.util
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from pydoc_data import topics

from stacking_ds.data.shard_manifest import SplitName
from stacking_ds.data.sources.docstring_prose import paragraphs
from stacking_ds.data.sources.near_duplicates import SeenSentences
from stacking_ds.errors import DataError

__all__ = ["PACKAGES", "TEXT_BYTES", "documents", "identity", "licences"]

# About what comes out, for progress bars.
TEXT_BYTES = 3_800_000
# Raise it whenever other text comes out of the same packages.
_CLEANING_VERSION = 1

# The dependencies that carry prose: import name -> distribution. A package that is not installed
# is left out, which `identity` shows.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "anyio": "anyio",
    "click": "click",
    "datasets": "datasets",
    "dateutil": "python-dateutil",
    "deepspeed": "deepspeed",
    "dill": "dill",
    "filelock": "filelock",
    "fsspec": "fsspec",
    "grpc": "grpcio",
    "huggingface_hub": "huggingface-hub",
    "jinja2": "jinja2",
    "markdown": "markdown",
    "mpmath": "mpmath",
    "networkx": "networkx",
    "numpy": "numpy",
    "packaging": "packaging",
    "pandas": "pandas",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "sympy": "sympy",
    "tensorboard": "tensorboard",
    "torch": "torch",
    "transformers": "transformers",
    "werkzeug": "werkzeug",
}
PACKAGES = ("python", *_DISTRIBUTIONS)
_HELDOUT = ("jinja2", "pydantic", "tensorboard")

# Tests, copies of other packages, and the model zoo of transformers, whose files are variations
# of one another.
_SKIPPED_FOLDERS = {"models", "pydoc_data", "site-packages", "dist-packages", "__pycache__"} | {
    *("_vendor", "_vendored", "third_party", "vendor"),
    *("idle_test", "test", "testing", "tests"),
}
_MIN_SENTENCES = 4
_MIN_CHARACTERS = 300


def identity() -> list[str]:
    """What the corpus is made of: the version of the cleaning, of Python and of each package."""
    versions = [f"embedded corpus, cleaning {_CLEANING_VERSION}"]
    return versions + [name for name, _ in licences()]


def licences() -> list[tuple[str, str | None]]:
    """Python and each package with its version, and the licence it states; None where it does
    not."""
    found: list[tuple[str, str | None]] = [(f"python {platform.python_version()}", "PSF-2.0")]
    for package, distribution in _DISTRIBUTIONS.items():
        if importlib.util.find_spec(package) is not None:
            try:
                stated = metadata.metadata(distribution)
            except metadata.PackageNotFoundError:
                found.append((f"{distribution} of unknown version", None))
                continue
            # old packages put the whole text there
            lines = [
                stated[field].strip().split("\n")[0][:80]
                for field in ("License-Expression", "License")
                if field in stated
            ]
            found.append((f"{distribution} {stated['Version']}", lines[0] if lines else None))
    return found


def documents(packages: Sequence[str] = PACKAGES) -> Iterator[tuple[SplitName, str]]:
    """The split and the text of each document, held-out ones first; one paragraph a line.

    `packages` are import names out of PACKAGES; "python" stands for the help topics and the
    standard library. Raises DataError for a name that is not among them.
    """
    unknown = sorted(set(packages) - set(PACKAGES))
    if unknown:
        raise DataError(f"the embedded corpus knows no package {unknown[0]!r}; it has {PACKAGES}")
    seen = SeenSentences()
    splits: tuple[SplitName, SplitName] = ("heldout", "train")
    for split in splits:
        chosen = [package for package in packages if (package in _HELDOUT) == (split == "heldout")]
        named = [item for package in chosen for item in _documentation(package)]
        for _, texts in sorted(named, key=lambda item: hashlib.sha256(item[0].encode()).digest()):
            document = _new_prose(texts, seen)
            if document is not None:
                yield split, document


def _new_prose(texts: Sequence[str], seen: SeenSentences) -> str | None:
    """The prose of `texts` that was not seen before, one paragraph a line; None if too little."""
    lines: list[str] = []
    num_sentences = 0
    for text in texts:
        for paragraph in paragraphs(text):
            sentences = [sentence for sentence in paragraph if seen.accept(sentence)]
            if sentences:
                lines.append(" ".join(sentences))
                num_sentences += len(sentences)
    document = "\n".join(lines)
    long_enough = num_sentences >= _MIN_SENTENCES and len(document) >= _MIN_CHARACTERS
    return document if long_enough else None


def _documentation(package: str) -> Iterator[tuple[str, list[str]]]:
    """The names of a package's documents and the texts each is made of."""
    if package == "python":
        for topic, text in topics.topics.items():
            # Descriptions of methods are indented by one level; code in them by two.
            lines = (line.removeprefix("   ") for line in text.split("\n"))
            yield f"topic {topic}", ["\n".join(lines)]
        roots = [Path(sysconfig.get_path("stdlib"))]
    else:
        spec = importlib.util.find_spec(package)
        roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if not _SKIPPED_FOLDERS.intersection(parts):
                texts = _docstrings(path)
                if texts:
                    yield "/".join((package, *parts)), texts


def _docstrings(path: Path) -> list[str]:
    """The triple-quoted docstrings of a source file in order; none if this Python cannot parse it.

    Packages ship files that are no Python of this version (templates, tests of parsers), which
    are not errors here.
    """
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []
        tree = _parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    return list(_docstrings_of(tree))


def _parse(source: str) -> ast.Module:
    """The syntax tree, without the warnings that other people's code deserves, and without the
    garbage collector, which would walk the growing tree over and over (a quarter of the time)."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    finally:
        if collecting:
            gc.enable()


def _docstrings_of(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings_of(child)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            # numpy and torch document compiled functions by calls: add_docstr(name, "...").
            yield from _string_arguments(child.value)


def _string_arguments(call: ast.Call) -> Iterator[str]:
    for argument in call.args:
        for node in ast.walk(argument):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
