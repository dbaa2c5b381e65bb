"""Acceptance rules: which path of a tree the target accepts, and with what the round ends.

Row 0 of a tree is the anchor, row 1 + i is node i; the target's law at a row is the law of the
token that follows the path to it. Laws come from a function, so that only the rows a walk reaches
are ever computed (depth + 1 at the most), and uniforms come from a function of the node, so that
rules are pure and tests can choose them.

Rules that compare tokens (greedy, coupled, sample-match) know the target's token at every row and
follow it down the tree. Rules that compare laws (rejection, block) accept a drawn child against
the law it was drawn from, so that path and closing token together have the target's law.

Sources: rejection: Leviathan et al. 2023, Chen et al. 2023; several candidates without
replacement: Miao et al. 2024 (SpecInfer), Jeon et al. 2024, Algorithm 2 of Yang et al. 2024; block
verification: Sun et al. 2024, "Block verification accelerates speculative decoding", Algorithm 2.

Letters: N nodes, P laws, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.errors import ConfigError, DataError, ShapeError
from dspark.request import Rule
from dspark.tree import POINT_MASS, DraftTree, Proposal

__all__ = [
    "CLOSING",
    "LawFunction",
    "UniformFunction",
    "Walk",
    "children_of",
    "draw",
    "walk_block",
    "walk_rejection",
    "walk_targets",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LawFunction = Callable[[int], FloatArray]
"""Row of the tree (0 is the anchor) -> the target's law there, float64 [V]."""

UniformFunction = Callable[[int], float]
"""Node index, or CLOSING -> a uniform in [0, 1)."""

CLOSING = -1
"""The node index under which the closing token's uniform is asked for."""


@dataclass(frozen=True, slots=True)
class Walk:
    """How a law-comparing rule went down a tree.

    Attributes:
        path: Accepted node indices, root to leaf.
        tried: How many candidates were looked at, at depth 1, 2, ...
        law: float64 [V], law of the closing token; need not be normalised.
    """

    path: tuple[int, ...]
    tried: tuple[int, ...]
    law: FloatArray


def children_of(tree: DraftTree) -> list[list[int]]:
    """List the children of every row, in draw order.

    Args:
        tree: N nodes.

    Returns:
        N + 1 lists of node indices: those of the anchor, then of node 0, 1, ...

    Raises:
        ShapeError: If a node does not come after its parent.
    """
    children: list[list[int]] = [[] for _ in range(len(tree.token) + 1)]
    for node, parent in enumerate(tree.parent.tolist()):
        if not -1 <= parent < node:
            raise ShapeError(
                f"node {node} has parent {parent}, but must have -1 or an earlier node."
            )
        children[parent + 1].append(node)
    return children


def walk_targets(
    tree: DraftTree, targets: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Follow the target's own tokens down a tree.

    Among children with equal tokens (merged trees) the first is taken.

    Args:
        tree: N nodes.
        targets: N + 1 tokens, the target's at every row.

    Returns:
        The accepted path, the candidates looked at by depth, and the closing token: the target's
        token after the last accepted node.

    Raises:
        ShapeError: If the number of targets is not N + 1.
    """
    if len(targets) != len(tree.token) + 1:
        raise ShapeError(
            f"{len(targets)} target tokens for {len(tree.token)} nodes, but must be one more."
        )
    tokens = tree.token.tolist()
    children = children_of(tree)
    path: list[int] = []
    tried: list[int] = []
    row = 0
    while children[row]:
        wanted = int(targets[row])
        candidates = [tokens[node] for node in children[row]]
        if wanted not in candidates:
            tried.append(len(candidates))
            break
        at = candidates.index(wanted)
        tried.append(at + 1)
        path.append(children[row][at])
        row = path[-1] + 1
    return tuple(path), tuple(tried), int(targets[row])


def draw(law: FloatArray, uniform: float) -> int:
    """Draw a token by inverse CDF.

    Args:
        law: float64 [V], non-negative with a positive finite sum; need not be normalised.
        uniform: In [0, 1).

    Returns:
        The first token whose cumulated mass exceeds uniform times the total; never one with
        probability zero, not even for a uniform of exactly 0.
    """
    cumulated = np.cumsum(law)
    total = cumulated[-1]
    token = int(np.searchsorted(cumulated, uniform * total, side="right"))
    if token < len(law):
        return token
    return int(np.flatnonzero(law > 0)[-1])  # the product was rounded up to the total


class _DraftLaws:
    """The laws of one proposal, checked and brought to float64 as they are asked for."""

    def __init__(self, proposal: Proposal, rule: Rule) -> None:
        """Check that every node names a law.

        Raises:
            ShapeError: If one does not.
        """
        self.tokens: list[int] = proposal.tree.token.tolist()
        self.law_of: list[int] = proposal.law_of.tolist()
        laws = proposal.laws
        self._laws: FloatArray | None = None
        if laws is not None:
            self._laws = laws.detach().to("cpu", torch.float64).numpy()
        available = 0 if self._laws is None else len(self._laws)
        if len(self.law_of) != len(self.tokens):
            raise ShapeError(
                f"a proposal of {len(self.tokens)} nodes names laws for {len(self.law_of)} of "
                f"them, but rule {rule.value!r} needs the law that every token was drawn from.",
                hint="use rule 'coupled', or a drafter that reports its laws",
            )
        for index in self.law_of:
            if not POINT_MASS <= index < available:
                raise ShapeError(
                    f"law_of holds {index}, but must be from {POINT_MASS} to {available - 1}."
                )

    def token(self, node: int, size: int) -> int:
        """Give a node's token; raises ShapeError if it is not one of the target's V = `size`."""
        token = self.tokens[node]
        if not 0 <= token < size:
            raise ShapeError(f"a drafted token is {token}, but must be from 0 to {size - 1}.")
        return token

    def of(self, node: int, size: int) -> FloatArray:
        """Give the law that a node's token was drawn from, float64 [V], normalised.

        Args:
            node: The node.
            size: V of the target.

        Returns:
            The law.

        Raises:
            ShapeError: If the law's width or the token does not fit the target.
            DataError: If it is not a law.
        """
        index, token = self.law_of[node], self.token(node, size)
        if index == POINT_MASS or self._laws is None:
            certain = np.zeros(size, dtype=np.float64)
            certain[token] = 1.0
            return certain
        law: FloatArray = self._laws[index]
        if len(law) != size:
            raise ShapeError(f"a draft law has width {len(law)}, but the target's is {size}.")
        total = float(law.sum())
        if not (0 < total < np.inf and law.min() >= 0):
            raise DataError(
                f"draft law {index} sums to {total} with least entry {law.min()}, but must be "
                "non-negative and sum to 1."
            )
        return law / total


def _residual(target: FloatArray, draft: FloatArray) -> FloatArray:
    """Give max(target - draft, 0), normalised: the law to draw from after a rejection.

    It is empty only if the draft law is nowhere below the target's, and both sum to 1: they are
    equal up to rounding. A rejection then had probability zero but for rounding, and the target's
    own law is as close to the truth as any.
    """
    rest = np.maximum(target - draft, 0.0)
    total = rest.sum()
    return rest / total if total > 0 else target


def _without(law: FloatArray, token: int) -> FloatArray:
    """Remove a token from a law and renormalise; all zero once the law is exhausted."""
    rest = law.copy()
    rest[token] = 0.0
    total = rest.sum()
    return rest / total if total > 0 else rest


def walk_rejection(proposal: Proposal, target_law: LawFunction, uniform: UniformFunction) -> Walk:
    """Accept children in draw order with min(1, target / draft), the residual taking over.

    Children of one parent that share a law were drawn from it without replacement, so after a
    rejection their law loses that token. Children with laws of their own (merged trees) are an
    ordered list of independent candidates; equal tokens among them stay, each being judged
    against what is left. A token to which its law gives no mass cannot have been drawn from it;
    it is passed over, which changes no law.

    Args:
        proposal: N nodes with their laws.
        target_law: The target's law at a row.
        uniform: The uniform of a node.

    Returns:
        The walk; its closing law is the target's after the accepted path, or the residual if all
        children there were rejected.

    Raises:
        ShapeError: If laws, law indices and vocabulary do not agree.
        DataError: If a draft law is not a law.
    """
    drafts = _DraftLaws(proposal, Rule.REJECTION)
    children = children_of(proposal.tree)
    path: list[int] = []
    tried: list[int] = []
    law = target_law(0)
    row = 0
    while children[row]:
        accepted, law, looked_at = _judge(drafts, children[row], law, uniform)
        tried.append(looked_at)
        if accepted is None:
            break
        path.append(accepted)
        row = accepted + 1
        law = target_law(row)
    return Walk(tuple(path), tuple(tried), law)


def _judge(
    drafts: _DraftLaws, siblings: Sequence[int], target: FloatArray, uniform: UniformFunction
) -> tuple[int | None, FloatArray, int]:
    """Judge the children of one parent: the accepted one or None, the law left, how many."""
    size = len(target)
    current: dict[int, FloatArray] = {}
    for count, node in enumerate(siblings, start=1):
        token, group = drafts.token(node, size), drafts.law_of[node]
        draft = drafts.of(node, size) if group not in current else current[group]
        if draft[token] > 0:
            if uniform(node) * draft[token] < target[token]:
                return node, target, count
            target = _residual(target, draft)
            draft = _without(draft, token)
        if group != POINT_MASS:
            current[group] = draft
    return None, target, len(siblings)


def walk_block(proposal: Proposal, target_law: LawFunction, uniform: UniformFunction) -> Walk:
    """Judge a chain as one block: the longest prefix whose test succeeds is accepted.

    With p_0 = 1 and p_i = min(p_{i-1} target(x_i) / draft(x_i), 1), prefix i succeeds with
    probability S_i / (S_i + 1 - p_i), where S_i is the mass of max(p_i target - draft, 0) at the
    next position, and the whole chain with p_gamma. A failed prefix does not end the search. The
    closing token comes from max(p_i target - draft, 0) after the longest successful prefix.

    Args:
        proposal: A chain of N nodes with their laws.
        target_law: The target's law at a row.
        uniform: The uniform of a node.

    Returns:
        The walk.

    Raises:
        ConfigError: If the tree branches.
        ShapeError: If laws, law indices and vocabulary do not agree.
        DataError: If a draft law is not a law.

    Source:
        Sun et al. 2024, "Block verification accelerates speculative decoding", Algorithm 2.
    """
    tree = proposal.tree
    nodes = len(tree.token)
    if not np.array_equal(tree.parent, np.arange(-1, nodes - 1)):
        raise ConfigError(
            "rule 'block' was given a tree that branches, but verifies chains only.",
            hint="set width to 1, or use rule 'rejection'",
        )
    drafts = _DraftLaws(proposal, Rule.BLOCK)
    law = target_law(0)
    draft = drafts.of(0, len(law)) if nodes else law
    accepted, looked_at, ratio = 0, 0, 1.0
    closing = _block_residual(1.0, law, draft) if nodes else law
    for node in range(nodes):
        token = drafts.tokens[node]
        if draft[token] <= 0:
            break  # cannot have been drawn: the chain ends before it
        looked_at = node + 1
        ratio = min(ratio * (law[token] / draft[token]), 1.0)
        if ratio == 0:
            break  # no longer prefix can succeed
        law = target_law(node + 1)
        if node + 1 == nodes:
            if uniform(node) < ratio:
                accepted, closing = nodes, law
            break
        draft = drafts.of(node + 1, len(law))
        mass = float(np.maximum(ratio * law - draft, 0.0).sum())
        if uniform(node) * (mass + 1.0 - ratio) < mass:
            accepted, closing = node + 1, _block_residual(ratio, law, draft)
    return Walk(tuple(range(accepted)), (1,) * looked_at, closing)


def _block_residual(ratio: float, target: FloatArray, draft: FloatArray) -> FloatArray:
    """Give max(ratio * target - draft, 0); the target's law where rounding leaves it empty."""
    rest = np.maximum(ratio * target - draft, 0.0)
    return rest if rest.sum() > 0 else target
