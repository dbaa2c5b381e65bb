"""What forwards were seen to take, against what a profile says.

A profile is measured once, on a machine in one state, with trees of few requests. Hours later other
programs may share the memory's bandwidth, or have left; and attention reads the context of every
request, however few rows it has. So forwards are timed while the engine runs, and the profile's
curve p(B) of B rows becomes

    s(q, B) = a p(1) + b (p(B) - p(1)) + c (q - 1) p(1)

for q requests: what a forward takes anyhow, what rows cost, and what a request costs beside its
rows. a, b and c are a Bayesian regression on the forwards seen, whose older ones fade; they begin
at 1, 1 and 0, where the profile is right. The curve's steps stay where they are.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["MeasuredCosts", "SeenCosts"]

FloatArray = NDArray[np.float64]

_FADE = 0.98  # a forward: the last 50 or so count
_NOISE = 0.05  # of a forward's seconds, relative
_EXPECTED = np.array([1.0, 1.0, 0.0])
_SPREAD = np.array([0.5, 1.0, 0.2])  # of a, b, c before anything was seen
_MOST = 2.0  # times the estimate: slower forwards waited for another program


@runtime_checkable
class MeasuredCosts(Protocol):
    """Costs of forwards (`dspark.payoff.StepSeconds`) that the engine's own forwards may correct.

    Any other function is taken at its word.
    """

    @property
    def is_measured(self) -> bool:
        """True if it was measured on a machine like this one."""
        ...

    def __call__(self, rows: int, context: int) -> float:
        """Seconds of a forward."""
        ...


class SeenCosts:
    """Regression of seconds on a profile's, by rows and requests."""

    def __init__(self) -> None:
        self._prior = np.diag(1 / _SPREAD**2)
        self._products = np.zeros((3, 3))
        self._targets = np.zeros(3)
        self._factors: FloatArray | None = _EXPECTED.copy()

    @property
    def factors(self) -> FloatArray:
        """The a, b and c of the module's formula, float64 [3]; a and b never below a tenth."""
        if self._factors is None:
            found = self._solve(3)
            if found[2] < 0:  # contexts never save time: what is left over goes to a and b
                found = np.append(self._solve(2), 0.0)
            self._factors = np.maximum(found, [0.1, 0.1, 0.0])
        return self._factors

    def _solve(self, count: int) -> FloatArray:
        """The first factors, the others being as expected."""
        products = (self._prior + self._products)[:count, :count]
        targets = (self._prior @ _EXPECTED + self._targets)[:count]
        found: FloatArray = np.linalg.solve(products, targets)
        return found

    def record(self, requests: int, alone: float, profiled: float, seconds: float) -> None:
        """Add a forward.

        Args:
            requests: Requests in it.
            alone: Seconds that the profile has for one row.
            profiled: Seconds that it has for the forward's rows.
            seconds: What it took.
        """
        parts = np.array([alone, profiled - alone, (requests - 1) * alone])
        seconds = min(seconds, _MOST * float(parts @ self.factors))
        parts /= profiled  # errors grow with the forward
        weight = 1 / _NOISE**2
        self._products *= _FADE
        self._targets *= _FADE
        self._products += weight * np.outer(parts, parts)
        self._targets += weight * seconds / profiled * parts
        self._factors = None

    def seconds(self, requests: int, alone: float, profiled: FloatArray) -> FloatArray:
        """Seconds of forwards.

        Args:
            requests: Requests in each, >= 1.
            alone: Seconds that the profile has for one row.
            profiled: Seconds that it has for their rows, float64 [n].

        Returns:
            float64 [n].
        """
        base, row, request = self.factors.tolist()
        fixed = alone * (base - row + request * (requests - 1))
        return np.maximum(row * profiled + fixed, 0.1 * profiled)
