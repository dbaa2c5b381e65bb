"""Filters of prompts and answers: length, repetition, duplicates, overlap with evaluation sets.

Two texts are compared by their words alone: Unicode NFKC, case folded, punctuation and whitespace
left out, every Chinese or Japanese character a word of its own. Duplicates also see the signs of
arithmetic, so that "3 + 4" and "3 - 4" are two questions.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from dspark.errors import ConfigError

__all__ = [
    "Drop",
    "DuplicateIndex",
    "ExclusionIndex",
    "FilterLimits",
    "repetition",
    "shingles",
    "words",
]

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_WORD_OR_SIGN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[-+*/=<>^%]")

_SHINGLE = 8  # characters
_OVERLAP = 13  # words
_LEAST_WORDS = 5  # a shorter text overlaps only with its equal
_INSTRUCTION = 8  # words of a run that many excluded texts share
_MANY = 5  # texts; a run of words in more of them is an instruction, not a question


class Drop(StrEnum):
    """Why a prompt or an answer was left out."""

    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    REPETITIVE = "repetitive"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    EXCLUDED = "excluded"  # it overlaps with an evaluation set
    UNFINISHED = "unfinished"  # the target came to no end of its question
    MALFORMED = "malformed"  # not valid text, or the template refuses it
    ANSWER_TOO_SHORT = "answer_too_short"
    ANSWER_REPETITIVE = "answer_repetitive"
    FAILED = "failed"  # no answer: the engine or the server refused
    REASONING = "reasoning"  # a server cut the reasoning out of the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterLimits:
    """What passes.

    Attributes:
        min_prompt_tokens: Tokens of the user's text at the least, without the template.
        max_prompt_tokens: Tokens of the prompt at the most, with the template.
        max_repetition: Largest share of repeated 3-grams among a prompt's words, in [0, 1].
        max_similarity: Largest Jaccard similarity to an earlier prompt, in (0, 1]; 1 keeps all but
            exact duplicates.
        min_tokens: Tokens of an answer at the least, its end token included.
        max_answer_repetition: Largest share of repeated 4-grams among an answer's tokens, in
            [0, 1]; 1 keeps all.

    Raises:
        ConfigError: If a limit is outside its range.
    """

    min_prompt_tokens: int = 3
    max_prompt_tokens: int = 1024
    max_repetition: float = 0.5
    max_similarity: float = 0.7
    min_tokens: int = 2
    max_answer_repetition: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_prompt_tokens", "max_prompt_tokens", "min_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}, but must be >= 1.")
        for name in ("max_repetition", "max_similarity", "max_answer_repetition"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}, but must be in [0, 1].")
        if self.max_similarity == 0:
            raise ConfigError("max_similarity is 0, but must be in (0, 1].")
        if self.min_prompt_tokens > self.max_prompt_tokens:
            raise ConfigError(
                f"min_prompt_tokens is {self.min_prompt_tokens}, but must not be over "
                f"max_prompt_tokens, {self.max_prompt_tokens}."
            )


def words(text: str, *, with_signs: bool = False) -> list[str]:
    """The words of a text, whatever its case, punctuation and whitespace.

    Args:
        text: Any text.
        with_signs: Take the signs of arithmetic as words.
    """
    pattern = _WORD_OR_SIGN if with_signs else _WORD
    return pattern.findall(unicodedata.normalize("NFKC", text).casefold())


def repetition(items: Sequence[Hashable], size: int) -> float:
    """The share of n-grams that occurred before.

    Args:
        items: Words or token ids.
        size: n.

    Returns:
        0 (every n-gram is new, or there are fewer than two) up to nearly 1.
    """
    total = len(items) - size + 1
    if total < 2:
        return 0.0
    distinct = len({tuple(items[i : i + size]) for i in range(total)})
    return 1 - distinct / total


def shingles(text: str) -> set[str]:
    """The eight characters from the start of every word on, of the text in normal form.

    A changed word touches its own shingle and one or two before it, so short texts that differ in
    one word stay similar, and a text has no more shingles than words.
    """
    found = words(text, with_signs=True)
    joined, start, out = " ".join(found), 0, set[str]()
    for word in found:
        out.add(joined[start : start + _SHINGLE])
        start += len(word) + 1
    return out


class DuplicateIndex:
    """Texts seen so far; finds equal and similar ones.

    Similarity is the exact Jaccard index of two texts' shingles, found by an inverted index.

    Args:
        max_similarity: Texts more similar than this to an earlier one are near duplicates; at 1
            there are none.
    """

    def __init__(self, max_similarity: float) -> None:
        self._limit = max_similarity
        self._exact: set[str] = set()
        self._sizes = array("I")
        # Most shingles occur once: a number takes less memory than an array of one.
        self._where: dict[str, int | array[int]] = {}

    def check(self, text: str) -> Drop | None:
        """Tell whether a text was seen before; if not, remember it.

        Returns:
            DUPLICATE, NEAR_DUPLICATE or None.
        """
        key = " ".join(words(text, with_signs=True)) or text.strip()
        if key in self._exact:
            return Drop.DUPLICATE
        pieces = shingles(text)
        if self._limit < 1 and self._similarity(pieces) > self._limit:
            return Drop.NEAR_DUPLICATE
        self._exact.add(key)
        if self._limit < 1:
            self._remember(pieces)
        return None

    def _similarity(self, pieces: set[str]) -> float:
        """The largest Jaccard index with any text remembered."""
        single: list[int] = []
        parts: list[np.ndarray] = []
        for piece in pieces:
            where = self._where.get(piece)
            if isinstance(where, int):
                single.append(where)
            elif where is not None:
                parts.append(np.frombuffer(where, dtype=np.uint32))
        parts.append(np.array(single, dtype=np.uint32))
        texts, shared = np.unique(np.concatenate(parts), return_counts=True)
        if not len(texts):
            return 0.0
        sizes = np.frombuffer(self._sizes, dtype=np.uint32)[texts].astype(np.int64)
        return float((shared / (len(pieces) + sizes - shared)).max())

    def _remember(self, pieces: set[str]) -> None:
        number = len(self._sizes)
        self._sizes.append(len(pieces))
        for piece in pieces:
            where = self._where.get(piece)
            if where is None:
                self._where[piece] = number
            elif isinstance(where, int):
                self._where[piece] = array("I", [where, number])
            else:
                where.append(number)


class ExclusionIndex:
    """Texts that no prompt may overlap with, such as the questions of evaluation sets.

    A prompt overlaps with an excluded text if

    - they share a run of 13 words;
    - or the shorter of them has 5 to 12 words and stands whole in the other;
    - or their words are equal.

    A run of 8 words that stands in more than 5 different excluded texts is an instruction of their
    set ("Please reason step by step, and put your final answer ..."), not a question, and does not
    count; the rest of such a text is taken piece by piece.

    **Source:** 13-grams as a sign of contamination: Brown et al. 2020 (GPT-3), appendix C.

    Args:
        texts: The excluded texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        unique = dict.fromkeys(tuple(words(text)) for text in texts)
        unique.pop((), None)
        self._whole = {" ".join(text) for text in unique}
        self._pieces = [piece for text in _without_instructions(list(unique)) for piece in text]
        # Keyed by their first words, so that a place in a prompt costs one look-up.
        self._runs_from: dict[str, set[str]] = {}
        for piece in self._pieces:
            if len(piece) >= _LEAST_WORDS:
                for gram in _grams(piece, min(len(piece), _OVERLAP)):
                    head = " ".join(gram.split(" ", _LEAST_WORDS)[:_LEAST_WORDS])
                    self._runs_from.setdefault(head, set()).add(gram)
        self._inside: dict[int, set[str]] = {}

    def overlaps(self, text: str) -> bool:
        """True if a text overlaps with an excluded one."""
        found = words(text)
        size = len(found)
        if " ".join(found) in self._whole:
            return True
        for start, head in enumerate(_grams(found, _LEAST_WORDS)):
            runs = self._runs_from.get(head)
            if runs is not None:
                here = " ".join(found[start : start + _OVERLAP]) + " "
                if any(here.startswith(run + " ") for run in runs):
                    return True
        return _LEAST_WORDS <= size < _OVERLAP and " ".join(found) in self._runs(size)

    def _runs(self, size: int) -> set[str]:
        """All runs of so many words in excluded texts; made when first asked for."""
        if size not in self._inside:
            self._inside[size] = {gram for piece in self._pieces for gram in _grams(piece, size)}
        return self._inside[size]


def _grams(items: Sequence[str], size: int) -> Iterator[str]:
    for start in range(len(items) - size + 1):
        yield " ".join(items[start : start + size])


def _without_instructions(texts: Sequence[tuple[str, ...]]) -> Iterator[list[list[str]]]:
    """For every text, what is left of it once shared instructions are cut out."""
    counts = Counter(gram for text in texts for gram in set(_grams(text, _INSTRUCTION)))
    for text in texts:
        is_shared = [False] * len(text)
        for start, gram in enumerate(_grams(text, _INSTRUCTION)):
            if counts[gram] > _MANY:
                is_shared[start : start + _INSTRUCTION] = [True] * _INSTRUCTION
        pieces: list[list[str]] = [[]]
        for word, shared in zip(text, is_shared, strict=True):
            if not shared:
                pieces[-1].append(word)
            elif pieces[-1]:
                pieces.append([])
        yield [piece for piece in pieces if piece]
