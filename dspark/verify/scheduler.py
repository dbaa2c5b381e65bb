"""The scheduler: which drafted nodes of a round are worth a row of the target's forward.

With B rows in all, SPS(B) forwards of that size a second, w_r the priority of request r and a_ri
the survival of its node i, a round is worth

    Theta = (sum over requests of w_r (1 + sum of admitted a_ri)) SPS(B)

expected tokens a second. Survival never rises from parent to child, so the n nodes of highest
weighted survival (ties: ancestors first) are closed under ancestors, and no other n nodes have a
higher sum. The best admission of all is therefore the best of N + 1 prefixes of one sorted list
(`search`), whatever SPS looks like. Algorithm 1 of the DSpark paper goes down the same list and
stops at the first node that does not raise Theta (`early_stop`): the same wherever Theta has one
peak, and the only one of the two that the rejection and block rules allow, since nothing that hangs
on a node's own token has a say in its admission (docs/scheduling.md has the argument).

Letters: N nodes of all requests, B rows of a forward.

**Source:** DSpark, arXiv 2607.05147, section 3.2.2 and appendix A (chains; trees, weights and the
global search are ours).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dspark.errors import ConfigError
from dspark.tree import BoolArray, DraftTree, FloatArray, IntArray
from dspark.verify.scheduler_drift import Drift, Outcome
from dspark.verify.scheduler_few import FEW, search_few
from dspark.verify.scheduler_setting import Schedule, ScheduleKind

__all__ = ["Cut", "Load", "Offer", "Scheduler", "early_stop", "search"]

_STATIC = (ScheduleKind.OFF, ScheduleKind.THRESHOLD, ScheduleKind.FIXED)
"""What goes by the proposal alone, not by time."""

_SEARCHES = (ScheduleKind.AUTO, ScheduleKind.GLOBAL)
"""What searches all numbers of nodes, where none is drawn."""

_LAG = 2  # drafted rounds between the survivals that a budget comes from and its use


def _theta(worth: FloatArray, rates: FloatArray, value: float) -> FloatArray:
    """Theta of the first 0, 1, ..., n nodes, [n + 1]."""
    total = np.empty(len(worth) + 1)
    total[0] = value
    np.cumsum(worth, out=total[1:])
    total[1:] += value
    total *= rates[: len(total)]
    return total


def search(worth: FloatArray, rates: FloatArray, value: float) -> int:
    """How many of the best nodes make Theta largest; the fewest among equals.

    Args:
        worth: float64 [n], weighted survival, falling.
        rates: float64 [n + 1 or more], SPS with 0, 1, ... of the nodes.
        value: Weighted expected tokens of a round without them.

    Returns:
        0 .. n.
    """
    return int(_theta(worth, rates, value).argmax())


def early_stop(worth: FloatArray, rates: FloatArray, value: float) -> int:
    """How many of the best nodes come before the first that does not raise Theta.

    The arguments are those of `search`.

    Returns:
        0 .. n.

    **Source:** DSpark, arXiv 2607.05147, Algorithm 1.
    """
    theta = _theta(worth, rates, value)
    stops = theta[1:] <= theta[:-1]
    return int(stops.argmax()) if stops.any() else len(worth)


@dataclass(slots=True, kw_only=True)
class Offer:
    """What was drafted for one request.

    Attributes:
        request_id: Whose.
        tree: The tree. Under a rule that draws from laws, a node's survival was known before its
            token was drawn, and siblings stand in falling survival (`in_judging_order`).
        weight: The request's priority, > 0.
        is_drawn: True under a rule that draws from laws.
        is_promised: True if the tree is verified whole, whatever it costs.
        noise: What names the noise its tokens were drawn with; requests that share it are kept
            apart under rules that draw from laws.
    """

    request_id: int
    tree: DraftTree
    weight: float = 1.0
    is_drawn: bool = False
    is_promised: bool = False
    noise: Hashable = None


@dataclass(frozen=True, slots=True)
class Load:
    """A round before any node.

    Attributes:
        value: Sum of the priorities of all requests that decode.
        rates: How many nodes -> SPS with 0, 1, ... of them on top of the rows there are anyhow
            (anchors, prompt chunks), float64 [nodes + 1]; None while costs are not known.
        asking: Seconds that drafting for one request adds to the round.
    """

    value: float
    rates: Callable[[int], FloatArray] | None
    asking: float = 0.0


@dataclass(slots=True)
class Cut:
    """What the scheduler decided about one offer.

    Attributes:
        keep: bool [n], the nodes to verify, closed under ancestors; None for all.
        first: Survival of its best node, as far as the scheduler believes it.
        gain: Weighted tokens that the nodes kept are expected to add, beyond those that the round's
            tokens without nodes would come to in the time of their rows; infinite where nothing is
            known about time.
    """

    keep: BoolArray | None
    first: float
    gain: float = 0.0


@dataclass(slots=True)
class _Flat:
    """Nodes of all offers end to end; offer i has nodes start[i] .. start[i + 1] - 1.

    Attributes:
        survival: float64 [N], as far as it is believed.
        worth: float64 [N], with the weights.
        start: int64 [offers + 1].
        is_drawn: bool [N]; None if no node is.
        fixed: bool [N], nodes of promised trees; None if there is none.
        alone: Offers that must be decided by themselves.
        num_apart: How many there are of these, empty ones included.
    """

    offers: Sequence[Offer]
    survival: FloatArray
    worth: FloatArray
    start: IntArray
    is_drawn: BoolArray | None = None
    fixed: BoolArray | None = None
    alone: Sequence[int] = ()
    num_apart: int = 0

    def part(self, offer: int) -> slice:
        return slice(int(self.start[offer]), int(self.start[offer + 1]))

    def spread(self, flags: Sequence[bool]) -> BoolArray:
        """One flag per offer -> one per node."""
        return np.repeat(np.array(flags, dtype=np.bool_), np.diff(self.start))


class Scheduler:
    """Decides round by round which nodes are verified.

    Args:
        schedule: How.
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        self._schedule = schedule or Schedule()
        self._drift = Drift()
        self._budgets: dict[int, deque[int]] = {}  # what a request was worth, oldest first

    @property
    def schedule(self) -> Schedule:
        """How it decides."""
        return self._schedule

    @property
    def draft_limit(self) -> int | None:
        """Nodes per request beyond which drafting is in vain; None if there is no such number."""
        is_fixed = self._schedule.kind is ScheduleKind.FIXED
        return int(self._schedule.value) if is_fixed else None

    def plan(self, offers: Sequence[Offer], load: Load) -> list[Cut]:
        """Choose the nodes to verify.

        Args:
            offers: One per request that drafted.
            load: The round without them.

        Returns:
            One cut per offer, in order.

        Raises:
            ConfigError: If a survival is NaN, or the schedule does not allow a request's rule.
        """
        cuts = [Cut(None, 0.0)] * len(offers)
        some = [i for i, offer in enumerate(offers) if len(offer.tree.token)]
        if not some:
            return cuts
        num_nodes = sum(len(offers[i].tree.token) for i in some)
        searches = self._schedule.kind in _SEARCHES and load.rates is not None
        if searches and num_nodes <= FEW and not any(o.is_drawn or o.is_promised for o in offers):
            return self._plan_few(offers, load, num_nodes)
        flat = self._flatten([offers[i] for i in some])
        apart = _sharing_noise(offers)
        flat.num_apart = len(apart)
        flat.alone = [place for place, i in enumerate(some) if i in apart]
        admitted = self._admit(flat, load)
        starts = flat.start[:-1]
        first = np.maximum.reduceat(flat.survival, starts).tolist()
        is_whole = np.logical_and.reduceat(admitted, starts).tolist()
        bounds = flat.start.tolist()
        gains = self._gains(flat, admitted, load)
        for place, i in enumerate(some):
            keep = None if is_whole[place] else admitted[bounds[place] : bounds[place + 1]]
            cuts[i] = Cut(keep, first[place], gains[place])
        return cuts

    def price(self, load: Load) -> float:
        """Weighted tokens that a round without nodes makes in the time that one drafting takes.

        0 where nothing is known against drafting, and for schedules that do not go by time.
        """
        if self._schedule.kind in _STATIC or load.rates is None:
            return 0.0
        return load.asking * load.value * float(load.rates(0)[0])

    def bar(self, load: Load, *, nodes: int, weight: float, is_drawn: bool) -> float:
        """The survival that the best node of a request must exceed if any of its nodes is to pay.

        It asks whether nodes pay that are the only ones of the round; others only raise the bar.
        What drafting them takes is to be saved yet, so they must pay for that too.

        Args:
            load: The round without nodes.
            nodes: Nodes that the request may draft, >= 1.
            weight: Its priority.
            is_drawn: Whether its rule draws from laws.

        Returns:
            The survival; 0 where nothing is known against drafting.
        """
        kind = self._schedule.kind
        if kind is ScheduleKind.THRESHOLD:
            return float(np.nextafter(self._schedule.value, 0.0))
        if kind in _STATIC or load.rates is None:
            return 0.0
        stops = kind is ScheduleKind.EARLY_STOP or (is_drawn and kind is ScheduleKind.AUTO)
        none, *rates = (float(rate) for rate in load.rates(1 if stops else nodes))
        each = ((none / rate - 1 + load.asking * none) / n for n, rate in enumerate(rates, 1))
        return load.value * min(each) / weight

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Learn how often verified nodes were accepted, for later rounds.

        Args:
            outcomes: One per request whose drafter offered something in the round.
        """
        if self._schedule.kind not in _STATIC:
            self._drift.observe(outcomes)

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        self._budgets.pop(request_id, None)
        self._drift.release(request_id)

    # -- inside -------------------------------------------------------------------------------

    def _gains(self, flat: _Flat, admitted: BoolArray, load: Load) -> list[float]:
        """`Cut.gain` of every offer; the nodes share the time of their rows alike."""
        starts = flat.start[:-1]
        if self._schedule.kind in _STATIC or load.rates is None:
            return [math.inf] * len(starts)
        total = int(np.count_nonzero(admitted))
        if not total:
            return [0.0] * len(starts)
        rates = load.rates(total)
        each = load.value * (float(rates[0] / rates[total]) - 1) / total
        gains: list[float] = np.add.reduceat((flat.worth - each) * admitted, starts).tolist()
        return gains

    def _plan_few(self, offers: Sequence[Offer], load: Load, num_nodes: int) -> list[Cut]:
        """As `plan`: the search under one budget over a handful of nodes (`scheduler_few`)."""
        trees = [offer.tree for offer in offers]
        stated = [value for tree in trees for value in tree.survival.tolist()]
        _check_stated(stated)
        survival = self._drift.correct([(o.request_id, False) for o in offers], trees, stated)
        weights = [offer.weight for offer in offers]
        sizes = [len(tree.token) for tree in trees]
        rates = [] if load.rates is None else load.rates(num_nodes).tolist()
        found = search_few(survival, sizes, weights, rates, load.value)
        return [Cut(*decided) for decided in found]

    def _flatten(self, offers: Sequence[Offer]) -> _Flat:
        trees = [offer.tree for offer in offers]
        start = np.zeros(len(trees) + 1, dtype=np.int64)
        np.cumsum([len(tree.token) for tree in trees], out=start[1:])
        survival = np.concatenate([tree.survival for tree in trees])
        if not (survival >= 0).all():  # false for NaN
            _check_stated(survival.tolist())
        if self._schedule.kind not in _STATIC:
            owners = [(offer.request_id, offer.is_drawn) for offer in offers]
            values = survival.tolist()
            corrected = self._drift.correct(owners, trees, values)
            if corrected is not values:
                survival = np.array(corrected)
        flat = _Flat(offers, survival, survival, start)
        weights = [offer.weight for offer in offers]
        if any(weight != 1 for weight in weights):
            flat.worth = survival * np.repeat(weights, np.diff(start))
        if any(offer.is_promised for offer in offers):
            flat.fixed = flat.spread([offer.is_promised for offer in offers])
        if any(offer.is_drawn for offer in offers):
            flat.is_drawn = flat.spread([offer.is_drawn for offer in offers])
        return flat

    def _admit(self, flat: _Flat, load: Load) -> BoolArray:
        """Which nodes to verify, bool [N]."""
        schedule = self._schedule
        if schedule.kind is ScheduleKind.ASYNC:
            admitted = self._by_budgets(flat)
            self._note_budgets(flat, load)
        elif schedule.kind is ScheduleKind.THRESHOLD:
            admitted = flat.survival >= schedule.value
        elif schedule.kind is ScheduleKind.FIXED:
            admitted = _best_of_each(flat, [int(schedule.value)] * len(flat.offers))
        elif schedule.kind is ScheduleKind.OFF:
            admitted = np.ones(len(flat.worth), dtype=np.bool_)
        else:
            admitted = self._jointly(flat, load, may_look=False)
        return admitted if flat.fixed is None else admitted | flat.fixed

    def _jointly(self, flat: _Flat, load: Load, *, may_look: bool) -> BoolArray:
        """All requests under one budget; see docs/scheduling.md for the order of decisions.

        Args:
            flat: The nodes.
            load: The round.
            may_look: Whether drawn nodes may be chosen globally, because nothing is verified by it.
        """
        kind = self._schedule.kind
        if kind is ScheduleKind.GLOBAL and flat.is_drawn is not None:
            raise ConfigError("the global search was asked about nodes drawn from laws.")
        size = len(flat.worth)
        if load.rates is None:
            return np.ones(size, dtype=np.bool_)
        admitted = np.zeros(size, dtype=np.bool_) if flat.fixed is None else flat.fixed.copy()
        pooled = ~admitted
        if flat.alone:
            decide = search if may_look else early_stop
            for part, keep in _decided_alone(flat, load, load.rates, decide):
                pooled[part] = False
                admitted[part] = keep
        nodes = np.flatnonzero(pooled)
        order = nodes[np.argsort(-flat.worth[nodes], kind="stable")]
        rows = int(np.count_nonzero(admitted))
        value = load.value + float(flat.worth[admitted].sum())
        rates = load.rates(rows + len(order))[rows:]
        drawn = None if flat.is_drawn is None or may_look else flat.is_drawn[order]
        if kind is ScheduleKind.EARLY_STOP or (drawn is not None and drawn.any()):
            first = order[: early_stop(flat.worth[order], rates, value)]
            if drawn is None or kind is ScheduleKind.EARLY_STOP or drawn.all():
                admitted[first] = True
                return admitted
            # What is drawn is settled; the others may look at everything.
            first = first[drawn[: len(first)]]
            admitted[first] = True
            rates = rates[len(first) :]
            value += float(flat.worth[first].sum())
            order = order[~drawn]
        admitted[order[: search(flat.worth[order], rates, value)]] = True
        return admitted

    def _by_budgets(self, flat: _Flat) -> BoolArray:
        """The best nodes of each request, as many as it was worth; all while that is not known."""
        counts = []
        for offer in flat.offers:
            past = self._budgets.get(offer.request_id)
            is_known = past is not None and len(past) == _LAG
            counts.append(past[0] if past is not None and is_known else offer.tree.num_nodes)
        return _best_of_each(flat, counts)

    def _note_budgets(self, flat: _Flat, load: Load) -> None:
        """Work out what requests are worth by this round's survivals, for later rounds."""
        if load.rates is None:
            return
        admitted = self._jointly(flat, load, may_look=True)
        counts = np.add.reduceat(admitted, flat.start[:-1], dtype=np.int64).tolist()
        for i, offer in enumerate(flat.offers):
            past = self._budgets.get(offer.request_id)
            if past is None:
                past = self._budgets[offer.request_id] = deque(maxlen=_LAG)
            past.append(counts[i])


def _check_stated(survival: Sequence[float]) -> None:
    for value in survival:
        if not value >= 0:  # NaN is neither
            raise ConfigError(f"a drafted node has survival {value}, but must have one in [0, 1].")


def _sharing_noise(offers: Sequence[Offer]) -> set[int]:
    """Offers drawn with noise that another one of the round was drawn with too.

    Their tokens tell of each other's, so none may have a say in the other's admission.
    """
    users = Counter(offer.noise for offer in offers if offer.is_drawn)
    if len(users) == users.total():
        return set()
    return {
        i
        for i, offer in enumerate(offers)
        if offer.is_drawn and not offer.is_promised and users[offer.noise] > 1
    }


def _decided_alone(
    flat: _Flat,
    load: Load,
    rates: Callable[[int], FloatArray],
    decide: Callable[[FloatArray, FloatArray, float], int],
) -> Iterator[tuple[slice, BoolArray]]:
    """Admission of offers that may know nothing of each other: their nodes, and bool [n].

    Each is decided as if all that are in this situation did the same: its nodes count, in rows and
    in tokens, as many times as there are such requests.
    """
    rows, value = 0, load.value
    if flat.fixed is not None and flat.is_drawn is not None:
        known = flat.fixed & ~flat.is_drawn
        rows += int(np.count_nonzero(known))
        value += float(flat.worth[known].sum())
    parts = [flat.part(offer) for offer in flat.alone]
    step = flat.num_apart
    # As many as the longest could ask for: what the others offer may not show.
    speed = rates(rows + step * max(part.stop - part.start for part in parts))[rows::step]
    for part in parts:
        own = flat.worth[part]
        order = np.argsort(-own, kind="stable")
        keep = np.zeros(len(own), dtype=np.bool_)
        keep[order[: decide(own[order] * step, speed, value)]] = True
        yield part, keep


def _best_of_each(flat: _Flat, counts: Sequence[int]) -> BoolArray:
    """The `counts[i]` best nodes of every offer i, bool [N]."""
    sizes = np.diff(flat.start)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-flat.survival, owner))  # stable, so ancestors come first
    rank = np.arange(len(owner)) - flat.start[owner]  # owners stand in order already
    admitted = np.empty(len(owner), dtype=np.bool_)
    admitted[order] = rank < np.asarray(counts, dtype=np.int64)[owner]
    return admitted
