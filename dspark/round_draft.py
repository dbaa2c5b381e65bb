"""The drafting half of a round: whom to draft for, what the drafter offers, what is verified of it.

A drafter that fails is asked no more: it costs speed, never the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.active import ActiveRequest, Phase
from dspark.cache import Cache
from dspark.draft.base import DraftContext, Drafter, Observer
from dspark.draft.none import NoDrafter
from dspark.errors import ShapeError
from dspark.payoff import RoundCosts
from dspark.round_limits import RoundLimits
from dspark.target import Target
from dspark.tree import Proposal
from dspark.verify.scheduler import Load, Offer, Scheduler
from dspark.verify.scheduler_drift import Outcome
from dspark.verify.scheduler_order import in_judging_order

__all__ = ["NOTHING", "Drafted", "Drafting", "slot_of"]

logger = logging.getLogger(__name__)


class _Bar:
    """`Scheduler.bar` of one round, remembered."""

    __slots__ = ("_known", "_load", "_scheduler")

    def __init__(self, scheduler: Scheduler, load: Load) -> None:
        self._scheduler = scheduler
        self._load = load
        self._known: dict[tuple[int, float, bool], float] = {}

    def __call__(self, nodes: int, weight: float, is_drawn: bool) -> float:
        key = nodes, weight, is_drawn
        if key not in self._known:
            self._known[key] = self._scheduler.bar(
                self._load, nodes=nodes, weight=weight, is_drawn=is_drawn
            )
        return self._known[key]


@dataclass(frozen=True, slots=True)
class Drafted:
    """What one request has for a round.

    Attributes:
        proposal: What is verified.
        offered: Nodes that the drafter offered.
    """

    proposal: Proposal
    offered: int


NOTHING = Drafted(Proposal.empty(), 0)
"""A round of plain decoding."""


class Drafting:
    """Asks the drafter for proposals and has the scheduler cut them.

    Args:
        target: The target.
        cache: Its cache.
        drafter: The drafter.
        limits: Sizes of a round.
        scheduler: Decides which nodes are verified.
        costs: What rounds cost.
    """

    def __init__(
        self,
        target: Target,
        cache: Cache,
        drafter: Drafter,
        limits: RoundLimits,
        scheduler: Scheduler,
        costs: RoundCosts,
    ) -> None:
        self._target = target
        self._cache = cache
        self._drafter = drafter
        self._limits = limits
        self._scheduler = scheduler
        self._costs = costs
        # Protocols are slow to check, and these answers stay.
        self._observer = drafter if isinstance(drafter, Observer) else None
        self._is_idle = isinstance(drafter, NoDrafter)
        self._has_failed = False
        self._outcomes: list[Outcome] = []

    @property
    def capture(self) -> tuple[int, ...]:
        """Target layers whose hidden states the drafter still needs."""
        return () if self._has_failed else self._drafter.capture

    # -- before the forward -------------------------------------------------------------------

    def load(self, decoding: Sequence[ActiveRequest], other_rows: int) -> Load:
        """A round before any drafted node.

        Args:
            decoding: Requests that decode.
            other_rows: Rows that ride along: prompt chunks.
        """
        if not decoding:
            return Load(0.0, None)
        context = sum(len(request.tokens) for request in decoding) // len(decoding)
        # What is measured while rounds run would make a seed's text differ from run to run under
        # rules that draw from laws; a profile alone does not.
        is_drawn = any(request.rule.draws_from_laws for request in decoding)
        rates = self._costs.rates(
            len(decoding) + other_rows,
            context,
            with_overhead=not (is_drawn and self._costs.is_profiled),
        )
        return Load(sum(request.priority for request in decoding), rates)

    def budget(self, request: ActiveRequest, count: int) -> int:
        """Nodes that may be drafted for a request in a round, whatever is drawn in it.

        Args:
            request: The request.
            count: Requests that decode.
        """
        params, limits = request.params, self._limits
        if not params.draft or self._has_failed or self._is_idle:
            return 0
        budget = params.tree_budget
        if budget is None:
            budget = min(limits.tree_budget, max(1, limits.max_rows // count - 1))
            most = self._scheduler.draft_limit
            budget = budget if most is None else min(budget, most)
        most = self._target.exactness.max_nodes
        return budget if most is None else min(budget, most)

    def propose(
        self, decoding: Sequence[ActiveRequest], budgets: Sequence[int], load: Load
    ) -> dict[int, Proposal]:
        """What the drafter offers, by request id; nothing where it is not worth asking.

        Args:
            decoding: Requests that decode.
            budgets: Of each, from `budget`.
            load: From `load`.
        """
        contexts = []
        bar = _Bar(self._scheduler, load)
        wants_plain = self._costs.wants_plain(len(decoding))
        for request, budget in zip(decoding, budgets, strict=True):
            context = self._context(request, budget, bar, wants_plain=wants_plain)
            if context is not None:
                contexts.append(context)
        if not contexts:
            return {}
        try:
            proposals = self._drafter.propose(contexts)
            pairs = list(zip(contexts, proposals, strict=True))
            for context, proposal in pairs:
                _check_limits(context, proposal)
            return {context.request_id: proposal for context, proposal in pairs}
        except Exception as exc:  # noqa: BLE001 - drafters are plug-ins: whatever breaks in one
            # must cost speed, never the answer.
            self._give_up(exc)
            return {}

    def cut(
        self, decoding: Sequence[ActiveRequest], proposals: dict[int, Proposal], load: Load
    ) -> dict[int, Drafted]:
        """What is verified of the proposals that are not empty, by request id.

        Args:
            decoding: Requests that decode.
            proposals: From `propose`.
            load: From `load`.
        """
        drafted = [
            request
            for request in decoding
            if request.request_id in proposals and proposals[request.request_id].tree.num_nodes
        ]
        if not drafted:
            return {}
        try:
            return self._cut(drafted, proposals, load)
        except Exception as exc:  # noqa: BLE001 - trees of a plug-in may be anything
            self._give_up(exc)
            return {}

    def _cut(
        self, drafted: Sequence[ActiveRequest], proposals: dict[int, Proposal], load: Load
    ) -> dict[int, Drafted]:
        offered = [proposals[request.request_id] for request in drafted]
        drawn = [i for i, request in enumerate(drafted) if _is_cut_by_law(request)]
        for i, proposal in zip(drawn, in_judging_order([offered[i] for i in drawn]), strict=True):
            offered[i] = proposal
        offers = [
            Offer(
                request_id=request.request_id,
                tree=proposal.tree,
                weight=request.priority,
                is_drawn=request.rule.draws_from_laws,
                is_promised=request.params.tree_budget is not None,
                noise=request.noise,
            )
            for request, proposal in zip(drafted, offered, strict=True)
        ]
        result = {}
        cuts = self._scheduler.plan(offers, load)
        for request, proposal, cut in zip(drafted, offered, cuts, strict=True):
            request.switch.first_node.offered(cut.first)
            kept = proposal if cut.keep is None else proposal.subtree(cut.keep)
            result[request.request_id] = Drafted(kept, proposal.tree.num_nodes)
        return result

    def _give_up(self, exc: Exception) -> None:
        if not self._has_failed:
            logger.warning("drafter %s failed, decoding plainly: %s", self._drafter.name, exc)
        self._has_failed = True

    def _context(
        self, request: ActiveRequest, budget: int, bar: _Bar, *, wants_plain: bool
    ) -> DraftContext | None:
        """What the drafter is told of a request, None if it is not to draft for it."""
        # The closing token comes on top of the path, so the last remaining token needs no draft.
        room = request.remaining(self._target.info.max_positions) - 1
        depth = request.params.depth
        depth = min(self._limits.depth if depth is None else depth, room, budget)
        if depth <= 0 or not self._is_on(request, budget, bar, wants_plain=wants_plain):
            request.switch.skipped()
            return None
        return _draft_context(request, request.tokens, budget=budget, depth=depth)

    def _is_on(self, request: ActiveRequest, budget: int, bar: _Bar, *, wants_plain: bool) -> bool:
        """Whether drafting may pay for this request now."""
        switch = request.switch
        if not switch.allowed:
            return True
        if not switch.is_on or wants_plain:
            return False
        if request.params.tree_budget is not None:
            return True
        is_drawn = request.rule.draws_from_laws
        return switch.first_node.pays(bar(budget, request.priority, is_drawn))

    # -- after it -----------------------------------------------------------------------------

    def note(self, outcome: Outcome) -> None:
        """Keep what became of a request's drafted nodes until the round ends."""
        self._outcomes.append(outcome)

    def finish(self, requests: Sequence[ActiveRequest]) -> None:
        """End a round: learn from its outcomes, hand over hidden states that pile up.

        Args:
            requests: All requests of the round.
        """
        self._scheduler.observe(self._outcomes)
        self._outcomes.clear()
        self._hand_over(requests)

    def _hand_over(self, requests: Sequence[ActiveRequest]) -> None:
        """Let the drafter take in hidden states that pile up: of a long prompt, or while it is off.

        Otherwise a prompt of a million tokens would keep the captured layers of all of them.
        """
        if self._has_failed or self._observer is None:
            return
        contexts = []
        for request in requests:
            pending = sum(len(rows) for rows in next(iter(request.features.values()), []))
            if pending < self._limits.prefill_chunk or request.phase is Phase.DONE:
                continue
            known = request.tokens[: self._cache.length(slot_of(request)) + 1]
            contexts.append(_draft_context(request, known, budget=1, depth=1))
        try:
            if contexts:
                self._observer.observe(contexts)
        except Exception as exc:  # noqa: BLE001 - as in propose
            self._give_up(exc)

    def drop(self, request_id: int) -> None:
        """Forget what the drafter keeps of a request; it comes back with all its tokens."""
        self._drafter.release(request_id)

    def release(self, request_id: int) -> None:
        """Forget a request."""
        self._drafter.release(request_id)
        self._scheduler.release(request_id)


def _is_cut_by_law(request: ActiveRequest) -> bool:
    """Whether a request's nodes may be cut, but not for what their tokens are."""
    return request.rule.draws_from_laws and request.params.tree_budget is None


def slot_of(request: ActiveRequest) -> int:
    """The slot of a request that takes part in a round."""
    if request.slot is None:
        raise RuntimeError(f"request {request.request_id} takes part without a slot")
    return request.slot


def _draft_context(
    request: ActiveRequest, tokens: Sequence[int], *, budget: int, depth: int
) -> DraftContext:
    """What the drafter is told of a request; the hidden states that waited for it go along."""
    features = {layer: torch.cat(rows) for layer, rows in request.features.items()}
    request.features.clear()
    return DraftContext(
        request_id=request.request_id,
        tokens=tokens,
        prompt_length=len(request.prompt),
        params=request.params,
        rule=request.rule,
        noise=request.noise,
        round=request.rounds + 1,
        budget=budget,
        depth=depth,
        width=request.params.width,
        features=features or None,
    )


def _check_limits(context: DraftContext, proposal: Proposal) -> None:
    tree = proposal.tree
    if tree.num_nodes > context.budget or tree.max_depth > context.depth:
        raise ShapeError(
            f"a proposal has {tree.num_nodes} nodes and depth {tree.max_depth}, but at most "
            f"{context.budget} and {context.depth} were asked for."
        )
