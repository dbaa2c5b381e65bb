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

**Whose rounds.** Under greedy, coupled and sample-match all requests share one record, and each has
a factor of its own on top of it: a draft that knows one kind of text misses another, and rows are
better spent where they are accepted. Under rules that draw from laws a request is corrected by its
own past rounds alone: two requests with the same seed have the same noise in the same round of
theirs, so one's outcome would tell of the other's tokens before they are drawn. A record of all of
them exists too, for the log.

**What cannot be seen is forgotten.** A draft that was found so poor that none of its nodes is
verified any more gives no evidence either way. Each such round takes a fifth of the old evidence,
so that the draft gets another chance.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from dspark.tree import DraftTree

__all__ = ["Drift", "Outcome"]

logger = logging.getLogger(__name__)

_DEPTHS = 32  # deeper nodes count with the deepest
_SIZE = _DEPTHS + 1
_NONE = (1.0,) * _SIZE  # factors that correct nothing
_TRUST = 6.0  # expected tokens of evidence that the depth above stands for
_TOLERANCE = 0.1  # smaller deviations are left alone
_TELL = 1.2  # a factor that moved by more than this since it was last told is logged
_FADE_SHARED = 0.995  # per verified tree: the last 200 or so count
_FADE_OWN = 0.98
_OWN_TRUST = 4.0  # expected tokens of evidence that a request is like the others
_FADE_REQUEST = 0.98  # of its factor on top of the shared record
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
    """What is known of all requests, and how the next survivals are to be corrected.

    One record is shared by the requests whose rule compares tokens, one is kept of the others for
    the log, and each of the others has its own.
    """

    def __init__(self) -> None:
        self._shared, self._logged = _Record(_FADE_SHARED), _Record(_FADE_SHARED)
        self._own: dict[int, _Record] = {}  # of requests whose rule draws from laws
        self._seen: dict[int, tuple[float, float]] = {}  # accepted, expected by the shared record
        self._scale: dict[int, float] = {}  # of requests that differ from the others

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Take in the outcomes of a round."""
        if not outcomes:
            return
        shared = [outcome for outcome in outcomes if not outcome.is_drawn]
        drawn = [outcome for outcome in outcomes if outcome.is_drawn]
        if shared:
            for outcome in shared:
                self._compare(outcome)
            self._shared.add(shared)
            self._shared.tell("greedy, coupled, sample-match")
        if drawn:
            of_request: dict[int, list[Outcome]] = {}
            for outcome in drawn:
                of_request.setdefault(outcome.request_id, []).append(outcome)
            for request_id, own in of_request.items():
                self._own.setdefault(request_id, _Record(_FADE_OWN)).add(own)
            self._logged.add(drawn)
            self._logged.tell("rejection, block")

    def release(self, request_id: int) -> None:
        """Forget what a request showed by itself."""
        self._seen.pop(request_id, None)
        self._scale.pop(request_id, None)
        self._own.pop(request_id, None)

    def correct(
        self,
        owners: Sequence[tuple[int, bool]],
        trees: Sequence[DraftTree],
        values: list[float],
    ) -> list[float]:
        """Survival as past rounds teach it, never above 1 or the parent's.

        Args:
            owners: Of each tree, the request and whether its rule draws from laws.
            trees: The trees.
            values: Survival of all nodes, [N], end to end.

        Returns:
            [N]; `values` itself where there is nothing to correct.
        """
        if not (self._scale or self._own or self._shared.differs):
            return values
        corrected: list[float] = []
        for (owner, is_drawn), tree in zip(owners, trees, strict=True):
            record = self._own.get(owner) if is_drawn else self._shared
            scale = self._scale.get(owner, 1.0)
            factors = _NONE if record is None else record.factors
            first = len(corrected)
            nodes = zip(tree.depth.tolist(), tree.parent.tolist(), strict=True)
            for node, (depth, parent) in enumerate(nodes, start=first):
                value = values[node] * factors[min(depth, _DEPTHS)] * scale
                above = 1.0 if parent < 0 else corrected[first + parent]
                corrected.append(min(value, above))
        return corrected

    # -- inside -------------------------------------------------------------------------------

    def _compare(self, outcome: Outcome) -> None:
        """Count what a request's nodes did against what the shared record expects of them."""
        accepted, expected = self._seen.get(outcome.request_id, (0.0, 0.0))
        tree = outcome.tree
        left = _FADE_REQUEST if len(tree.token) else _FORGET
        factors = self._shared.factors
        nodes = zip(tree.depth.tolist(), tree.survival.tolist(), strict=True)
        expected *= left
        expected += sum(min(1.0, value * factors[min(depth, _DEPTHS)]) for depth, value in nodes)
        accepted = accepted * left + outcome.accepted
        self._seen[outcome.request_id] = accepted, expected
        scale = (accepted + _OWN_TRUST) / (expected + _OWN_TRUST)
        if abs(scale - 1) > _TOLERANCE:
            self._scale[outcome.request_id] = scale
        else:
            self._scale.pop(outcome.request_id, None)


class _Record:
    """Accepted tokens and predicted survival by depth, older ones fading, and the factors.

    Lists of plain numbers: a round has a handful of trees, of which numpy would see one at a time.

    Args:
        fade: What a verified tree leaves of older evidence.

    Attributes:
        factors: By depth, from 0; 1 where nothing is to be corrected.
        differs: True if a factor is not 1.
    """

    __slots__ = ("_accepted", "_exact", "_fade", "_predicted", "_told", "differs", "factors")

    def __init__(self, fade: float) -> None:
        self._fade = fade
        self._accepted = [0.0]  # as deep as any tree was
        self._predicted = [0.0]
        self._told = list(_NONE)
        self._exact: list[float] = []
        self.factors: Sequence[float] = _NONE
        self.differs = False

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Count the outcomes of a round."""
        times = sum(len(outcome.tree.token) > 0 for outcome in outcomes)
        left = self._fade**times if times else _FORGET
        predicted = self._predicted = [value * left for value in self._predicted]
        accepted = self._accepted = [value * left for value in self._accepted]
        for outcome in outcomes:
            tree = outcome.tree
            if not len(tree.token):
                continue
            depths = tree.depth.tolist()
            missing = min(max(depths), _DEPTHS) + 1 - len(predicted)
            if missing > 0:
                predicted += [0.0] * missing
                accepted += [0.0] * missing
            for depth, value in zip(depths, tree.survival.tolist(), strict=True):
                predicted[min(depth, _DEPTHS)] += value
            for depth in range(min(outcome.accepted, _DEPTHS) + 1):
                accepted[depth] += 1.0
            if outcome.accepted > _DEPTHS:
                accepted[_DEPTHS] += outcome.accepted - _DEPTHS
        self._update()

    def _update(self) -> None:
        """Work the factors out again."""
        accepted, predicted = self._accepted, self._predicted
        deepest = len(predicted) - 1
        while deepest and predicted[deepest] <= 1e-3:
            deepest -= 1
        found = 1.0
        exact = [found]
        for depth in range(1, deepest + 1):
            found = (accepted[depth] + _TRUST * found) / (predicted[depth] + _TRUST)
            exact.append(found)
        factors = [1.0 if abs(factor - 1) <= _TOLERANCE else factor for factor in exact]
        self._exact = exact
        self.factors = factors + factors[-1:] * (_SIZE - len(factors))
        self.differs = any(factor != 1 for factor in factors)

    def tell(self, name: str) -> None:
        """Log factors that moved far since they were last told.

        Args:
            name: Whose they are.
        """
        for depth, factor in enumerate(self._exact):
            if 1 / _TELL <= factor / self._told[depth] <= _TELL:
                continue
            self._told[depth] = factor
            logger.info(
                "%s: tokens drafted at depth %d are accepted %.2f times as often as their survival "
                "says; the scheduler goes by that",
                name,
                depth,
                factor,
            )
