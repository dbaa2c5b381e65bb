"""Builders of draft trees, and the rows a tree adds to a verify batch.

Every builder aims at the same thing: the most expected accepted tokens, which is the sum of the
nodes' survival, within a budget of nodes. They differ in what they know beforehand: nothing but the
shape (`static`: Sequoia, arXiv 2402.12374; Medusa, arXiv 2401.10774), one level at a time (`beam`:
EAGLE-2, arXiv 2406.16858) or any node's candidates on demand (`best_first`: OPT-Tree, arXiv
2406.17276; DDTree, arXiv 2604.12989).
Letters: N nodes, D depths, K candidates a depth.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from dspark.errors import ConfigError, ShapeError
from dspark.target import BatchPart
from dspark.tree import DraftTree, IntArray

__all__ = [
    "Candidates",
    "Expand",
    "TreeGrower",
    "beam",
    "best_first",
    "chain",
    "static",
    "static_shape",
    "verify_part",
]

Candidates: TypeAlias = tuple[Sequence[int], Sequence[float]]
"""Tokens of a node's children, best first, and the probability of each given the node (sums to
at most 1)."""


class TreeGrower:
    """A tree under construction: Python lists that only grow.

    Attributes:
        token: Token of each node.
        parent: Parent of each node, -1 for the anchor.
        depth: Depth of each node, from 1.
        survival: Survival of each node.
    """

    __slots__ = ("depth", "parent", "survival", "token")

    def __init__(self) -> None:
        self.token: list[int] = []
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.survival: list[float] = []

    def __len__(self) -> int:
        return len(self.token)

    def add(self, parent: int, token: int, survival: float) -> int:
        """Append a node of survival >= 0, held to its parent's; returns its index."""
        if parent < 0:
            depth, above = 1, 1.0
        else:
            depth, above = self.depth[parent] + 1, self.survival[parent]
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(depth)
        self.survival.append(survival if survival < above else above)
        return len(self.token) - 1

    def path_tokens(self, node: int) -> list[int]:
        """Tokens from depth 1 down to `node`; empty for the anchor (-1)."""
        tokens = []
        while node >= 0:
            tokens.append(self.token[node])
            node = self.parent[node]
        return tokens[::-1]

    def build(self) -> DraftTree:
        """The tree so far, every node in the order it was added."""
        return DraftTree(
            np.array(self.token, dtype=np.int64),
            np.array(self.parent, dtype=np.int64),
            np.array(self.depth, dtype=np.int64),
            np.array(self.survival, dtype=np.float64),
        )


Expand: TypeAlias = Callable[[TreeGrower, Sequence[int]], Sequence[Candidates]]
"""Candidates of several nodes at once: (tree so far, node indices; -1 is the anchor) -> one entry
a node. A drafter answers all of them with one forward."""


def _check_limits(budget: int, depth: int, width: int | None) -> None:
    for name, value, least in (("budget", budget, 0), ("depth", depth, 0), ("width", width, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}, but must be >= {least}.")


def chain(tokens: Sequence[int], survival: Sequence[float] | None = None) -> DraftTree:
    """A tree without branches.

    Args:
        tokens: Drafted tokens, N >= 0.
        survival: Survival of each (a cumulative product, never rising); None is 1 throughout.

    Returns:
        The chain.

    Raises:
        ShapeError: If lengths differ.
        ConfigError: If a token or a survival is out of range.
    """
    return DraftTree.build(tokens, range(-1, len(tokens) - 1), survival)


@lru_cache(maxsize=256)
def _shape_from_widths(widths: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    parents: list[int] = []
    ranks: list[int] = []
    level = [-1]
    for width in widths:
        if width < 1:
            raise ConfigError(f"a tree shape has width {width}, but widths must be >= 1.")
        start = len(parents)
        for parent in level:
            parents.extend([parent] * width)
            ranks.extend(range(width))
        level = list(range(start, len(parents)))
    return tuple(parents), tuple(ranks)


@lru_cache(maxsize=256)
def _shape_from_paths(
    paths: tuple[tuple[int, ...], ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    nodes = {path[:end] for path in paths for end in range(1, len(path) + 1)}
    if any(rank < 0 for path in nodes for rank in path):
        raise ConfigError("a tree shape has a negative rank, but ranks count from 0.")
    order = sorted(nodes, key=lambda path: (len(path), path))
    index = {path: node for node, path in enumerate(order)}
    parents = tuple(index.get(path[:-1], -1) for path in order)
    return parents, tuple(path[-1] for path in order)


def static_shape(shape: Sequence[int] | Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Parents and candidate ranks of a fixed tree.

    Args:
        shape: Children of every node at depth 0, 1, ... ((3, 2): three children of the anchor, two
            of each of these), or a list of paths of ranks ([0], [0, 1], [1]: Medusa's notation;
            the beginnings of a path are added if they are missing).

    Returns:
        (parent int64 [N], rank int64 [N]), by depth, then in path order.

    Raises:
        ConfigError: If a width is under 1, a rank is negative, or the two are mixed.
    """
    widths = [entry for entry in shape if isinstance(entry, int)]
    paths = [tuple(entry) for entry in shape if not isinstance(entry, int)]
    if widths and paths:
        raise ConfigError("a tree shape mixes widths and paths, but must be one or the other.")
    parents, ranks = _shape_from_paths(tuple(paths)) if paths else _shape_from_widths(tuple(widths))
    return np.array(parents, dtype=np.int64), np.array(ranks, dtype=np.int64)


def static(
    shape: Sequence[int] | Sequence[Sequence[int]],
    tokens: ArrayLike,
    probs: ArrayLike | None = None,
) -> DraftTree:
    """A tree of fixed shape, filled with the candidates of each depth by rank.

    For drafters whose candidates at a depth do not depend on the path (parallel heads). The shape
    is known before any token, so it is non-anticipating.

    Args:
        shape: As `static_shape`.
        tokens: int [D, K], candidates of depth 1 .. D, best first.
        probs: float [D, K] in [0, 1], probability of each given that its parent was accepted; None
            is 1 throughout.

    Returns:
        The tree; survival is the product of `probs` along the path.

    Raises:
        ConfigError: If the shape or a value is out of range.
        ShapeError: If the shape is deeper or wider than the candidates.
    """
    parents, ranks = static_shape(shape)
    table = np.asarray(tokens, dtype=np.int64)
    values = np.ones(table.shape) if probs is None else np.asarray(probs, dtype=np.float64)
    if table.ndim != 2 or values.shape != table.shape:
        raise ShapeError(
            f"candidates have shape {table.shape} and probabilities {values.shape}, but both must "
            "be [depths, candidates]."
        )
    bare = DraftTree.build(np.zeros(len(parents), dtype=np.int64), parents)
    if bare.num_nodes and (bare.max_depth > table.shape[0] or ranks.max() >= table.shape[1]):
        raise ShapeError(
            f"a tree shape of depth {bare.max_depth} and ranks up to {int(ranks.max())} does not "
            f"fit candidates of shape {table.shape}."
        )
    survival = values[bare.depth - 1, ranks]
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            survival[node] *= survival[parent]
    return DraftTree.build(table[bare.depth - 1, ranks], parents, survival)


def beam(expand: Expand, *, budget: int, depth: int, width: int, beams: int) -> DraftTree:
    """Grow level by level, then keep the best nodes of all levels.

    At each depth the `beams` best nodes by survival are expanded into `width` children each; at the
    end the `budget` best nodes of all depths remain. One call of `expand` a depth, so one forward.
    A node that is not among the `budget` best when its turn comes never will be, and is left alone.

    Args:
        expand: Candidates of several nodes.
        budget: Nodes to keep at the most, >= 0.
        depth: Longest path, >= 0.
        width: Children per node at the most, >= 1.
        beams: Nodes to expand per depth, >= 1.

    Returns:
        The tree.

    Raises:
        ConfigError: If a limit is out of range.

    **Source:** EAGLE-2, arXiv 2406.16858, section 4 (expansion and reranking phases).
    """
    _check_limits(budget, depth, width)
    if beams < 1:
        raise ConfigError(f"beams is {beams}, but must be >= 1.")
    grown = TreeGrower()
    frontier = [-1]
    for _ in range(depth if budget else 0):
        start = len(grown)
        for node, (tokens, probs) in zip(frontier, expand(grown, frontier), strict=True):
            above = 1.0 if node < 0 else grown.survival[node]
            for token, prob in islice(zip(tokens, probs, strict=True), width):
                grown.add(node, token, above * prob)
        worth = grown.survival
        ranked = heapq.nsmallest(budget, range(len(grown)), key=lambda i: (-worth[i], i))
        frontier = [node for node in ranked if node >= start][:beams]
        if not frontier:
            break
    return grown.build().prune(budget)


def best_first(expand: Expand, *, budget: int, depth: int, width: int, batch: int = 1) -> DraftTree:
    """The tree with the highest sum of survival within the limits, nodes in falling survival.

    The best candidate not yet in the tree joins it, its children become candidates, until the
    budget is spent. That is the optimum, because a child is never worth more than its parent.
    With `batch` > 1 the next best candidates are expanded along with it in one call; this changes
    how many are expanded in vain, not the tree (as long as candidates depend on the path alone).

    Args:
        expand: Candidates of several nodes; nodes of the batch that have not joined the tree yet
            are in the grower already.
        budget: Nodes to keep at the most, >= 0.
        depth: Longest path, >= 0.
        width: Children per node at the most, >= 1; the first ones offered.
        batch: Nodes to expand at once, >= 1.

    Returns:
        The tree.

    Raises:
        ConfigError: If a limit is out of range.

    **Source:** OPT-Tree, arXiv 2406.17276; DDTree, arXiv 2604.12989, for the heap.
    """
    _check_limits(budget, depth, width)
    if batch < 1:
        raise ConfigError(f"batch is {batch}, but must be >= 1.")
    grown = TreeGrower()
    heap: list[tuple[float, int]] = []
    ready: dict[int, Candidates] = {}
    joined: list[int] = []
    node = -1
    while depth and len(joined) < budget:
        if node < 0 or grown.depth[node] < depth:
            if node not in ready:
                nodes = [node]
                if batch > 1:
                    near = (n for _, n in heapq.nsmallest(budget - len(joined), heap))
                    open_ = (n for n in near if n not in ready and grown.depth[n] < depth)
                    nodes.extend(islice(open_, batch - 1))
                ready.update(zip(nodes, expand(grown, nodes), strict=True))
            above = 1.0 if node < 0 else grown.survival[node]
            for token, prob in islice(zip(*ready[node], strict=True), width):
                child = grown.add(node, token, above * prob)
                heapq.heappush(heap, (-grown.survival[child], child))
        if not heap:
            break
        node = heapq.heappop(heap)[1]
        joined.append(node)
    return _renumbered(grown, joined)


def _renumbered(grown: TreeGrower, nodes: list[int]) -> DraftTree:
    """The tree of these nodes, in this order (parents first)."""
    index = {node: new for new, node in enumerate(nodes)}
    index[-1] = -1
    return DraftTree(
        np.array([grown.token[node] for node in nodes], dtype=np.int64),
        np.array([index[grown.parent[node]] for node in nodes], dtype=np.int64),
        np.array([grown.depth[node] for node in nodes], dtype=np.int64),
        np.array([grown.survival[node] for node in nodes], dtype=np.float64),
    )


def verify_part(slot: int, anchor_token: int, position: int, tree: DraftTree) -> BatchPart:
    """The rows that one request adds to a verify batch.

    Row 0 is the anchor, row 1 + i is node i; logits of every row are wanted.

    Args:
        slot: The request's slot in the target's cache.
        anchor_token: The last committed token.
        position: Absolute position of the anchor.
        tree: What to verify; empty for plain decoding.

    Returns:
        The part, 1 + N rows.
    """
    rows = tree.num_nodes + 1
    tokens = np.empty(rows, dtype=np.int64)
    tokens[0], tokens[1:] = anchor_token, tree.token
    positions = np.empty(rows, dtype=np.int64)
    positions[0], positions[1:] = position, position + tree.depth
    parent = np.empty(rows, dtype=np.int64)
    parent[0], parent[1:] = -1, tree.parent + 1
    return BatchPart(slot, tokens, positions, parent, np.arange(rows))
