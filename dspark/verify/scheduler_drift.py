"""Online correction: how often drafted tokens are accepted against what their survival promised.

If survival is calibrated, the tokens accepted at a depth number, on average, the sum of the
survival of the nodes verified there, whichever nodes were chosen. So the ratio of the two sums,
over rounds whose weight fades, is a factor that makes the level right without any model of the
draft.

**Per depth, not overall.** Survival is a product of one estimate per step, so an error of each step
grows with the depth: a draft that overstates every step by 5 % is 5 % too high at depth 1 and 48 %
at depth 8, and one factor for all would be wrong at both ends, on which the cut depends. Deep nodes
are few, hence noisy; each depth therefore leans on the one above it, as `_TRUST` expected tokens of
evidence would.

**Whose rounds.** Under greedy, coupled and sample-match all requests share one record. Under rules
that draw from laws a request is corrected by its own past rounds alone: two requests with the same
seed have the same noise in the same round of theirs, so one's outcome would tell of the other's
tokens before they are drawn. A record of all of them exists too, for the log.

**What cannot be seen is forgotten.** A draft that was found so poor that none of its nodes is
verified any more gives no evidence either way. Each such round takes a fifth of the old evidence,
so that the draft gets another chance.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark.tree import DraftTree, FloatArray, IntArray

__all__ = ["Drift", "Outcome"]

logger = logging.getLogger(__name__)

_DEPTHS = 32  # deeper nodes count with the deepest
_SIZE = _DEPTHS + 1
_SHARED, _LOGGED = 0, 1  # rows
_NAMES = ("greedy, coupled, sample-match", "rejection, block")
_TRUST = 6.0  # expected tokens of evidence that the depth above stands for
_TOLERANCE = 0.1  # smaller deviations are left alone
_TELL = 1.2  # a factor that moved by more than this since it was last told is logged
_FADE_SHARED = 0.995  # per verified tree: the last 200 or so count
_FADE_OWN = 0.98
_FORGET = 0.8  # what is left after a round in which nothing offered was verified


@dataclass(slots=True)
class Outcome:
    """What became of a request's drafted nodes.

    Attributes:
        request_id: Whose.
        is_drawn: Whether its rule draws from laws.
        tree: The nodes that were verified, perhaps none.
        accepted: How many of them were accepted: the length of the path.
    """

    request_id: int
    is_drawn: bool
    tree: DraftTree
    accepted: int


class Drift:
    """Accepted tokens and predicted survival by depth, older ones fading, and the factors.

    One row is shared by the requests whose rule compares tokens, one is kept of the others for the
    log, and each of the others has its own.
    """

    def __init__(self) -> None:
        self._row_of: dict[int, int] = {}
        self._spare: list[int] = []
        self._accepted = np.zeros((2, _SIZE))
        self._predicted = np.zeros((2, _SIZE))
        self._factors = np.ones((2, _SIZE))
        self._fade = np.array([_FADE_SHARED, _FADE_SHARED])
        self._told = np.ones((2, _SIZE))
        self._is_active = False

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Take in the outcomes of a round."""
        if not outcomes:
            return
        rows = [self._row(o.request_id) if o.is_drawn else _SHARED for o in outcomes]
        self._add(rows, outcomes)
        drawn = [outcome for outcome in outcomes if outcome.is_drawn]
        if drawn:
            self._add([_LOGGED] * len(drawn), drawn)
        self._is_active = bool((self._factors != 1).any())

    def release(self, request_id: int) -> None:
        """Forget what a request showed by itself."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._accepted[row] = self._predicted[row] = 0.0
            self._factors[row] = 1.0
            self._spare.append(row)

    def correct(
        self,
        owners: Sequence[tuple[int, bool]],
        trees: Sequence[DraftTree],
        start: IntArray,
        survival: FloatArray,
    ) -> FloatArray:
        """Survival as past rounds teach it, never above 1 or the parent's.

        Args:
            owners: Of each tree, the request and whether its rule draws from laws.
            trees: The trees.
            start: int64 [trees + 1], first node of each.
            survival: float64 [N], of all nodes end to end.

        Returns:
            float64 [N]; `survival` itself where there is nothing to correct.
        """
        if not self._is_active:
            return survival
        rows = [self._row(owner) if is_drawn else _SHARED for owner, is_drawn in owners]
        owner_of = np.repeat(np.arange(len(trees)), start[1:] - start[:-1])
        depth = np.concatenate([tree.depth for tree in trees])
        factors = self._factors[np.array(rows)[owner_of], np.minimum(depth, _DEPTHS)]
        parent = np.concatenate([tree.parent for tree in trees])
        parent = np.where(parent < 0, len(survival), parent + start[owner_of])
        return _held(survival * factors, parent, int(depth.max()))

    # -- inside -------------------------------------------------------------------------------

    def _row(self, request_id: int) -> int:
        """The row of a request whose rule draws from laws; a new one if it has none."""
        row = self._row_of.get(request_id)
        if row is None:
            if not self._spare:
                self._grow()
            row = self._row_of[request_id] = self._spare.pop()
        return row

    def _grow(self) -> None:
        """Make room for twice as many rows."""
        size = len(self._fade)
        self._spare.extend(range(size, 2 * size))
        self._accepted = np.concatenate([self._accepted, np.zeros((size, _SIZE))])
        self._predicted = np.concatenate([self._predicted, np.zeros((size, _SIZE))])
        self._factors = np.concatenate([self._factors, np.ones((size, _SIZE))])
        self._fade = np.append(self._fade, np.full(size, _FADE_OWN))

    def _add(self, rows: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """Count each outcome to its row."""
        row = np.array(rows)
        sizes = np.array([len(outcome.tree.token) for outcome in outcomes])
        is_seen = sizes > 0
        times = np.bincount(row[is_seen], minlength=len(self._fade))
        touched = np.array(sorted(set(rows)))
        left = np.where(times > 0, self._fade**times, _FORGET)[touched, None]
        self._accepted[touched] *= left
        self._predicted[touched] *= left
        if is_seen.any():
            depth = np.minimum(np.concatenate([o.tree.depth for o in outcomes]), _DEPTHS)
            survival = np.concatenate([o.tree.survival for o in outcomes])
            self._predicted += self._counted(np.repeat(row, sizes), depth, survival)
            length = np.array([outcome.accepted for outcome in outcomes])
            reached = self._counted(row, np.minimum(length, _DEPTHS), is_seen.astype(np.float64))
            self._accepted += reached[:, ::-1].cumsum(axis=1)[:, ::-1]
            deeper = np.maximum(length - _DEPTHS, 0)
            self._accepted[:, -1] += np.bincount(row, weights=deeper, minlength=len(self._fade))
        self._update(touched)

    def _counted(self, row: IntArray, depth: IntArray, weight: FloatArray) -> FloatArray:
        """Sum of weights by row and depth."""
        flat = np.bincount(row * _SIZE + depth, weights=weight, minlength=self._accepted.size)
        return flat.reshape(-1, _SIZE).astype(np.float64, copy=False)

    def _update(self, rows: IntArray) -> None:
        """Work the factors of these rows out again."""
        accepted, predicted = self._accepted[rows], self._predicted[rows]
        seen = np.flatnonzero((predicted > 1e-3).any(axis=0))
        deepest = int(seen[-1]) if len(seen) else 0
        factors = np.ones((len(rows), _SIZE))
        for depth in range(1, deepest + 1):
            above = _TRUST * factors[:, depth - 1]
            factors[:, depth] = (accepted[:, depth] + above) / (predicted[:, depth] + _TRUST)
        factors[:, deepest + 1 :] = factors[:, deepest, None]
        for row in set(rows.tolist()) & {_SHARED, _LOGGED}:
            self._tell(row, factors[rows == row][0, : deepest + 1])
        factors[np.abs(factors - 1) <= _TOLERANCE] = 1.0
        self._factors[rows] = factors

    def _tell(self, row: int, factors: FloatArray) -> None:
        """Log factors that moved far since they were last told."""
        change = factors / self._told[row, : len(factors)]
        for depth in np.flatnonzero((change > _TELL) | (change < 1 / _TELL)).tolist():
            self._told[row, depth] = factors[depth]
            logger.info(
                "%s: tokens drafted at depth %d are accepted %.2f times as often as their survival "
                "says; the scheduler goes by that",
                _NAMES[row],
                depth,
                factors[depth],
            )


def _held(values: FloatArray, parent: IntArray, depth: int) -> FloatArray:
    """The least value on the way from an anchor, whose value is 1, to each node.

    Args:
        values: float64 [N].
        parent: int64 [N], N for the anchor.
        depth: Of the deepest node.
    """
    held = np.append(values, 1.0)
    above = np.append(parent, len(values))
    reach = 1
    while reach <= depth:  # held covers `reach` nodes up from each, `above` is the one after these
        np.minimum(held, held[above], out=held)
        above = above[above]
        reach *= 2
    return held[:-1]
