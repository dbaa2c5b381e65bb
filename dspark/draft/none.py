"""Drafter `none`: offers nothing, so every round is a step of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.draft.base import DraftContext
from dspark.tree import Proposal

__all__ = ["NoDrafter"]


class NoDrafter:
    """Proposes empty trees."""

    @property
    def name(self) -> str:
        """What reports call it."""
        return "none"

    @property
    def capture(self) -> tuple[int, ...]:
        """It needs no hidden states."""
        return ()

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        """One empty proposal for each request."""
        return [Proposal.empty() for _ in contexts]

    def release(self, request_id: int) -> None:
        """Nothing is kept, so nothing is forgotten."""
