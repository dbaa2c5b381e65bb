"""Cache protocol: what the engine and the drafters may ask of a target's memory.

After `commit(slot, path)` a slot is what plain decoding of exactly those tokens would have left.
Rows of the last forward that are not on the path leave no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dspark.errors import CapabilityError

__all__ = ["Cache", "CacheFullError", "CacheUsage", "PricesRequests"]


class CacheFullError(CapabilityError):
    """The cache's memory limit leaves no room for what was asked."""


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """Memory in use.

    Attributes:
        pages: Pages held by live slots and by kept prefixes.
        page_tokens: Tokens a page holds.
        bytes: Bytes of K/V allocated, which the limit holds down.
        limit: Byte limit, or None.
        slots: Live slots.
    """

    pages: int
    page_tokens: int
    bytes: int
    limit: int | None
    slots: int


@runtime_checkable
class Cache(Protocol):
    """State of many requests, one slot each."""

    def open(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Open a slot for a request whose context starts with `tokens`.

        Args:
            tokens: The prompt.

        Returns:
            (slot, shared): `shared` leading tokens, fewer than len(tokens), are already in the
            slot because another request started alike.

        Raises:
            CacheFullError: If the memory limit leaves no room.
        """
        ...

    def reserve(self, slot: int, rows: int) -> None:
        """Make room for `rows` more rows after the committed context.

        Raises:
            CacheFullError: If the memory limit leaves no room.
        """
        ...

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep these rows of the slot's last forward, in order; forget its other rows.

        Args:
            slot: The slot.
            path: Row indices within the slot's part of the last batch; each one's parent is the
                one before it (the first one's is the committed context). May be empty.

        Raises:
            ShapeError: If the path is not such a path.
        """
        ...

    def length(self, slot: int) -> int:
        """Committed tokens of the slot."""
        ...

    def release(self, slot: int) -> None:
        """Close the slot and give its pages back."""
        ...

    def scrub(self, slot: int) -> None:
        """Overwrite what rejected rows left behind the committed context, if it is not finite."""
        ...

    def forget_kept(self) -> None:
        """Give back the pages of released requests that were kept for sharing."""
        ...

    def usage(self) -> CacheUsage:
        """Memory in use."""
        ...

    def page_bytes(self) -> int:
        """Bytes of one page."""
        ...


@runtime_checkable
class PricesRequests(Protocol):
    """A cache whose slots take more than their tokens' pages."""

    def request_bytes(self, rows: int) -> int:
        """Bytes that a slot takes at the most while nothing else is in the cache.

        Args:
            rows: Committed tokens that it may come to hold, and rows of a tree behind them.
        """
        ...
