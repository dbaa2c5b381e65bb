"""Percentiles and bootstrap intervals of timings, in numpy.

An interval resamples prompts and repeats, each with replacement: a configuration was measured on
some prompts out of many, in some minutes out of many. Two configurations are resampled together, so
that what is easy for both, or slow for both, takes no part in their ratio.

**Source:** Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13
(percentile intervals).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RESAMPLES", "Resamples", "Timings", "percentiles", "speed_ratios"]

RESAMPLES = 2000
_LEVEL = (2.5, 97.5)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timings:
    """All answers of one configuration at one concurrency; R repeats, P prompts.

    Attributes:
        tokens: [R, P] tokens of an answer; 0 where it failed.
        shares: [R, P] seconds of the run that fall to the answer, in proportion to how long it was
            under way, so that the sum over a run without failures is the run's wall-clock time;
            0 where it failed.
        seconds: [R, P] how long it was under way; NaN where it failed.
    """

    tokens: Floats
    shares: Floats
    seconds: Floats

    @property
    def is_fine(self) -> NDArray[np.bool_]:
        """[R, P] True where an answer did not fail."""
        return ~np.isnan(self.seconds)

    def only(self, kept: NDArray[np.bool_]) -> Timings:
        """The same without the answers that are False in [R, P]."""
        return Timings(
            np.where(kept, self.tokens, 0.0),
            np.where(kept, self.shares, 0.0),
            np.where(kept, self.seconds, np.nan),
        )

    @property
    def speeds(self) -> Floats:
        """[R] tokens per second of every repeat; NaN where everything failed."""
        return _ratio(self.tokens.sum(axis=1), self.shares.sum(axis=1))

    @property
    def user_speeds(self) -> Floats:
        """[R, P] tokens per second as the user of each answer sees them."""
        return self.tokens / self.seconds


class Resamples:
    """Bootstrap resamples of R repeats and P prompts, the same for all that are compared.

    Args:
        repeats: R.
        prompts: P.
        seed: Of the draws.
        count: B, resamples.
    """

    def __init__(self, repeats: int, prompts: int, *, seed: int, count: int = RESAMPLES) -> None:
        rng = np.random.default_rng(seed)
        self._repeats = rng.integers(repeats, size=(count, repeats))  # [B, R]
        self._prompts = rng.integers(prompts, size=(count, prompts))  # [B, P]
        flat = self._prompts + prompts * np.arange(count)[:, None]
        times = np.bincount(flat.ravel(), minlength=count * prompts)
        self._times = times.reshape(count, prompts).astype(np.float64)  # how often each was drawn
        self._has_spread = repeats * prompts > 1

    def speed(self, timings: Timings) -> tuple[float, float] | None:
        """95 % interval of the median over repeats of tokens per second."""
        return self._interval(self._speeds(timings))

    def user_speed(self, timings: Timings) -> tuple[float, float] | None:
        """95 % interval of the median over repeats of the median over answers."""
        return self._interval(_medians(timings.user_speeds[:, self._prompts], axis=2))

    def ratio(self, upper: Timings, lower: Timings) -> tuple[float, float] | None:
        """95 % interval of the median over repeats of the ratio of tokens per second."""
        return self._interval(_ratio(self._speeds(upper), self._speeds(lower)))

    def _speeds(self, timings: Timings) -> Floats:
        """[R, B] tokens per second of every repeat with the prompts of every resample."""
        return _ratio(timings.tokens @ self._times.T, timings.shares @ self._times.T)

    def _interval(self, values: Floats) -> tuple[float, float] | None:
        """Percentiles of the resampled medians; None if one answer is all there is.

        Args:
            values: [R, B].
        """
        drawn = np.take_along_axis(values.T, self._repeats, axis=1)  # [B, R]
        medians = _medians(drawn, axis=1)
        known = medians[~np.isnan(medians)]
        if not self._has_spread or known.size == 0:
            return None
        low, high = np.percentile(known, _LEVEL)
        return float(low), float(high)


def speed_ratios(upper: Timings, lower: Timings) -> list[float]:
    """Ratio of tokens per second of every repeat in which both have an answer."""
    ratios = _ratio(upper.speeds, lower.speeds)
    return [value for value in ratios.tolist() if not np.isnan(value)]


def percentiles(
    values: Sequence[float] | Floats, points: Sequence[int], *, has_max: bool = False
) -> dict[str, float | None]:
    """Percentiles by name ("p50"), linear between neighbours; None each without any value."""
    array = np.asarray(values, dtype=np.float64)
    is_empty = array.size == 0
    found = {f"p{p}": None if is_empty else float(np.percentile(array, p)) for p in points}
    return {**found, "max": None if is_empty else float(array.max())} if has_max else found


def _ratio(upper: Floats, lower: Floats) -> Floats:
    """Elementwise quotient, NaN where nothing is divided by nothing."""
    return np.divide(upper, lower, out=np.full_like(upper, np.nan), where=lower > 0)


def _medians(values: Floats, *, axis: int) -> Floats:
    """Medians of what is not NaN; NaN where nothing else is."""
    is_empty = np.isnan(values).all(axis=axis, keepdims=True)
    medians: Floats = np.nanmedian(np.where(is_empty, 0.0, values), axis=axis)
    return np.where(np.squeeze(is_empty, axis=axis), np.nan, medians)
