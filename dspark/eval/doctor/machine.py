"""What the machine has: cores, memory, swap, load; Linux, as far as it tells."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cores", "free_memory", "load_average", "swapped_bytes"]

_CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """CPUs that this process may use: its affinity, cut by a container's quota."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        count = os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="utf-8").split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return count


def free_memory() -> int | None:
    """Bytes that may still be taken without swapping; None if the system does not say."""
    free = _kibibytes(Path("/proc/meminfo"), "MemAvailable:")
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="utf-8"))
        used = int((_CGROUP / "memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max", or no such group
        return free
    left = max(0, limit - used)
    return left if free is None else min(free, left)


def swapped_bytes() -> int:
    """Bytes of this process that were swapped out."""
    return _kibibytes(Path("/proc/self/status"), "VmSwap:") or 0


def load_average() -> float | None:
    """Processes that ran or waited for a core in the last minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _kibibytes(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(name)), None)
    return None if found is None else int(found.split()[1]) * 1024
