"""A grammar that begins behind a token: the reasoning before it is free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dspark.tree import BoolArray
    from dspark.verify.constraint import Constraint, ConstraintState

__all__ = ["AfterToken"]


class AfterToken:
    """Any tokens but end tokens up to a first marker, then a constraint.

    Args:
        inner: What holds behind the marker.
        marker: The token, such as the one that ends a model's reasoning.
    """

    def __init__(self, inner: Constraint, marker: int) -> None:
        self._inner = inner
        self._marker = marker
        self._free = np.ones(inner.vocab_size, dtype=np.bool_)
        self._free[sorted(inner.end_tokens)] = False
        self._free.flags.writeable = False

    @property
    def vocab_size(self) -> int:
        """As of what holds behind the marker."""
        return self._inner.vocab_size

    @property
    def end_tokens(self) -> frozenset[int]:
        """As of what holds behind the marker."""
        return self._inner.end_tokens

    def start(self) -> ConstraintState:
        """A state before any text, for one request."""
        return _State(self._inner.start(), self._marker, self._free)

    def __deepcopy__(self, memo: dict[int, object]) -> AfterToken:
        """Itself, since it never changes."""
        return self


class _State:
    """Where a request stands: before the marker, or in the inner state."""

    __slots__ = ("_free", "_inner", "_is_open", "_marker")

    def __init__(self, inner: ConstraintState, marker: int, free: BoolArray) -> None:
        self._inner = inner
        self._marker = marker
        self._free = free
        self._is_open = True

    def allowed(self, path: Sequence[int]) -> BoolArray:
        """See `dspark.verify.constraint.ConstraintState.allowed`."""
        if not self._is_open:
            return self._inner.allowed(path)
        own = list(path)
        if self._marker not in own:
            return self._free
        return self._inner.allowed(own[own.index(self._marker) + 1 :])

    def advance(self, token: int) -> None:
        """See `dspark.verify.constraint.ConstraintState.advance`."""
        if not self._is_open:
            self._inner.advance(token)
        elif token == self._marker:
            self._is_open = False
