"""The fused decoder's kernels, compiled on demand (dspark/native.py) and called by ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from dspark import native
from dspark.adapters.fused.layout import NotFused

__all__ = ["Library", "load_library"]

_FOLDER = Path(__file__).parent / "kernels"
_SOURCES = native.Sources("fused", _FOLDER / "forward.cpp", tuple(sorted(_FOLDER.glob("*.h"))))
_FLAGS = native.FLAGS


class Library:
    """The loaded kernels.

    Args:
        path: The shared library.

    Raises:
        OSError: If it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.fingerprint = path.stem
        self.lanes = self._number("dspark_lanes")
        self.has_threads = bool(self._number("dspark_has_threads"))
        self.forward = self._library.dspark_forward
        self.unembed = self._library.dspark_unembed
        for function in (self.forward, self.unembed):
            function.restype = None
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.linear = self._library.dspark_linear
        self.linear.restype = None
        number, place = ctypes.c_int64, ctypes.c_void_p
        self.linear.argtypes = [place, place, number, place, number, number]
        self.context = self._library.dspark_context
        self.context.restype = None
        self.context.argtypes = [place, place, place]
        self.branches = self._library.dspark_branches
        self.branches.restype = None
        self.branches.argtypes = [place, number]
        self.grow = self._library.dspark_grow
        self.grow.restype = None
        self.grow.argtypes = [place, number]
        self._work_floats = self._library.dspark_work_floats
        self._work_floats.restype = ctypes.c_int64
        self._work_floats.argtypes = [ctypes.c_void_p, *(4 * [ctypes.c_int64])]

    def _number(self, name: str) -> int:
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        function.argtypes = []
        return int(function())

    def work_floats(
        self, model: object, rows: int, outputs: int, columns: int, threads: int
    ) -> int:
        """Floats of working memory that a forward of such a size needs.

        Args:
            model: Reference to the model's structure (structures.py).
            rows: Rows of the batch.
            outputs: Rows whose logits are wanted.
            columns: Columns of the longest slot, the batch's rows included.
            threads: Threads.
        """
        return int(self._work_floats(model, rows, outputs, columns, threads))


def load_library(folder: Path) -> Library:
    """Load the kernels, compiling them if this machine has not done so yet.

    Args:
        folder: Where compiled kernels are kept.

    Raises:
        NotFused: If there is no compiler, or it fails.
    """
    return _load(folder, os.environ.get("CXX"))


@functools.cache
def _load(folder: Path, named: str | None) -> Library:
    try:
        path = native.compile_once(_SOURCES, folder, compiler=named, flags=_FLAGS)
    except native.NotCompiled as exc:
        raise NotFused(str(exc)) from exc
    try:
        return Library(path)
    except (OSError, AttributeError) as exc:
        raise NotFused(f"the compiled kernels cannot be loaded: {exc}") from exc
