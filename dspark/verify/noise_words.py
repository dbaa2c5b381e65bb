"""The 64-bit words that noise is hashed from.

Letters: n words, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHUNK", "extend", "mix_array", "token_words", "vocabulary_words"]

IntArray = NDArray[np.int64]
WordArray = NDArray[np.uint64]

CHUNK = 8192
"""Words hashed at a time, so that they stay in the first-level cache."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(_FIRST), np.uint64(_SECOND))


def _mix(word: int) -> int:
    """Scramble one 64-bit word; a bijection."""
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def mix_array(words: WordArray) -> WordArray:
    """Scramble uint64 [n] in place, as `_mix` does."""
    for start in range(0, words.shape[0], CHUNK):
        part = words[start : start + CHUNK]
        part ^= part >> _SHIFTS[0]
        part *= _FACTORS[0]
        part ^= part >> _SHIFTS[1]
        part *= _FACTORS[1]
        part ^= part >> _SHIFTS[2]
    return words


def extend(state: int, words: Iterable[int]) -> int:
    """Chain words, each in 64-bit two's complement, to a state."""
    for word in words:
        state = _mix(state ^ _mix((word + _GOLDEN) & _MASK))
    return state


def token_words(ids: IntArray) -> WordArray:
    """Scramble token ids [n] as `extend` scrambles a word before chaining it."""
    return mix_array(ids.astype(np.uint64) + np.uint64(_GOLDEN))


@lru_cache(maxsize=4)
def vocabulary_words(size: int) -> WordArray:
    """`token_words` of 0 .. size - 1, kept because every position needs it."""
    words = token_words(np.arange(size, dtype=np.int64))
    words.flags.writeable = False
    return words
