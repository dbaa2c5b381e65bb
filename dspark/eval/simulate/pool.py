"""What may be drafted at a point of a text, and what the target would make of it.

A pool holds states. A state is a proposal as a scheduler sees it, with its outcome known: nodes in
falling survival, how many tokens are accepted if the best n of them are verified, and which state
follows then. Every schedule admits a prefix of a request's nodes in falling survival (ties: earlier
nodes first), so this is all that a simulation needs, for chains and trees alike.

Letters: S states, W nodes of the largest proposal, K states that a text may begin with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dspark.errors import ConfigError
from dspark.tree import FloatArray, IntArray

__all__ = ["NEW", "ABSENT", "Pool", "PoolBuilder"]

NEW = -1
"""A following state that is drawn anew from `starts`."""

ABSENT = -1.0
"""Survival where a proposal has no node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """States and how they follow each other.

    Attributes:
        name: Where it comes from, for people.
        survival: float64 [S, W], falling along W, ABSENT behind the last node.
        gain: int64 [S, W + 1], accepted tokens if the best 0, 1, ... W nodes are verified.
        following: int64 [S, W + 1], the state after that, NEW for one of `starts` at random.
        starts: int64 [K], states that a text may begin or go on with.
        lengths: int64 [K, 2], tokens of the prompt and of the answer recorded with each start;
            None if there are none.
        is_chain: True if no proposal branches.
    """

    name: str
    survival: FloatArray
    gain: IntArray
    following: IntArray
    starts: IntArray
    lengths: IntArray | None = None
    is_chain: bool = True

    @property
    def width(self) -> int:
        """W."""
        return int(self.survival.shape[1])

    @property
    def nodes(self) -> IntArray:
        """Nodes of each state, int64 [S]."""
        return np.asarray((self.survival >= 0).sum(axis=1), dtype=np.int64)

    def cut(self, nodes: int) -> Pool:
        """The same pool with no more than the best so many nodes of a proposal.

        Raises:
            ConfigError: If nodes is below 1.
        """
        if nodes < 1:
            raise ConfigError(f"a pool of proposals cannot be cut to {nodes} nodes.")
        if nodes >= self.width:
            return self
        return replace(
            self,
            survival=self.survival[:, :nodes],
            gain=self.gain[:, : nodes + 1],
            following=self.following[:, : nodes + 1],
        )

    def mean_committed(self, nodes: int) -> float:
        """Committed tokens of a round that verifies the best so many nodes: mean over states.

        For pools whose rounds are independent of each other this is tau.
        """
        return 1.0 + float(self.gain[:, min(nodes, self.width)].mean())


class PoolBuilder:
    """Collects states one by one."""

    def __init__(self) -> None:
        self._survival: list[list[float]] = []
        self._gain: list[list[int]] = []
        self._following: list[list[int]] = []
        self._starts: list[int] = []
        self._lengths: list[tuple[int, int]] = []
        self._is_chain = True

    @property
    def size(self) -> int:
        """States so far, which is the number of the next one."""
        return len(self._survival)

    def add_state(self, survival: list[float], gain: list[int], following: list[int]) -> int:
        """Add a state.

        Args:
            survival: Of its n nodes, falling.
            gain: n + 1 accepted tokens.
            following: n + 1 states, or NEW; states that come later may be named.

        Returns:
            Its number.
        """
        self._survival.append(survival)
        self._gain.append(gain)
        self._following.append(following)
        return len(self._survival) - 1

    def add_start(self, state: int, *, prompt: int, output: int) -> None:
        """Say that a text of so many tokens begins with a state."""
        self._starts.append(state)
        self._lengths.append((prompt, output))

    def branched(self) -> None:
        """Say that a proposal branches."""
        self._is_chain = False

    def build(self, name: str) -> Pool:
        """The pool.

        Raises:
            ConfigError: If there is no start.
        """
        if not self._starts:
            raise ConfigError(f"{name} holds no round to simulate with.")
        size = len(self._survival)
        width = max(1, max(len(row) for row in self._survival))
        survival = np.full((size, width), ABSENT)
        gain = np.zeros((size, width + 1), dtype=np.int64)
        following = np.full((size, width + 1), NEW, dtype=np.int64)
        for state, row in enumerate(self._survival):
            count = len(row)
            survival[state, :count] = row
            for table, own in ((gain, self._gain[state]), (following, self._following[state])):
                table[state, : count + 1] = own
                table[state, count + 1 :] = own[-1]
        return Pool(
            name=name,
            survival=survival,
            gain=gain,
            following=following,
            starts=np.array(self._starts, dtype=np.int64),
            lengths=np.array(self._lengths, dtype=np.int64),
            is_chain=self._is_chain,
        )
