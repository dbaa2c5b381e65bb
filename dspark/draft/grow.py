"""Growing a tree level by level from a causal draft's logits, as the acceptance rule demands.

A `Growth` names the nodes to expand next, takes the shaped logits of their rows, and in the end
gives the proposal. Two kinds:

`RankedGrowth` (greedy, coupled, sample-match) looks at probabilities before it decides: any tree is
lossless there. Levels as in EAGLE-2 (arXiv 2406.16858): all candidates of a level are kept, the
best few are expanded, the best of all levels remain.

`DrawnGrowth` (rejection, block) fixes the whole shape before any draw, as Sequoia (arXiv
2402.12374) does: the tree with the most expected accepted tokens if the chance of acceptance
depends on the draw index alone. Nothing about it depends on drawn tokens, so it is
non-anticipating.

**Survival of ranked candidates.** If the target's log-probabilities differ from the draft's by
independent Gumbel errors of scale 1, then the target's choice is token i with probability
softmax(v)_i, v being what the choice is the maximum of: shaped logits for greedy, so the draft's
own probability; shaped logits plus the shared noise for coupled, so that a clear perturbed winner
counts as nearly certain however flat the law is. Under sample-match the target's noise is not
known, the drawn token is i with its probability, so the shaped draft law ranks and rates. These
are priors; survival maps (calibration.py) take their place where some were fitted.

Letters: R rows (expanded nodes), V vocabulary, P laws.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.draft.base import DraftContext
from dspark.draft.block_runner import Ask, Found
from dspark.draft.calibration import Calibration, SurvivalMap
from dspark.draft.recording import Recorder, tell
from dspark.errors import ConfigError
from dspark.request import Rule
from dspark.tree import DraftTree, FloatArray, Proposal
from dspark.tree_build import TreeGrower, best_first
from dspark.verify import noise, sampling

__all__ = [
    "DrawnGrowth",
    "Growth",
    "GrowthConfig",
    "GrowsTrees",
    "Limits",
    "RankedGrowth",
    "drawn_shape",
    "grow",
]

_EXTRA = 4  # perturbed candidates looked at beyond the width, for the share of those left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far one proposal may grow, and how its nodes are rated.

    Attributes:
        budget: Nodes to offer at the most.
        depth: Longest path.
        width: Children per node at the most.
        beams: Nodes to expand per level at the most (ranked growth).
        min_survival: Nodes less likely than this are not expanded (ranked growth).
        rating: The survival map in force, None for the draft's own estimate.
        recorder: Is told of every node that is added, or None.
    """

    budget: int
    depth: int
    width: int
    beams: int
    min_survival: float
    rating: SurvivalMap | None = None
    recorder: Recorder | None = None

    @property
    def needs_confidence(self) -> bool:
        """Whether a confidence head has to be asked."""
        rated = self.rating is not None and self.rating.reads_confidence
        return rated or self.recorder is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthConfig:
    """Settings that every drafter that grows trees has.

    Attributes:
        width: Children per node at the most where the request does not say, >= 1.
        beams: Nodes to expand per level at the most, >= 1 (greedy, coupled, sample-match).
        min_survival: Nodes less likely than this are not expanded, in [0, 1) (the same rules).
        calibration: Survival maps of this draft, None for its own estimates.
        recorder: Is told of every node that is added, or None.

    Raises:
        ConfigError: If a value is outside its range.
    """

    width: int = 4
    beams: int = 4
    min_survival: float = 0.02
    calibration: Calibration | None = None
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("beams", self.beams)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, but must be an integer >= 1.")
        if not 0 <= self.min_survival < 1:
            raise ConfigError(f"min_survival is {self.min_survival}, but must be in [0, 1).")

    def limits(self, context: DraftContext, depth: int) -> Limits:
        """How far a request's proposal may grow, with paths of `depth` at the most."""
        width = self.width if context.width is None else context.width
        if context.rule is Rule.BLOCK:
            width = 1  # it verifies chains only
        rating = None
        if self.calibration is not None:
            temperature = context.params.temperature
            rating = self.calibration.find(context.rule, temperature, is_chain=width == 1)
        return Limits(
            budget=context.budget,
            depth=min(context.depth, depth),
            width=width,
            beams=self.beams,
            min_survival=self.min_survival,
            rating=rating,
            recorder=self.recorder,
        )


@runtime_checkable
class GrowsTrees(Protocol):
    """A drafter that grows its trees here; its settings may be replaced between rounds."""

    config: GrowthConfig


class Growth(Protocol):
    """A tree that grows level by level.

    Attributes:
        tree: What has grown so far.
        needs_all_tokens: Whether a row must have a column for every token of the target, as where
            noise is added by token; else a draft's own vocabulary will do.
    """

    tree: TreeGrower
    needs_all_tokens: bool

    def frontier(self) -> list[int]:
        """Nodes to expand next, -1 for the anchor; empty when the tree is done."""
        ...

    def take(
        self,
        nodes: Sequence[int],
        shaped: torch.Tensor,
        confidence: Sequence[float] | None = None,
        ids: torch.Tensor | None = None,
    ) -> None:
        """Add children of these nodes.

        Args:
            nodes: The nodes, -1 for the anchor.
            shaped: float32 [R, V], one row each, finite maximum.
            confidence: Confidence logit of each, None if there is none or nobody asked.
            ids: int64 [V], the token of each column; None where column and token are the same,
                as they must be if `needs_all_tokens`.
        """
        ...

    def proposal(self) -> Proposal:
        """What has grown so far, within the budget."""
        ...


def grow(context: DraftContext, limits: Limits) -> Growth:
    """The growth that the request's rule demands."""
    if context.rule.draws_from_laws:
        return DrawnGrowth(context, limits)
    return RankedGrowth(context, limits)


class RankedGrowth:
    """Candidates by probability; see the module."""

    def __init__(self, context: DraftContext, limits: Limits) -> None:
        self.tree = TreeGrower()
        self.needs_all_tokens = context.rule is Rule.COUPLED
        self._context = context
        self._limits = limits
        self._level = 0  # levels already handed out
        self._start = 0  # first node of the newest level

    def frontier(self) -> list[int]:
        """The best nodes of the newest level that are still among the best of all."""
        limits, tree = self._limits, self.tree
        if self._level >= limits.depth or not limits.budget:
            return []
        self._level += 1
        if self._level == 1:
            return [-1]
        worth = tree.survival
        best = heapq.nsmallest(limits.budget, range(len(tree)), key=lambda i: (-worth[i], i))
        start, self._start = self._start, len(tree)
        new = [i for i in best if i >= start and worth[i] >= limits.min_survival]
        return sorted(new[: limits.beams])

    def take(
        self,
        nodes: Sequence[int],
        shaped: torch.Tensor,
        confidence: Sequence[float] | None = None,
        ids: torch.Tensor | None = None,
    ) -> None:
        """Add the best `width` candidates of every node, best first; see `Growth.take`."""
        columns, shares = self._candidates(nodes, shaped)
        best: list[list[int]] = (columns if ids is None else ids[columns]).tolist()
        self._add(nodes, best, shares, confidence)

    @property
    def count(self) -> int:
        """Candidates to look at for each node."""
        has_noise = self._context.rule is Rule.COUPLED
        return self._limits.width + (_EXTRA if has_noise else 0)

    def noise(self, node: int, size: int) -> NDArray[np.float32] | None:
        """Noise [size] by which the children of a node are chosen; None where there is none."""
        context = self._context
        if context.rule is not Rule.COUPLED:
            return None
        depth = 0 if node < 0 else self.tree.depth[node]
        return noise.approximate_gumbel(context.noise, [context.output_position + depth], size)[0]

    def ask(self, request: int, scale: float, size: int) -> Ask | None:
        """The whole tree, for somebody else to grow; None where it has to be grown here.

        Args:
            request: Which of the blocks.
            scale: What logits are divided by.
            size: V, as `noise`.
        """
        context, limits = self._context, self._limits
        if limits.recorder is not None:
            return None
        noises = None
        if context.rule is Rule.COUPLED:
            first = context.output_position
            positions = range(first, first + limits.depth)
            noises = noise.approximate_gumbel(context.noise, positions, size)
        return Ask(
            request=request,
            anchor=context.tokens[-1],
            budget=limits.budget,
            depth=limits.depth,
            width=limits.width,
            count=self.count,
            beams=limits.beams,
            min_survival=limits.min_survival,
            temperature=scale,
            noise=noises,
            rating=limits.rating,
        )

    def take_tree(self, tree: TreeGrower) -> None:
        """Take over what somebody grew for `ask`."""
        self.tree = tree

    def take_found(
        self,
        nodes: Sequence[int],
        found: Found,
        confidence: Sequence[float] | None = None,
    ) -> None:
        """Add candidates that somebody else has looked for, as `take` does.

        Args:
            nodes: The nodes, -1 for the anchor.
            found: `count` candidates of each or more, with the `noise` of each.
            confidence: As `take`.
        """
        width = self._limits.width
        values = found.values[:, : self.count].astype(np.float64)
        if self._context.rule is Rule.COUPLED:
            weights = np.exp(values - values[:, :1])
            shares = weights / weights.sum(axis=1, keepdims=True)
        else:
            shares = np.exp(values - found.log_sum[:, None])
        self._add(nodes, found.tokens[:, :width].tolist(), shares[:, :width], confidence)

    def _add(
        self,
        nodes: Sequence[int],
        best: Sequence[Sequence[int]],
        shares: FloatArray,
        confidence: Sequence[float] | None,
    ) -> None:
        given, tree, rating = shares.tolist(), self.tree, self._limits.rating
        rates = given
        if rating is not None:
            depth = [1 if node < 0 else tree.depth[node] + 1 for node in nodes]
            rates = rating.rates(
                depth, shares.shape[1], share=shares, confidence=confidence
            ).tolist()
        first = len(tree)
        for node, tokens, probs, rho in zip(nodes, best, given, rates, strict=True):
            above = 1.0 if node < 0 else tree.survival[node]
            for token, prob, rate in zip(tokens, probs, rho, strict=True):
                if prob > 0:
                    tree.add(node, token, above * rate)
        if self._limits.recorder is not None:
            share = [prob for probs in given for prob in probs if prob > 0]
            tell(self._limits.recorder, self._context, tree, first, nodes, confidence, share)

    def _candidates(
        self, nodes: Sequence[int], shaped: torch.Tensor
    ) -> tuple[torch.Tensor, FloatArray]:
        context, width = self._context, min(self._limits.width, int(shaped.shape[1]))
        if context.rule is Rule.COUPLED:
            first = context.output_position  # of a child of the anchor
            at = [first if node < 0 else first + self.tree.depth[node] for node in nodes]
            seen = min(width + _EXTRA, int(shaped.shape[1]))
            ids, values = noise.perturbed_topk(shaped, [context.noise] * len(nodes), at, seen)
            shares = torch.softmax(values, dim=1)
        else:
            values, ids = torch.topk(shaped, width, dim=1)
            shares = torch.exp(values - torch.logsumexp(shaped, dim=1, keepdim=True))
        best: FloatArray = shares[:, :width].to("cpu", torch.float64).numpy()
        return ids[:, :width], best

    def proposal(self) -> Proposal:
        """The best nodes within the budget."""
        return Proposal(self.tree.build().prune(self._limits.budget))


def _acceptance_by_draw(width: int, hazards: Sequence[float] = ()) -> list[float]:
    """Chance that the r-th draw is accepted, the earlier ones having been rejected included.

    A prior where nothing was fitted: .6 for the first, and each later one that is reached has
    .6 / (1 + r / 2), since it is judged against a residual that draws have already been taken from.

    Args:
        width: Draws.
        hazards: Fitted chances of the draws that are reached; later draws have the last.
    """
    chances: list[float] = []
    left = 1.0
    for rank in range(width):
        hazard = hazards[min(rank, len(hazards) - 1)] if hazards else 0.6 / (1 + rank / 2)
        chance = left * hazard
        left -= chance
        chances.append(min(chance, *chances[-1:], 1.0))
    return chances


@lru_cache(maxsize=128)
def drawn_shape(budget: int, depth: int, width: int, hazards: tuple[float, ...] = ()) -> DraftTree:
    """The fixed tree for drawn children; `token` holds draw indices.

    Args:
        budget: Nodes, >= 0.
        depth: Longest path, >= 0.
        width: Children per node at the most, >= 1.
        hazards: Mean chance of each draw that is reached, by draw index; empty for a prior.

    Returns:
        The tree with the highest sum of expected survival; shared, not to be written to.

    **Source:** Sequoia, arXiv 2402.12374, section 3.1 (positional acceptance, optimal tree).
    """
    width = min(width, max(budget, 1))
    children = (range(width), _acceptance_by_draw(width, hazards))
    return best_first(
        lambda _, nodes: [children] * len(nodes), budget=budget, depth=depth, width=width
    )


class DrawnGrowth:
    """Children drawn without replacement into a shape fixed beforehand; see the module."""

    def __init__(self, context: DraftContext, limits: Limits) -> None:
        self.tree = TreeGrower()
        self.needs_all_tokens = True
        self._context = context
        self._limits = limits
        width = 1 if context.rule is Rule.BLOCK else limits.width
        hazards = () if limits.rating is None else limits.rating.chances
        self._shape = drawn_shape(limits.budget, limits.depth, width, hazards)
        start, child = self._shape.children()
        self._children = [
            child[a:b].tolist()
            for a, b in zip(start[:-1].tolist(), start[1:].tolist(), strict=True)
        ]  # of shape node i at i + 1
        self._shape_node = {-1: -1}
        self._fresh = [-1]
        self._laws: list[torch.Tensor] = []
        self._law_of: list[int] = []

    def frontier(self) -> list[int]:
        """Drawn nodes of the newest level to which the shape gives children."""
        fresh, self._fresh = self._fresh, []
        return [node for node in fresh if self._children[self._shape_node[node] + 1]]

    def take(
        self,
        nodes: Sequence[int],
        shaped: torch.Tensor,
        confidence: Sequence[float] | None = None,
        ids: torch.Tensor | None = None,
    ) -> None:
        """Draw the children of every node in draw order; keep the laws they were drawn from.

        See `Growth.take`.
        """
        context, tree = self._context, self.tree
        counts = [len(self._children[self._shape_node[node] + 1]) for node in nodes]
        ids, _ = noise.draft_topk(
            shaped, [context.noise] * len(nodes), [context.round] * len(nodes), nodes, max(counts)
        )
        laws = sampling.laws(shaped, [context.params] * len(nodes))
        worth = self._worth(nodes, max(counts), confidence)
        first = len(tree)
        for row, (node, count, tokens) in enumerate(zip(nodes, counts, ids.tolist(), strict=True)):
            law = len(self._laws)
            self._laws.append(laws[row])
            places = self._children[self._shape_node[node] + 1]
            for place, token, survival in zip(places, tokens[:count], worth[row], strict=False):
                if token < 0:  # the law is exhausted
                    break
                new = tree.add(node, token, survival)
                self._shape_node[new] = place
                self._law_of.append(law)
                self._fresh.append(new)
        if self._limits.recorder is not None:
            tell(self._limits.recorder, context, tree, first, nodes, confidence)

    def _worth(
        self, nodes: Sequence[int], width: int, confidence: Sequence[float] | None
    ) -> list[list[float]]:
        """Survival of the children of every node by draw index, before any of them is drawn."""
        rating, tree = self._limits.rating, self.tree
        if rating is None:
            rows = [self._children[self._shape_node[node] + 1] for node in nodes]
            return [self._shape.survival[places].tolist() for places in rows]
        depth = [1 if node < 0 else tree.depth[node] + 1 for node in nodes]
        above = [1.0 if node < 0 else tree.survival[node] for node in nodes]
        rates = rating.rates(depth, width, confidence=confidence)
        worth: list[list[float]] = (rates * np.array(above)[:, None]).tolist()
        return worth

    def proposal(self) -> Proposal:
        """All that was drawn, with its laws."""
        laws = torch.stack(self._laws) if self._laws else None
        return Proposal(self.tree.build(), laws, np.array(self._law_of, dtype=np.int64))
