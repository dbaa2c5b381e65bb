"""What became of offered nodes: the evidence that survival maps are fitted from.

A recorder is told of every node a drafter offers, also of those that pruning drops, and finds out
from the finished text which of them the target accepted: under rules that compare tokens the text
is the target's own choice, whatever was verified; under rejection a rejected token has no mass left
in the residual, so the token that comes out is a child's exactly if that child was accepted. Under
block the length of the text tells how many of the chain's tokens were accepted.

Nothing selects by outcome: whether a node was offered follows from what the draft said before.
Where the text ended before a node could be decided, the node is left out.

Letters: N rounds, D depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark.draft.base import DraftContext
from dspark.draft.calibration import held_logit
from dspark.draft.recording import Children
from dspark.request import Rule
from dspark.tree import FloatArray

__all__ = ["Family", "FirstPaths", "Observations", "OfferRecorder"]

_MISSED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The children of one node, and which of them was accepted.

    Attributes:
        depth: The children's, from 1.
        children: What was offered.
        is_reached: Whether their parent was accepted.
        hit: Index of the accepted child, -1 for none.
    """

    depth: int
    children: Children
    is_reached: bool
    hit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstPaths:
    """The path of first children of every round; NaN where it ends, or where nobody knows.

    Attributes:
        share: [N, D], the draft's probability of each; all NaN for drawn children.
        survival: [N, D], as the drafter stated it.
        confidence: [N, D], confidence logit of each one's parent; all NaN without such a head.
        accepted: [N, D], 1 where the path down to there was accepted, else 0.
    """

    share: FloatArray
    survival: FloatArray
    confidence: FloatArray
    accepted: FloatArray

    @staticmethod
    def joined(parts: Sequence[FirstPaths]) -> FirstPaths:
        """Several as one, as deep as the deepest."""
        depth = max((part.accepted.shape[1] for part in parts), default=0)

        def stacked(tables: Sequence[FloatArray]) -> FloatArray:
            wide = [
                np.pad(table, ((0, 0), (0, depth - table.shape[1])), constant_values=np.nan)
                for table in tables
            ]
            return np.concatenate(wide) if wide else np.empty((0, 0))

        return FirstPaths(
            share=stacked([part.share for part in parts]),
            survival=stacked([part.survival for part in parts]),
            confidence=stacked([part.confidence for part in parts]),
            accepted=stacked([part.accepted for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What was observed of one rule, temperature and shape.

    Attributes:
        families: Of all rounds whose outcome is known.
        paths: The first children.
    """

    families: tuple[Family, ...]
    paths: FirstPaths

    @staticmethod
    def joined(parts: Sequence[Observations]) -> Observations:
        """Several as one."""
        return Observations(
            families=tuple(family for part in parts for family in part.families),
            paths=FirstPaths.joined([part.paths for part in parts]),
        )

    @property
    def rounds(self) -> int:
        """Rounds observed."""
        return len(self.paths.accepted)

    @property
    def has_confidence(self) -> bool:
        """Whether the draft has a confidence head."""
        return any(family.children.confidence is not None for family in self.families)


@dataclass(slots=True)
class _Round:
    """One round of one request.

    Attributes:
        request_id: Whose.
        number: Which.
        start: Tokens of its context.
        rule: The rule in force.
        offered: All that was offered.
        accepted: Drafted tokens accepted, as the next round tells; None if there was none.
    """

    request_id: int
    number: int
    start: int
    rule: Rule
    offered: list[Children] = field(default_factory=list)
    accepted: int | None = None


class OfferRecorder:
    """Keeps what a drafter offers; see `dspark.draft.recording.Recorder`."""

    def __init__(self) -> None:
        self._rounds: list[_Round] = []
        self._last: dict[int, _Round] = {}
        # The request's own list, which grows with its text.
        self._texts: dict[int, Sequence[int]] = {}

    def note(self, context: DraftContext, children: Sequence[Children]) -> None:
        """Take in the children of one level of a request's tree."""
        current = self._last.get(context.request_id)
        if current is None or current.number != context.round:
            start = len(context.tokens)
            if current is not None and current.number + 1 == context.round:
                current.accepted = start - current.start - 1  # the closing token is not drafted
            current = _Round(context.request_id, context.round, start, context.rule)
            self._last[context.request_id] = current
            self._rounds.append(current)
        self._texts[context.request_id] = context.tokens
        current.offered.extend(children)

    def observations(self) -> Observations:
        """What is known when all requests have ended."""
        families: list[Family] = []
        paths: list[list[Family]] = []
        for item in self._rounds:
            text = self._texts[item.request_id][item.start :]
            known = [f for f in (_judge(item, c, text) for c in item.offered) if f is not None]
            families += known
            path = _first_path(known)
            if path:
                paths.append(path)
        return Observations(families=tuple(families), paths=_table(paths))


def _judge(item: _Round, children: Children, text: Sequence[int]) -> Family | None:
    """What became of the children of a node; None if the text does not tell."""
    above = len(children.path)
    if item.rule is Rule.BLOCK:
        if item.accepted is None:
            return None
        is_reached, is_hit = above <= item.accepted, above < item.accepted
        hit = 0 if is_hit else _MISSED
    else:
        shared = min(above, len(text))
        is_reached = children.path[:shared] == tuple(text[:shared])
        if is_reached and len(text) <= above:
            return None
        hit = _MISSED
        if is_reached and text[above] in children.tokens:
            hit = children.tokens.index(text[above])
    return Family(depth=above + 1, children=children, is_reached=is_reached, hit=hit)


def _first_path(families: Sequence[Family]) -> list[Family]:
    """From the anchor on, always the first child's family."""
    by_path = {family.children.path: family for family in families}
    found: list[Family] = []
    path: tuple[int, ...] = ()
    while (family := by_path.get(path)) is not None and family.children.tokens:
        found.append(family)
        path = (*path, family.children.tokens[0])
    return found


def _table(paths: Sequence[Sequence[Family]]) -> FirstPaths:
    depth = max(map(len, paths), default=0)
    columns = {
        name: np.full((len(paths), depth), np.nan)
        for name in ("share", "survival", "confidence", "accepted")
    }
    for row, path in enumerate(paths):
        is_accepted = True
        for column, family in enumerate(path):
            children = family.children
            is_accepted = is_accepted and family.is_reached and family.hit == 0
            columns["accepted"][row, column] = is_accepted
            columns["survival"][row, column] = children.survival[0]
            if children.share:
                columns["share"][row, column] = children.share[0]
            if children.confidence is not None:
                columns["confidence"][row, column] = held_logit(children.confidence)
    return FirstPaths(**columns)
