"""Where dspark keeps things on this machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root(cache: str | Path | None = None) -> Path:
    """Return the cache folder: `cache` if given, else $XDG_CACHE_HOME/dspark or ~/.cache/dspark."""
    if cache is not None:
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path is to be ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "dspark"
