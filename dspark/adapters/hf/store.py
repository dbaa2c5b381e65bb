"""K/V store for wrapped transformers models: slots, pages, segments, prefix sharing, rollback.

A slot's K/V lie in a list of segments. A segment is a run of whole pages, allocated once and never
moved: growth appends a segment, so no row is ever copied to grow, and a prefix that two requests
share is one segment that both refer to. Attention on plain PyTorch reads contiguous K/V for free
but would have to gather scattered pages on every forward (docs/design.md, "Contiguous segments"),
which is why the page is the unit of accounting and sharing and not of addressing.

Rows of a forward are written behind the committed context at columns length .. length + n - 1, in
batch order, so for a chain the column is the position. `commit` moves the accepted rows together.
Letters: L layers of a group, H K/V heads, T columns, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dspark.cache import CacheFullError, CacheUsage
from dspark.errors import ShapeError
from dspark.target import TokenBatch

__all__ = ["PAGE_TOKENS", "LayerShape", "Piece", "Segment", "SlotState", "StoreCache"]

PAGE_TOKENS = 256
"""Tokens a page holds. Also the block over which exact attention sums (attention.py)."""

SUM_COLUMNS = 8
"""Extra columns of ones behind V: the softmax denominator comes out of the same product as the
numerator, so both are summed in the same order."""

_KEPT_SLOTS = 4
"""Released requests whose K/V stay for others to share until memory is wanted."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """K/V shape of one layer that owns K/V.

    Attributes:
        layer: Layer index.
        heads: K/V heads.
        head_dim: d.
    """

    layer: int
    heads: int
    head_dim: int


@dataclass(eq=False, slots=True)
class Segment:
    """A run of whole pages, for all layers.

    Attributes:
        pages: Pages it spans.
        keys: One [L, H, T, d] tensor for every group of layers of one shape.
        values: The same with columns of ones behind, [L, H, T, d + sum columns].
        users: Slots that refer to it.
        places: Of each group: columns of the segment, and where its K and its V lie in memory.
    """

    pages: int
    keys: list[Tensor]
    values: list[Tensor]
    users: int = 0
    places: list[tuple[int, int, int]] = field(init=False)

    def __post_init__(self) -> None:
        pairs = zip(self.keys, self.values, strict=True)
        self.places = [(k.shape[2], k.data_ptr(), v.data_ptr()) for k, v in pairs]


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a slot's context in one segment: positions start .. start + columns - 1.

    Attributes:
        segment: Where.
        start: First position, a multiple of PAGE_TOKENS.
        columns: Columns of the segment that this slot may use.
    """

    segment: Segment
    start: int
    columns: int


@dataclass(eq=False, slots=True)
class SlotState:
    """One request's memory.

    Attributes:
        tokens: Committed token ids.
        pieces: Its segments, in order.
        pending: (token ids, parent rows within the part) of the last forward, or None.
        has_run: True once rows of its own were committed.
    """

    tokens: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    pending: tuple[list[int], list[int]] | None = None
    has_run: bool = False

    @property
    def length(self) -> int:
        """Committed tokens."""
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        """Columns that exist."""
        return self.pieces[-1].start + self.pieces[-1].columns if self.pieces else 0


class StoreCache:
    """Cache (dspark.cache) over segments of dense K/V.

    Args:
        layers: Shapes of the layers that own K/V.
        dtype: Element type of the stored K/V.
        device: Where it lives.
        memory_limit: Bytes that may be allocated, or None.
        sum_columns: Columns of ones behind V.

    Example:
        >>> shape = LayerShape(layer=0, heads=1, head_dim=8)
        >>> cache = StoreCache([shape], dtype=torch.float32, device=torch.device("cpu"))
        >>> slot, shared = cache.open([1, 2, 3])
        >>> cache.reserve(slot, 3)
        >>> cache.usage().pages
        1
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory_limit: int | None = None,
        sum_columns: int = SUM_COLUMNS,
    ) -> None:
        self._dtype = dtype
        self._sum_columns = sum_columns
        self._device = device
        self._limit = memory_limit
        self._slots: dict[int, SlotState] = {}
        self._kept: dict[int, SlotState] = {}  # insertion order is age
        self._next_slot = 0
        self._pages = 0
        shapes: dict[tuple[int, int], list[int]] = {}
        for shape in layers:
            shapes.setdefault((shape.heads, shape.head_dim), []).append(shape.layer)
        self._groups = list(shapes.items())
        self._place = {
            layer: (group, index)
            for group, (_, members) in enumerate(self._groups)
            for index, layer in enumerate(members)
        }

    # -- the Cache protocol -------------------------------------------------------------------

    def open(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Open a slot; see `dspark.cache.Cache.open`."""
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        state = SlotState()
        self._slots[slot] = state
        donor, shared = self._best_donor(tokens)
        if donor is not None and shared > 0:
            self._share(donor, state, shared)
        return slot, state.length

    def reserve(self, slot: int, rows: int) -> None:
        """Make room; see `dspark.cache.Cache.reserve`."""
        state = self._slots[slot]
        missing = state.length + rows - state.capacity
        if missing <= 0:
            return
        needed = -(-missing // PAGE_TOKENS)
        # Later segments double the slot, so their number stays logarithmic in its length. Where
        # memory is limited a quarter does, too, and leaves more of it to others.
        more = state.capacity // PAGE_TOKENS // (1 if self._limit is None else 4)
        self._grow(state, max(needed, more), least=needed)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep these rows; see `dspark.cache.Cache.commit`."""
        state = self._slots[slot]
        if state.pending is None:
            raise ShapeError(f"slot {slot} has no rows to commit: run a forward first.")
        tokens, parent = state.pending
        before = -1
        for row in path:
            if not 0 <= row < len(tokens) or parent[row] != before:
                raise ShapeError(
                    f"{list(path)} is not a path from the committed context through the "
                    f"{len(tokens)} rows of slot {slot}."
                )
            before = row
        moved = next((i for i, row in enumerate(path) if row != i), len(path))
        if moved < len(path):
            self._move(state, [state.length + row for row in path[moved:]], state.length + moved)
        state.tokens.extend(tokens[row] for row in path)
        state.pending = None
        state.has_run = True

    def scrub(self, slot: int) -> None:
        """Zero the columns behind the committed context; see `dspark.cache.Cache.scrub`."""
        state = self._slots[slot]
        for piece in state.pieces:
            start = max(0, state.length - piece.start)
            for keys, values in zip(piece.segment.keys, piece.segment.values, strict=True):
                keys[:, :, start : piece.columns] = 0
                values[:, :, start : piece.columns, : keys.shape[3]] = 0

    def length(self, slot: int) -> int:
        """Committed tokens of the slot."""
        return self._slots[slot].length

    def release(self, slot: int) -> None:
        """Close the slot; its whole pages stay for sharing until memory is wanted."""
        state = self._slots.pop(slot)
        state.pending = None
        if state.has_run:  # else it holds nothing that its donor does not
            self._kept[slot] = state
            while len(self._kept) > _KEPT_SLOTS:
                self._drop_oldest()
        else:
            self._drop(state)

    def usage(self) -> CacheUsage:
        """Memory in use."""
        return CacheUsage(
            pages=self._pages,
            page_tokens=PAGE_TOKENS,
            bytes=self._pages * self.page_bytes(),
            limit=self._limit,
            slots=len(self._slots),
        )

    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        per_token = sum(
            len(members) * heads * (2 * dim + self._sum_columns)
            for (heads, dim), members in self._groups
        )
        return per_token * PAGE_TOKENS * self._dtype.itemsize

    def forget_kept(self) -> None:
        """Give back the pages of released requests that were kept for sharing."""
        while self._kept:
            self._drop_oldest()

    # -- what the target's attention uses -----------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the stored K/V."""
        return self._dtype

    @property
    def layout(self) -> tuple[torch.dtype, int]:
        """Element type, and columns of ones behind V."""
        return self._dtype, self._sum_columns

    def state(self, slot: int) -> SlotState:
        """The memory of a slot."""
        return self._slots[slot]

    def begin(self, batch: TokenBatch) -> None:
        """Note the rows that a forward is about to write.

        Raises:
            ShapeError: If a slot was not reserved for that many rows.
        """
        for span in batch.spans:
            state = self._slots[span.slot]
            rows = span.stop - span.start
            if state.length + rows > state.capacity:
                raise ShapeError(
                    f"slot {span.slot} has room for {state.capacity - state.length} rows, not "
                    f"{rows}: reserve them first."
                )
            first = span.start
            parents = batch.parent[first : span.stop].tolist()
            local = [parent - first if parent >= 0 else -1 for parent in parents]
            state.pending = (batch.token_ids[first : span.stop].tolist(), local)

    def write(self, layer: int, state: SlotState, key: Tensor, value: Tensor) -> None:
        """Write one layer's rows behind the committed context.

        Args:
            layer: A layer that owns K/V.
            state: The slot.
            key: [H, n, d].
            value: [H, n, d].
        """
        group, index = self._place[layer]
        start, done, dim = state.length, 0, key.shape[-1]
        for piece in state.pieces:
            a = max(start + done, piece.start) - piece.start
            n = min(key.shape[1] - done, piece.columns - a)
            if n <= 0:
                continue
            piece.segment.keys[group][index, :, a : a + n] = key[:, done : done + n]
            piece.segment.values[group][index, :, a : a + n, :dim] = value[:, done : done + n]
            done += n

    def read(self, layer: int, state: SlotState, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer at columns start .. stop - 1.

        Returns:
            K [H, stop - start, d] and V [H, stop - start, d + sum columns]; views where the range
            lies in one segment, copies where it spans several.
        """
        group, index = self._place[layer]
        keys, values = [], []
        for piece in state.pieces:
            a, b = max(start, piece.start), min(stop, piece.start + piece.columns)
            if a < b:
                keys.append(piece.segment.keys[group][index, :, a - piece.start : b - piece.start])
                values.append(
                    piece.segment.values[group][index, :, a - piece.start : b - piece.start]
                )
        if len(keys) == 1:
            return keys[0], values[0]
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    # -- inside -------------------------------------------------------------------------------

    def _grow(self, state: SlotState, pages: int, *, least: int) -> None:
        segment = self._allocate(pages, least=least)
        segment.users += 1
        state.pieces.append(Piece(segment, state.capacity, segment.pages * PAGE_TOKENS))

    def _allocate(self, pages: int, *, least: int) -> Segment:
        if self._limit is not None:
            room = self._limit // self.page_bytes() - self._pages
            while room < pages and self._kept:
                self._drop_oldest()
                room = self._limit // self.page_bytes() - self._pages
            pages = max(least, min(pages, room))
            if room < pages:
                raise CacheFullError(
                    f"the K/V cache needs {pages} more pages of {PAGE_TOKENS} tokens "
                    f"({pages * self.page_bytes() / 2**20:.0f} MiB), but its limit of "
                    f"{self._limit / 2**20:.0f} MiB leaves room for {max(room, 0)}.",
                    hint="shorten the prompt, lower max_tokens or raise the memory limit",
                )
        columns = pages * PAGE_TOKENS
        try:
            segment = self._new_segment(pages, columns)
        except (RuntimeError, MemoryError) as exc:  # how torch says that memory is out
            raise CacheFullError(
                f"{pages} pages of {PAGE_TOKENS} tokens for the K/V cache "
                f"({pages * self.page_bytes() / 2**20:.0f} MiB) cannot be allocated.",
                hint="shorten the prompt, lower max_tokens or the tree budget",
            ) from exc
        self._pages += pages
        return segment

    def _new_segment(self, pages: int, columns: int) -> Segment:
        keys, values = [], []
        for (heads, dim), members in self._groups:
            shape = (len(members), heads, columns, dim)
            # Zeros, not garbage: a masked column is multiplied by an exact 0, and 0 * NaN is NaN.
            keys.append(torch.zeros(shape, dtype=self._dtype, device=self._device))
            value = torch.zeros(
                (*shape[:3], dim + self._sum_columns), dtype=self._dtype, device=self._device
            )
            value[..., dim:] = 1
            values.append(value)
        return Segment(pages, keys, values)

    def _best_donor(self, tokens: Sequence[int]) -> tuple[SlotState | None, int]:
        wanted = np.asarray(tokens[:-1], dtype=np.int64)  # the last row must run: its logits matter
        best: tuple[SlotState | None, int] = (None, 0)
        for state in [*self._slots.values(), *self._kept.values()]:
            n = min(len(wanted), state.length)
            if n <= best[1]:
                continue
            differs = np.flatnonzero(np.asarray(state.tokens[:n], dtype=np.int64) != wanted[:n])
            shared = int(differs[0]) if differs.size else n
            if shared > best[1]:
                best = (state, shared)
        return best

    def _share(self, donor: SlotState, state: SlotState, shared: int) -> None:
        """Refer to the donor's whole pages; copy the columns of the page in progress."""
        whole = shared - shared % PAGE_TOKENS
        for piece in donor.pieces:
            columns = min(piece.columns, whole - piece.start)
            if columns > 0:
                piece.segment.users += 1
                state.pieces.append(Piece(piece.segment, piece.start, columns))
        state.tokens = donor.tokens[:whole]
        if shared == whole:
            return
        kept = [number for number, other in self._kept.items() if other is donor]
        for number in kept:  # making room must not drop the donor
            del self._kept[number]
        try:
            self._grow(state, 1, least=1)
        except CacheFullError:
            return
        finally:
            for number in kept:
                self._kept[number] = donor
        for group in range(len(self._groups)):
            for name in ("keys", "values"):
                data = _columns(donor, name, group, whole, shared)
                _set_columns(state, name, group, whole, data)
        state.tokens = donor.tokens[:shared]

    def _move(self, state: SlotState, columns: list[int], start: int) -> None:
        low, high = min(columns), max(columns) + 1
        index = torch.tensor([c - low for c in columns], device=self._device)
        for group in range(len(self._groups)):
            for name in ("keys", "values"):
                data = _columns(state, name, group, low, high)
                _set_columns(state, name, group, start, data.index_select(2, index))

    def _drop_oldest(self) -> None:
        number = next(iter(self._kept))
        self._drop(self._kept.pop(number))

    def _drop(self, state: SlotState) -> None:
        for piece in state.pieces:
            piece.segment.users -= 1
            if piece.segment.users == 0:
                self._pages -= piece.segment.pages
        state.pieces = []


def _columns(state: SlotState, name: str, group: int, start: int, stop: int) -> Tensor:
    """All layers' K or V of one group at columns start .. stop - 1: [L, H, stop - start, *]."""
    parts = []
    for piece in state.pieces:
        a, b = max(start, piece.start), min(stop, piece.start + piece.columns)
        if a < b:
            tensor: Tensor = getattr(piece.segment, name)[group]
            parts.append(tensor[:, :, a - piece.start : b - piece.start])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _set_columns(state: SlotState, name: str, group: int, start: int, data: Tensor) -> None:
    stop = start + data.shape[2]
    for piece in state.pieces:
        a, b = max(start, piece.start), min(stop, piece.start + piece.columns)
        if a < b:
            tensor: Tensor = getattr(piece.segment, name)[group]
            tensor[:, :, a - piece.start : b - piece.start] = data[:, :, a - start : b - start]
