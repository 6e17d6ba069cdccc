"""The embedded corpus is prose, is the same every time, and leaks nothing."""

import re

import pytest

from stacking_ds.data.sources import embedded
from stacking_ds.data.sources.documents import split_sentences
from stacking_ds.data.sources.embedded import SeenSentences, paragraphs
from stacking_ds.errors import DataError

FEW = ("packaging", "jinja2", "filelock", "pydantic", "mpmath")

DOCSTRING = """Solve a *small* system with :func:`~scipy.linalg.solve` and ``numpy``.

        The indented example is code, whatever it says.

    The solution is unique when the matrix is regular. See `the manual
    <https://example.org>`_ for what happens when it is not, and note that x[1] = 2.

    >>> solve(a, b)
    array([1, 2])

    Parameters
    ----------
    a : array
        The matrix of the system that is to be solved.

    Notes
    -----
    The method is **stable** for most matrices in practice.  It needs no pivots when the matrix
    is the sum of a diagonal and a small remainder.

    Returns:
        The vector that solves the system of equations.

    :param b: the right hand side of the equation.

    * A list item that reads like any sentence.

    ======  =====
    table   value
    ======  =====
    """


def words(sentence):
    return " ".join(re.findall("[a-z]+", sentence.lower()))


def check(documents):
    """What holds for any part of the corpus."""
    sentences = {"train": [], "heldout": []}
    for split, text in documents:
        found = split_sentences(text)
        assert len(found) >= 4
        assert len(text) >= 300
        sentences[split].extend(found)
    for split_sentences_ in sentences.values():
        normal = [words(sentence) for sentence in split_sentences_]
        assert len(set(normal)) > 0.995 * len(normal)
    assert not {words(s) for s in sentences["train"]} & {words(s) for s in sentences["heldout"]}
    text = "\n".join(text for _, text in documents)
    assert not re.search(r">>>|https?:|``|:param|\*\*|==|\{|\\", text)
    letters = sum(character.isalpha() or character == " " for character in text)
    assert letters > 0.95 * len(text)
    return sentences


def test_a_few_packages_give_prose_in_both_splits():
    documents = list(embedded.documents(FEW))
    sentences = check(documents)
    assert min(map(len, sentences.values())) > 100
    assert list(embedded.documents(FEW[::-1])) == documents


def test_held_out_packages_are_held_out_whole():
    assert {split for split, _ in embedded.documents(("jinja2", "pydantic"))} == {"heldout"}
    assert {split for split, _ in embedded.documents(("packaging", "mpmath"))} == {"train"}


@pytest.mark.slow
def test_the_help_topics_and_the_standard_library_are_train():
    documents = list(embedded.documents(("python",)))
    assert {split for split, _ in documents} == {"train"}
    assert sum(len(text) for _, text in documents) > 400_000


@pytest.mark.slow
def test_the_whole_corpus_has_two_megabytes_and_no_leak():
    documents = list(embedded.documents())
    check(documents)
    size = {"train": 0, "heldout": 0}
    for split, text in documents:
        size[split] += len(text)
    assert sum(size.values()) > 2_000_000
    assert 0.02 < size["heldout"] / sum(size.values()) < 0.06


def test_identity_names_versions():
    identity = embedded.Embedded().identity()
    assert any(line.startswith("python 3.") for line in identity)
    assert any(re.match(r"torch \d", line) for line in identity)


def test_unknown_packages_are_refused():
    with pytest.raises(DataError, match="knows no package 'cobol'"):
        list(embedded.documents(("cobol",)))


def test_only_prose_remains_of_a_docstring():
    assert list(paragraphs(DOCSTRING)) == [
        ["Solve a small system with solve and numpy."],
        ["The solution is unique when the matrix is regular."],
        [
            "The method is stable for most matrices in practice.",
            "It needs no pivots when the matrix is the sum of a diagonal and a small remainder.",
        ],
    ]


def test_near_duplicates_are_recognised():
    seen = SeenSentences()
    assert seen.accept("Return the number of rows in the table that have a value in column 3.")
    assert not seen.accept("Return the number of rows in the table that have a value in column 4!")
    assert not seen.accept(
        "return the number of columns in the table that have a value in column 3"
    )
    assert seen.accept("The table is written to disk before the process returns to its caller.")
    assert not seen.accept("Number of rows in the table.")
    assert seen.accept("Short.")
    assert not seen.accept("Short.")
