"""A drafter that may fail: then it is asked no more, which costs speed, never the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from dspark.draft.base import DraftContext, Drafter, Observer, SharesContext
from dspark.draft.none import NoDrafter
from dspark.errors import ShapeError
from dspark.tree import Proposal

__all__ = ["GuardedDrafter"]

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class GuardedDrafter:
    """Asks a drafter until something in it breaks.

    Args:
        drafter: The drafter, which may be a plug-in.

    Attributes:
        has_failed: Whether something broke.
        is_idle: Whether it never offers anything.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        # Protocols are slow to check, and these answers stay.
        self._observer = drafter if isinstance(drafter, Observer) else None
        self._sharer: SharesContext | None = None
        if isinstance(drafter, SharesContext) and drafter.shares_context:
            self._sharer = drafter
        self.is_idle = isinstance(drafter, NoDrafter)
        self.has_failed = False

    @property
    def capture(self) -> tuple[int, ...]:
        """Target layers whose hidden states it still needs."""
        return () if self.has_failed else self._drafter.capture

    @property
    def reads_states(self) -> bool:
        """Whether it needed hidden states when it began."""
        return bool(self._drafter.capture)

    @property
    def can_observe(self) -> bool:
        """Whether it takes hidden states without drafting."""
        return self._observer is not None and not self.has_failed

    @property
    def can_share(self) -> bool:
        """Whether requests may go on from what others began with."""
        return not self.capture or self._sharer is not None

    @property
    def takes_over(self) -> bool:
        """Whether it keeps hidden states of a request for others that begin alike."""
        return bool(self.capture) and self._sharer is not None

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal] | None:
        """Ask for proposals.

        Args:
            contexts: One per request.

        Returns:
            One each, within its limits; None if it failed.
        """
        return self._guarded(lambda: self._checked(contexts), None)

    def _checked(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        proposals = self._drafter.propose(contexts)
        for context, proposal in zip(contexts, proposals, strict=True):
            _check_limits(context, proposal)
        return proposals

    def observe(self, contexts: Sequence[DraftContext]) -> None:
        """Hand over hidden states without asking for anything."""
        observer = self._observer
        if observer is not None and not self.has_failed:
            self._guarded(lambda: observer.observe(contexts), None)

    def covered(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of a text it needs no hidden states of."""
        sharer = self._sharer
        if not self.capture:
            return len(tokens)
        return 0 if sharer is None else self._guarded(lambda: sharer.covered(tokens), len(tokens))

    def adopt(self, request_id: int, tokens: Sequence[int]) -> None:
        """Tell it of a request that begins with tokens which others ran.

        Args:
            request_id: Whose.
            tokens: No more than it said that it covered.
        """
        sharer = self._sharer
        if self.capture and sharer is not None:
            self._guarded(lambda: sharer.adopt(request_id, tokens), None)

    def release(self, request_id: int) -> None:
        """Have it forget a request."""
        self._drafter.release(request_id)

    def give_up(self, exc: Exception) -> None:
        """Ask it no more."""
        if not self.has_failed:
            logger.warning("drafter %s failed, decoding plainly: %s", self._drafter.name, exc)
        self.has_failed = True

    def _guarded(self, call: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return call()
        except Exception as exc:  # noqa: BLE001 - drafters are plug-ins: anything may break
            self.give_up(exc)
            return otherwise


def _check_limits(context: DraftContext, proposal: Proposal) -> None:
    tree = proposal.tree
    if tree.num_nodes > context.budget or tree.max_depth > context.depth:
        raise ShapeError(
            f"a proposal has {tree.num_nodes} nodes and depth {tree.max_depth}, but at most "
            f"{context.budget} and {context.depth} were asked for."
        )
