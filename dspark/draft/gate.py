"""Whether a second drafter is worth asking, learnt from what it would have added.

The tokens that followed tell afterwards how far each drafter's tree went: what the second one added
in a round is what the united tree matched beyond the first one's, less what its further nodes cost
to verify. It adds much where the first is at a loss and little where it is sure, so its gain is
kept by how sure the first one was of the next token. It is asked where that gain is worth more than
the tokens the engine makes in the time it takes. Nothing of this shows in the text: whom a gate
asks follows from tokens that are certain already and from clocks.

Letters: S survival of the first drafter's candidates for the next token together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from dspark.tree import DraftTree

__all__ = ["SecondGate"]

_EDGES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.96)
"""Where one class of S ends and the next begins."""

_FIRST_TRIES = 8
"""Rounds of a class in which it is asked before there is an opinion."""

_EVERY = 16
"""One round in so many it is asked all the same, lest an opinion be for ever."""

_MEMORY = 200.0
"""Rounds of a class that its mean goes back to."""

_SPEED_MEMORY = 0.05
"""Weight of the newest round in means of seconds."""

_MOST_SECONDS = 4.0
"""Times the mean that one call may count for: slower ones waited for something else."""

_LIKELY = 0.1
"""Survival below which a node is not counted on where its price is not known. Else it is that: a
scheduler verifies a node if it is more likely than tokens are made in the time it takes."""


class _Class:
    """What the second drafter added where the first was about so sure."""

    __slots__ = ("count", "gain", "passed")

    def __init__(self) -> None:
        self.count = 0
        self.gain = 0.0
        self.passed = 0

    def learn(self, gain: float) -> None:
        self.count += 1
        self.gain += (gain - self.gain) / min(self.count, _MEMORY)


class _Round:
    """What was offered for a request, until the next context shows what followed."""

    __slots__ = ("first", "kind", "node_seconds", "size", "united")

    def __init__(
        self,
        size: int,
        kind: _Class,
        trees: tuple[DraftTree, DraftTree],
        node_seconds: float,
    ) -> None:
        self.size = size
        self.kind = kind
        self.first, self.united = trees
        self.node_seconds = node_seconds

    def gain(self, after: Sequence[int], rate: float) -> float:
        """Tokens by which the second drafter was worth more, at so many tokens a second."""
        price = self.node_seconds * rate
        first, one = _matched(self.first, after, price)
        united, both = _matched(self.united, after, price)
        return both - one - price * max(0, united - first)


class SecondGate:
    """Decides for each request of a round whether the second drafter is asked.

    Args:
        clock: Seconds.

    Attributes:
        rate: Tokens a second that the engine makes.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._classes = [_Class() for _ in range(len(_EDGES) + 1)]
        self._rounds: dict[int, _Round] = {}
        self._sizes: dict[int, int] = {}
        self._present: frozenset[int] = frozenset()  # in the last round
        self._asked: set[int] = set()  # whom it was asked for before
        self._last: float | None = None
        self.rate = 0.0
        self._seconds = 0.0  # that one more request takes of the second drafter

    def follow(self, request_ids: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Learn from what came of the last round.

        Args:
            request_ids: Requests of this round.
            tokens: Prompt and output so far of each.
        """
        now, grown = self._clock(), 0
        for request_id, text in zip(request_ids, tokens, strict=True):
            if request_id in self._present:  # others bring what they made in other rounds, too
                grown += max(0, len(text) - self._sizes[request_id])
            self._sizes[request_id] = len(text)
            done = self._rounds.pop(request_id, None)
            if done is not None and done.size < len(text):
                done.kind.learn(done.gain(text[done.size :], self.rate))
        if self._last is not None and grown and now > self._last:
            self.rate = _mean(self.rate, grown / (now - self._last))
        self._last, self._present = now, frozenset(request_ids)

    def asks(self, tree: DraftTree) -> bool:
        """Whether to ask the second drafter beside such a tree of the first."""
        kind = self._kind(tree)
        if kind.count < _FIRST_TRIES or kind.gain > self._seconds * self.rate:
            return True
        kind.passed += 1
        return kind.passed % _EVERY == 0

    def took(self, seconds: float, request_ids: Sequence[int]) -> None:
        """Note how long the second drafter took for some requests.

        A call that has a request for the first time reads its prompt, and may load or compile
        what is needed once: it says nothing of later ones.
        """
        is_usual = self._asked.issuperset(request_ids)
        self._asked.update(request_ids)
        if not is_usual:
            return
        each = seconds / len(request_ids)
        if self._seconds:
            each = min(each, _MOST_SECONDS * self._seconds)
        self._seconds = _mean(self._seconds, each)

    def note(
        self,
        request_id: int,
        size: int,
        first: DraftTree,
        united: DraftTree,
        node_seconds: float = 0.0,
    ) -> None:
        """Remember what both drafters offered behind `size` tokens.

        Args:
            request_id: For whom.
            size: Tokens of the context.
            first: What the first one offered.
            united: What both did.
            node_seconds: Seconds that a further node adds to the round, 0 if that is not known.
        """
        self._rounds[request_id] = _Round(size, self._kind(first), (first, united), node_seconds)

    def release(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        self._rounds.pop(request_id, None)
        self._sizes.pop(request_id, None)
        self._asked.discard(request_id)
        self._present -= {request_id}

    def _kind(self, tree: DraftTree) -> _Class:
        sure = 0.0
        for parent, survival in zip(tree.parent.tolist(), tree.survival.tolist(), strict=True):
            if parent < 0:
                sure += survival
        return self._classes[sum(sure >= edge for edge in _EDGES)]


def _mean(mean: float, value: float) -> float:
    return value if mean == 0 else mean + _SPEED_MEMORY * (value - mean)


def _matched(tree: DraftTree, tokens: Sequence[int], price: float) -> tuple[int, int]:
    """Nodes of the tree that are worth a price, and how many of these tokens a path of them has."""
    least = price or _LIKELY
    place = {
        (parent, token): node
        for node, (parent, token, survival) in enumerate(
            zip(tree.parent.tolist(), tree.token.tolist(), tree.survival.tolist(), strict=True)
        )
        if survival >= least
    }
    node, count = -1, 0
    for token in tokens:
        node = place.get((node, token), -2)
        if node < 0:
            break
        count += 1
    return len(place), count
