"""The wide passes of `dspark.verify.noise` in C++ (kernels/noise.cpp), compiled on demand."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import c_float, c_int64, c_uint64, c_void_p
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspark import native
from dspark.folders import cache_root

__all__ = ["NoiseLibrary", "load_library", "noise_library"]

logger = logging.getLogger(__name__)

_SOURCES = native.Sources("noise", Path(__file__).parent / "kernels" / "noise.cpp")
_ROOM = 4096
"""Candidates of a row; one with more is left to numpy."""

_MOST = 64
"""Best tokens of a row that the kernel keeps."""


class NoiseLibrary:
    """The loaded kernels.

    Args:
        path: The shared library.

    Raises:
        OSError: If it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._vector = library.dspark_noise_vector
        self._vector.restype = None
        self._vector.argtypes = [c_void_p, c_int64, c_uint64, c_void_p]
        self._candidates = library.dspark_noise_candidates
        self._candidates.restype = c_int64
        self._candidates.argtypes = [
            *(c_void_p, c_void_p, c_int64, c_int64, c_float, c_int64, c_void_p, c_void_p)
        ]

    def vector(self, words: NDArray[np.uint64], state: int) -> NDArray[np.float32]:
        """Noise of a vocabulary, as `dspark.verify.noise` approximates it.

        Args:
            words: uint64 [V], the words of all tokens.
            state: What the key, the stream and the position come to.
        """
        out = np.empty(words.shape[0], dtype=np.float32)
        self._vector(words.ctypes.data, len(words), state, out.ctypes.data)
        return out

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
