"""Texts to look up in: where does an ending occur, and what follows it there?

Every place of every text is kept with the tokens that follow it, sorted by these tokens, so that
all occurrences of a string of tokens stand together and the two ends of their range are found by
bisection. A string that grows by a token narrows its range; the tokens that follow are read off
the range itself. This costs 24 bytes a token and two seconds a million tokens to set up, where the
automaton that follows a request's own text (draft/lookup.py) would need a kilobyte a token.

**Depth.** Strings of up to `MOST` tokens are told apart: enough to be sure of what follows, and
three words of memory a place.

**Source:** Manber and Myers 1993 (suffix arrays); SuffixDecoding, arXiv 2411.04975 (drafting from
earlier answers of the model).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dspark.errors import ConfigError

__all__ = ["MOST", "SAMPLE", "Corpus", "Place"]

_BITS = 21  # of a token in a word: vocabularies of up to two million
_PER_WORD = 3
_WORDS = 3
MOST = _PER_WORD * _WORDS - 1
"""Tokens of a match at the most; one more is kept, which follows it."""

SAMPLE = 1024
"""Occurrences looked at to weigh what follows a string."""

_MASK = (1 << _BITS) - 1
_FEW = 64  # occurrences that are counted faster one by one
_MOST_FOLLOWERS = 64  # of such a sample
_MAX_KEPT = 1 << 16  # ranges whose followers are remembered

Place: TypeAlias = tuple[int, int, int, int]
"""Occurrences of a string: first and end of their range, length of the string, and its last
tokens as far as they share a word."""

IntArray = NDArray[np.int64]


class Corpus:
    """Texts, sorted.

    Args:
        texts: Token ids of each, as lists or arrays; no match runs from one into the next.

    Attributes:
        size: Tokens in all.
        words: int64 [size] each, read only: the tokens from every place on, packed and in order.

    Raises:
        ConfigError: If a token id is negative or too large.
    """

    def __init__(self, texts: Iterable[Sequence[int] | IntArray] = ()) -> None:
        arrays = [np.asarray(text, dtype=np.int64) for text in texts if len(text)]
        for array in arrays:
            if array.min() < 0 or array.max() >= _MASK:
                bad = int(array.min()) if array.min() < 0 else int(array.max())
                raise ConfigError(f"a corpus has token {bad}, but needs ids from 0 to {_MASK - 1}.")
        self.size = sum(len(array) for array in arrays)
        self.words = _sorted_words(arrays)
        for word in self.words:
            word.flags.writeable = False
        self._views = [word.data for word in self.words]
        self._root: Place = (0, self.size, 0, 0)
        self._followers: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}

    def follow(self, places: Sequence[Place], token: int) -> tuple[Place, ...]:
        """Lengthen matches by a token.

        Args:
            places: Where the endings of a text occur, longest first; none for an empty text.
            token: The token that follows the text.

        Returns:
            Where the endings of the longer text occur, longest first, of `MOST` tokens at the most.
        """
        found = []
        for place in (*places, self._root):
            if place[2] < MOST:
                longer = self._narrow(place, token)
                if longer is not None:
                    found.append(longer)
        return tuple(found)

    def endings(self, tokens: Sequence[int]) -> tuple[Place, ...]:
        """Where the endings of a text occur, longest first.

        Args:
            tokens: The text; its last `MOST` tokens count.
        """
        places: tuple[Place, ...] = ()
        for token in tokens[-MOST:] if self.size else ():
            places = self.follow(places, int(token))
        return places

    def followers(self, place: Place, most: int) -> tuple[tuple[int, int], ...]:
        """What follows a string, and how often, the most frequent first.

        Args:
            place: Its occurrences. Of very many of them a part is looked at, evenly spread over
                what follows.
            most: Tokens to return at the most.

        Returns:
            (token, occurrences); the ends of texts are left out.
        """
        first, end, length, _ = place
        key = (first, length)
        kept = self._followers.get(key)
        if kept is None:
            kept = self._count(first, end, length)
            if len(self._followers) >= _MAX_KEPT:
                self._followers.clear()
            self._followers[key] = kept
        return kept[:most]

    def _count(self, first: int, end: int, length: int) -> tuple[tuple[int, int], ...]:
        word, part = divmod(length, _PER_WORD)
        shift = _BITS * (_PER_WORD - 1 - part)
        step = -(-(end - first) // SAMPLE)
        if end - first <= _FEW:
            values = [(value >> shift) & _MASK for value in self._views[word][first:end]]
            pairs = Counter(values).most_common()
        else:
            column = (self.words[word][first:end:step] >> shift) & _MASK
            # Sorted, so equal ones are together.
            ends = np.flatnonzero(np.append(column[1:] != column[:-1], True))
            sizes = np.diff(ends, prepend=-1)
            order = np.argsort(-sizes, kind="stable")[:_MOST_FOLLOWERS]
            tokens, counts = column[ends[order]].tolist(), (step * sizes[order]).tolist()
            pairs = list(zip(tokens, counts, strict=True))
        return tuple((token - 1, count) for token, count in pairs if token)

    def _narrow(self, place: Place, token: int) -> Place | None:
        """The occurrences that go on with a token, None if there are none."""
        if not 0 <= token < _MASK:  # no text has it
            return None
        first, end, length, prefix = place
        word, part = divmod(length, _PER_WORD)
        prefix = (prefix << _BITS if part else 0) | (token + 1)
        spare = _BITS * (_PER_WORD - 1 - part)
        low = prefix << spare
        # Bisection over a view is three times as fast as numpy's for the odd single value.
        view = self._views[word]
        start = bisect_left(view, low, first, end)
        stop = bisect_left(view, low + (1 << spare), start, end)
        return None if start == stop else (start, stop, length + 1, prefix)


def _sorted_words(texts: Sequence[IntArray]) -> tuple[IntArray, ...]:
    """The tokens from every place on, packed into words, in order; 0 stands for a text's end."""
    parts = [np.append(text + 1, 0) for text in texts]
    tokens = np.concatenate([*parts, np.zeros(_PER_WORD * _WORDS, dtype=np.int64)])
    places = np.flatnonzero(tokens[: len(tokens) - _PER_WORD * _WORDS])
    words = []
    for word in range(_WORDS):
        packed = np.zeros(len(places), dtype=np.int64)
        for part in range(_PER_WORD):
            # What stands behind a text's end is the next text: no match narrows past the 0 between.
            packed = (packed << _BITS) | tokens[places + word * _PER_WORD + part]
        words.append(packed)
    order = np.lexsort(words[::-1])
    return tuple(word[order] for word in words)
