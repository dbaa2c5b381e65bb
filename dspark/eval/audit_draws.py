"""Identity check: the law a proposal records is the law its tokens were drawn from.

Draws are counter-based: the children of a node are the largest values of log law + noise, the noise
being named by the sample's key, the round and the node (`verify.noise.draft_gumbel`). So every draw
can be made again from what the proposal records, over the whole vocabulary and in float64, and must
give the same children in the same order. No sample size is needed to see a law that was recorded in
another temperature than it was drawn at: one draw that differs is enough. Another precision changes
few draws, so noise is looked for with which the two best candidates nearly tie (`near_ties`), and
the drafter is asked to draw with that.

Candidates offered with certainty are drawn from nothing: in one context they must be the same
whatever the noise. The number of children of the anchor must not depend on the noise either, and a
chain must go on after a token wherever it goes on after that token and the same ones before it:
what was dropped for what it turned out to be would be missing from the law.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dspark.draft.base import DraftContext, Drafter
from dspark.eval.audit_report import CheckResult, Status
from dspark.request import Rule, SamplingParams
from dspark.tree import POINT_MASS, Proposal
from dspark.verify.noise import NoiseKey, draft_gumbel

__all__ = ["DrawRecorder", "near_ties"]

FloatArray = NDArray[np.float64]
_Place = tuple[object, ...]

_ROUND_OFFSET = 1 << 32  # what a combined drafter adds per part (dspark.draft.combined)
_TOLERANCE = 1e-5  # in units of log law: a law kept in float32 is good to 1e-6
_NEAR = 1e-3  # draws decided by less than this are counted
_CANDIDATES = 64  # likeliest tokens among which near-ties are looked for


def near_ties(
    law: FloatArray, name: tuple[int, int], *, start: int, tried: int, count: int
) -> list[int]:
    """Find seeds whose noise nearly ties the two best candidates of a law.

    Args:
        law: float64 [V].
        name: (round, node) of the noise.
        start: First seed to try.
        tried: Seeds to try.
        count: Seeds to return at the most.

    Returns:
        Those with the smallest gaps that a recorded law still resolves.
    """
    ids = np.argsort(-law, kind="stable")[:_CANDIDATES]
    ids = ids[law[ids] > 0]
    if len(ids) < 2:
        return []
    logs = np.log(law[ids])
    gaps = np.empty(tried)
    for i in range(tried):
        best = np.partition(logs + draft_gumbel(NoiseKey(start + i), *name, ids), -2)[-2:]
        gaps[i] = best[1] - best[0]
    gaps[gaps <= 2 * _TOLERANCE] = np.inf
    return [start + int(i) for i in np.argsort(gaps)[:count] if np.isfinite(gaps[i])]


@dataclass(frozen=True, slots=True)
class _Group:
    """Children of one parent that share a law."""

    parent: int
    name: tuple[int, int]  # (round, parent) as the drafter counted them
    law: int
    tokens: tuple[int, ...]


@dataclass(slots=True)
class DrawRecorder:
    """A drafter that passes another's proposals on and checks them.

    Attributes:
        drafter: The drafter under test.
        vocab_size: V.
        most: Draws to check at the most; the rest is passed on unchecked.
    """

    drafter: Drafter
    vocab_size: int
    most: int = 5000
    draws: int = 0
    near: int = 0
    tokens: int = 0
    certain: int = 0
    wrong: int = 0
    worst: float = -np.inf
    faults: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _first_laws: dict[_Place, FloatArray] = field(default_factory=dict)
    _first_draws: dict[_Place, tuple[int, FloatArray]] = field(default_factory=dict)
    _ties: dict[tuple[object, ...], list[int]] = field(default_factory=dict)
    _pending: list[tuple[DraftContext, Proposal]] = field(default_factory=list)
    _shapes: dict[_Place, tuple[int, ...]] = field(default_factory=dict)
    _goes_on: dict[_Place, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.drafter.name

    @property
    def capture(self) -> tuple[int, ...]:
        """Layers that the drafter needs."""
        return self.drafter.capture

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        """Let the drafter propose; what it says is kept for `check`."""
        try:
            proposals = self.drafter.propose(contexts)
        except Exception as exc:
            self.failures.append(f"{type(exc).__name__}: {exc}")
            raise  # the round goes on without drafts
        for context, proposal in zip(contexts, proposals, strict=False):
            if context.rule.draws_from_laws and self.draws + len(self._pending) < self.most:
                # The request's own list, which grows.
                still = replace(context, tokens=tuple(context.tokens), features=None)
                self._pending.append((still, proposal))
        return proposals

    def release(self, request_id: int) -> None:
        """Forget a request."""
        self.drafter.release(request_id)

    def check(self) -> None:
        """Make the draws of the proposals seen since the last call again."""
        pending, self._pending = self._pending, []
        for context, proposal in pending:
            tree = proposal.tree
            if len(proposal.law_of) != tree.num_nodes:
                self._fault("a proposal names no law for its tokens")
                continue
            if context.round == 1:
                self._note_length(context, proposal)
                self._note_anchor(context, proposal)
            for group in self._groups(context, proposal):
                self._redraw(context, proposal, group)
                if context.round == 1 and group.parent < 0:
                    law = _law(proposal, group.law, 0, self.vocab_size)
                    place = _place(context.tokens, context.params)
                    self._first_draws.setdefault(place, (group.name[0], law))

    def law_at(self, tokens: Sequence[int], params: SamplingParams) -> FloatArray | None:
        """The law float64 [V] that the anchor's first child came from in a context, if seen."""
        return self._first_laws.get(_place(tokens, params))

    def seeds_that_tie(
        self, tokens: Sequence[int], params: SamplingParams, *, start: int, tried: int, count: int
    ) -> list[int]:
        """Seeds that nearly tie the first draw in a context, if one was seen; see `near_ties`."""
        known = self._first_draws.get(_place(tokens, params))
        if known is None:
            return []
        number, law = known
        name = (tuple(tokens), number, law.tobytes())  # rules share their draws
        if name not in self._ties:
            self._ties[name] = near_ties(law, (number, -1), start=start, tried=tried, count=count)
        return self._ties[name]

    # -- inside -------------------------------------------------------------------------------

    def _fault(self, text: str) -> None:
        self.wrong += 1
        if len(self.faults) < 8:
            self.faults.append(text)

    def _note_anchor(self, context: DraftContext, proposal: Proposal) -> None:
        """Compare what hangs at the anchor with other samples of the same first round."""
        tree, law_of = proposal.tree, proposal.law_of.tolist()
        children = np.flatnonzero(tree.parent == -1).tolist()
        if not children:
            return
        shape = tuple(
            int(tree.token[node]) if law_of[node] == POINT_MASS else -1 for node in children
        )
        # A truncated law that has lost a token to rounding may well give fewer children.
        laws = {law_of[node] for node in children}
        support = tuple(
            int(np.count_nonzero(_law(proposal, law, 0, self.vocab_size))) for law in sorted(laws)
        )
        known = self._shapes.setdefault((*_asked(context), support), shape)
        if known != shape:
            self._fault(
                f"the anchor's children depend on the noise: {shape} after {known} in one context "
                "(-1 is a drawn token)"
            )
        place = _place(context.tokens, context.params)
        if place not in self._first_laws:
            self._first_laws[place] = _law(proposal, law_of[children[0]], shape[0], self.vocab_size)

    def _note_length(self, context: DraftContext, proposal: Proposal) -> None:
        """Compare where a chain ends with other samples of the same first round."""
        tree = proposal.tree
        tokens = tuple(tree.token.tolist()) if tree.is_chain else ()
        for size in range(len(tokens) + 1):
            goes_on = size < tree.num_nodes
            place = (*_asked(context), tokens[:size])
            if self._goes_on.setdefault(place, goes_on) != goes_on:
                self._fault(
                    f"after the drafted tokens {list(tokens[:size])} one draft of a context ends "
                    "and another goes on: its length depends on what was drawn next"
                )

    def _groups(self, context: DraftContext, proposal: Proposal) -> list[_Group]:
        """The drawn siblings of a proposal, named as the drafter that drew them did."""
        parts = self.drafter.name.split("+")
        local: list[int] = []
        counts: dict[str, int] = {}
        groups: dict[tuple[int, int], list[int]] = {}
        parents, law_of = proposal.tree.parent.tolist(), proposal.law_of.tolist()
        for node, law in enumerate(law_of):
            source = proposal.source[node] if proposal.source else parts[0]
            local.append(counts.get(source, 0))
            counts[source] = local[-1] + 1
            if law == POINT_MASS:
                self.certain += 1
            else:
                groups.setdefault((parents[node], law), []).append(node)
        named = []
        for (parent, law), nodes in groups.items():
            source = proposal.source[nodes[0]] if proposal.source else parts[0]
            place = parts.index(source) if source in parts else 0
            name = (context.round + place * _ROUND_OFFSET, -1 if parent < 0 else local[parent])
            tokens = tuple(int(proposal.tree.token[node]) for node in nodes)
            named.append(_Group(parent, name, law, tokens))
        return named

    def _redraw(self, context: DraftContext, proposal: Proposal, group: _Group) -> None:
        law = _law(proposal, group.law, 0, self.vocab_size)
        possible = np.flatnonzero(law > 0)
        self.draws += 1
        self.tokens += len(group.tokens)
        values = np.full(len(law), -np.inf)
        noise = draft_gumbel(context.noise, *group.name, possible)
        values[possible] = np.log(law[possible]) + noise
        for token in group.tokens:
            value, values[token] = values[token], -np.inf
            gap = float(values.max() - value)  # negative if the right one was drawn
            self.worst = max(self.worst, gap)
            if not gap <= _TOLERANCE:
                self._fault(
                    f"round {context.round}, {context.rule.value}: token {token} was drawn where "
                    f"the recorded law and its noise give {int(values.argmax())}, by {gap:.2g}"
                )
                return
            self.near += gap > -_NEAR

    def result(self, rules: Sequence[Rule], seconds: float) -> CheckResult:
        """What was seen."""
        status, evidence, power, advice = self._verdict()
        return CheckResult(
            name="draws, " + " and ".join(rule.value for rule in rules),
            status=status,
            evidence=evidence,
            power=power,
            advice=advice,
            seconds=seconds,
            details={
                "draws": self.draws,
                "drawn_tokens": self.tokens,
                "near_ties": self.near,
                "certain_candidates": self.certain,
                "judged_nodes": self.tokens + self.certain,
                "wrong": self.wrong,
                "worst_gap": self.worst if self.draws else None,
                "faults": self.faults,
                "failures": self.failures[:8],
            },
        )

    def _verdict(self) -> tuple[Status, str, str, str]:
        if self.faults:
            advice = (
                "the drafter must record the very law it draws from and draw with the noise of "
                "verify.noise.draft_topk; until then use --rule coupled"
            )
            return Status.FOUND, f"{self.wrong} faults: {self.faults[0]}", "", advice
        if not self.draws and not self.certain:
            why = f"the drafter failed ({self.failures[0]})" if self.failures else "it had none"
            evidence = f"nothing was drafted, so no draw could be made again: {why}"
            return Status.INCONCLUSIVE, evidence, "", "audit with prompts it can draft for"
        seen = []
        if self.draws:
            seen.append(f"{self.draws} draws of {self.tokens} tokens made again from their laws")
        if self.certain:
            seen.append(f"{self.certain} candidates are certain, whatever the noise")
        evidence = "; ".join(seen)
        power = ""
        if self.draws:
            power = f"a law that changes one draw in {max(1, int(self.draws / 2.3))} (90 %)"
            power += f"; {self.near} tokens were drawn by a margin under {_NEAR:g} of log law"
        return Status.PASSED, evidence, power, ""


def _place(tokens: Sequence[int], params: SamplingParams) -> _Place:
    """What a first draw depends on but for the noise."""
    shaped = (params.temperature, params.top_k, params.top_p, params.min_p)
    return (tuple(tokens), params.rule, *shaped, params.tree_budget, params.depth, params.width)


def _asked(context: DraftContext) -> _Place:
    """What the shape of a first draft may depend on: the place, and how much was asked for."""
    place = _place(context.tokens, context.params)
    return (*place, context.budget, context.depth, context.width)


def _law(proposal: Proposal, index: int, token: int, size: int) -> FloatArray:
    """A recorded law, float64 [V]; certain of `token` where there is none."""
    if index == POINT_MASS or proposal.laws is None:
        law = np.zeros(size, dtype=np.float64)
        law[token] = 1.0
        return law
    row: FloatArray = proposal.laws[index].detach().cpu().double().numpy()
    return row
