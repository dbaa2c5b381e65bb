"""What may follow: constraints on the output, and their masks on the nodes of a tree.

A constraint (a grammar) says which tokens may follow a sequence of tokens. Its mask is one more
processor (`dspark.verify.sampling`): it acts on the target's rows and on a draft's laws alike, at
each node for the node's own path. So the target's law under a constraint is the masked law, and
whatever holds for the acceptance rules without one holds with it.

Masks are computed where a law is asked for and kept until tokens are committed, so that the
drafter, the pruning of its tree and the verifier share them.

Letters: V vocabulary of the target, V' of the constraint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from dspark.tree import BoolArray

__all__ = ["AllowedAfter", "Constraint", "ConstraintState", "PathMasks"]

AllowedAfter: TypeAlias = Callable[[Sequence[int]], BoolArray | None]
"""Tokens drafted after the anchor -> bool [V], the tokens that may follow them.

None says that nothing is ruled out, because no text reaches that place: a token of the path is
itself forbidden where it stands, or ends the text.
"""


@runtime_checkable
class ConstraintState(Protocol):
    """Where the output of one request stands in its constraint."""

    def allowed(self, path: Sequence[int]) -> BoolArray:
        """The tokens that may follow the output and a path; the state itself stays where it is.

        The answer depends on output and path alone, however they were reached.

        Args:
            path: Tokens after the output, each allowed where it stands, none an end token.

        Returns:
            bool [V']; end tokens are true where the text may end. All false is a dead end.

        Raises:
            DsparkError: If it cannot be told; this ends the request.
        """
        ...

    def advance(self, token: int) -> None:
        """Take in a token of the output that was allowed and is no end token."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """A language of token sequences; immutable, shared by many requests."""

    @property
    def vocab_size(self) -> int:
        """V'. Tokens from there on are never allowed; those at the target's V and above unused."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens by which `ConstraintState.allowed` tells that the text may end, at least one."""
        ...

    def start(self) -> ConstraintState:
        """The state before any output."""
        ...


class PathMasks:
    """The masks of one request, each computed once between two commits.

    Where the constraint lets the text end, all end tokens of the target are allowed; elsewhere none
    of them is, even one that the constraint takes for text.

    Args:
        constraint: The constraint.
        vocab_size: V.
        end_tokens: Tokens that end a text of the target, at least one.
    """

    __slots__ = ("_end", "_known", "_marks", "_size", "_state")

    def __init__(
        self, constraint: Constraint, *, vocab_size: int, end_tokens: frozenset[int]
    ) -> None:
        self._state = constraint.start()
        self._size = vocab_size
        self._end = sorted(token for token in end_tokens if token < vocab_size)
        self._marks = sorted(constraint.end_tokens)
        self._known: dict[tuple[int, ...], BoolArray | None] = {}

    def allowed(self, path: Sequence[int]) -> BoolArray | None:
        """Which tokens may follow the output and a path; see `AllowedAfter`.

        Args:
            path: Drafted tokens after the anchor.

        Returns:
            bool [V], not to be written to, or None. All false is a dead end.

        Raises:
            DsparkError: If the constraint cannot tell.
        """
        key = tuple(path)
        if key not in self._known:
            self._known[key] = self._mask(key) if self._is_reached(key) else None
        return self._known[key]

    def _is_reached(self, path: tuple[int, ...]) -> bool:
        if not path:
            return True
        above, token = self.allowed(path[:-1]), path[-1]
        if above is None or token in self._end or not 0 <= token < self._size:
            return False
        return bool(above[token])

    def _mask(self, path: tuple[int, ...]) -> BoolArray:
        own = self._state.allowed(path)
        may_end = any(bool(own[token]) for token in self._marks if token < len(own))
        mask = np.zeros(self._size, dtype=np.bool_)
        known = min(self._size, len(own))
        mask[:known] = own[:known]
        mask[[token for token in self._marks if token < self._size]] = False
        mask[self._end] = may_end
        return mask

    def forced(self, most: int) -> list[int]:
        """Tokens that are certain to follow: each is the only one allowed where it stands.

        Forced text is not enough for that, since a text has many tokenisations.

        Args:
            most: How many to look for.

        Returns:
            At most so many tokens; a last one may end the text.

        Raises:
            DsparkError: If the constraint cannot tell.
        """
        path: list[int] = []
        while len(path) < most:
            mask = self.allowed(path)
            if mask is None or np.count_nonzero(mask) != 1:
                break
            path.append(int(mask.argmax()))
        return path

    def below(self, prefix: Sequence[int]) -> AllowedAfter:
        """The masks as a drafter sees them that continues behind `prefix`."""
        if not prefix:
            return self.allowed
        return lambda path: self.allowed((*prefix, *path))

    def advance(self, token: int) -> None:
        """Take in a committed token that was allowed and does not end the text."""
        self._known.clear()
        self._state.advance(token)
