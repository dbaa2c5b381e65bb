"""Small pieces of wording that the error messages of this package share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["format_bytes", "near_match"]


def near_match(name: str, known: Iterable[str]) -> str:
    """Return ', did you mean ...?' without the question mark's line, or '' if nothing is near."""
    lowered = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f" (did you mean {lowered[found[0]]!r}?)" if found else ""


def format_bytes(count: int) -> str:
    """Write a size the way file managers do: 93 MB, 1.4 GB."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    digits = 1 if unit == "GB" else 0
    return f"{size:.{digits}f} {unit}"
