"""Experts that the rows of a forward wake: counted, and what they make of its cost.

In a mixture of experts every row chooses k experts of a layer, and rows that choose the same ones
share the reading of their weights. How much the rows of a tree share depends on the text; a profile
knows it for its own trees alone. So forwards are watched while the engine runs, and where a profile
says what an expert costs, its seconds are corrected by the experts that forwards were seen to wake
more, or fewer, than the profile's did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dspark.target import Target

__all__ = ["ExpertCounter", "ExpertReuse", "PricesExperts", "TellsExperts"]

FloatArray = NDArray[np.float64]

_DECAY = 0.98  # of what was seen, a forward
_TRUST = 4  # forwards' worth of one row's experts that count as the profile says


@runtime_checkable
class TellsExperts(Protocol):
    """A target that tells which experts its rows are routed to."""

    def watch_experts(
        self, note: Callable[[int, torch.Tensor], None]
    ) -> AbstractContextManager[None]:
        """Have every forward inside the block report its routing.

        Args:
            note: Called with a layer and the experts chosen there, int64 [n, k]. Padding rows that
                exact mode adds are among the rows, since they wake experts too.
        """
        ...


@runtime_checkable
class PricesExperts(Protocol):
    """Measured costs of forwards (`dspark.payoff.StepSeconds`) that know the experts' part."""

    @property
    def seconds_per_expert(self) -> float:
        """Seconds that a forward takes longer for one more distinct expert in every layer."""
        ...

    def woken(self, rows: int) -> float:
        """Distinct experts of a layer that a measured forward of so many rows woke, on average."""
        ...

    def __call__(self, rows: int, context: int) -> float:
        """Seconds of a forward."""
        ...


class ExpertCounter:
    """Counts the experts that forwards wake.

    Args:
        target: The target; one that does not tell, or has no experts, is not watched.

    Attributes:
        chosen: Experts chosen by rows, over all layers and forwards counted.
        woken: Distinct experts of a layer, over all layers and forwards counted: chosen / woken is
            how many rows share an expert.
        last: Distinct experts of a layer in the last forward counted, the mean over layers; None
            if there were none.
    """

    def __init__(self, target: Target) -> None:
        self._target = target if isinstance(target, TellsExperts) else None
        self.chosen = 0
        self.woken = 0
        self.last: float | None = None

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count the forward inside the block."""
        self.last = None
        if self._target is None:
            yield
            return
        found: list[int] = []

        def note(layer: int, chosen: torch.Tensor) -> None:
            self.chosen += chosen.numel()
            found.append(len(torch.unique(chosen)))

        with self._target.watch_experts(note):
            yield
        if not found:  # it has no experts, and looking for them takes time
            self._target = None
            return
        self.woken += sum(found)
        self.last = sum(found) / len(found)


class ExpertReuse:
    """Experts that forwards wake, against those that a profile's forwards of as many rows woke.

    Args:
        prices: The profile.
    """

    def __init__(self, prices: PricesExperts) -> None:
        self._prices = prices
        self._one = prices.woken(1)
        self._more: list[float] = []  # experts beyond those of one row, by rows
        self._seen = 0.0
        self._expected = 0.0

    def record(self, rows: int, woken: float) -> None:
        """Add a forward.

        Args:
            rows: Its rows.
            woken: Distinct experts of a layer, the mean over layers.
        """
        expected = self._expect(rows + 1)[rows]
        if expected > 0:
            self._seen = self._seen * _DECAY + max(0.0, woken - self._one)
            self._expected = self._expected * _DECAY + expected

    @property
    def ratio(self) -> float:
        """Experts woken beyond those of one row, over what the profile expects; 1 at first."""
        trust = _TRUST * self._one
        return (self._seen + trust) / (self._expected + trust)

    def seconds(self, first: int, count: int) -> FloatArray:
        """What to add to the profile's seconds of first, first + 1, ... rows, float64 [count]."""
        each = self._prices.seconds_per_expert * (self.ratio - 1)
        return each * np.array(self._expect(first + count)[first : first + count])

    def _expect(self, count: int) -> list[float]:
        """Experts beyond those of one row that the profile expects of 0, 1, ... rows."""
        for rows in range(len(self._more), count):
            self._more.append(max(0.0, self._prices.woken(rows) - self._one))
        return self._more
