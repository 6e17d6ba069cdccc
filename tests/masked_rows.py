"""Rows of tokens, and their masks, for the tests of masking."""

import numpy as np

from stacking_ds.data.counter_random import derive_key
from stacking_ds.data.masking import MaskingVocabulary, mask_tokens

__all__ = [
    "CLS",
    "FIRST_PIECE",
    "MASK",
    "MODES",
    "SEP",
    "SIZE",
    "SPECIAL",
    "UNK",
    "VOCABULARY",
    "WORD_MODES",
    "budget_of",
    "mask",
    "rows_of_words",
    "words_of",
]

MODES = ("tokens", "whole_words", "spans")
WORD_MODES = ("whole_words", "spans")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
UNK, CLS, SEP, MASK = 1, 2, 3, 4
WHOLE = 60  # ids 5 to 64 begin words, 65 to 104 continue them
VOCABULARY = MaskingVocabulary.of(
    SPECIAL + [f"w{i}" for i in range(WHOLE)] + [f"##w{i}" for i in range(40)]
)
FIRST_PIECE, SIZE = 5 + WHOLE, 105


def mask(rows, *, masking="tokens", probability=0.15, keys=None, seed=1):
    """Masks the lists of tokens `rows`; returns tokens before and after, offsets and the result."""
    ids = np.array([token for row in rows for token in row], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    keys = derive_key(seed, np.arange(len(rows))) if keys is None else keys
    after = ids.copy()
    positions, labels = mask_tokens(
        after,
        ids > MASK,
        offsets,
        keys,
        masking=masking,
        mlm_probability=probability,
        vocabulary=VOCABULARY,
    )
    return ids, after, offsets, positions, labels


def budget_of(maskable, probability):
    return min(max(1, int(probability * maskable + 0.5)), maskable)


def words_of(row):
    """The words of a list of tokens as lists of places, found by reading from left to right."""
    words, previous = [], SEP
    for place, token in enumerate(row):
        if token > MASK:
            if token >= FIRST_PIECE and previous > MASK:
                words[-1].append(place)
            else:
                words.append([place])
        previous = token
    return words


def rows_of_words(count, num_words, seed=0):
    """Rows of `num_words` words of one to four pieces between [CLS] and [SEP]."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = [CLS]
        for pieces in generator.choice(4, num_words, p=[0.7, 0.15, 0.1, 0.05]):
            row.append(int(generator.integers(5, FIRST_PIECE)))
            row.extend(generator.integers(FIRST_PIECE, SIZE, pieces).tolist())
        rows.append([*row, SEP])
    return rows
