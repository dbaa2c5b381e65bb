"""Row pools: fixed-width rows of every layer, handed out in pages.

All layers of one kind share their row numbers, so one index tensor serves every layer of a forward,
and a commit moves the rows of all layers at once. Row numbers stay valid when the pool grows.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.cache import CacheFullError

__all__ = ["ZERO_ROW", "IntArray", "Pools", "RowPool", "Want"]

IntArray = NDArray[np.int64]

ZERO_ROW = 0
"""A row that is never written. What is masked points here: 0 times a stale NaN would be NaN."""


class RowPool:
    """Rows for some layers; a row may have several parts, which live and move together.

    Args:
        layers: The layers, each with its device.
        widths: Elements of every part of a row, by the part's name.
        page_rows: Rows of a page.
        dtype: Element type.
    """

    def __init__(
        self,
        layers: Mapping[int, torch.device],
        *,
        widths: Mapping[str, int],
        page_rows: int,
        dtype: torch.dtype,
    ) -> None:
        self.page_rows = page_rows
        self.row_bytes = len(layers) * sum(widths.values()) * dtype.itemsize
        members: dict[torch.device, list[int]] = {}
        for layer, device in layers.items():
            members.setdefault(device, []).append(layer)
        self._stacks = {
            (device, part): torch.zeros(len(of), page_rows, width, dtype=dtype, device=device)
            for device, of in members.items()
            for part, width in widths.items()
        }
        self._place = {
            layer: (device, index)
            for device, of in members.items()
            for index, layer in enumerate(of)
        }
        self._free: list[int] = []
        self._pages = 1  # page 0 holds ZERO_ROW and is never handed out
        self._users: dict[int, int] = {}

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages handed out."""
        return self.pages_used * self.page_bytes

    @property
    def bytes_held(self) -> int:
        """Bytes of all pages there are, but for the one of ZERO_ROW."""
        return (self._pages - 1) * self.page_bytes

    @property
    def pages_free(self) -> int:
        """Pages that can be handed out without growing."""
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.row_bytes * self.page_rows

    @property
    def pages_used(self) -> int:
        """Pages handed out."""
        return len(self._users)

    def layer(self, index: int, part: str) -> Tensor:
        """One part of the rows of a layer, a view [rows, width]."""
        device, place = self._place[index]
        return self._stacks[device, part][place]

    def allocate(self, pages: int, *, spare: int | None = None) -> list[int]:
        """Hand out pages, those of the lowest numbers first, so that they tend to be in a row.

        Args:
            pages: How many.
            spare: Where the pool has to grow, by how many more at the most; None for as many as
                there are, so that a page is copied once on average.
        """
        missing = pages - len(self._free)
        if missing > 0:
            extra = max(0, self._pages - missing)
            self._resize(self._pages + missing + (extra if spare is None else min(extra, spare)))
        taken = [heapq.heappop(self._free) for _ in range(pages)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Count one more user of these pages."""
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; those without another user become free."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                heapq.heappush(self._free, page)

    def pages_for(self, rows: int) -> int:
        """Pages that so many rows take."""
        return -(-rows // self.page_rows)

    def rows_of(self, pages: Sequence[int], count: int | None = None) -> IntArray:
        """Row numbers of pages, in order: int64 [count], by default all of them."""
        starts = np.asarray(pages, dtype=np.int64)[:, None] * self.page_rows
        rows = (starts + np.arange(self.page_rows)).reshape(-1)
        return rows if count is None else rows[:count]

    def move(self, source: IntArray, destination: IntArray) -> None:
        """Copy rows of all layers; source and destination may overlap."""
        if len(source) == 0 or np.array_equal(source, destination):
            return
        for (device, _), stack in self._stacks.items():
            rows = torch.from_numpy(source).to(device)
            stack[:, torch.from_numpy(destination).to(device)] = stack[:, rows]

    def compact(self) -> dict[int, int]:
        """Move pages into free ones of lower numbers, and give the memory behind them back.

        Returns:
            Old number of each page that moved -> its new one.
        """
        count = self.pages_used + 1
        high = sorted(page for page in self._users if page >= count)
        low = sorted(page for page in self._free if page < count)
        moved = dict(zip(high, low, strict=True))
        self.move(self.rows_of(high), self.rows_of(low))
        self._users = {moved.get(page, page): users for page, users in self._users.items()}
        self._free = []
        self._resize(count)
        return moved

    def _resize(self, pages: int) -> None:
        """Make the pool as large as `pages` pages; what is cut off is not in use."""
        rows = pages * self.page_rows
        # A forward may make it grow, in inference mode, and a commit writes to it outside of that.
        with torch.inference_mode(False):
            for key, stack in self._stacks.items():  # one after the other: old and new side by side
                kept = min(rows, stack.shape[1])
                resized = stack.new_zeros(stack.shape[0], rows, stack.shape[2])
                resized[:, :kept] = stack[:, :kept]
                self._stacks[key] = resized
        for page in range(self._pages, pages):
            heapq.heappush(self._free, page)
        self._pages = pages


Want: TypeAlias = tuple[RowPool, list[int], int]
"""A pool, a list of its pages, and how many pages more the list is to have."""

PageLists: TypeAlias = Callable[[], Iterable[tuple[RowPool, list[int]]]]
"""Every list of pages there is, with its pool."""


class Pools:
    """Pools under one limit of bytes.

    The limit holds for all pages there are, not only for those in use: a pool that was larger once
    gives its idle pages to the others.

    Args:
        pools: The pools.
        limit: Bytes that they may hold together, or None.
    """

    def __init__(self, pools: Sequence[RowPool], *, limit: int | None) -> None:
        self._pools = pools
        self._limit = limit

    @property
    def pages_used(self) -> int:
        """Pages handed out."""
        return sum(pool.pages_used for pool in self._pools)

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages handed out."""
        return sum(pool.bytes_used for pool in self._pools)

    @property
    def bytes_held(self) -> int:
        """Bytes of all pages there are."""
        return sum(pool.bytes_held for pool in self._pools)

    def take(self, wanted: Sequence[Want], lists: PageLists, drop: Callable[[], bool]) -> None:
        """Put pages into lists: all that are wanted, or none.

        Args:
            wanted: What is wanted.
            lists: Page lists, whose numbers may change.
            drop: Gives back pages that are kept in vain; False if there are none.

        Raises:
            CacheFullError: If the limit leaves no room.
        """
        asked: Counter[RowPool] = Counter()
        for pool, _, count in wanted:
            asked[pool] += count
        spare = None
        if self._limit is not None:
            spare = self._make_room(asked, self._limit, lists, drop) // 2 // max(1, len(asked))
        for pool, pages, count in wanted:
            room = None if spare is None else spare // pool.page_bytes
            pages.extend(pool.allocate(count, spare=room))

    def compact(self, lists: PageLists) -> None:
        """Give idle pages back; pages in use may change their numbers.

        Args:
            lists: Page lists.
        """
        moved = {pool: pool.compact() for pool in self._pools if pool.pages_free}
        if any(moved.values()):
            for pool, pages in lists():
                new = moved.get(pool, {})
                pages[:] = [new.get(page, page) for page in pages]

    def _make_room(
        self, asked: Counter[RowPool], limit: int, lists: PageLists, drop: Callable[[], bool]
    ) -> int:
        """Free memory until the pools may grow by what is asked; returns the bytes left then."""
        needed = sum(pool.page_bytes * count for pool, count in asked.items())
        while (left := limit - self._bytes_with(asked)) < 0:
            if self.bytes_used + needed <= limit:
                self.compact(lists)
            elif not drop():
                raise CacheFullError(
                    f"the cache needs {needed / 2**20:.1f} MiB more, but holds "
                    f"{self.bytes_used / 2**20:.1f} MiB of its limit of {limit / 2**20:.1f} MiB.",
                    hint="shorten the prompt, lower max_tokens or raise the memory limit",
                )
        return left

    def _bytes_with(self, asked: Counter[RowPool]) -> int:
        """Bytes of all pages there will be when these are handed out."""
        grown = sum(
            pool.page_bytes * max(0, count - pool.pages_free) for pool, count in asked.items()
        )
        return self.bytes_held + grown
