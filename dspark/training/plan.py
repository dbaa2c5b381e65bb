"""Which samples each step sees."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.training.recipe import RunSection
from dspark.training.samples import Sample, plan_epoch

__all__ = ["Plan"]


class Plan:
    """The steps of a run.

    Args:
        samples: Training samples.
        run: Length, size of a step, seed.

    Attributes:
        total: Steps of the run.
    """

    def __init__(self, samples: Sequence[Sample], run: RunSection) -> None:
        self._samples = samples
        self._run = run
        self._starts = [0]  # first step of every epoch so far
        self._at: tuple[int, list[list[Sample]]] = (-1, [])
        self.total = self._count()

    def steps_of(self, epoch: int) -> list[list[Sample]]:
        """Samples of every step of an epoch."""
        if self._at[0] != epoch:
            self._at = (epoch, plan_epoch(self._samples, self._run, epoch))
        return self._at[1]

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a step (from 0), and its number there."""
        while self._starts[-1] <= step:
            last = len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self.steps_of(last)))
        epoch = len(self._starts) - 2
        while self._starts[epoch] > step:
            epoch -= 1
        return epoch, step - self._starts[epoch]

    def epochs_at(self, step: int) -> float:
        """Passes over the data after a number of steps."""
        epoch, inside = self.locate(step)
        return epoch + inside / len(self.steps_of(epoch))

    def _count(self) -> int:
        if self._run.steps is not None:
            return self._run.steps
        whole, rest = divmod(self._run.epochs or 0.0, 1)
        steps = sum(len(self.steps_of(epoch)) for epoch in range(int(whole)))
        if rest:
            steps += round(rest * len(self.steps_of(int(whole))))
        return max(1, steps)
