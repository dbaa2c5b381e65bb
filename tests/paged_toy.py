"""The toy target with a cache that has pages, a limit, sharing, and no patience for mistakes."""

from __future__ import annotations

import torch

from dspark.cache import CacheFullError, CacheUsage
from dspark.errors import ShapeError
from tests.eval.toys import ToyCache, ToyTarget, toy_pair

PAGE = 4
"""Tokens of a page; a page counts as one byte."""

KEPT = 2
"""Released slots that stay until memory is wanted."""


class PagedCache(ToyCache):
    """Tokens in pages; every slot pays for its own pages.

    Args:
        limit: Pages there are, or None.
        is_whole: A state can be taken over only whole, as V4's.
    """

    def __init__(self, limit: int | None, *, is_whole: bool = False) -> None:
        super().__init__()
        self.limit = limit
        self.is_whole = is_whole
        self.pages: dict[int, int] = {}
        self.kept: dict[int, tuple[list[int], int]] = {}
        self.most = 0
        self.opened_with: list[int] = []

    def open(self, tokens):
        slot, _ = super().open(tokens)
        self.pages[slot] = 0
        held = [*self.committed.values(), *(tokens for tokens, _ in self.kept.values())]
        shared = max((self.common(other, list(tokens)) for other in held), default=0)
        self.opened_with.append(shared)
        if shared:
            try:
                self.reserve(slot, shared)
            except CacheFullError:
                self.release(slot)
                raise
            self.committed[slot] = list(tokens[:shared])
        return slot, shared

    def common(self, other: list[int], wanted: list[int]) -> int:
        limit = min(len(other), len(wanted) - 1)
        same = next((i for i in range(limit) if other[i] != wanted[i]), max(limit, 0))
        return same if not self.is_whole or same == len(other) else 0

    def reserve(self, slot, rows):
        needed = -(-(len(self.committed[slot]) + rows) // PAGE) - self.pages[slot]
        if needed <= 0:
            return
        while self.limit is not None and self.used + needed > self.limit and self.kept:
            del self.kept[next(iter(self.kept))]
        if self.limit is not None and self.used + needed > self.limit:
            raise CacheFullError(f"{needed} pages are not there.")
        self.pages[slot] += needed
        self.most = max(self.most, self.used)

    @property
    def used(self) -> int:
        return sum(self.pages.values()) + sum(pages for _, pages in self.kept.values())

    def release(self, slot):
        tokens, pages = self.committed[slot], self.pages.pop(slot)
        super().release(slot)
        if tokens:
            self.kept[slot] = (tokens, pages)
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]

    def forget_kept(self):
        self.kept.clear()

    def usage(self):
        return CacheUsage(self.used, PAGE, self.used, self.limit, len(self.committed))


class PagedTarget(ToyTarget):
    """The toy target on a `PagedCache`, which it remembers.

    Args:
        table: Its logits, as the toy target's; None for those of `toy_pair`.
        is_whole: As there.
    """

    def __init__(self, table: torch.Tensor | None = None, *, is_whole: bool = False) -> None:
        super().__init__(toy_pair()[0].table if table is None else table)
        self.is_whole = is_whole
        self.cache: PagedCache | None = None
        self.rows: list[int] = []

    def new_cache(self, *, memory_limit=None):
        self.cache = PagedCache(memory_limit, is_whole=self.is_whole)
        return self.cache

    def forward(self, batch, cache, *, capture=()):
        for span in batch.spans:
            start = len(cache.committed[span.slot])
            if start + span.stop - span.start > cache.pages[span.slot] * PAGE:
                raise ShapeError("rows were not reserved")
            first = [i for i in range(span.start, span.stop) if batch.parent[i] < 0]
            if any(batch.positions[i] != start for i in first):
                raise ShapeError("rows stand at the wrong position")
        self.rows.append(batch.num_rows)
        return super().forward(batch, cache, capture=capture)
