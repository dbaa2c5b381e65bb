"""Does drafting pay? Measured costs of a forward by rows, and the per-request switch.

A drafted node pays while the tokens it is expected to add take less time that way than they would
by more rounds. The costs are measured while the engine runs; nothing here changes the text under
the greedy, coupled and sample-match rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["PayoffSwitch", "StepClock"]

_DECAY = 0.98


@dataclass(slots=True)
class StepClock:
    """Running estimate of a forward's seconds as base + slope * rows.

    A least-squares line whose older samples fade. Slow outliers (another program took the cores)
    are clipped to twice the estimate.
    """

    _weight: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0
    _rows2: float = 0.0
    _cross: float = 0.0

    def record(self, rows: int, seconds: float) -> None:
        """Add a measured forward.

        Args:
            rows: Rows in the batch.
            seconds: Wall-clock seconds.
        """
        if self.is_known:
            seconds = min(seconds, 2 * self.seconds(rows))
        for name, value in (
            ("_weight", 1.0),
            ("_rows", float(rows)),
            ("_seconds", seconds),
            ("_rows2", float(rows) * rows),
            ("_cross", rows * seconds),
        ):
            setattr(self, name, getattr(self, name) * _DECAY + value)

    @property
    def is_known(self) -> bool:
        """True once forwards of different row counts were measured."""
        return self._weight > 3 and self._variance > 0.5

    def wants_plain(self, requests: int) -> bool:
        """True if only drafted rounds of one size were seen: a plain step would tell costs apart.

        Args:
            requests: Requests that decode, which is the rows of a plain step.
        """
        if self._weight <= 3 or self._variance > 0.5:
            return False
        return self._rows / self._weight > requests + 0.5

    @property
    def _variance(self) -> float:
        return self._rows2 / self._weight - (self._rows / self._weight) ** 2

    @property
    def slope(self) -> float:
        """Seconds a further row costs, never under 0; 0 until known."""
        if not self.is_known:
            return 0.0
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        covariance = self._cross / self._weight - mean_rows * mean_seconds
        return max(0.0, covariance / self._variance)

    def seconds(self, rows: float) -> float:
        """Estimated seconds of a forward of so many rows; 0 before any sample."""
        if self._weight == 0:
            return 0.0
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        return max(mean_seconds * 0.1, mean_seconds + self.slope * (rows - mean_rows))


@dataclass(slots=True)
class PayoffSwitch:
    """Switches drafting off for a request while it loses, and probes again.

    Over the last rounds with a non-empty proposal, drafting gains when
    mean committed tokens > 1 + extra seconds / seconds of the request's share of a plain step.

    Attributes:
        allowed: False to never switch off.
        off_count: Times it switched off.
    """

    allowed: bool = True
    off_count: int = 0
    _tokens: float = 0.0
    _ratio: float = 0.0
    _rounds: float = 0.0
    _pause: int = 0
    _next_pause: int = 16
    _since_probe: int = field(default=0)

    _FADE = 0.9
    _LEAST_ROUNDS = 6
    _LONGEST_PAUSE = 256

    @property
    def is_on(self) -> bool:
        """True if the request should be drafted for in this round."""
        return not self.allowed or self._pause == 0

    def skipped(self) -> None:
        """Count a round without drafting."""
        if self._pause > 0:
            self._pause -= 1

    def drafted(self, committed: int, extra: float, plain: float) -> None:
        """Count a round with drafting.

        Args:
            committed: Tokens the round committed.
            extra: Seconds that drafting and verifying its nodes added.
            plain: Seconds of the request's share of a plain step.
        """
        if plain <= 0:
            return
        self._tokens = self._tokens * self._FADE + committed
        self._ratio = self._ratio * self._FADE + 1 + extra / plain
        self._rounds = self._rounds * self._FADE + 1
        self._since_probe += 1
        if self._since_probe < self._LEAST_ROUNDS:
            return
        if self._tokens >= self._ratio:
            self._next_pause = 16
            return
        if self.allowed:
            self.off_count += 1
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, self._LONGEST_PAUSE)
            self._tokens = self._ratio = self._rounds = 0.0
            self._since_probe = 0
