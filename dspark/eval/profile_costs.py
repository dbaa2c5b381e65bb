"""A profile as what an engine asks for costs (`EngineConfig.step_seconds`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark.eval.profile import Profile, seconds_for
from dspark.payoff import StepSeconds

__all__ = ["ExpertCosts", "ProfileCosts", "costs_of"]


def costs_of(profile: Profile) -> StepSeconds:
    """Seconds of forwards as a profile measured them, for `EngineConfig.step_seconds`.

    Args:
        profile: The curve. The engine corrects it by what its own forwards take
            (`dspark.seen_costs`) and, if it counted experts, by those that they wake
            (`dspark.expert_reuse`).
    """
    return ExpertCosts(profile) if profile.experts else ProfileCosts(profile)


class ProfileCosts:
    """A profile as costs; see `dspark.seen_costs.MeasuredCosts`.

    Args:
        profile: The curve.
    """

    is_measured = True

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def __call__(self, rows: int, context: int) -> float:
        """Seconds of a forward; see `dspark.eval.profile.seconds_for`."""
        return seconds_for(self._profile, rows, context)


class ExpertCosts(ProfileCosts):
    """A profile of a mixture of experts; see `dspark.expert_reuse.PricesExperts`.

    Args:
        profile: The curve, with experts.
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        counts = sorted(profile.experts or (), key=lambda count: count.rows)
        self._rows = [count.rows for count in counts]
        self._woken = [count.distinct_experts for count in counts]
        self.seconds_per_expert = self._price()

    def woken(self, rows: int) -> float:
        """Distinct experts of a layer, on lines between counts, constant beyond them."""
        return float(np.interp(rows, self._rows, self._woken))

    def _price(self) -> float:
        """Seconds of one more expert in every layer.

        By rows r a step takes s(r) = s(1) + b (r - 1) + c (E(r) - E(1)) with E the experts woken:
        least squares at the shortest context, with neither b nor c below 0.
        """
        points = self._profile.curve(self._profile.contexts[0])
        rows = np.array([point.rows for point in points], dtype=np.float64)
        woken = np.array([self.woken(point.rows) for point in points])
        seconds = np.array([point.median for point in points])
        return _share_of_second(rows - rows[0], woken - woken[0], seconds - seconds[0])


def _share_of_second(
    first: NDArray[np.float64], second: NDArray[np.float64], y: NDArray[np.float64]
) -> float:
    """C of the least squares y = b first + c second with b, c >= 0."""
    both = np.linalg.lstsq(np.stack((first, second), axis=1), y, rcond=None)[0]
    if both.min() >= 0:
        return float(both[1])
    alone = [max(0.0, float(x @ y) / float(x @ x)) if x.any() else 0.0 for x in (first, second)]
    errors = [((y - b * x) ** 2).sum() for b, x in zip(alone, (first, second), strict=True)]
    return alone[1] if errors[1] < errors[0] else 0.0
