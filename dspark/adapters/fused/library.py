"""The kernels: compiled on this machine the first time they are wanted, then kept.

One shared library per machine type, compiler and torch, in the user's cache folder; a second start
loads it in milliseconds. It is linked against the OpenMP runtime that torch has loaded already: two
runtimes in a process would fight over the cores. Nothing but the C++ compiler is needed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from dspark.adapters.fused.layout import NotFused

__all__ = ["Library", "load_library"]

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "kernels"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
_SECONDS = 300
"""Time after which a compiler is given up on."""


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
    compiler = shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotFused(f"there is no C++ compiler ({named or 'g++ or clang++'})")
    path = folder / f"fused-{_fingerprint(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    try:
        return Library(path)
    except (OSError, AttributeError) as exc:
        raise NotFused(f"the compiled kernels cannot be loaded: {exc}") from exc


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    facts = (
        compiler,
        Path(compiler).resolve().stat().st_mtime_ns,
        _FLAGS,
        torch.__version__,
        platform.machine(),
        _processor(),
        torch.backends.cpu.get_cpu_capability(),
        _openmp(),
    )
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What -march=native goes by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _openmp() -> str | None:
    """The OpenMP runtime that torch loaded, if it is GNU's and lies beside torch."""
    folders = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parents[1] / "torch.libs")
    for folder in folders:
        found = sorted(folder.glob("libgomp*.so*"))
        if found:
            return str(found[0])
    return None


def _compile(compiler: str, path: Path) -> None:
    logger.info("compiling kernels for this machine (once, some ten seconds)")
    runtime = _openmp()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *_FLAGS, str(_SOURCES / "forward.cpp"), "-o", str(made)]
            _run([*command, *([runtime] if runtime else [])])
            made.replace(path)
    except OSError as exc:
        raise NotFused(f"the kernels cannot be compiled: {exc}") from exc


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - the user's own compiler, on our own source
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as exc:
        raise NotFused(f"{command[0]} took longer than {_SECONDS} s") from exc
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise NotFused(f"{command[0]} failed: {(lines or ['no message'])[0].strip()}")
