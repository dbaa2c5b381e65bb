"""The scheduler's decisions for many replicas at once, in numpy.

They are those of `dspark.verify.scheduler.Scheduler`, node for node; only the form differs: one
sort of a matrix instead of one over lists of trees. tests/eval/test_simulate_admission.py holds the
two against each other.

Letters: M replicas, C slots, W nodes of a proposal at the most.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from dspark.tree import BoolArray, FloatArray, IntArray
from dspark.verify.scheduler_setting import Schedule, ScheduleKind

__all__ = ["Budgets", "FirstNodes", "admit_alone", "admit_jointly", "bars"]

_LAG = 2  # as dspark.verify.scheduler
_RECENT, _FIRST_PAUSE, _LONGEST_PAUSE = 4, 8, 64  # as dspark.payoff.FirstNode

Survival: TypeAlias = FloatArray
"""float64 [M, C, W], falling along W, below 0 where there is no node."""


def admit_alone(schedule: Schedule, survival: Survival) -> IntArray:
    """Nodes of each request under a schedule that looks at each by itself.

    Args:
        schedule: OFF, FIXED or THRESHOLD.
        survival: Of what was drafted.

    Returns:
        int64 [M, C].
    """
    if schedule.kind is ScheduleKind.THRESHOLD:
        return np.asarray((survival >= schedule.value).sum(axis=2), dtype=np.int64)
    offered = np.asarray((survival >= 0).sum(axis=2), dtype=np.int64)
    if schedule.kind is ScheduleKind.FIXED:
        return np.minimum(offered, int(schedule.value))
    return offered


def admit_jointly(
    survival: Survival, value: FloatArray, rates: FloatArray, *, stops: bool
) -> IntArray:
    """Nodes of each request when all requests of a replica share one budget.

    Args:
        survival: Of what was drafted.
        value: float64 [M], requests that decode: expected tokens of a round without nodes.
        rates: float64 [M, C W + 1], rounds a second with 0, 1, ... nodes.
        stops: Stop at the first node that does not raise Theta, instead of taking the largest.

    Returns:
        int64 [M, C].

    **Source:** DSpark, arXiv 2607.05147, Algorithm 1; the global form is ours.
    """
    replicas, slots, width = survival.shape
    flat = survival.reshape(replicas, slots * width)
    order = np.argsort(-flat, axis=1, kind="stable")
    worth = np.take_along_axis(flat, order, axis=1)
    count = (flat >= 0).sum(axis=1)
    theta = np.empty((replicas, slots * width + 1))
    theta[:, 0] = value
    np.cumsum(worth, axis=1, out=theta[:, 1:])
    theta[:, 1:] += value[:, None]
    theta *= rates
    behind = np.arange(slots * width + 1) > count[:, None]
    if stops:
        ends = theta[:, 1:] <= theta[:, :-1]
        ends |= behind[:, 1:]
        best = np.where(ends.any(axis=1), ends.argmax(axis=1), slots * width)
    else:
        theta[behind] = -np.inf
        best = theta.argmax(axis=1)
    admitted = np.zeros(flat.shape, dtype=np.bool_)
    ranks = np.arange(slots * width) < best[:, None]
    np.put_along_axis(admitted, order, ranks, axis=1)
    return np.asarray(admitted.reshape(survival.shape).sum(axis=2), dtype=np.int64)


def bars(value: FloatArray, rates: FloatArray, caps: IntArray, *, stops: bool) -> FloatArray:
    """The survival that a request's best node must exceed, see `Scheduler.bar`; float64 [M].

    Args:
        value: float64 [M].
        rates: float64 [M, N + 1].
        caps: int64 [M], nodes that a request may draft, >= 1.
        stops: As for `admit_jointly`.
    """
    most = 1 if stops else int(caps.max(initial=1))
    count = np.arange(1, most + 1)
    each = value[:, None] * (rates[:, :1] / rates[:, 1 : most + 1] - 1) / count
    if not stops:
        each[count > caps[:, None]] = np.inf
    return np.asarray(each.min(axis=1), dtype=np.float64)


class Budgets:
    """Nodes that requests were worth two drafted rounds ago: the asynchronous schedule.

    Args:
        shape: (M, C).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.past = np.zeros((*shape, _LAG), dtype=np.int64)  # oldest first
        self.known = np.zeros(shape, dtype=np.int64)

    def reset(self, slots: BoolArray) -> None:
        """Forget the requests that were in these slots, bool [M, C]."""
        self.known[slots] = 0

    def admit(self, offered: IntArray) -> IntArray:
        """The budgets of this round, int64 [M, C]; all that is offered while none is known."""
        return np.where(self.known == _LAG, np.minimum(self.past[..., 0], offered), offered)

    def note(self, worth: IntArray, has_offer: BoolArray) -> None:
        """Keep what requests are worth by this round's survival, where they drafted."""
        full = has_offer & (self.known == _LAG)
        self.past[full, 0] = self.past[full, 1]
        at = np.minimum(self.known, _LAG - 1)
        m, c = np.nonzero(has_offer)
        self.past[m, c, at[m, c]] = worth[m, c]
        self.known[has_offer] = np.minimum(self.known[has_offer] + 1, _LAG)

    def keep(self, replicas: BoolArray) -> None:
        """Drop the other replicas."""
        self.past, self.known = self.past[replicas], self.known[replicas]


class FirstNodes:
    """Whether a request's next proposal can be expected to hold a node that pays, of all slots.

    As `dspark.payoff.FirstNode`.

    Args:
        shape: (M, C).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.recent = np.zeros((*shape, _RECENT))
        self.seen = np.zeros(shape, dtype=np.int64)
        self.wait = np.zeros(shape, dtype=np.int64)
        self.pause = np.full(shape, _FIRST_PAUSE)

    def reset(self, slots: BoolArray) -> None:
        """Forget the requests that were in these slots, bool [M, C]."""
        self.seen[slots] = self.wait[slots] = 0
        self.pause[slots] = _FIRST_PAUSE

    def offered(self, best: FloatArray, has_offer: BoolArray) -> None:
        """Note the best node's survival of proposals, float64 [M, C], where there is one."""
        m, c = np.nonzero(has_offer)
        self.recent[m, c, self.seen[m, c] % _RECENT] = best[m, c]
        self.seen[has_offer] += 1

    def pay(self, bar: FloatArray, asked: BoolArray) -> BoolArray:
        """Decide about the next round, and count it where it is to be skipped.

        Args:
            bar: float64 [M], survival that the best node must exceed.
            asked: bool [M, C], requests to decide about.

        Returns:
            bool [M, C].
        """
        likely = (self.seen < _RECENT) | (self.recent.max(axis=2) > bar[:, None])
        self.wait[asked & likely] = 0
        self.pause[asked & likely] = _FIRST_PAUSE
        starts = asked & ~likely & (self.wait == 0)
        goes_on = asked & ~likely & (self.wait > 0)
        self.wait[goes_on] -= 1
        probes = goes_on & (self.wait == 0)
        self.wait[starts] = self.pause[starts]
        self.pause[starts] = np.minimum(2 * self.pause[starts], _LONGEST_PAUSE)
        return np.asarray((asked & likely) | probes, dtype=np.bool_)

    def keep(self, replicas: BoolArray) -> None:
        """Drop the other replicas."""
        self.recent, self.seen = self.recent[replicas], self.seen[replicas]
        self.wait, self.pause = self.wait[replicas], self.pause[replicas]
