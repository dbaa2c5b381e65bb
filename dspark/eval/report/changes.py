"""Changes from one file to another, their intervals, and cells that show them.

**Source:** Zou and Donner 2008 (MOVER): the interval of a difference from two intervals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark.eval.report.numbers import NONE, signed
from dspark.eval.report.numbers import change as change_text
from dspark.eval.report.page import Cell, Tone

__all__ = [
    "INTERVALS",
    "Change",
    "Triple",
    "difference_cell",
    "difference_of",
    "ratio_cell",
    "ratio_of",
]

INTERVALS = (
    "Intervals of a change come from those of the two figures as if the two were independent; both "
    "ran the same prompts, so they are rather too wide."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A difference, or a ratio, and its 95 % interval.

    Attributes:
        value: It.
        low: Lower end; None if one of the two figures has no interval.
        high: Upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def is_beyond(self, nothing: float) -> bool:
        """True if the interval leaves out the value that means no change."""
        return (
            self.low is not None
            and self.high is not None
            and not (self.low <= nothing <= self.high)
        )


Triple = tuple[float | None, float | None, float | None]
"""A figure and its interval: (figure, low, high)."""


def difference_of(one: Triple, two: Triple) -> Change | None:
    """The second figure minus the first, by MOVER as if the two were independent.

    Figures of the same prompts rise and fall together, so the interval is rather too wide.
    """
    (a, a_low, a_high), (b, b_low, b_high) = one, two
    if a is None or b is None:
        return None
    value = b - a
    if a_low is None or a_high is None or b_low is None or b_high is None:
        return Change(value=value)
    below = math.hypot(b - b_low, a_high - a)
    above = math.hypot(b_high - b, a - a_low)
    return Change(value=value, low=value - below, high=value + above)


def ratio_of(one: Triple, two: Triple) -> Change | None:
    """The second figure over the first, by MOVER on logarithms."""
    known = [x for x in itertools.chain(one, two) if x is not None]
    if one[0] is None or two[0] is None or min(known) <= 0:
        return None
    logs = [tuple(None if x is None else math.log(x) for x in triple) for triple in (one, two)]
    found = difference_of(_triple(logs[0]), _triple(logs[1]))
    if found is None:
        return None
    low = None if found.low is None else math.exp(found.low)
    high = None if found.high is None else math.exp(found.high)
    return Change(value=math.exp(found.value), low=low, high=high)


def _triple(values: Sequence[float | None]) -> Triple:
    figure, low, high = values
    return figure, low, high


def difference_cell(change: Change | None, *, is_more_better: bool, places: int = 2) -> Cell:
    """A difference with its interval, tinted if the interval leaves out zero."""
    return _cell(change, 0.0, lambda value: signed(value, places), is_more_better=is_more_better)


def ratio_cell(change: Change | None, *, is_more_better: bool) -> Cell:
    """A ratio as a change in percent, with its interval, tinted if it leaves out one."""
    return _cell(change, 1.0, change_text, is_more_better=is_more_better)


def _cell(
    change: Change | None,
    nothing: float,
    show: Callable[[float | None], str],
    *,
    is_more_better: bool,
) -> Cell:
    if change is None:
        return Cell(NONE)
    text = show(change.value)
    if change.low is not None and change.high is not None:
        text += f" ({show(change.low)} to {show(change.high)})"
    if not change.is_beyond(nothing):
        return Cell(text)
    is_better = (change.value > nothing) == is_more_better
    return Cell(text, Tone.GOOD if is_better else Tone.BAD)
