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

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["MeasuredCosts", "SeenCosts"]

FloatArray = NDArray[np.float64]

_FADE = 0.98  # a forward: the last 50 or so count
_NOISE = 0.05  # of a forward's seconds, relative
_EXPECTED = (1.0, 1.0, 0.0)
_SPREAD = (0.5, 1.0, 0.2)  # of a, b, c before anything was seen
_TRUST = tuple(1 / spread**2 for spread in _SPREAD)
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
        # Plain numbers: it is asked and told in every round, and numpy takes longer over three.
        self._products = [0.0] * 6  # sums of aa, ab, ac, bb, bc, cc
        self._targets = [0.0] * 3
        self._factors: tuple[float, float, float] | None = _EXPECTED

    @property
    def factors(self) -> tuple[float, float, float]:
        """The a, b and c of the module's formula; a and b never below a tenth."""
        if self._factors is None:
            a, b, c = self._solve()
            self._factors = max(a, 0.1), max(b, 0.1), c
        return self._factors

    def _solve(self) -> tuple[float, float, float]:
        """The normal equations, by Cholesky's way; without c where it would be negative."""
        aa, ab, ac, bb, bc, cc = self._products
        aa, bb, cc = (own + trust for own, trust in zip((aa, bb, cc), _TRUST, strict=True))
        expected = zip(self._targets, _TRUST, _EXPECTED, strict=True)
        a, b, c = (own + trust * value for own, trust, value in expected)
        ratio_b, ratio_c = ab / aa, ac / aa
        bb, bc, cc = bb - ratio_b * ab, bc - ratio_b * ac, cc - ratio_c * ac
        b, c = b - ratio_b * a, c - ratio_c * a
        found_c = max(0.0, (c - bc / bb * b) / (cc - bc / bb * bc))  # contexts never save time
        found_b = (b - bc * found_c) / bb
        return (a - ab * found_b - ac * found_c) / aa, found_b, found_c

    def record(self, requests: int, alone: float, profiled: float, seconds: float) -> None:
        """Add a forward.

        Args:
            requests: Requests in it.
            alone: Seconds that the profile has for one row.
            profiled: Seconds that it has for the forward's rows.
            seconds: What it took.
        """
        base, row, request = self.factors
        further, others = profiled - alone, (requests - 1) * alone
        seconds = min(seconds, _MOST * (base * alone + row * further + request * others))
        # Errors grow with the forward.
        a, b, c, y = alone / profiled, further / profiled, others / profiled, seconds / profiled
        products = (a * a, a * b, a * c, b * b, b * c, c * c)
        self._products = _faded(self._products, products)
        self._targets = _faded(self._targets, (a * y, b * y, c * y))
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
        row, fixed = self._line(requests, alone)
        return np.maximum(row * profiled + fixed, 0.1 * profiled)

    def once(self, requests: int, alone: float, profiled: float) -> float:
        """As `seconds`, of one forward."""
        row, fixed = self._line(requests, alone)
        return max(row * profiled + fixed, 0.1 * profiled)

    def _line(self, requests: int, alone: float) -> tuple[float, float]:
        """What a profile's seconds are multiplied by, and what comes on top."""
        base, row, request = self.factors
        return row, alone * (base - row + request * (requests - 1))


def _faded(sums: Sequence[float], new: Sequence[float]) -> list[float]:
    """Sums with a forward added, older ones fading."""
    return [_FADE * old + value / _NOISE**2 for old, value in zip(sums, new, strict=True)]
