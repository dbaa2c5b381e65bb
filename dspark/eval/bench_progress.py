"""How long a benchmark will still take, from the runs that are done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command shows its help without torch
    from dspark.eval.bench import Planned

__all__ = ["TimeLeft"]

_LEAST_SHARE = 0.05
"""Share of a run from which on its own pace says more than what others took."""


class TimeLeft:
    """An estimate that knows that configurations differ in speed.

    A run that was seen before takes as long again; one that was not takes as long as others at the
    same concurrency, or else as any other.

    Args:
        planned: All runs, in order.
        clock: Seconds.
    """

    def __init__(
        self, planned: Sequence[Planned], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._left = list(planned)
        self._clock = clock
        self._seen: list[tuple[Planned, float]] = []
        self._current: Planned | None = None
        self._began = 0.0
        self._share = 0.0

    def started(self, planned: Planned) -> None:
        """A run begins."""
        self._current, self._began, self._share = planned, self._clock(), 0.0

    def advanced(self, share: float) -> None:
        """So much of it is done, 0 to 1."""
        self._share = share

    def ended(self, planned: Planned, seconds: float | None) -> None:
        """A run is done or left out.

        Args:
            planned: Which.
            seconds: How long it took, None if it was left out.
        """
        self._current = None
        self._left = [item for item in self._left if item.name != planned.name]
        if seconds is not None:
            self._seen.append((planned, seconds))

    def seconds(self) -> float | None:
        """Seconds that are left, None as long as nothing is known."""
        passed = 0.0 if self._current is None else self._clock() - self._began
        seen = list(self._seen)
        if self._current is not None and self._share >= _LEAST_SHARE:
            seen = [pair for pair in seen if pair[0].name[:2] != self._current.name[:2]]
            seen.append((self._current, passed / self._share))
        if not seen:
            return None
        total = sum(_expected(planned, seen) for planned in self._left)
        return max(0.0, total - passed)


def _expected(planned: Planned, seen: Sequence[tuple[Planned, float]]) -> float:
    """Seconds of a run, from those of the runs most like it."""
    same = [seconds for other, seconds in seen if other.name[:2] == planned.name[:2]]
    level = [seconds for other, seconds in seen if other.concurrency == planned.concurrency]
    return statistics.fmean(same or level or [seconds for _, seconds in seen])
