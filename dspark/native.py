"""C++ sources compiled on this machine the first time they are wanted, then kept.

One shared library per machine type, compiler, sources and torch, in the user's cache folder; a
second start loads it in milliseconds. It is linked against the OpenMP runtime that torch has loaded
already: two runtimes in a process would fight over the cores. Nothing but the compiler is needed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dspark.errors import ConfigError

__all__ = [
    "FLAGS",
    "PATHS",
    "PATH_VARIABLE",
    "NotCompiled",
    "Sources",
    "address_of",
    "compile_once",
    "wanted_path",
]

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
"""What the compiler is told."""

PATHS = ("auto", "fused", "plain")
"""Values of LoadOptions.path: kernels of our own where they pay, always, or never."""

PATH_VARIABLE = "DSPARK_PATH"
"""Environment variable that says which path "auto" is."""

_SECONDS = 300
"""Time after which a compiler is given up on."""


def address_of(array: np.ndarray) -> int:
    """Where a contiguous array's numbers lie; `array.ctypes` makes an object first."""
    place: int = array.__array_interface__["data"][0]
    return place


class NotCompiled(Exception):  # noqa: N818 - no error: there is a path without kernels
    """Kernels that cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What a shared library is made of.

    Attributes:
        name: What the library's file is called before its fingerprint.
        main: The file to compile.
        included: Files that it includes: their change makes another library, too.
    """

    name: str
    main: Path
    included: tuple[Path, ...] = ()


def compile_once(
    sources: Sources, folder: Path, *, compiler: str | None = None, flags: Sequence[str] = FLAGS
) -> Path:
    """The shared library of some sources, made now if this machine has not done so yet.

    Args:
        sources: What to compile.
        folder: Where compiled libraries are kept.
        compiler: Name of the C++ compiler; None takes $CXX, else g++ or clang++.
        flags: What the compiler is told.

    Returns:
        The library's file.

    Raises:
        NotCompiled: If there is no compiler, or it fails.
    """
    named = compiler or os.environ.get("CXX")
    found = shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise NotCompiled(f"there is no C++ compiler ({named or 'g++ or clang++'})")
    path = folder / f"{sources.name}-{_fingerprint(sources, found, flags)}.so"
    if not path.exists():
        _compile(sources, [found, *flags], path)
    return path


def wanted_path(path: str) -> str:
    """Which path to take: what is asked for, and for "auto" what the environment says.

    Args:
        path: `LoadOptions.path`.

    Raises:
        ConfigError: If it is none of PATHS.
    """
    wanted = path
    if wanted == "auto":
        wanted = os.environ.get(PATH_VARIABLE) or "auto"
    if wanted not in PATHS:
        raise ConfigError(f"the path is {wanted!r}, but must be one of {', '.join(PATHS)}.")
    return wanted


def _fingerprint(sources: Sources, compiler: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for source in (sources.main, *sources.included):
        digest.update(source.read_bytes())
    facts = (
        compiler,
        Path(compiler).resolve().stat().st_mtime_ns,
        tuple(flags),
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


def _compile(sources: Sources, command: list[str], path: Path) -> None:
    logger.info("compiling kernels for this machine (once, some ten seconds)")
    runtime = _openmp()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            _run([*command, str(sources.main), "-o", str(made), *([runtime] if runtime else [])])
            made.replace(path)
    except OSError as exc:
        raise NotCompiled(f"the kernels cannot be compiled: {exc}") from exc


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - the user's own compiler, on our own source
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as exc:
        raise NotCompiled(f"{command[0]} took longer than {_SECONDS} s") from exc
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise NotCompiled(f"{command[0]} failed: {(lines or ['no message'])[0].strip()}")
