"""How many nodes are worth drafting for a request, by what the scheduler took of late.

A tree of which two nodes are verified was drafted for nothing but those two, and under load
drafting is a good part of a round. So a request is drafted twice what was taken at the most in its
last rounds; where all that was offered was taken, it may have all that the limits allow again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["Appetite"]

_ROUNDS = 8
_LEAST = 4  # nodes; fewer would not show that more pay again


@dataclass(slots=True)
class Appetite:
    """Nodes to draft for one request.

    Not for rules that draw from laws: there the number of nodes may not depend on outcomes.
    """

    _wishes: deque[float] = field(default_factory=lambda: deque(maxlen=_ROUNDS))

    def took(self, kept: int, offered: int) -> None:
        """Note a round.

        Args:
            kept: Nodes that were verified.
            offered: Nodes that the drafter offered, >= 1.
        """
        self._wishes.append(float("inf") if kept == offered else max(_LEAST, 2 * kept))

    def most(self, budget: int) -> int:
        """Nodes to draft, at most `budget`."""
        if len(self._wishes) < _ROUNDS // 2:
            return budget
        return int(min(budget, max(self._wishes)))
