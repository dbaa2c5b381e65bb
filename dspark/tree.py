"""Draft trees: structure, masks, paths, pruning. Builders and merging are in `tree_build`.

A tree is a set of parallel arrays in topological order. Node i continues the path that ends in
`parent[i]`; -1 is the anchor, which is a row of the verify batch but not a node. Depth starts at 1.
Among the children of one parent, index order is draw order (the order in which the rejection rule
looks at them). Letters: N nodes, P laws, V vocabulary.

Trees are rebuilt every round for every request and are small (N <= 64 as a rule), so whatever has
to follow parents does so over Python ints, which is faster at that size than N small array calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dspark.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    import torch

__all__ = ["POINT_MASS", "DraftTree", "Proposal"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

POINT_MASS = -1
"""`Proposal.law_of` value of a node whose law is certain of its own token."""

_RANK_DISCOUNT = 0.5  # weight of a later candidate when only its parent may be looked at


def _vector(values: Sequence[int] | IntArray, name: str) -> IntArray:
    array = np.array(values, dtype=np.int64)  # a copy: a tree shares no memory with its caller
    if array.ndim != 1:
        raise ShapeError(f"{name} of a draft tree has shape {array.shape}, but must be a vector.")
    return array


def _depths(parents: list[int]) -> list[int]:
    """Depth of every node, and the check that parents come first."""
    depth: list[int] = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ShapeError(
                f"node {node} of a draft tree has parent {parent}, but must have an earlier node "
                "or -1 (the anchor)."
            )
        depth.append(1 if parent < 0 else depth[parent] + 1)
    return depth


def _check_survival(survival: FloatArray, parent: IntArray) -> None:
    inside = (survival >= 0) & (survival <= 1)  # false for NaN
    if not inside.all():
        node = int(np.argmin(inside))
        raise ConfigError(
            f"survival of draft node {node} is {survival[node]}, but must be in [0, 1]."
        )
    above = np.append(survival, 1.0)[parent]  # parent -1 reads the appended 1, the anchor's
    if (survival > above).any():
        node = int(np.argmax(survival > above))
        raise ConfigError(
            f"survival of draft node {node} is {survival[node]}, but must not be above its "
            f"parent's, {above[node]}."
        )


@dataclass(frozen=True, slots=True)
class DraftTree:
    """A token tree.

    The constructor trusts its arguments (it runs in the round); `build` computes and checks.

    Attributes:
        token: int64 [N].
        parent: int64 [N], -1 for the anchor, else an earlier index.
        depth: int64 [N], 1 for the anchor's children.
        survival: float64 [N] in [0, 1], probability that verification reaches and accepts the
            node; never larger than its parent's.
    """

    token: IntArray
    parent: IntArray
    depth: IntArray
    survival: FloatArray

    @staticmethod
    def build(
        token: Sequence[int] | IntArray,
        parent: Sequence[int] | IntArray,
        survival: Sequence[float] | FloatArray | None = None,
    ) -> DraftTree:
        """Make a tree from tokens and parents; depths are computed.

        Args:
            token: int [N], >= 0.
            parent: int [N], -1 for the anchor, else an earlier index.
            survival: float [N] in [0, 1], not above the parent's; None is 1 for every node.

        Returns:
            The tree.

        Raises:
            ShapeError: If lengths differ, or a parent does not come before its child.
            ConfigError: If a token is negative, or a survival is out of range.
        """
        tokens, parents = _vector(token, "token"), _vector(parent, "parent")
        size = len(tokens)
        values = np.ones(size) if survival is None else np.array(survival, dtype=np.float64)
        if parents.shape != (size,) or values.shape != (size,):
            raise ShapeError(
                f"a draft tree has {size} tokens, parents of shape {parents.shape} and survival "
                f"of shape {values.shape}, but needs equal lengths."
            )
        if size and int(tokens.min()) < 0:
            raise ConfigError(f"a draft tree has token {int(tokens.min())}, but needs ids >= 0.")
        depth = np.array(_depths(parents.tolist()), dtype=np.int64)
        _check_survival(values, parents)
        return DraftTree(tokens, parents, depth, values)

    @staticmethod
    def empty() -> DraftTree:
        """The tree of plain decoding: no nodes."""
        none = np.zeros(0, dtype=np.int64)
        return DraftTree(none, none, none, np.zeros(0))

    def validate(self) -> None:
        """Check every promise of the class.

        Raises:
            ShapeError: If lengths differ, parents do not come first, or depths are wrong.
            ConfigError: If a token is negative, or a survival is out of range.
        """
        built = DraftTree.build(self.token, self.parent, self.survival)
        if not np.array_equal(built.depth, self.depth):
            raise ShapeError(
                f"a draft tree says its depths are {self.depth.tolist()}, but its parents make "
                f"them {built.depth.tolist()}."
            )

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.token)

    @property
    def max_depth(self) -> int:
        """Length of the longest path, 0 for the empty tree."""
        return int(max(self.depth.tolist(), default=0))

    @property
    def is_chain(self) -> bool:
        """True if every node continues the one before it; true for the empty tree."""
        return bool(self.parent.tolist() == list(range(-1, len(self.parent) - 1)))

    def ancestor_mask(self) -> BoolArray:
        """Who sees whom: bool [N, N], [i, j] true if j is i itself or above it."""
        size = len(self.parent)
        if size == 0:
            return np.zeros((0, 0), dtype=np.bool_)
        bits: list[int] = []  # one Python integer a row: an OR of ints is cheaper than of arrays
        for node, parent in enumerate(self.parent.tolist()):
            bits.append(1 << node if parent < 0 else bits[parent] | 1 << node)
        width = (size + 7) // 8
        packed = np.frombuffer(b"".join(b.to_bytes(width, "little") for b in bits), dtype=np.uint8)
        rows = np.unpackbits(packed.reshape(size, width), axis=1, count=size, bitorder="little")
        return rows.view(np.bool_)

    def children_of(self, node: int) -> IntArray:
        """Children of a node (-1: of the anchor) in draw order, int64 [children]."""
        return np.flatnonzero(self.parent == node).astype(np.int64, copy=False)

    def children(self) -> tuple[IntArray, IntArray]:
        """All children at once, in compressed rows.

        Returns:
            (start int64 [N + 2], child int64 [N]): the children of node i, in draw order, are
            child[start[i + 1] : start[i + 2]]; those of the anchor are i = -1.
        """
        start = np.zeros(len(self.parent) + 2, dtype=np.int64)
        np.cumsum(np.bincount(self.parent + 1, minlength=len(self.parent) + 1), out=start[1:])
        return start, np.argsort(self.parent, kind="stable")

    def path_to(self, node: int) -> list[int]:
        """Nodes from depth 1 down to `node`, itself included; empty for the anchor (-1).

        Raises:
            ShapeError: If there is no such node.
        """
        if not -1 <= node < len(self.parent):
            raise ShapeError(
                f"node {node} was asked for, but the draft tree has nodes 0 to "
                f"{len(self.parent) - 1}."
            )
        path = []
        while node >= 0:
            path.append(node)
            node = int(self.parent[node])
        return path[::-1]

    def path_tokens(self, node: int) -> list[int]:
        """Tokens from depth 1 down to `node`; see `path_to`."""
        return [int(token) for token in self.token[self.path_to(node)]]

    def best(self, budget: int) -> IntArray:
        """The `budget` nodes of highest survival, closed under ancestors.

        No other such set has a higher sum: survival never rises from parent to child, so the
        highest values (ties: lowest index, hence the parent) are closed by themselves.

        Args:
            budget: Nodes to keep at the most, >= 0.

        Returns:
            int64 [min(budget, N)], indices in ascending order.

        Raises:
            ConfigError: If the budget is negative.
        """
        _check_budget(budget)
        if budget >= len(self.token):
            return np.arange(len(self.token))
        kept = np.argsort(-self.survival, kind="stable")[:budget]
        kept.sort()
        return kept

    def best_by_parents(self, budget: int) -> IntArray:
        """As `best`, but whether a node is kept never depends on its own token.

        Needed for the rejection rule (docs/losslessness.md). A node's worth is what its parent
        knew: the least survival above it, halved for every earlier candidate of the same parent.
        Its descendants and its later siblings, the only nodes whose numbers its token can touch,
        are worth no more and come later, so they never decide about it. Draw order stays whole:
        a kept node's earlier siblings are kept.

        Args:
            budget: Nodes to keep at the most, >= 0.

        Returns:
            int64 [min(budget, N)], indices in ascending order.

        Raises:
            ConfigError: If the budget is negative.
        """
        _check_budget(budget)
        if budget >= len(self.token):
            return np.arange(len(self.token))
        survival = self.survival.tolist()
        offered: dict[int, float] = {-1: 1.0}  # worth of the parent's next candidate
        worth = []
        for node, parent in enumerate(self.parent.tolist()):
            value = offered[parent]
            offered[parent] = value * _RANK_DISCOUNT
            offered[node] = min(value, survival[node])
            worth.append(value)
        kept = np.argsort(-np.array(worth), kind="stable")[:budget]
        kept.sort()
        return kept

    def subtree(self, keep: IntArray | BoolArray) -> DraftTree:
        """The tree of the kept nodes, renumbered in order.

        Args:
            keep: bool [N], or ascending int64 indices; a kept node's parent must be kept.

        Returns:
            The subtree; its node j was node `keep[j]` (indices) of this tree.

        Raises:
            ShapeError: If `keep` fits no such set.
        """
        kept = self._kept(keep)
        if len(kept) == len(self.token):
            return self
        new_index = np.full(len(self.token) + 1, -2, dtype=np.int64)
        new_index[kept] = np.arange(len(kept))
        new_index[-1] = -1  # where parent -1 reads
        parent = new_index[self.parent[kept]]
        if (parent == -2).any():
            node = int(kept[np.argmax(parent == -2)])
            raise ShapeError(f"node {node} was kept without its parent {int(self.parent[node])}.")
        return DraftTree(self.token[kept], parent, self.depth[kept], self.survival[kept])

    def prune(self, budget: int) -> DraftTree:
        """The subtree of the `best` nodes; see there."""
        return self.subtree(self.best(budget))

    def _kept(self, keep: IntArray | BoolArray) -> IntArray:
        size = len(self.token)
        if keep.dtype == np.bool_:
            if keep.shape != (size,):
                raise ShapeError(f"a mask of shape {keep.shape} cannot pick from {size} nodes.")
            return np.flatnonzero(keep)
        kept = keep.astype(np.int64, copy=False)
        ascending = kept.ndim == 1 and bool((kept[1:] > kept[:-1]).all())
        if not ascending or (len(kept) and not 0 <= kept[0] <= kept[-1] < size):
            raise ShapeError(f"kept nodes must be ascending indices from 0 to {size - 1}.")
        return kept


def _check_budget(budget: int) -> None:
    if budget < 0:
        raise ConfigError(f"budget is {budget}, but must be >= 0.")


@dataclass(frozen=True, slots=True)
class Proposal:
    """A tree and what its acceptance rule needs.

    Attributes:
        tree: The tree.
        laws: float [P, V], the laws that tokens were drawn from; None for rules that need none.
        law_of: int64 [N], row of `laws` that node i's token was drawn from, POINT_MASS for a
            candidate offered with certainty. Children of one parent that share a row were drawn
            from it without replacement, in index order. Empty for rules that need no laws.
        source: Name of the drafter that offered node i, if drafters were combined, else empty.
    """

    tree: DraftTree
    laws: torch.Tensor | None = None
    law_of: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    source: tuple[str, ...] = ()

    @staticmethod
    def empty() -> Proposal:
        """Nothing offered: a round of plain decoding."""
        return Proposal(DraftTree.empty())

    def validate(self) -> None:
        """Check the tree, and that every node's law exists.

        Raises:
            ShapeError: If the tree or the shape of `laws`, `law_of` or `source` is wrong.
            ConfigError: If a value of the tree is out of range.
        """
        self.tree.validate()
        size = self.tree.num_nodes
        if len(self.law_of) not in (0, size) or len(self.source) not in (0, size):
            raise ShapeError(
                f"a proposal of {size} nodes has {len(self.law_of)} entries in law_of and "
                f"{len(self.source)} in source, but needs as many as nodes, or none."
            )
        if self.laws is not None and self.laws.ndim != 2:
            raise ShapeError(f"laws have shape {tuple(self.laws.shape)}, but must be [P, V].")
        rows = 0 if self.laws is None else int(self.laws.shape[0])
        if len(self.law_of) and not ((self.law_of >= POINT_MASS) & (self.law_of < rows)).all():
            raise ShapeError(f"law_of names a law outside -1 to {rows - 1}.")

    def subtree(self, keep: IntArray | BoolArray) -> Proposal:
        """The proposal of the kept nodes; `laws` stays as it is, `law_of` follows the nodes.

        Args:
            keep: As `DraftTree.subtree`.

        Returns:
            The smaller proposal.

        Raises:
            ShapeError: If `keep` is not closed under ancestors.
        """
        tree = self.tree.subtree(keep)
        if tree is self.tree:
            return self
        law_of = self.law_of[keep] if len(self.law_of) else self.law_of
        source = self.source
        if source:
            picked = np.flatnonzero(keep) if keep.dtype == np.bool_ else keep
            source = tuple(source[int(node)] for node in picked)
        return Proposal(tree, self.laws, law_of, source)

    def prune(self, budget: int, *, anticipating: bool | None = None) -> Proposal:
        """Cut to `budget` nodes, closed under ancestors.

        Args:
            budget: Nodes to keep at the most, >= 0.
            anticipating: True keeps the nodes of highest survival (`DraftTree.best`): right for
                greedy, coupled and sample-match, wrong for the rejection rule, where keeping a
                node because its own drawn token looks likely changes the law of the output.
                False decides from what a node's parent knew (`DraftTree.best_by_parents`). None
                is False where a node was drawn from a law or offered with certainty
                (`law_of` is set), else True.

        Returns:
            The smaller proposal.

        Raises:
            ConfigError: If the budget is negative.
        """
        if anticipating is None:
            anticipating = len(self.law_of) == 0
        tree = self.tree
        return self.subtree(tree.best(budget) if anticipating else tree.best_by_parents(budget))
