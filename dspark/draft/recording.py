"""What drafters offer, told to whoever compares it with what became of it (`dspark calibrate`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dspark.draft.base import DraftContext
from dspark.tree_build import TreeGrower

__all__ = ["Children", "Recorder", "tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Children:
    """The children that were offered for one node, and what the draft said of them.

    Attributes:
        path: Tokens from depth 1 down to the node; empty for the anchor.
        tokens: The children's, first child first.
        share: The draft's probability of each; empty where they were drawn.
        above: Survival of the node, 1 for the anchor.
        survival: Survival of each as it went into the tree.
        confidence: Confidence logit of the node, None without such a head.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    share: tuple[float, ...]
    above: float
    survival: tuple[float, ...]
    confidence: float | None


class Recorder(Protocol):
    """Is told what drafters offer."""

    def note(self, context: DraftContext, children: Sequence[Children]) -> None:
        """Take in the children that a request's nodes of one level just got."""
        ...


def tell(
    recorder: Recorder,
    context: DraftContext,
    tree: TreeGrower,
    first: int,
    nodes: Sequence[int],
    confidence: Sequence[float] | None,
    share: Sequence[float] = (),
) -> None:
    """Tell of the children that a level added.

    Args:
        recorder: Whom.
        context: The request.
        tree: Its tree.
        first: Where the children begin in it.
        nodes: Their parents, -1 for the anchor.
        confidence: Confidence logit of each parent, or None.
        share: The draft's probability of each child, empty where they were drawn.
    """
    made: dict[int, list[int]] = {node: [] for node in nodes}
    for new in range(first, len(tree)):
        made[tree.parent[new]].append(new)
    told = [
        Children(
            path=tuple(tree.path_tokens(node)),
            tokens=tuple(tree.token[new] for new in made[node]),
            share=tuple(share[new - first] for new in made[node]) if share else (),
            above=1.0 if node < 0 else tree.survival[node],
            survival=tuple(tree.survival[new] for new in made[node]),
            confidence=None if confidence is None else confidence[row],
        )
        for row, node in enumerate(nodes)
    ]
    recorder.note(context, told)
