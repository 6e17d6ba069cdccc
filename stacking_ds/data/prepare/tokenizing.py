"""WordPiece for millions of sentences: each word is looked up once, and all else is arrays.

`tokenizers` spends most of its time on what its `Encoding` holds beside the ids. Here the bytes of
all sentences are cut at once into pieces, a piece being a run of letters, digits and non-ASCII
bytes, or one mark of ASCII punctuation, either with the space before it; Arrow numbers the
different pieces; only pieces that are new are given to the library. Cutting there changes nothing:
BERT splits at every space and every ASCII mark, and its normaliser (clean, and unless it is told
otherwise strip accents and lower) looks at one character at a time, so it does the same to a piece
as to the sentence around it.

Shapes: B bytes of all sentences, P pieces, U different pieces, S sentences, T tokens.
"""

import string
from array import array
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stacking_ds.data.arrow_numbers import numbers
from stacking_ds.data.shard_writer import token_dtype
from stacking_ds.data.tokenizer import UNCASED, Normalization, build_tokenizer

__all__ = ["SentenceTokenizer"]

_MAX_PIECES = 2**18
_MAX_PIECE_BYTES = 2**25

_WORD, _MARK, _SPACE = 0, 1, 2
_CLASS = np.full(256, _WORD, dtype=np.uint8)
_CLASS[list(string.punctuation.encode())] = _MARK
_CLASS[ord(" ")] = _SPACE
_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[list(string.ascii_uppercase.encode())] += 32


class SentenceTokenizer:
    """Gives the ids that `build_tokenizer` gives each sentence without special tokens, where text
    that spells "[MASK]" is text. Its memory is bounded."""

    def __init__(self, vocabulary: Sequence[str], normalization: Normalization = UNCASED) -> None:
        tokenizer = build_tokenizer(vocabulary, normalization)
        self._lowercase = normalization.lowercase
        self._normalize = tokenizer.normalizer.normalize_str
        self._pre_tokenize = tokenizer.pre_tokenizer.pre_tokenize_str
        self._tokenize = tokenizer.model.tokenize
        self._dtype = token_dtype(len(vocabulary))
        self._forget()

    def __call__(
        self, sentences: Sequence[str]
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int32]]:
        """The ids of all sentences one after another, and how many each has. Shapes [T], [S]."""
        texts = pa.array(sentences, pa.large_string())
        starts = np.frombuffer(texts.buffers()[1], np.int64, len(sentences) + 1)
        content = texts.buffers()[2]
        if content is None or not starts[-1]:
            return np.empty(0, self._dtype), np.zeros(len(sentences), np.int32)
        bytes_B = np.frombuffer(content, np.uint8, starts[-1])
        if self._lowercase:
            bytes_B = _LOWER[bytes_B]
        bounds = _piece_bounds(bytes_B, starts)
        pieces = pa.LargeStringArray.from_buffers(
            len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(bytes_B)
        ).dictionary_encode()
        slots_U = self._slots(pieces.dictionary.to_pylist())
        slots_P = slots_U[numbers(pieces.indices)]
        table = pa.ListArray.from_arrays(
            pa.array(np.array(self._ends, dtype=np.int32)),
            pa.array(np.array(self._ids, dtype=self._dtype)),
        )
        found = table.take(pa.array(slots_P))
        first_piece_of_sentence = np.searchsorted(bounds, starts)
        token_starts = numbers(found.offsets)[first_piece_of_sentence]
        return numbers(found.values), np.diff(token_starts)

    def _slots(self, pieces: Sequence[str]) -> NDArray[np.int64]:
        """Where the ids of each piece stand; pieces that are new get their place. Shape [U]."""
        if len(self._slot) > _MAX_PIECES or self._piece_bytes > _MAX_PIECE_BYTES:
            self._forget()
        slot = self._slot
        for piece in pieces:
            if piece not in slot:
                slot[piece] = len(slot)
                self._piece_bytes += len(piece)
                self._ids.extend(self._ids_of(piece))
                self._ends.append(len(self._ids))
        return np.fromiter(map(slot.__getitem__, pieces), np.int64, len(pieces))

    def _ids_of(self, piece: str) -> list[int]:
        word = piece.removeprefix(" ")
        if word.isascii() and word.isprintable():
            words = [word] if word else []
        else:
            words = [part for part, _ in self._pre_tokenize(self._normalize(word))]
        return [token.id for word in words for token in self._tokenize(word)]

    def _forget(self) -> None:
        self._slot: dict[str, int] = {}
        self._piece_bytes = 0
        self._ids, self._ends = array("I"), array("I", [0])


def _piece_bounds(bytes_B: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where pieces start, and the end; every start of a sentence is among them. Shape [P + 1]."""
    kinds = _CLASS[bytes_B]
    before = np.empty_like(kinds)
    before[0] = _WORD
    before[1:] = kinds[:-1]
    is_start = kinds == _SPACE
    is_start |= (kinds == _MARK) & (before != _SPACE)
    is_start |= (kinds == _WORD) & (before == _MARK)
    is_start[starts[:-1][starts[:-1] < len(bytes_B)]] = True
    return np.append(np.flatnonzero(is_start), len(bytes_B))
