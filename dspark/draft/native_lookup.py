"""The lookup drafter in C++ (kernels/lookup.cpp), compiled on demand and called by ctypes.

All requests of a round are one call: what is new in their texts goes in, their trees come out. It
offers what the Python drafter of `dspark.draft.lookup` offers, bit by bit. Texts live behind a
handle that belongs to this object; the corpus stays where numpy has it and is only read.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import weakref
from array import array
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dspark import native
from dspark.draft.base import DraftContext
from dspark.draft.corpus import SAMPLE, Corpus
from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.folders import cache_root
from dspark.request import Rule
from dspark.tree import POINT_MASS, DraftTree, Proposal

__all__ = ["Library", "Limits", "NativeLookup", "Reader", "choose_library", "load_library"]

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "kernels"
_SOURCES = native.Sources("lookup", _FOLDER / "lookup.cpp", tuple(sorted(_FOLDER.glob("*.h"))))
# A product and a sum in one rounding would differ from what Python computes.
_FLAGS = (*native.FLAGS, "-ffp-contract=off")
_TAIL = 16  # tokens compared to see that a context still extends what was seen
_NO_MEMORY = -2  # what a call gives where memory ends
_MOST = 1 << 29  # tokens of a text
_MOST_FOLLOWERS = 16
_WORDS = 3
_NOTHING = Proposal.empty()
_LAWS = tuple(rule for rule in Rule if rule.draws_from_laws)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the drafter counts and looks at; `dspark.draft.lookup` says what each is.

    Attributes:
        links: Suffix links that an occurrence is counted along.
        matches: Matches looked at for one node's candidates.
        followers: Candidates of one match looked at, 16 at the most.
        least: Tokens of a match at the least.
        leftover: Shorter matches are not looked at for less than this.
        doubt: Of the request's own text.
        shared_doubt: Of the corpus.
        min_survival: Candidates less likely than this are not offered.

    Raises:
        ConfigError: If matches may be empty, or there is no room for so many followers.
    """

    links: int
    matches: int
    followers: int
    least: int
    leftover: float
    doubt: float
    shared_doubt: float
    min_survival: float

    def __post_init__(self) -> None:
        if self.least < 1 or not 0 < self.followers <= _MOST_FOLLOWERS:
            raise ConfigError(
                f"lookup is to take matches of {self.least} tokens and {self.followers} followers, "
                f"but needs one at the least, and from 1 to {_MOST_FOLLOWERS}."
            )


class _Settings(ctypes.Structure):
    _fields_ = (
        *(
            (name, c_int64)
            for name in ("links", "matches", "followers", "sample", "least", "corpus_size")
        ),
        *((name, c_double) for name in ("leftover", "doubt", "shared_doubt", "min_survival")),
        ("words", c_void_p * _WORDS),
    )


class Library:
    """The loaded kernels.

    Args:
        path: The shared library.

    Raises:
        OSError: If it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.open = library.dspark_lookup_open
        self.open.restype = c_void_p
        self.open.argtypes = [c_void_p]
        self.close = library.dspark_lookup_close
        self.close.restype = None
        self.close.argtypes = [c_void_p]
        self.add = library.dspark_lookup_add
        self.add.restype = c_int64
        self.add.argtypes = [c_void_p]
        self.drop = library.dspark_lookup_drop
        self.drop.restype = None
        self.drop.argtypes = [c_void_p, c_int64]
        self.run = library.dspark_lookup_run
        self.run.restype = c_int64
        self.run.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p]
        self.take = library.dspark_lookup_take
        self.take.restype = None
        self.take.argtypes = [c_void_p] * 5


class Reader:
    """How much of a text was seen, and which tokens are new.

    Attributes:
        size: Tokens seen.
    """

    __slots__ = ("_tail", "size")

    def __init__(self) -> None:
        self.size = 0
        self._tail: list[int] = []

    def is_extended_by(self, tokens: Sequence[int]) -> bool:
        """Compare the last tokens only: a wrong yes costs speed, never a wrong text."""
        size, tail = self.size, self._tail
        return len(tokens) >= size and _listed(tokens[size - len(tail) : size]) == tail

    def follow(self, tokens: Sequence[int]) -> array[int]:
        """Take in a text that extends what was seen.

        Args:
            tokens: The whole text.

        Returns:
            What is new in it.

        Raises:
            DataError: If one is no integer of 64 bits, or the text is too long.
        """
        size = len(tokens)
        try:
            new = array("q", tokens[self.size :])
        except (OverflowError, TypeError) as exc:
            raise DataError(f"a text to draft for holds what is no token id: {exc}.") from exc
        if size > _MOST:
            raise DataError(f"a text has {size} tokens, but lookup takes {_MOST}.")
        self.size = size
        self._tail = _listed(tokens[-_TAIL:])
        return new


def _listed(tokens: Sequence[int]) -> list[int]:
    return tokens if type(tokens) is list else list(tokens)


class _Text(Reader):
    """A request's text, and its number behind the handle."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class NativeLookup:
    """Texts of requests, and what is offered for them.

    Args:
        library: The kernels.
        limits: What is counted and looked at.
        corpus: Texts that all requests share.
    """

    def __init__(self, library: Library, limits: Limits, corpus: Corpus) -> None:
        self._library = library
        self._corpus = corpus  # its memory is read behind the handle
        words = (c_void_p * _WORDS)(*(word.ctypes.data for word in corpus.words))
        settings = _Settings(
            limits.links,
            limits.matches,
            limits.followers,
            SAMPLE,
            min(limits.least, _MOST),
            corpus.size,
            limits.leftover,
            limits.doubt,
            limits.shared_doubt,
            limits.min_survival,
            words,
        )
        handle = library.open(ctypes.byref(settings))
        if handle is None:
            raise MemoryError("no memory for a lookup drafter")
        self._handle = c_void_p(handle)
        weakref.finalize(self, library.close, self._handle)
        self._texts: dict[int, _Text] = {}
        # A call runs without the interpreter's lock.
        self._lock = threading.Lock()

    @property
    def texts_kept(self) -> int:
        """Requests that it keeps a text of."""
        return len(self._texts)

    def propose(self, contexts: Sequence[DraftContext], widths: Sequence[int]) -> list[Proposal]:
        """Draft for several requests.

        Args:
            contexts: One per request, limits >= 0.
            widths: Children per node at the most, >= 1, of each.

        Returns:
            One proposal each.

        Raises:
            DataError: If a text holds what is no token id, or is too long.
        """
        with self._lock:
            try:
                return self._propose(contexts, widths)
            except BaseException:
                # What was read and what was counted may differ now.
                for request_id in list(self._texts):
                    self._drop(request_id)
                raise

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        with self._lock:
            self._drop(request_id)

    def _drop(self, request_id: int) -> None:
        text = self._texts.pop(request_id, None)
        if text is not None:
            self._library.drop(self._handle, text.number)

    def _propose(self, contexts: Sequence[DraftContext], widths: Sequence[int]) -> list[Proposal]:
        tokens: array[int] = array("q")
        asked: list[int] = []
        for context, width in zip(contexts, widths, strict=True):
            text = self._texts.get(context.request_id)
            is_new = text is None or not text.is_extended_by(context.tokens)
            if text is None or is_new:
                text = self._texts[context.request_id] = _Text(self._number(text))
            new = text.follow(context.tokens)
            tokens += new
            asked += (text.number, is_new, len(new), context.budget, context.depth, width)
        requests = _numbers(asked)
        ends = array("q", bytes(8 * len(contexts) + 8))
        size = self._checked(
            self._library.run(
                self._handle,
                len(contexts),
                requests.buffer_info()[0],
                tokens.buffer_info()[0],
                len(tokens),
                ends.buffer_info()[0],
            )
        )
        return self._taken(contexts, size, ends) if size else [_NOTHING] * len(contexts)

    def _number(self, known: _Text | None) -> int:
        """Where a text is behind the handle."""
        if known is not None:
            return known.number
        return self._checked(self._library.add(self._handle))

    def _checked(self, result: int) -> int:
        if result == _NO_MEMORY:
            raise MemoryError("no memory for a lookup drafter")
        if result < 0:
            raise RuntimeError(f"the lookup kernels gave {result}")
        return result

    def _taken(
        self, contexts: Sequence[DraftContext], size: int, ends: Sequence[int]
    ) -> list[Proposal]:
        """The nodes of a run as trees: parts of common arrays."""
        columns = np.empty((5, size), dtype=np.int64)
        first, step = native.address_of(columns), columns.strides[0]
        self._library.take(self._handle, *range(first, first + 4 * step, step))
        token, parent, depth, bits, law = columns
        survival = bits.view(np.float64)
        law.fill(POINT_MASS)
        proposals = []
        end = 0
        for i, context in enumerate(contexts):
            start, end = end, ends[i + 1]
            if start == end:
                proposals.append(_NOTHING)
                continue
            tree = DraftTree(
                token[start:end], parent[start:end], depth[start:end], survival[start:end]
            )
            if context.rule in _LAWS:
                proposals.append(Proposal(tree, law_of=law[start:end]))
            else:
                proposals.append(Proposal(tree, law_of=_NOTHING.law_of))
        return proposals


def _numbers(asked: list[int]) -> array[int]:
    try:
        return array("q", asked)
    except OverflowError as exc:
        raise ConfigError(f"budgets, depths and widths must be below {1 << 63}.") from exc


def choose_library(path: str = "auto") -> Library | None:
    """The kernels, compiled now if need be.

    Args:
        path: Whether kernels are wanted (`dspark.native.PATHS`); "auto" takes them where they can
            be had.

    Returns:
        None for Python.

    Raises:
        ConfigError: If the path is none of PATHS.
        CapabilityError: If kernels were asked for and cannot be had.
    """
    wanted = native.wanted_path(path)
    if wanted == "plain":
        return None
    try:
        return load_library()
    except native.NotCompiled as exc:
        if wanted == "fused":
            raise CapabilityError(
                f"the kernels for lookup cannot be taken: {exc}.",
                hint="leave the choice to dspark, or take the plain path",
            ) from exc
        logger.info("lookup drafts in Python: %s", exc)
        return None


def load_library() -> Library:
    """Load the kernels, compiling them if this machine has not done so yet.

    Raises:
        NotCompiled: If there is no compiler, or it fails.
    """
    return _load(os.environ.get("CXX"))


@functools.cache
def _load(compiler: str | None) -> Library:
    try:
        folder = cache_root() / "kernels"
        return Library(native.compile_once(_SOURCES, folder, compiler=compiler, flags=_FLAGS))
    except (OSError, AttributeError) as exc:
        raise native.NotCompiled(f"the compiled kernels cannot be loaded: {exc}") from exc
