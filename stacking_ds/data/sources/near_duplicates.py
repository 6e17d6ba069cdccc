"""Recognises sentences that have been said before, in the same or nearly the same words."""

import re

__all__ = ["SeenSentences"]

_SHINGLE_WORDS = 4
_MIN_NEW_SHARE = 0.6
_WORD = re.compile(r"[a-z]+")


class SeenSentences:
    """Remembers every run of four words it has accepted (Broder 1997 calls them shingles).

    Numbers, case and punctuation do not count. A template with one name exchanged shares most of
    its runs with the first of its kind, and so does a sentence put together from known ones. The
    sets are exact, which a few megabytes of text can afford.
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
