"""Small pieces of wording, and sizes as people write them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from dspark.errors import ConfigError

__all__ = ["format_bytes", "near_match", "parse_bytes"]

_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}


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


def parse_bytes(text: str) -> int:
    """Read a size: "32GiB", "500MB", "1.5 GiB", "4096".

    Args:
        text: A number and a unit: B, kB, MB, GB, TB (powers of 1000) or KiB ... TiB (of 1024).

    Raises:
        ConfigError: If it is not a size, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT]?)(I?)B?)", text.strip().upper())
    size = 0
    if found is not None:
        number, unit, is_binary = found.groups()
        power = _UNITS[unit]
        if unit:
            power = 1 << power if is_binary else 1000 ** (power // 10)
        size = int(float(number) * power)
    if found is None or size <= 0 or (found[3] and not found[2]):
        raise ConfigError(f"{text!r} is no size; give a number and a unit, such as 32GiB or 500MB.")
    return size
