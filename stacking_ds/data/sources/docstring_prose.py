"""Finds the English sentences in documentation: docstrings, help topics, package descriptions.

What is not prose goes: code, doctests, lists of parameters, tables, headings, formulas, URLs, and
the marks of reStructuredText and Markdown around words. What remains reads like a manual.
"""

import inspect
import re
from collections.abc import Iterator

from stacking_ds.data.sentences import split_sentences

__all__ = ["paragraphs"]

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
_WORD = re.compile(
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
_MIN_WORDS = 5
_MAX_WORDS = 90


def paragraphs(documentation: str) -> Iterator[list[str]]:
    """The prose of one docstring or help text: for each paragraph its sentences, cleaned."""
    skipping = False
    for block in re.split(r"\n[ \t]*\n", inspect.cleandoc(documentation)):
        lines = block.rstrip().split("\n")
        if len(lines) > 1 and _UNDERLINE.match(lines[1]):
            skipping = bool(_SKIPPED_SECTION.match(lines[0].strip()))
            lines = lines[2:]
        if not lines or skipping or _is_not_prose(lines):
            continue
        sentences = list(_sentences(" ".join(lines)))
        if sentences:
            yield sentences


def _is_not_prose(lines: list[str]) -> bool:
    return bool(_NOT_PROSE_START.match(lines[0])) or any(map(_NOT_PROSE_LINE.match, lines))


def _sentences(text: str) -> Iterator[str]:
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    for sentence in split_sentences(text):
        if _is_sentence(sentence):
            yield sentence


def _is_sentence(sentence: str) -> bool:
    """Whether this reads as English: capital, full stop, ordinary words, no code."""
    words = sentence.split()
    if not _MIN_WORDS <= len(words) <= _MAX_WORDS or sentence[-1] not in ".!?":
        return False
    if not (sentence[0].isupper() and sentence.isascii()) or _NOT_IN_PROSE.search(sentence):
        return False
    ordinary = sum(bool(_WORD.match(word)) for word in words)
    odd = sum(bool(_IDENTIFIER.search(word.rstrip(".,;:)"))) for word in words)
    grammar = sum(word.lower().strip(".,;:()") in _FUNCTION_WORDS for word in words)
    return ordinary >= 0.85 * len(words) and odd <= 0.1 * len(words) and grammar >= 0.2 * len(words)
