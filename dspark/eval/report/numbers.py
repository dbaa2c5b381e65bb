"""Numbers as a report shows them: sensible digits, units, signs; a dash where there is none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "NONE",
    "change",
    "count",
    "decimals",
    "interval",
    "percent",
    "rounded",
    "seconds",
    "signed",
    "size",
    "time_unit",
    "times",
    "value_text",
]

NONE = "–"
"""What stands where there is no figure."""


def rounded(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, never in exponents below 10^15."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    places = digits - 1 - _exponent(value, digits)
    if places < 0:
        value = round(value, places)
    return _minus(f"{value:,.{max(0, places)}f}")


def _exponent(value: float, digits: int) -> int:
    """The power of ten of the first digit after rounding."""
    return int(f"{abs(value):.{digits - 1}e}".partition("e")[2])


def decimals(value: float | None, places: int = 2) -> str:
    """A number with so many decimal places."""
    return NONE if value is None else _minus(f"{value:,.{places}f}")


def count(value: int | None) -> str:
    """A whole number."""
    return NONE if value is None else _minus(f"{value:,}")


def percent(value: float | None, places: int = 1) -> str:
    """A share as percent."""
    return NONE if value is None else _minus(f"{100 * value:.{places}f} %")


def times(value: float | None) -> str:
    """A ratio."""
    return NONE if value is None else f"{value:.2f}×"


def signed(value: float | None, places: int = 2) -> str:
    """A difference, with its sign."""
    if value is None:
        return NONE
    text = f"{value:+,.{places}f}"
    return text[1:] if float(text.replace(",", "")) == 0 else _minus(text)


def change(value: float | None) -> str:
    """A ratio as a change in percent."""
    return NONE if value is None else f"{signed(100 * (value - 1), 1)} %"


def interval(low: float | None, high: float | None, places: int = 2) -> str:
    """An interval, or the dash."""
    if low is None or high is None:
        return NONE
    return f"{decimals(low, places)} to {decimals(high, places)}"


def time_unit(values: Iterable[float | None]) -> str:
    """The unit for a column of times: "s" if the largest is 10 s or more, else "ms"."""
    return "s" if max((v for v in values if v is not None), default=0.0) >= 10 else "ms"


def seconds(value: float | None, unit: str) -> str:
    """Seconds in a unit of `time_unit`."""
    return NONE if value is None else rounded(value * (1000 if unit == "ms" else 1))


def size(value: float | None) -> str:
    """Bytes, in binary units."""
    if value is None:
        return NONE
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1024, larger
    return f"{rounded(value)} {unit}"


def value_text(value: Any) -> str:
    """A setting's value: short, with words for what JSON has signs for."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(value_text(item) for item in value) or "none"
    text = str(value)
    is_checksum = len(text) >= 32 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_checksum else text


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")
