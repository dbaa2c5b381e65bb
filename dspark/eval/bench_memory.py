"""How much memory a run took: of the process, and of a CUDA device."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

from dspark.eval.bench_records import Memory

__all__ = ["MemoryWatch"]

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # what Linux's clear_refs takes to set the peak back to what is in use


class MemoryWatch:
    """Peak memory from its making on.

    Where the system cannot set the process's peak back (not Linux), the peak is the process's.

    Args:
        device: Where the target runs; several devices with commas between.
    """

    def __init__(self, device: str) -> None:
        names = (name.strip() for name in device.split(","))
        self._devices = [name for name in names if name.startswith("cuda")]
        with contextlib.suppress(OSError):
            (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        for name in self._devices:
            torch.cuda.reset_peak_memory_stats(name)

    def read(self, *, cache: int | None, is_local: bool) -> Memory:
        """What was taken since.

        Args:
            cache: Bytes of K/V, if known.
            is_local: The run was in this process; otherwise nothing is known.
        """
        if not is_local:
            return Memory(cache=cache)
        on_devices = sum(int(torch.cuda.max_memory_allocated(name)) for name in self._devices)
        return Memory(peak_rss=_peak_rss(), cache=cache, device=on_devices or None)


def _peak_rss() -> int | None:
    with contextlib.suppress(OSError):
        for line in (
            (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
        ):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
