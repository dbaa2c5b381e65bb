"""The wide passes of `dspark.verify.noise` in C++ (kernels/noise.cpp), compiled on demand."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dspark import native
from dspark.folders import cache_root

__all__ = ["Close", "NoiseLibrary", "load_library", "noise_library"]

logger = logging.getLogger(__name__)

_SOURCES = native.Sources("noise", Path(__file__).parent / "kernels" / "noise.cpp")
_ROOM = 4096
"""Candidates of a row; one with more is left to numpy."""

_MOST = 64
"""Best tokens of a row that the kernel keeps."""

_CLOSE = 16
"""Tokens that may come close to the best of a row in `NoiseLibrary.rows`."""


class Close(NamedTuple):
    """Of each of R rows, the tokens whose sum with the noise comes close to the largest sum.

    Attributes:
        counts: How many there are; -1 where a sum is no number.
        ids: The first _CLOSE of them, ascending.
        tops: The largest sum.
        most: The largest logit, 0 where the scale is 1.
    """

    counts: list[int]
    ids: NDArray[np.int64]
    tops: list[float]
    most: list[float]

    @property
    def room(self) -> int:
        """Tokens that there is room for in a row."""
        return int(self.ids.shape[1])


class NoiseLibrary:
    """The loaded kernels.

    Args:
        path: The shared library.

    Raises:
        OSError: If it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._candidates = library.dspark_noise_candidates
        self._candidates.restype = c_int64
        self._candidates.argtypes = [
            *(c_void_p, c_void_p, c_int64, c_int64, c_float, c_int64, c_void_p, c_void_p)
        ]
        self._vectors = library.dspark_noise_vectors
        self._vectors.restype = None
        self._vectors.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p]
        self._rows = library.dspark_noise_rows
        self._rows.restype = None
        self._rows.argtypes = [
            *(c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_float, c_int64, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_void_p),
        ]

    def vectors(
        self, words: NDArray[np.uint64], states: Sequence[int], threads: int
    ) -> list[NDArray[np.float32]]:
        """Noise of a vocabulary, as `dspark.verify.noise_vectors` approximates it.

        Args:
            words: uint64 [V], the words of all tokens.
            states: What the key, the stream and the position of each vector come to.
            threads: Threads, >= 1.

        Returns:
            float32 [V] each.
        """
        size, count = len(words), len(states)
        out = [np.empty(size, dtype=np.float32) for _ in states]
        where = (c_void_p * count)(*(native.address_of(own) for own in out))
        whose = (c_uint64 * count)(*states)
        self._vectors(
            *(native.address_of(words), size, ctypes.addressof(whose), count, threads),
            ctypes.addressof(where),
        )
        return out

    def rows(
        self,
        logits: NDArray[np.float32],
        scales: Sequence[float],
        noise: Sequence[NDArray[np.float32]],
        slack: float,
        threads: int,
    ) -> Close:
        """The tokens that may be the best of rows, once noise is added.

        Args:
            logits: float32 [R, V], contiguous.
            scales: What each row, less its largest logit, is divided by; 1 leaves it as it is.
            noise: float32 [V] of each row.
            slack: How much less than the largest sum counts.
            threads: Threads, >= 1.
        """
        count, size = logits.shape
        whose = (c_void_p * count)(*(native.address_of(own) for own in noise))
        counts, ids = (c_int64 * count)(), np.empty((count, _CLOSE), dtype=np.int64)
        divisors, tops, most = (c_float * count)(*scales), (c_float * count)(), (c_float * count)()
        self._rows(
            *(native.address_of(logits), count, size, ctypes.addressof(divisors)),
            *(ctypes.addressof(whose), slack, _CLOSE, threads, ctypes.addressof(counts)),
            *(native.address_of(ids), ctypes.addressof(tops), ctypes.addressof(most)),
        )
        return Close(list(counts), ids, list(tops), list(most))

    def candidates(
        self, row: NDArray[np.float32], noise: NDArray[np.float32], m: int, slack: float
    ) -> tuple[NDArray[np.int64], float] | None:
        """Tokens whose sum comes within `slack` of the m-th largest, and that largest.

        Args:
            row: float32 [V], shaped logits, -inf where removed.
            noise: float32 [V].
            m: Best tokens wanted.
            slack: How much less counts.

        Returns:
            Ids, ascending, and the m-th largest sum; None where there are too many, fewer than m
            tokens are left, or a sum is no number.
        """
        if m > _MOST or not row.flags.c_contiguous:
            return None
        ids, floor = np.empty(_ROOM, dtype=np.int64), c_float()
        count = self._candidates(
            *(row.ctypes.data, noise.ctypes.data, len(row), m, slack, _ROOM, ids.ctypes.data),
            ctypes.addressof(floor),
        )
        if not m <= count <= _ROOM or floor.value == -np.inf:
            return None
        return ids[:count], floor.value


def noise_library() -> NoiseLibrary | None:
    """The kernels, compiled now if need be; None where there are none, or none are wanted."""
    if native.wanted_path("auto") == "plain":
        return None
    return _load(os.environ.get("CXX"))


def load_library(compiler: str | None = None) -> NoiseLibrary:
    """Load the kernels, compiling them if this machine has not done so yet.

    Args:
        compiler: Name of the C++ compiler; None takes $CXX, else g++ or clang++.

    Raises:
        NotCompiled: If there is no compiler, or it fails.
    """
    folder = cache_root() / "kernels"
    try:
        return NoiseLibrary(native.compile_once(_SOURCES, folder, compiler=compiler))
    except (OSError, AttributeError) as exc:
        raise native.NotCompiled(f"the compiled kernels cannot be loaded: {exc}") from exc


@functools.cache
def _load(compiler: str | None) -> NoiseLibrary | None:
    try:
        return load_library(compiler)
    except native.NotCompiled as exc:
        logger.info("noise is made by numpy: %s", exc)
        return None
