"""The cache of a V4 target: window rows, compressed entries, raw rows of unfinished windows.

Per request and layer it holds (W sliding window, m compression rate, n committed tokens):

- a ring of W rows of keys (= values) of the last positions;
- entries, one per closed window of m positions, and the indexer's key beside a CSA entry;
- a ring of raw projected rows, from which entries that are still to close are pooled: the last
  m - 1 positions for HCA, the last 2m - 1 for CSA, whose windows overlap.

Rows of a forward are written to staging rows, never into the rings; entries that they close are
staged too, each owned by the row that closed it. `commit` moves what lies on the accepted path and
nothing else, so rejected rows leave no trace, whatever they overwrote or closed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dspark.base_model.config import CSA_RATIO, V4Config
from dspark.base_model.pool import IntArray, Pools, RowPool, Want
from dspark.cache import CacheUsage
from dspark.errors import ShapeError
from dspark.target import RowSpan, TokenBatch

__all__ = ["Lane", "Pending", "SlotState", "V4Cache"]

_ENTRY_PAGE = 64
"""Entries of a page."""

_PAGE_TOKENS = 256
"""Tokens that usage figures call a page."""

_STAGED_ROWS = 64
"""Rows a slot keeps staging room for between rounds: a large tree."""

_CHUNK_ROWS = 512
"""Rows that a forward is expected to bring for a slot at the most; more are taken as they come."""

_KEPT_SLOTS = 4
"""Released requests whose state stays for a longer prompt that starts alike."""


@dataclass(frozen=True, slots=True)
class Lane:
    """What the layers of one compression rate keep.

    Attributes:
        ratio: m.
        reach: Raw rows an entry is pooled from: m for HCA, 2m for CSA.
        entries: Entries; parts "entry" [c] and, for CSA, "key" [index_head_dim].
        raw: Raw rows, pages of `reach` rows; parts "entry" and, for CSA, "key".
    """

    ratio: int
    reach: int
    entries: RowPool
    raw: RowPool


@dataclass(eq=False, slots=True)
class LaneState:
    """A slot's part of a lane.

    Attributes:
        ring: The page of raw rows; position p lies at row p mod reach.
        pages: Pages of committed entries.
        raw_stage: Pages for raw rows of a forward.
        entry_stage: Pages for entries that a forward closes.
    """

    ring: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    raw_stage: list[int] = field(default_factory=list)
    entry_stage: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pending:
    """Rows of a slot's last forward.

    Attributes:
        tokens: Token ids.
        parent: Parent row within the slot's part, -1 after the committed context.
        closing: By ratio: the rows that close a window, ascending.
    """

    tokens: list[int]
    parent: list[int]
    closing: dict[int, list[int]]


@dataclass(eq=False, slots=True)
class SlotState:
    """One request's memory.

    Attributes:
        tokens: Committed token ids.
        window: The page of the window ring; position p lies at row p mod W.
        stage: Pages for window rows of a forward.
        lanes: By ratio.
        room: Committed tokens and rows that entries were reserved for.
        pending: Rows of the last forward, or None.
    """

    window: list[int]
    lanes: dict[int, LaneState]
    tokens: list[int] = field(default_factory=list)
    stage: list[int] = field(default_factory=list)
    room: int = 0
    pending: Pending | None = None

    @property
    def length(self) -> int:
        """Committed tokens."""
        return len(self.tokens)


class V4Cache:
    """Cache (dspark.cache) of a V4 target.

    Args:
        config: The model.
        devices: The layers it is for, each with its device.
        dtype: Element type of rows and entries.
        wide: Element type of raw rows.
        memory_limit: Bytes of rows that may be allocated, or None. While a pool grows, one part of
            it exists twice for a moment.
    """

    def __init__(
        self,
        config: V4Config,
        *,
        devices: Mapping[int, torch.device],
        dtype: torch.dtype,
        wide: torch.dtype,
        memory_limit: int | None = None,
    ) -> None:
        self.config = config
        self._limit = memory_limit
        self._slots: dict[int, SlotState] = {}
        self._kept: dict[int, SlotState] = {}  # insertion order is age
        self._next_slot = 0
        self.window = RowPool(
            devices,
            widths={"row": config.head_dim},
            page_rows=config.sliding_window,
            dtype=dtype,
        )
        self.lanes = {
            ratio: _make_lane(
                config,
                ratio,
                {i: d for i, d in devices.items() if config.ratio(i) == ratio},
                (dtype, wide),
            )
            for ratio in sorted({config.ratio(layer) for layer in devices} - {0})
        }
        lanes = self.lanes.values()
        self._pools = Pools(
            [self.window, *(pool for lane in lanes for pool in (lane.entries, lane.raw))],
            limit=memory_limit,
        )

    # -- the Cache protocol -------------------------------------------------------------------

    def open(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Open a slot; see `dspark.cache.Cache.open`.

        A state can be taken over only whole: of a request whose committed tokens all begin the new
        prompt (a chat's next turn). An earlier point of it is gone from the rings.
        """
        donor = self._best_donor(tokens)
        state = self._new_state()
        wanted: list[Want] = [(self.window, state.window, 1)]
        for ratio, lane in self.lanes.items():
            of = state.lanes[ratio]
            wanted.append((lane.raw, of.ring, 1))
            if donor is not None and donor.length // ratio % lane.entries.page_rows:
                wanted.append((lane.entries, of.pages, 1))  # a page in progress is copied
        self._take(wanted, spared=donor)
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        self._slots[slot] = state
        if donor is not None:
            self._copy(donor, state)
        return slot, state.length

    def reserve(self, slot: int, rows: int) -> None:
        """Make room; see `dspark.cache.Cache.reserve`."""
        state = self._slots[slot]
        self._take([item for item in self._missing(state, rows) if item[2] > 0])
        state.room = max(state.room, state.length + rows)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep these rows; see `dspark.cache.Cache.commit`."""
        state = self._slots[slot]
        pending = state.pending
        if pending is None:
            raise ShapeError(f"slot {slot} has no rows to commit: run a forward first.")
        before = -1
        for row in path:
            if not 0 <= row < len(pending.tokens) or pending.parent[row] != before:
                raise ShapeError(
                    f"{list(path)} is not a path from the committed context through the "
                    f"{len(pending.tokens)} rows of slot {slot}."
                )
            before = row
        rows = np.asarray(path, dtype=np.int64)
        _into_ring(self.window, state.stage, state.window, rows, state.length)
        for ratio, lane in self.lanes.items():
            _commit_lane(lane, state.lanes[ratio], rows, pending.closing[ratio], state.length)
        state.tokens.extend(pending.tokens[row] for row in path)
        state.pending = None
        # What admission promised stays, where others could take it.
        promised = 0 if self._limit is None else min(state.room - state.length, _CHUNK_ROWS)
        self._shrink(state, rows=max(_STAGED_ROWS, promised))

    def length(self, slot: int) -> int:
        """Committed tokens of the slot."""
        return self._slots[slot].length

    def release(self, slot: int) -> None:
        """Close the slot; its state stays for a while for a prompt that goes on from it."""
        state = self._slots.pop(slot)
        state.pending = None
        self._shrink(state, rows=0)
        if state.length == 0:
            self._drop(state)
            return
        self._kept[slot] = state
        while len(self._kept) > _KEPT_SLOTS:
            self._drop(self._kept.pop(next(iter(self._kept))))

    def scrub(self, slot: int) -> None:
        """Nothing to do: a row that was not committed is never read (`pool.ZERO_ROW`)."""

    def forget_kept(self) -> None:
        """Give back the memory of released requests, and what lies idle."""
        for state in self._kept.values():
            self._drop(state)
        self._kept.clear()
        self._pools.compact(self._lists)

    def usage(self) -> CacheUsage:
        """Memory in use."""
        return CacheUsage(
            pages=self._pools.pages_used,
            page_tokens=_PAGE_TOKENS,
            bytes=self._pools.bytes_held,
            limit=self._limit,
            slots=len(self._slots),
        )

    def request_bytes(self, rows: int) -> int:
        """Bytes that a slot takes at the most; see `dspark.cache.PricesRequests`."""
        rings = [self.window, *(lane.raw for lane in self.lanes.values())]
        total = sum(pool.page_bytes for pool in rings)
        for pool, _, pages in self._missing(self._new_state(), rows):
            total += pool.page_bytes * max(0, pages)
        return total

    def page_bytes(self) -> int:
        """Bytes that 256 more tokens of a long context take."""
        return sum(
            -(-_PAGE_TOKENS // lane.ratio) * lane.entries.row_bytes for lane in self.lanes.values()
        )

    # -- what the target uses -----------------------------------------------------------------

    def state(self, slot: int) -> SlotState:
        """The memory of a slot."""
        return self._slots[slot]

    def state_bytes(self, slot: int) -> int:
        """Bytes of a slot's committed state: rows that hold something, not pages."""
        n = self._slots[slot].length
        total = min(n, self.config.sliding_window) * self.window.row_bytes
        for lane in self.lanes.values():
            total += n // lane.ratio * lane.entries.row_bytes
            total += min(n, lane.reach - 1) * lane.raw.row_bytes
        return total

    def begin(self, batch: TokenBatch) -> None:
        """Note the rows that a forward is about to write.

        Raises:
            ShapeError: If a slot was not reserved for that many rows.
        """
        for span in batch.spans:
            state = self._slots[span.slot]
            count = span.stop - span.start
            if state.length + count > state.room:
                raise ShapeError(f"slot {span.slot} has no room for {count} rows: reserve them.")
            state.pending = self._pending(batch, span)
            self._stretch(self.window, state.stage, count)
            for ratio, lane in self.lanes.items():
                of = state.lanes[ratio]
                self._stretch(lane.raw, of.raw_stage, count)
                self._stretch(lane.entries, of.entry_stage, len(state.pending.closing[ratio]))

    # -- inside -------------------------------------------------------------------------------

    def _pending(self, batch: TokenBatch, span: RowSpan) -> Pending:
        rows = slice(span.start, span.stop)
        parent = batch.parent[rows]
        after = batch.positions[rows] + 1
        return Pending(
            tokens=batch.token_ids[rows].tolist(),
            parent=np.where(parent < 0, -1, parent - span.start).tolist(),
            closing={m: np.flatnonzero(after % m == 0).tolist() for m in self.lanes},
        )

    def _new_state(self) -> SlotState:
        return SlotState([], {ratio: LaneState() for ratio in self.lanes})

    def _take(self, wanted: Sequence[Want], spared: SlotState | None = None) -> None:
        """Put pages into lists; released requests but `spared` make room for it."""

        def drop() -> bool:
            oldest = next((n for n, state in self._kept.items() if state is not spared), None)
            if oldest is not None:
                self._drop(self._kept.pop(oldest))
            return oldest is not None

        self._pools.take(wanted, self._lists, drop)

    def _lists(self) -> Iterator[tuple[RowPool, list[int]]]:
        """Every list of pages there is, with its pool."""
        for state in [*self._slots.values(), *self._kept.values()]:
            yield self.window, state.window
            yield self.window, state.stage
            for ratio, lane in self.lanes.items():
                of = state.lanes[ratio]
                yield lane.entries, of.pages
                yield lane.entries, of.entry_stage
                yield lane.raw, of.ring
                yield lane.raw, of.raw_stage

    def _stretch(self, pool: RowPool, pages: list[int], rows: int) -> None:
        """Add pages to a list until it has room for `rows` rows.

        Only a chunk beyond `_CHUNK_ROWS` lacks any, and takes them whatever the limit is.
        """
        missing = pool.pages_for(rows) - len(pages)
        if missing > 0:
            pages.extend(pool.allocate(missing, spare=None if self._limit is None else 0))

    def _missing(self, state: SlotState, rows: int) -> Iterator[Want]:
        """Pools, page lists, and how many pages these lack for `rows` more rows."""
        staged = min(rows, _CHUNK_ROWS)  # of one forward; a request's rows come in many
        yield self.window, state.stage, self.window.pages_for(staged) - len(state.stage)
        for ratio, lane in self.lanes.items():
            of, entries = state.lanes[ratio], lane.entries
            committed = entries.pages_for((state.length + rows) // ratio)
            closed = entries.pages_for(staged // ratio + 1)
            yield lane.raw, of.raw_stage, lane.raw.pages_for(staged) - len(of.raw_stage)
            yield entries, of.pages, committed - len(of.pages)
            yield entries, of.entry_stage, closed - len(of.entry_stage)

    def _shrink(self, state: SlotState, rows: int) -> None:
        """Give staging rows back down to `rows`."""
        _cut(self.window, state.stage, rows)
        for ratio, lane in self.lanes.items():
            of = state.lanes[ratio]
            _cut(lane.raw, of.raw_stage, rows)
            _cut(lane.entries, of.entry_stage, rows)

    def _best_donor(self, tokens: Sequence[int]) -> SlotState | None:
        wanted = list(tokens)
        fitting = [
            state
            for state in [*self._slots.values(), *self._kept.values()]
            if 0 < state.length < len(wanted) and wanted[: state.length] == state.tokens
        ]
        return max(fitting, key=lambda state: state.length, default=None)

    def _copy(self, donor: SlotState, state: SlotState) -> None:
        """Take over a donor's state: share its full entry pages, copy what will still change."""
        self.window.move(self.window.rows_of(donor.window), self.window.rows_of(state.window))
        for ratio, lane in self.lanes.items():
            given, of, entries = donor.lanes[ratio], state.lanes[ratio], lane.entries
            lane.raw.move(lane.raw.rows_of(given.ring), lane.raw.rows_of(of.ring))
            full = donor.length // ratio // entries.page_rows
            own = of.pages  # for the entries after the full pages, if there are any
            entries.share(given.pages[:full])
            if own:
                entries.move(entries.rows_of(given.pages[full : full + 1]), entries.rows_of(own))
            of.pages = [*given.pages[:full], *own]
        state.tokens = list(donor.tokens)

    def _drop(self, state: SlotState) -> None:
        self.window.release([*state.window, *state.stage])
        for ratio, lane in self.lanes.items():
            of = state.lanes[ratio]
            lane.raw.release([*of.ring, *of.raw_stage])
            lane.entries.release([*of.pages, *of.entry_stage])


def _make_lane(
    config: V4Config,
    ratio: int,
    layers: Mapping[int, torch.device],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Lane:
    """A lane's pools; `dtypes` are those of entries and of raw rows."""
    c, d = config.head_dim, config.index_head_dim
    if ratio == CSA_RATIO:
        # A raw row holds value and gate, each for the window it is in and for the next one.
        reach, widths, raw = 2 * ratio, {"entry": c, "key": d}, {"entry": 4 * c, "key": 4 * d}
    else:
        reach, widths, raw = ratio, {"entry": c}, {"entry": 2 * c}
    return Lane(
        ratio=ratio,
        reach=reach,
        entries=RowPool(layers, widths=widths, page_rows=_ENTRY_PAGE, dtype=dtypes[0]),
        raw=RowPool(layers, widths=raw, page_rows=reach, dtype=dtypes[1]),
    )


def _cut(pool: RowPool, pages: list[int], rows: int) -> None:
    """Give back the pages of a list that `rows` rows do not need."""
    kept = pool.pages_for(rows)
    pool.release(pages[kept:])
    del pages[kept:]


def _into_ring(
    pool: RowPool, stage: list[int], ring: list[int], rows: IntArray, length: int
) -> None:
    """Move staged rows on the path into a ring of one page; only the last ones stay."""
    kept = rows[-pool.page_rows :]
    positions = length + len(rows) - len(kept) + np.arange(len(kept))
    pool.move(pool.rows_of(stage)[kept], pool.rows_of(ring)[positions % pool.page_rows])


def _commit_lane(
    lane: Lane, state: LaneState, rows: IntArray, closing: list[int], length: int
) -> None:
    _into_ring(lane.raw, state.raw_stage, state.ring, rows, length)
    ordinal = {row: index for index, row in enumerate(closing)}
    owned = [ordinal[row] for row in rows.tolist() if row in ordinal]
    if owned:
        pool, first = lane.entries, length // lane.ratio
        source = pool.rows_of(state.entry_stage)[np.asarray(owned)]
        pool.move(source, pool.rows_of(state.pages)[first : first + len(owned)])
