"""Row pools: fixed-width rows of every layer, handed out in pages.

All layers of one kind share their row numbers, so one index tensor serves every layer of a forward,
and a commit moves the rows of all layers at once. Row numbers stay valid when the pool grows.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ZERO_ROW", "IntArray", "RowPool"]

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

    def allocate(self, pages: int) -> list[int]:
        """Hand out pages, those of the lowest numbers first, so that they tend to be in a row."""
        while len(self._free) < pages:
            self._grow(max(pages - len(self._free), self._pages))
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

    def _grow(self, pages: int) -> None:
        grown = {}
        # A forward may make it grow, in inference mode, and a commit writes to it outside of that.
        with torch.inference_mode(False):
            for key, stack in self._stacks.items():
                extra = stack.new_zeros(stack.shape[0], pages * self.page_rows, stack.shape[2])
                grown[key] = torch.cat((stack, extra), dim=1)
        self._stacks = grown
        for page in range(self._pages, self._pages + pages):
            heapq.heappush(self._free, page)
        self._pages += pages
