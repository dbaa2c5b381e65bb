"""Pools of recorded rounds: the log of `dspark eval` replayed.

A log was recorded with whole proposals verified, so it tells what any part of one would have
yielded: the accepted path as far as it was admitted. If less is verified than was accepted, the
round ends inside the recorded path, at its j-th token, and the next one starts there: its proposal
is taken to be what the recorded one held beyond that token (survival over that token's), with what
is left of the path. This is exact for a drafter that would say the same again one token later. A
proposal that was accepted to its end leaves nothing beyond: the next recorded round follows at
once. A text that outlasts its recorded rounds goes on with another recorded text, so that easy and
hard stretches stay together (a bootstrap of whole answers).

Survival is corrected as the engine's scheduler does in the long run
(`dspark.verify.scheduler_drift`): by depth, where it is off by more than 10 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dspark.errors import ConfigError, DataError
from dspark.eval.log import read_log
from dspark.eval.records import QuestionRecord, all_turns
from dspark.eval.simulate.pool import NEW, Pool, PoolBuilder
from dspark.request import RoundStats

__all__ = ["Shape", "correction", "find_records", "recorded_pool"]

_TRUST = 6.0  # as dspark.verify.scheduler_drift
_TOLERANCE = 0.1


@dataclass(slots=True)
class Shape:
    """One recorded proposal.

    Attributes:
        parent: Of each node, an earlier node or -1.
        survival: Of each node.
        path: The accepted nodes, from the anchor down.
    """

    parent: list[int]
    survival: list[float]
    path: list[int]

    @staticmethod
    def of(item: RoundStats, *, as_chain: bool) -> Shape:
        """The proposal of a recorded round, or its likeliest chain alone.

        Raises:
            DataError: If the log was written before the nodes of trees were kept.
        """
        if as_chain or not item.nodes:
            if not as_chain and item.verified > item.depth:
                raise DataError(
                    "the log holds trees, but was written before dspark kept their nodes.",
                    hint="record it again with dspark eval, or simulate a chain",
                )
            size = len(item.survival)
            hits = list(range(min(item.matched, size)))
            return Shape(list(range(-1, size - 1)), list(item.survival), hits)
        parent = [node[0] for node in item.nodes]
        hits = [i for i, node in enumerate(item.nodes) if node[2]]
        return Shape(parent, [node[1] for node in item.nodes], hits)

    @property
    def depth(self) -> list[int]:
        """Depth of each node, from 1."""
        depth: list[int] = []
        for up in self.parent:
            depth.append(1 if up < 0 else depth[up] + 1)
        return depth


def find_records(path: str | Path, configuration: str | None) -> list[QuestionRecord]:
    """The records of one configuration of a log.

    Args:
        path: A log of `dspark eval`.
        configuration: Its name, or a part of it that no other has; None if there is only one that
            drafts.

    Raises:
        DataError: If the log cannot be read, or does not hold just one such configuration.
    """
    found = read_log(path)
    names = [name for name in found if configuration is None or configuration in name]
    if configuration in found:
        names = [configuration]
    if configuration is None and len(names) > 1:
        names = [name for name in names if any(r.proposed for r in _rounds(found[name]))]
    if len(names) != 1:
        known = ", ".join(repr(name) for name in found) or "none"
        asked = "" if configuration is None else f" whose name has {configuration!r} in it"
        raise DataError(
            f"{Path(path).name} holds {len(names)} configurations{asked}, but one is needed; it "
            f"has: {known}."
        )
    return found[names[0]]


def _rounds(records: Sequence[QuestionRecord]) -> list[RoundStats]:
    return [item for turn in all_turns(records) for item in turn.rounds]


def recorded_pool(
    records: Sequence[QuestionRecord],
    *,
    name: str,
    as_chain: bool = False,
    budget: int | None = None,
) -> Pool:
    """The pool of recorded answers.

    Args:
        records: What `dspark eval` recorded with a draft, whole proposals verified.
        name: What to call it.
        as_chain: Use each tree's likeliest chain alone.
        budget: Keep this many of the best nodes of a proposal at the most; None for all.

    Returns:
        One start per answer, with its lengths.

    Raises:
        DataError: If there is no answer with rounds, or trees were not kept.
        ConfigError: If budget is below 1.
    """
    if budget is not None and budget < 1:
        raise ConfigError(f"the budget is {budget}, but must be >= 1.")
    turns = [turn for turn in all_turns(records) if turn.rounds]
    if not turns:
        raise DataError(f"{name} holds no answer with rounds.")
    shapes = [[Shape.of(item, as_chain=as_chain) for item in turn.rounds] for turn in turns]
    factors = correction([shape for own in shapes for shape in own])
    builder = PoolBuilder()
    for turn, own in zip(turns, shapes, strict=True):
        for shape in own:
            _correct(shape, factors)
        first = _add_text(builder, own, budget)
        builder.add_start(first, prompt=turn.prompt_tokens, output=turn.output_tokens)
    return builder.build(name)


def correction(shapes: Sequence[Shape]) -> list[float]:
    """By what survival at depth 1, 2, ... must be multiplied to be right on average.

    The scheduler's own rule over all rounds: (accepted + 6 f) / (predicted + 6) with f the factor
    one depth above, and 1 where it is off by no more than 10 %.
    """
    deepest = max((max(shape.depth, default=0) for shape in shapes), default=0)
    accepted, predicted = np.zeros(deepest + 1), np.zeros(deepest + 1)
    for shape in shapes:
        accepted[1 : len(shape.path) + 1] += 1
        np.add.at(predicted, shape.depth, shape.survival)
    factors = [1.0]
    for depth in range(1, deepest + 1):
        above = _TRUST * factors[-1]
        factors.append(float((accepted[depth] + above) / (predicted[depth] + _TRUST)))
    return [1.0 if abs(factor - 1) <= _TOLERANCE else factor for factor in factors[1:]]


def _correct(shape: Shape, factors: Sequence[float]) -> None:
    """Apply the factors; survival stays at or below 1 and the parent's."""
    held: list[float] = []
    for up, value, depth in zip(shape.parent, shape.survival, shape.depth, strict=True):
        held.append(min(value * factors[depth - 1], 1.0 if up < 0 else held[up]))
    shape.survival = held


def _add_text(builder: PoolBuilder, shapes: Sequence[Shape], budget: int | None) -> int:
    """Add the states of one answer; returns the first."""
    parts = [_parts_of(shape, budget) for shape in shapes]
    place = builder.size
    starts = []
    for own in parts:
        starts.append(place)
        place += len(own)
    starts.append(NEW)
    for at, own in enumerate(parts):
        for offset, part in enumerate(own):
            after = []
            for taken in part.gain:
                reached = offset + taken + 1  # the closing token counts
                is_inside = taken < part.left and reached < len(own)
                after.append(starts[at] + reached if is_inside else starts[at + 1])
            builder.add_state(part.survival, part.gain, after)
            if part.branches:
                builder.branched()
    return starts[0]


@dataclass(slots=True)
class _Part:
    """A proposal beyond the j-th token of its path: survival, gains, tokens left of the path."""

    survival: list[float]
    gain: list[int]
    left: int
    branches: bool


def _parts_of(shape: Shape, budget: int | None) -> list[_Part]:
    """The proposal from its anchor, and from each accepted token that has nodes below it."""
    parts = []
    for offset in range(len(shape.path) + 1):
        root = shape.path[offset - 1] if offset else -1
        inside = {root}
        below = []
        for node, up in enumerate(shape.parent):
            if up in inside:
                inside.add(node)
                below.append(node)
        if offset and not below:
            break
        above = shape.survival[root] if offset else 1.0
        values = [shape.survival[node] / above if above > 0 else 0.0 for node in below]
        order = sorted(range(len(below)), key=lambda i, v=values: -v[i])[:budget]  # type: ignore[misc]
        hits = set(shape.path[offset:])
        gain = [0]
        for i in order:
            gain.append(gain[-1] + (below[i] in hits))
        parts.append(
            _Part(
                survival=[min(1.0, values[i]) for i in order],
                gain=gain,
                left=len(hits),
                branches=len({shape.parent[node] for node in below}) < len(below),
            )
        )
    return parts
