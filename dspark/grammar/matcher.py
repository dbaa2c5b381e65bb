"""A request's place in a grammar, and the masks of the paths that go on from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.errors import CapabilityError

if TYPE_CHECKING:
    from dspark.grammar.tokens import TokenTable
    from dspark.tree import BoolArray

__all__ = ["MatcherState"]

_DEAD_END = "NoExtensionBias"


class MatcherState:
    """A `dspark.verify.constraint.ConstraintState` over one matcher of llguidance.

    The matcher walks to a path and stays there: the next path is reached by taking back what the
    two do not share, so that a tree costs one step per node.

    Args:
        make: Makes a matcher that stands before any text.
        table: The tokens.
    """

    __slots__ = ("_make", "_matcher", "_output", "_table", "_walked")

    def __init__(self, make: Callable[[], Any], table: TokenTable) -> None:
        self._make = make
        self._matcher = make()
        self._table = table
        self._output: list[int] = []
        self._walked: list[int] = []  # beyond the output

    def allowed(self, path: Sequence[int]) -> BoolArray:
        """See `dspark.verify.constraint.ConstraintState.allowed`.

        Raises:
            CapabilityError: If the grammar is too complex to go on with.
        """
        self._walk_to(list(path))
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():  # the bits would then say that the text may end
            if _DEAD_END not in self._matcher.get_error():
                raise self._error()
            self._restart()
            return np.zeros(self._table.vocab_size, dtype=np.bool_)
        bits = np.unpackbits(packed, count=self._table.vocab_size, bitorder="little")
        mask: BoolArray = bits.view(np.bool_)
        if np.count_nonzero(mask) == 1 and not self._fits(int(mask.argmax())):
            mask[:] = False
        return mask

    def _fits(self, token: int) -> bool:
        """Whether the only allowed token really is: a tokenizer may lack what the text needs next.

        llguidance then names the token after the gap.
        """
        is_end = token in self._table.end_tokens
        return is_end or self._matcher.validate_tokens([token]) == 1

    def advance(self, token: int) -> None:
        """See `dspark.verify.constraint.ConstraintState.advance`.

        Raises:
            CapabilityError: If the token does not belong there, or as in `allowed`.
        """
        self._walk_to([token])
        self._output.append(token)
        self._walked = []

    def _walk_to(self, path: list[int]) -> None:
        shared = 0
        for token, walked in zip(path, self._walked, strict=False):
            if token != walked:
                break
            shared += 1
        back, ahead = len(self._walked) - shared, path[shared:]
        if back:
            self._matcher.rollback(back)
        if ahead:
            self._matcher.consume_tokens(ahead)
        if self._matcher.is_error():
            raise self._error()
        self._walked = path

    def _restart(self) -> None:
        """Leave the state of error, which a matcher never does by itself."""
        self._matcher = self._make()
        self._walked = []
        if self._output:
            self._matcher.consume_tokens(self._output)

    def _error(self) -> CapabilityError:
        reason = str(self._matcher.get_error()).split("\n", maxsplit=1)[0].rstrip(".")
        self._restart()
        return CapabilityError(
            f"the grammar cannot be followed any further: {reason}.",
            hint="simplify the grammar: fewer alternatives, smaller repetition counts",
        )
