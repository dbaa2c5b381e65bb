"""The drafting half of a round: whom to draft for, what the drafter offers, what is verified of it.

Tokens that a request's grammar forces come before what the drafter offers, drafter or not. They are
certain, so they are rows and tokens that the round has anyhow: the scheduler, its record of how
drafts do and the switch that stops drafting see what comes behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dspark.active import ActiveRequest, Phase
from dspark.cache import Cache
from dspark.captured import Captured
from dspark.draft.base import DraftContext
from dspark.errors import DsparkError
from dspark.payoff import RoundCosts
from dspark.round_drafter import GuardedDrafter
from dspark.round_limits import RoundLimits
from dspark.target import Target
from dspark.tree import DraftTree, Proposal
from dspark.verify.constrained import behind, hang, without_forbidden
from dspark.verify.scheduler import Load, Offer, Scheduler
from dspark.verify.scheduler_drift import Outcome
from dspark.verify.scheduler_order import in_judging_order

__all__ = ["NOTHING", "Drafted", "Drafting", "Forced", "slot_of"]

_FEW = 8
"""Nodes over which it is averaged what one costs: about what a round has."""

Forced: TypeAlias = Mapping[int, Sequence[int]]
"""Request id -> tokens that its grammar forces from the anchor on; only where there are some."""


class _Bar:
    """`Scheduler.bar` of one round, remembered, and the price of drafting for a request."""

    __slots__ = ("_known", "_load", "_scheduler", "price")

    def __init__(self, scheduler: Scheduler, load: Load) -> None:
        self._scheduler = scheduler
        self._load = load
        self.price = scheduler.price(load)
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
        offered: Nodes that the drafter offered, behind forced ones.
        forced: How many nodes at its beginning are forced.
        doubtful: The tree behind these, given that they are accepted.
    """

    proposal: Proposal
    offered: int
    forced: int
    doubtful: DraftTree


NOTHING = Drafted(Proposal.empty(), 0, 0, DraftTree.empty())
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
        drafter: GuardedDrafter,
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
        self._outcomes: list[Outcome] = []

    # -- before the forward -------------------------------------------------------------------

    def forced(self, decoding: Sequence[ActiveRequest], budgets: Sequence[int]) -> Forced:
        """What grammars force from the anchors on.

        Args:
            decoding: Requests that decode.
            budgets: Of each, from `budget`.
        """
        found: dict[int, list[int]] = {}
        for request, budget in zip(decoding, budgets, strict=True):
            if request.masks is None:
                continue
            most = min(budget, self._room(request), request.params.depth or budget)
            try:
                tokens = request.masks.forced(most)
            except DsparkError:  # verification will meet it too, and say so
                continue
            if tokens:
                found[request.request_id] = tokens
        return found

    def _room(self, request: ActiveRequest) -> int:
        """Nodes that a path may have: on top comes the closing token, which needs no draft."""
        return request.remaining(self._target.info.max_positions) - 1

    def load(self, decoding: Sequence[ActiveRequest], prompt_rows: int, forced: Forced) -> Load:
        """A round before any node that a drafter offers.

        Args:
            decoding: Requests that decode.
            prompt_rows: Rows of prompts that ride along.
            forced: From `forced`.
        """
        if not decoding:
            return Load(0.0, None)
        rows = len(decoding) + sum(len(tokens) for tokens in forced.values())
        context = sum(len(request.tokens) for request in decoding) // len(decoding)
        # What is measured while rounds run would make a seed's text differ from run to run under
        # rules that draw from laws; a profile alone does not.
        is_drawn = any(request.rule.draws_from_laws for request in decoding)
        by_time = not (is_drawn and self._costs.is_profiled)
        rates = self._costs.rates(
            rows,
            context,
            with_overhead=by_time,
            requests=len(decoding),
            prompt_rows=prompt_rows,
        )
        certain = (1 + len(forced.get(request.request_id, ())) for request in decoding)
        worth = zip((request.priority for request in decoding), certain, strict=True)
        value = sum(priority * tokens for priority, tokens in worth)
        return Load(value, rates, self._costs.asking if by_time else 0.0)

    def budget(self, request: ActiveRequest, count: int) -> int:
        """Nodes that may be drafted for a request in a round, whatever is drawn in it.

        Args:
            request: The request.
            count: Requests that decode.
        """
        params, limits = request.params, self._limits
        has_drafter = not (self._drafter.has_failed or self._drafter.is_idle)
        if not params.draft or not (has_drafter or request.masks is not None):
            return 0
        budget = params.tree_budget
        if budget is None:
            budget = min(limits.tree_budget, max(1, limits.max_rows // count - 1))
            most = self._scheduler.draft_limit
            budget = budget if most is None else min(budget, most)
            if not request.rule.draws_from_laws:
                budget = request.switch.appetite.most(budget)
        most = self._target.exactness.max_nodes
        return budget if most is None else min(budget, most)

    def propose(
        self,
        decoding: Sequence[ActiveRequest],
        budgets: Sequence[int],
        forced: Forced,
        load: Load,
    ) -> dict[int, Proposal]:
        """What the drafter offers behind forced tokens, by request id.

        Nothing where it is not worth asking.

        Args:
            decoding: Requests that decode.
            budgets: Of each, from `budget`.
            forced: From `forced`.
            load: From `load`.
        """
        if self._drafter.has_failed or self._drafter.is_idle:
            return {}
        contexts = []
        node_seconds = 0.0
        if load.rates is not None:
            rates = load.rates(sum(budgets))  # for all that will ask: they are worked out once
            node_seconds = _node_seconds(rates)
        bar = _Bar(self._scheduler, load)
        wants_plain = self._costs.wants_plain(len(decoding))
        for request, budget in zip(decoding, budgets, strict=True):
            own = forced.get(request.request_id, ())
            context = self._context(request, budget, own, bar, wants_plain=wants_plain)
            if context is not None:
                context.node_seconds = node_seconds
                contexts.append(context)
        proposals = self._drafter.propose(contexts) if contexts else None
        if proposals is None:
            return {}
        pairs = zip(contexts, proposals, strict=True)
        offers = {context.request_id: proposal for context, proposal in pairs}
        for request in decoding:
            if request.masks is not None and request.request_id in offers:
                tokens = forced.get(request.request_id, ())
                offers[request.request_id] = self._fit(request, tokens, offers[request.request_id])
        return offers

    def _fit(self, request: ActiveRequest, forced: Sequence[int], offer: Proposal) -> Proposal:
        """What a grammar leaves of an offer, behind forced tokens."""
        if request.masks is None:
            return offer
        try:
            own = behind(offer, forced) if self._drafter.reads_states else offer
            return without_forbidden(own, request.masks.below(forced))
        except DsparkError:  # as in `forced`
            return Proposal.empty()

    def cut(
        self,
        decoding: Sequence[ActiveRequest],
        proposals: dict[int, Proposal],
        forced: Forced,
        load: Load,
    ) -> dict[int, Drafted]:
        """What is verified, by request id; requests that have nothing but the anchor are left out.

        Args:
            decoding: Requests that decode.
            proposals: From `propose`.
            forced: From `forced`.
            load: From `load`.
        """
        drafted = [
            request
            for request in decoding
            if request.request_id in proposals and proposals[request.request_id].tree.num_nodes
        ]
        result: dict[int, Drafted] = {}
        try:
            if drafted:
                result = self._cut(drafted, proposals, load)
        except Exception as exc:  # noqa: BLE001 - trees of a plug-in may be anything
            self._drafter.give_up(exc)
        for request in decoding:
            tokens = forced.get(request.request_id)
            if tokens:
                own = result.get(request.request_id, NOTHING)
                whole = hang(tokens, own.proposal, draws_from_laws=request.rule.draws_from_laws)
                result[request.request_id] = replace(own, proposal=whole, forced=len(tokens))
        return result

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
            request.switch.first_node.offered(cut.first, cut.gain)
            kept = proposal if cut.keep is None else proposal.subtree(cut.keep)
            request.switch.appetite.took(kept.tree.num_nodes, proposal.tree.num_nodes)
            result[request.request_id] = Drafted(kept, proposal.tree.num_nodes, 0, kept.tree)
        return result

    def _context(
        self,
        request: ActiveRequest,
        budget: int,
        forced: Sequence[int],
        bar: _Bar,
        *,
        wants_plain: bool,
    ) -> DraftContext | None:
        """What the drafter is told of a request, None if it is not to draft for it."""
        count = len(forced)
        depth = request.params.depth
        depth = self._limits.depth if depth is None else depth - count
        depth = min(depth, self._room(request) - count, budget - count)
        if forced and forced[-1] in self._target.info.eos_token_ids:
            depth = 0  # nothing comes behind the end
        if depth <= 0 or not self._is_on(request, budget - count, bar, wants_plain=wants_plain):
            request.switch.skipped()
            return None
        if self._drafter.reads_states:
            # Hidden states end at the anchor. Under the mask it drafts the forced tokens itself.
            return _draft_context(request, request.tokens, budget=budget, depth=depth + count)
        tokens = [*request.tokens, *forced] if forced else request.tokens
        context = _draft_context(request, tokens, budget=budget - count, depth=depth)
        if request.masks is not None:
            context.allowed = request.masks.below(forced)
        return context

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
        return switch.first_node.pays(bar(budget, request.priority, is_drawn), bar.price)

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
        """Let the drafter take in hidden states that pile up, or that others may want.

        Of a long prompt, or while it is off: otherwise a prompt of a million tokens would keep the
        captured layers of all of them. Where others wait for a prompt, or may go on from a text
        that has ended.
        """
        if not self._drafter.can_observe:
            return
        contexts = []
        for request in requests:
            pending = sum(len(rows) for _, rows in request.features)
            is_wanted = request.is_awaited or request.phase is Phase.DONE
            least = 1 if is_wanted and self._drafter.takes_over else self._limits.prefill_chunk
            if pending < least or request.slot is None:
                continue
            size = self._cache.length(slot_of(request)) + 1
            if size > len(request.tokens):
                continue  # an end that was drafted: what is behind it belongs to no text
            known = request.tokens[:size]
            contexts.append(_draft_context(request, known, budget=1, depth=1))
        if contexts:
            self._drafter.observe(contexts)

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


def _node_seconds(rates: NDArray[np.float64]) -> float:
    """Seconds that a node adds to a round of few, of its rates with 0, 1, ... nodes.

    Not below 0: where more rows were measured to take less time, that was noise.
    """
    nodes = min(_FEW, len(rates) - 1)
    return max(0.0, float(1 / rates[nodes] - 1 / rates[0]) / nodes) if nodes else 0.0


def _draft_context(
    request: ActiveRequest, tokens: Sequence[int], *, budget: int, depth: int
) -> DraftContext:
    """What the drafter is told of a request; the hidden states that waited for it go along."""
    features = Captured(request.features) if request.features else None
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
        features=features,
        allowed=None if request.masks is None else request.masks.allowed,
    )
