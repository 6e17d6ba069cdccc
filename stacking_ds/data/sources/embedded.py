"""Corpus that every installation carries: CPython's help topics and the docstrings of the standard
library and of this package's dependencies.

Nothing is imported or downloaded: source files are parsed, not run. A document is one help topic
or one module. The order follows the hash of the documents' names, so that it is the same wherever
packages are installed. A few packages are held out whole. They are read first, and a sentence whose
words have nearly all been read before is dropped, so that nothing held out is in the other split.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from pydoc_data import topics

from stacking_ds.data.shard_files import SplitName
from stacking_ds.data.sources.documents import (
    Document,
    Item,
    Reader,
    Reading,
    Source,
    SourcePiece,
    split_sentences,
)
from stacking_ds.errors import DataError

# ---- sentences that have been said before, in the same or nearly the same words

_SHINGLE_WORDS, _MIN_NEW_SHARE = 4, 0.6
_WORD = re.compile(r"[a-z]+")


class SeenSentences:
    """Remembers every run of four words it has accepted (Broder 1997 calls them shingles).

    Numbers, case and punctuation do not count. A template with one name exchanged shares most of
    its runs with the first of its kind, and so does a sentence put together from known ones.
    """

    def __init__(self) -> None:
        self._word_ids: dict[str, int] = {}
        self._shingles: set[tuple[int, ...]] = set()

    def accept(self, sentence: str) -> bool:
        """True, and remembered, if at least 60 % of the sentence's runs of words are new."""
        words = [
            self._word_ids.setdefault(word, len(self._word_ids))
            for word in _WORD.findall(sentence.lower())
        ]
        last = max(1, len(words) - _SHINGLE_WORDS + 1)
        shingles = {tuple(words[start : start + _SHINGLE_WORDS]) for start in range(last)}
        if len(shingles - self._shingles) < _MIN_NEW_SHARE * len(shingles):
            return False
        self._shingles |= shingles
        return True


# ---- English sentences in docstrings, help topics and package descriptions

_UNDERLINE = re.compile(r"[=\-~^*#+\"'`_.]{3,}\s*$")
# A block with such a line anywhere is not prose: indented, a doctest, a directive, a field, a
# table, a list.
_NOT_PROSE_LINE = re.compile(r"\s|>>>|\.\.\s|\.\.\.|:[\w\s]+:|[|+]|[-*+•]\s|```")
# Nor is a block that starts with such a line: code, markup, a numbered item, a heading ("Args:").
_NOT_PROSE_START = re.compile(r"[@#%$<\[{(\\/]|\d+[.)]\s|\w+\s*(\(.*\))?\s*:\s*$")
_SKIPPED_SECTION = re.compile(
    r"(other |keyword )?(param(eter)?s|arg(ument)?s|returns?|yields?|raises|attributes|references|"
    r"see also|methods|warns|receives|keys|fields|inputs?|outputs?|shape|bibliography|todo|"
    r"copyright|licen[sc]e|authors?|usage|syntax|signature|options|properties|routines?|"
    r"functions|classes|constants|exceptions|doctest|installation|version)\b.{0,12}$",
    re.IGNORECASE,
)
_MARKUP = (
    (re.compile(r"\[\d+\]_|\[#?\w*\]_"), ""),
    (re.compile(r":[\w:+\-]+:`[!~]?(?:[\w.]+\.)?([^`<]+?)(?:\s*<[^`]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`]*>`__?"), r"\1"),
    (re.compile(r"!?\[([^\]]+)\]\([^)]*\)"), r"\1"),
    (re.compile(r"``?([^`]+)``?_{0,2}"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,3}([^*\s][^*]*?)\*{1,3}(?!\w)"), r"\1"),
    (re.compile(r"(?<!\w)_([A-Za-z][A-Za-z ]*)_(?!\w)"), r"\1"),
    (re.compile(r'"([^"\s]+)"'), r"\1"),
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?=[.,;:](\s|$))"), ""),
)
_NOT_IN_PROSE = re.compile(
    r"""https?: | www\. | [\\{}|<>=^~@$%#*_`\[\]] | \w\(\) | \w\(\w* | \.\.\. | ::
    | \w\.\w+\.\w | \w/\w+/ | --? \w+= | \b(TODO|FIXME|XXX|NB|deprecated|versionadded)\b
    | \b(19|20)\d\d\b | \s-\w | (\d\s*[,;]\s*){3} | \bpp\.""",
    re.VERBOSE,
)
_PROSE_WORD = re.compile(
    r"[A-Za-z]+(?:['’\-][A-Za-z]+)*[.,;:!?)\"']*$|\(?[A-Za-z]+[.,;:!?)\"']*$|\d+[.,]?$"
)
_IDENTIFIER = re.compile(r"[a-z]+[A-Z]|[A-Z]{2,}[a-z]|\w\.\w|\d[A-Za-z]|[A-Za-z]\d|/")
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be been but by can for from has have if in into is it its may must no
        not of on or should so such than that the their them then there these they this to was we
        were when where which while will with would you your""",
    )
)
_MIN_WORDS, _MAX_WORDS = 5, 90


def paragraphs(documentation: str) -> Iterator[list[str]]:
    """The prose of one docstring or help text: for each paragraph its sentences, cleaned."""
    skipping = False
    for block in re.split(r"\n[ \t]*\n", inspect.cleandoc(documentation)):
        lines = block.rstrip().split("\n")
        if len(lines) > 1 and _UNDERLINE.match(lines[1]):
            skipping = bool(_SKIPPED_SECTION.match(lines[0].strip()))
            lines = lines[2:]
        is_code = any(map(_NOT_PROSE_LINE.match, lines))
        if not lines or skipping or is_code or _NOT_PROSE_START.match(lines[0]):
            continue
        text = " ".join(lines)
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        if sentences := [one for one in split_sentences(text) if _is_sentence(one)]:
            yield sentences


def _is_sentence(sentence: str) -> bool:
    """Whether this reads as English: capital, full stop, ordinary words, no code."""
    words = sentence.split()
    if not _MIN_WORDS <= len(words) <= _MAX_WORDS or sentence[-1] not in ".!?":
        return False
    if not (sentence[0].isupper() and sentence.isascii()) or _NOT_IN_PROSE.search(sentence):
        return False
    ordinary = sum(bool(_PROSE_WORD.match(word)) for word in words)
    odd = sum(bool(_IDENTIFIER.search(word.rstrip(".,;:)"))) for word in words)
    grammar = sum(word.lower().strip(".,;:()") in _FUNCTION_WORDS for word in words)
    return ordinary >= 0.85 * len(words) and odd <= 0.1 * len(words) and grammar >= 0.2 * len(words)


# ---- the packages, and their documentation

# About what comes out, for progress bars.
TEXT_BYTES = 3_800_000
# Raise it whenever other text comes out of the same packages.
_CLEANING_VERSION = 1

# Python and the dependencies that carry prose, by what is imported. A package that is not installed
# is left out, which `identity` shows.
PACKAGES = (
    "python",
    *("PIL", "absl", "anyio", "click", "datasets", "dateutil", "deepspeed", "dill", "filelock"),
    *("fsspec", "grpc", "huggingface_hub", "jinja2", "markdown", "mpmath", "networkx", "numpy"),
    *("packaging", "pandas", "psutil", "pyarrow", "pydantic", "sympy", "tensorboard", "torch"),
    *("transformers", "werkzeug"),
)
# the distributions that are called otherwise
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "dateutil": "python-dateutil",
    "grpc": "grpcio",
    "huggingface_hub": "huggingface-hub",
}
_HELDOUT = ("jinja2", "pydantic", "tensorboard")

# Tests, copies of other packages, and the model zoo of transformers, whose files are variations
# of one another.
_SKIPPED_FOLDERS = {"models", "pydoc_data", "site-packages", "dist-packages", "__pycache__"} | {
    *("_vendor", "_vendored", "third_party", "vendor"),
    *("idle_test", "test", "testing", "tests"),
}
_MIN_SENTENCES, _MIN_CHARACTERS = 4, 300


class Embedded(Source, Reader):
    """The corpus as a source of one piece; its first packages are held out."""

    name = "embedded"
    holds_out = True

    def identity(self) -> list[str]:
        """The version of the cleaning, of Python and of each package."""
        versions = [f"embedded corpus, cleaning {_CLEANING_VERSION}"]
        return versions + [name for name, _ in self.contents()]

    def contents(self) -> list[tuple[str, str | None]]:
        """Python and each package, with its version and the licence that it states, if it does."""
        found: list[tuple[str, str | None]] = [(f"python {platform.python_version()}", "PSF-2.0")]
        for package in filter(importlib.util.find_spec, PACKAGES[1:]):
            distribution = _DISTRIBUTIONS.get(package, package)
            try:
                stated = metadata.metadata(distribution)
            except metadata.PackageNotFoundError:
                found.append((f"{distribution} of unknown version", None))
                continue
            texts = [stated[key] for key in ("License-Expression", "License") if key in stated]
            # old packages put the whole text there
            licence = texts[0].strip().split("\n")[0][:80] if texts else None
            found.append((f"{distribution} {stated['Version']}", licence))
        return found

    def estimate(self) -> int:
        return TEXT_BYTES

    def pieces(self, piece_bytes: int, reading: Reading) -> list[SourcePiece]:
        size = TEXT_BYTES
        return [SourcePiece(file=0, start=0, stop=1, source_bytes=size, text_bytes=size)]

    def open(self, piece: SourcePiece, reading: Reading) -> Reader:
        return self

    def items(self) -> Iterator[Item]:
        for number, (split, text) in enumerate(documents(), start=1):
            yield Document(text, number, len(text), split)

    def place(self, number: int) -> tuple[str, str]:
        return f"embedded:{number}", f"the embedded corpus, document {number}"


@cache  # a few megabytes, and reading them takes much longer than tokenizing them
def documents(packages: tuple[str, ...] = PACKAGES) -> list[tuple[SplitName, str]]:
    """The split and the text of each document, held-out ones first; one paragraph a line.

    `packages` are import names out of PACKAGES; "python" stands for the help topics and the
    standard library. Raises DataError for a name that is not among them.
    """
    if unknown := sorted(set(packages) - set(PACKAGES)):
        raise DataError(f"the embedded corpus knows no package {unknown[0]!r}; it has {PACKAGES}")
    seen, found = SeenSentences(), []
    splits: tuple[SplitName, SplitName] = ("heldout", "train")
    for split in splits:
        chosen = [package for package in packages if (package in _HELDOUT) == (split == "heldout")]
        named = [item for package in chosen for item in _documentation(package)]
        for _, texts in sorted(named, key=lambda item: hashlib.sha256(item[0].encode()).digest()):
            prose = [list(filter(seen.accept, one)) for text in texts for one in paragraphs(text)]
            document = "\n".join(" ".join(sentences) for sentences in prose if sentences)
            if sum(map(len, prose)) >= _MIN_SENTENCES and len(document) >= _MIN_CHARACTERS:
                found.append((split, document))
    return found


def _documentation(package: str) -> Iterator[tuple[str, list[str]]]:
    """The names of a package's documents and the texts each is made of."""
    if package == "python":
        for topic, text in topics.topics.items():
            # Descriptions of methods are indented by one level; code in them by two.
            yield f"topic {topic}", [re.sub("^   ", "", text, flags=re.MULTILINE)]
        roots = [Path(sysconfig.get_path("stdlib"))]
    else:
        spec = importlib.util.find_spec(package)
        roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if not _SKIPPED_FOLDERS.intersection(parts) and (texts := _docstrings(path)):
                yield "/".join((package, *parts)), texts


def _docstrings(path: Path) -> list[str]:
    """The triple-quoted docstrings of a source file in order; none if this Python cannot parse it,
    as it is with templates and tests of parsers."""
    # the garbage collector would walk the growing tree over and over, a quarter of the time
    collecting = gc.isenabled()
    gc.disable()
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    finally:
        if collecting:
            gc.enable()
    return list(_docstrings_of(tree))


def _docstrings_of(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    if docstring := ast.get_docstring(node, clean=False):
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings_of(child)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            # numpy and torch document compiled functions by calls: add_docstr(name, "...").
            for part in chain.from_iterable(map(ast.walk, child.value.args)):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value
