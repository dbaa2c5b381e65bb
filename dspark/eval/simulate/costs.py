"""What a round takes: the target's forward, drafting, and the rest.

    seconds = step(rows, requests, context) + draft(requests that draft) + rest(requests)

Rows are anchors, drafted nodes and prompt tokens that ride along. With a prefill rate, prompt
tokens are no rows but take 1 / rate seconds each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dspark.errors import ConfigError
from dspark.eval.profile import Profile, seconds_for
from dspark.tree import FloatArray, IntArray

__all__ = [
    "Costs",
    "CountSeconds",
    "Line",
    "ProfileSteps",
    "Steps",
    "octave_of",
    "parse_line",
    "typical_context",
]

_PER_OCTAVE = 8  # contexts told apart between n and 2 n tokens, as dspark.payoff.RoundCosts


def octave_of(context: FloatArray) -> IntArray:
    """The number of the group of contexts, within 5 % of each other, that each belongs to."""
    found = np.rint(_PER_OCTAVE * np.log2(np.maximum(context, 1)))
    return np.asarray(found, dtype=np.int64)


def typical_context(octave: int) -> int:
    """The context that stands for a group."""
    return round(2 ** (octave / _PER_OCTAVE))


class Steps(Protocol):
    """Seconds of a forward of the target."""

    def seconds(self, rows: IntArray, requests: IntArray, context: FloatArray) -> FloatArray:
        """Seconds of forwards; the three arrays are broadcast against each other.

        Args:
            rows: Rows, >= 0; no rows take as long as one.
            requests: Requests that they belong to.
            context: Committed tokens of a request, on average.
        """
        ...


class CountSeconds(Protocol):
    """Seconds of something that is done for so many requests at once."""

    def seconds(self, requests: IntArray) -> FloatArray:
        """Seconds, float64 of the shape of `requests`; 0 for none."""
        ...


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds that grow with the requests.

    Attributes:
        base: Seconds for any request at all.
        each: Seconds for each request.
    """

    base: float = 0.0
    each: float = 0.0

    def seconds(self, requests: IntArray) -> FloatArray:
        """Base + each requests, 0 for none."""
        return np.where(requests > 0, self.base + self.each * requests, 0.0)


def parse_line(option: str, text: str) -> Line:
    """Read milliseconds: "3" for any number of requests, or "3+0.2" with 0.2 for each.

    Raises:
        ConfigError: If it is neither, or below 0.
    """
    base, _, each = text.partition("+")
    try:
        line = Line(float(base) / 1000, float(each or 0) / 1000)
    except ValueError:
        line = Line(math.nan)
    if not (0 <= line.base < math.inf and 0 <= line.each < math.inf):
        raise ConfigError(
            f"{option} is {text!r}, but must be milliseconds, such as 3, or 3+0.2 for 0.2 more a "
            "request."
        )
    return line


class ProfileSteps:
    """Forwards as a profile measured them, jagged where they are.

    Read by `seconds_for`; contexts within 5 % of each other share a reading, as in the engine.

    Args:
        profile: The curve.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._table = np.zeros((0, 0))  # seconds by octave of the context and rows, NaN if unread

    def seconds(self, rows: IntArray, requests: IntArray, context: FloatArray) -> FloatArray:
        """See `Steps`; requests make no difference."""
        del requests
        octave = octave_of(context)
        most, deepest = int(rows.max(initial=1)), int(octave.max(initial=0))
        have = self._table.shape
        if most >= have[1] or deepest >= have[0]:
            size = (max(deepest + 1, have[0]), 2 * most + 1 if most >= have[1] else have[1])
            self._table = np.full(size, np.nan)
        found = self._table[octave, np.maximum(rows, 1)]
        if np.isnan(found).any():
            for value in np.unique(octave).tolist():
                if np.isnan(self._table[value, 1]):
                    self._table[value] = self._curve(value, self._table.shape[1])
            found = self._table[octave, np.maximum(rows, 1)]
        return np.asarray(found, dtype=np.float64)

    def _curve(self, octave: int, size: int) -> list[float]:
        typical = typical_context(octave)
        first = seconds_for(self.profile, 1, typical)
        return [first, *(seconds_for(self.profile, rows, typical) for rows in range(1, size))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What rounds take.

    Attributes:
        steps: The target's forward.
        draft: Drafting, by the source of drafts ("chain", "mtp", "tree"); nothing where it is
            not named.
        rest: Everything else of a round.
        prefill_rate: Prompt tokens a second; None counts them as rows of the forward.
        stated: What stands behind these figures, line by line, for people.
    """

    steps: Steps
    draft: Mapping[str, CountSeconds] = field(default_factory=dict)
    rest: CountSeconds = field(default_factory=Line)
    prefill_rate: float | None = None
    stated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rate = self.prefill_rate
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"the prefill rate is {rate}, but must be a finite number above 0.")

    def draft_seconds(self, source: str, requests: IntArray) -> FloatArray:
        """Seconds of drafting for so many requests."""
        known = self.draft.get(source)
        return np.zeros(requests.shape) if known is None else known.seconds(requests)

    def forward(
        self, rows: IntArray, prompt: IntArray, requests: IntArray, context: FloatArray
    ) -> FloatArray:
        """Seconds of a forward with prompt tokens riding along; all arrays are broadcast."""
        if self.prefill_rate is None:
            return self.steps.seconds(rows + prompt, requests, context)
        alone = np.where(rows > 0, self.steps.seconds(rows, requests, context), 0.0)
        return alone + prompt / self.prefill_rate
