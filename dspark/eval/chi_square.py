"""Pearson's test of counts against a law, and what it would have caught.

Tokens with few expected counts share one bin, since the statistic's law is chi-square only where
every bin expects several. Statistics of independent samples add, and so do their degrees of
freedom, which pools contexts too small to say anything by themselves.

**Source:** Pearson 1900; noncentral chi-square as a Poisson mixture: Johnson, Kotz, Balakrishnan,
Continuous Univariate Distributions 2, chapter 29.

Letters: V vocabulary, K bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "LEAST_EXPECTED",
    "LawTest",
    "compare_counts",
    "critical_value",
    "detectable_shift",
    "noncentral_tail",
    "pool",
    "smallest",
    "upper_tail",
]

FloatArray = NDArray[np.float64]

LEAST_EXPECTED = 10.0
"""Expected counts of a bin at least; the usual 5 is too few for tails of 1e-6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LawTest:
    """Counts against a law.

    Attributes:
        samples: Tokens counted.
        statistic: Pearson's statistic over the bins.
        dof: Bins less one; 0 if the counts cannot tell anything.
        impossible: Tokens counted to which the law gives no mass.
        bins: Token ids of the bins of a single token; all others share the last bin.
        has_rest: True if there is such a last bin.
        law: float64 [K], mass of the bins.
    """

    samples: int
    statistic: float
    dof: int
    impossible: tuple[int, ...] = ()
    bins: tuple[int, ...] = ()
    has_rest: bool = False
    law: FloatArray

    @property
    def p_value(self) -> float:
        """Chance of so large a statistic under the law; 0 if something impossible was seen."""
        if self.impossible:
            return 0.0
        return upper_tail(self.statistic, self.dof)

    def binned(self, values: FloatArray) -> FloatArray:
        """Sum values [V] over the bins: float64 [K]."""
        own = values[list(self.bins)]
        if not self.has_rest:
            return own
        return np.append(own, values.sum() - own.sum())

    def shift(self, other: FloatArray) -> float:
        """Noncentrality if the counts came from another law [V]: n sum (other - law)^2 / law."""
        if self.dof == 0:
            return 0.0
        difference = self.binned(other) - self.law
        return float(self.samples * (difference**2 / self.law).sum())


def compare_counts(
    counts: Mapping[int, int], law: FloatArray, *, least: float = LEAST_EXPECTED
) -> LawTest:
    """Test counts of tokens against a law.

    Args:
        counts: Token id -> how often it came.
        law: float64 [V], sums to 1.
        least: Expected counts of a bin at least.

    Returns:
        The test.
    """
    samples = sum(counts.values())
    impossible = tuple(sorted(t for t, count in counts.items() if count and not law[t] > 0))
    order = np.argsort(-law, kind="stable")[: max(2, int(samples / least) + 1)]
    least *= 1 - 1e-9  # rounding must not tip an exact count
    own = [int(token) for token in order if samples * law[token] >= least]
    rest = 1.0 - float(law[own].sum())
    has_rest = rest > 1e-12
    if has_rest and samples * rest < least and own:
        own.pop()  # too small a rest takes the smallest bin in
    mass = law[own]
    seen = np.array([counts.get(token, 0) for token in own], dtype=np.float64)
    if has_rest:
        mass = np.append(mass, 1.0 - mass.sum())
        seen = np.append(seen, samples - seen.sum())
    dof = max(len(mass) - 1, 0)
    expected = samples * mass
    statistic = float(((seen - expected) ** 2 / expected).sum()) if dof else 0.0
    return LawTest(
        samples=samples,
        statistic=statistic,
        dof=dof,
        impossible=impossible,
        bins=tuple(own),
        has_rest=has_rest,
        law=mass,
    )


def pool(tests: Sequence[LawTest]) -> LawTest:
    """Add tests of independent samples up."""
    return LawTest(
        samples=sum(test.samples for test in tests),
        statistic=sum(test.statistic for test in tests),
        dof=sum(test.dof for test in tests),
        impossible=tuple(token for test in tests for token in test.impossible),
        law=np.zeros(0),
    )


def upper_tail(statistic: float, dof: int) -> float:
    """Give the chance that chi-square with `dof` degrees of freedom exceeds a value."""
    if dof <= 0:
        return 1.0
    half = torch.tensor([dof / 2, max(statistic, 0.0) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def noncentral_tail(value: float, dof: int, shift: float) -> float:
    """Give the chance that noncentral chi-square exceeds a value: the power at that shift."""
    if dof <= 0:
        return 0.0
    mean = shift / 2
    reach = 12 * math.sqrt(mean) + 30
    first = max(0, int(mean - reach))
    j = torch.arange(first, int(mean + reach) + 1, dtype=torch.float64)
    log_weight = torch.special.xlogy(j, torch.tensor(mean, dtype=torch.float64)) - mean
    weight = torch.exp(log_weight - torch.lgamma(j + 1))
    tail = torch.special.gammaincc(dof / 2 + j, torch.full_like(j, value / 2))
    return float((weight * tail).sum())


def critical_value(alpha: float, dof: int) -> float:
    """Give the value that chi-square exceeds with chance alpha."""
    low, high = 0.0, dof + 10.0
    while upper_tail(high, dof) > alpha:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle, dof) > alpha else (low, middle)
    return high


def detectable_shift(alpha: float, dof: int, power: float = 0.9) -> float:
    """Give the least noncentrality that a test at level alpha finds with chance `power`."""
    value = critical_value(alpha, dof)
    high = value + 10.0
    while noncentral_tail(value, dof, high) < power:
        high *= 2
    return smallest(lambda shift: noncentral_tail(value, dof, shift) >= power, 0.0, high)


def smallest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Find by bisection where a condition that holds at `high`, and from somewhere on, begins."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
