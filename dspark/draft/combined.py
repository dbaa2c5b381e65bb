"""Drafter `combined`: two drafters offer candidates under one budget.

Where a candidate counts by its token alone (greedy, coupled, sample-match) both may spend the whole
budget; the trees are united and the nodes of highest survival remain. Under the rejection rule the
split is fixed before anything is drawn: the first drafter may spend its share, the second what the
first left, and neither is cut afterwards. The block rule takes chains only, so one drafter has the
round: the first if it is confident of its first token, which must follow from the context alone
(as it does for `lookup`), else the second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dspark.draft.base import DraftContext, Drafter, Observer, SavesTime, SharesContext
from dspark.draft.gate import SecondGate
from dspark.errors import ConfigError
from dspark.request import Rule
from dspark.tree import POINT_MASS, Proposal
from dspark.tree_merge import limit_width, merge

__all__ = ["CombinedConfig", "CombinedDrafter"]

_ROUND_OFFSET = 1 << 32  # more rounds than a request has


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinedConfig:
    """How two drafters share a round.

    Attributes:
        share: Part of the budget that the first may spend under the rejection rule, in (0, 1).
        sure: Survival of its first node from which the first has a round of the block rule, in
            [0, 1].

    Raises:
        ConfigError: If a value is outside its range.
    """

    share: float = 0.5
    sure: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"share is {self.share}, but must be between 0 and 1.")
        if not 0 <= self.sure <= 1:
            raise ConfigError(f"sure is {self.sure}, but must be in [0, 1].")


class CombinedDrafter:
    """Unites what two drafters offer.

    Args:
        first: Asked first; its candidates come first. `lookup` belongs here: it is cheap, and its
            candidates follow from the context alone.
        second: The other one.
        config: How they share a round.

    Attributes:
        leaves: How many drafters take part, those inside combined ones counted singly.
    """

    leaves: int

    def __init__(
        self, first: Drafter, second: Drafter, config: CombinedConfig | None = None
    ) -> None:
        self._first = first
        self._second = second
        self._config = config or CombinedConfig()
        parts = [d.leaves if isinstance(d, CombinedDrafter) else 1 for d in (first, second)]
        self._offset = parts[0] * _ROUND_OFFSET
        self.leaves = sum(parts)
        self._saves_time = False
        self._gate = SecondGate()

    @property
    def saves_time(self) -> bool:
        """Whether the second is left out of rounds in which it has not paid.

        Rules that draw from laws always ask both. See `dspark.draft.base.SavesTime`.
        """
        return self._saves_time

    @saves_time.setter
    def saves_time(self, value: bool) -> None:
        """Say so, to the parts as well."""
        self._saves_time = value
        for drafter in (self._first, self._second):
            if isinstance(drafter, SavesTime):
                drafter.saves_time = value

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self._first.name}+{self._second.name}"

    @property
    def capture(self) -> tuple[int, ...]:
        """Layers that either of them needs."""
        return tuple(sorted({*self._first.capture, *self._second.capture}))

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        """Draft for several requests with both drafters.

        Args:
            contexts: One per request.

        Returns:
            One proposal each, within the request's budget, depth and width; `source` names the
            drafter of every node.
        """
        if self.saves_time:
            self._gate.follow([c.request_id for c in contexts], [c.tokens for c in contexts])
        firsts = self._first.propose([self._for_first(context) for context in contexts])
        asked = [i for i, context in enumerate(contexts) if self._needs_second(context, firsts[i])]
        if isinstance(self._second, Observer):
            left_out = set(range(len(contexts))).difference(asked)
            self._second.observe([contexts[i] for i in sorted(left_out)])
        rest = [self._for_second(contexts[i], firsts[i]) for i in asked]
        start = time.perf_counter()
        seconds = dict(zip(asked, self._second.propose(rest) if rest else [], strict=True))
        united = [
            self._unite(context, first, seconds.get(i))
            for i, (context, first) in enumerate(zip(contexts, firsts, strict=True))
        ]
        if rest:
            self._gate.took(time.perf_counter() - start, [context.request_id for context in rest])
        if self.saves_time:
            for i in asked:
                own, first, both = contexts[i], firsts[i].tree, united[i].tree
                self._gate.note(
                    own.request_id, len(own.tokens), first, both, node_seconds=own.node_seconds
                )
        return united

    @property
    def weights(self) -> str:
        """How the weights of a draft module among them are packed, "" where none is."""
        found = (getattr(drafter, "weights", "") for drafter in (self._first, self._second))
        return next((str(weights) for weights in found if weights), "")

    def observe(self, contexts: Sequence[DraftContext]) -> None:
        """Let those of them that follow the target's hidden states take these in."""
        for drafter in (self._first, self._second):
            if isinstance(drafter, Observer):
                drafter.observe(contexts)

    @property
    def shares_context(self) -> bool:
        """Whether all that read hidden states can take over beginnings; see `SharesContext`."""
        reading = [drafter for drafter in (self._first, self._second) if drafter.capture]
        return len(self._sharing()) == len(reading)

    def covered(self, tokens: Sequence[int]) -> int:
        """What all of them that read hidden states can take over; see `SharesContext`."""
        if not self.shares_context:
            return 0
        return min((d.covered(tokens) for d in self._sharing()), default=len(tokens))

    def adopt(self, request_id: int, tokens: Sequence[int]) -> None:
        """Let those of them that read hidden states begin a request; see `SharesContext`."""
        for drafter in self._sharing():
            drafter.adopt(request_id, tokens)

    def _sharing(self) -> list[SharesContext]:
        return [
            drafter
            for drafter in (self._first, self._second)
            if drafter.capture and isinstance(drafter, SharesContext) and drafter.shares_context
        ]

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        self._first.release(request_id)
        self._second.release(request_id)
        self._gate.release(request_id)

    def _for_first(self, context: DraftContext) -> DraftContext:
        if context.rule is not Rule.REJECTION or context.budget < 2:
            return context
        return replace(context, budget=max(1, int(context.budget * self._config.share)))

    def _for_second(self, context: DraftContext, first: Proposal) -> DraftContext:
        if not context.rule.draws_from_laws:
            return context
        # Two drafters that drew with the same noise would not draw independently.
        moved = replace(context, round=context.round + self._offset)
        if context.rule is Rule.REJECTION:
            moved.budget = context.budget - first.tree.num_nodes
        return moved

    def _needs_second(self, context: DraftContext, first: Proposal) -> bool:
        tree = first.tree
        if context.rule is Rule.REJECTION:
            return tree.num_nodes < context.budget
        if not context.rule.draws_from_laws and self.saves_time:
            return self._gate.asks(tree)
        if context.rule is not Rule.BLOCK or not tree.num_nodes:
            return True
        # A drawn chain may not be set aside for what was drawn.
        is_certain = bool((first.law_of == POINT_MASS).all())
        return is_certain and float(tree.survival[0]) < self._config.sure

    def _unite(self, context: DraftContext, first: Proposal, second: Proposal | None) -> Proposal:
        first = _signed(first, self._first.name)
        if second is None:
            return first
        second = _signed(second, self._second.name)
        if context.rule is Rule.BLOCK:
            return second if second.tree.num_nodes or not first.tree.num_nodes else first
        is_drawn = context.rule is Rule.REJECTION
        united = merge(first, second, keep_duplicates=is_drawn)
        if context.width is not None:
            united = limit_width(united, context.width, by_survival=not is_drawn)
        return united.prune(context.budget, anticipating=not is_drawn)


def _signed(proposal: Proposal, name: str) -> Proposal:
    """The proposal with its drafter's name on every node, unless it names several already."""
    if proposal.source or not proposal.tree.num_nodes:
        return proposal
    source = (name,) * proposal.tree.num_nodes
    return Proposal(proposal.tree, proposal.laws, proposal.law_of, source)
