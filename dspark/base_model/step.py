"""Which rows of the cache every row of a forward reads and writes, for prefill, decode and trees.

All of it follows from positions and parents, is the same for every layer of one kind, and is worked
out once per forward. A row v at position p, of a slot with n committed tokens, has the context
P(v) = the committed tokens followed by v's ancestors and v itself, and sees (architecture of V4):

- window rows: those of P(v) at positions over p - W;
- entries: (p + 1) div m of them; entry w is the committed one if it closed before n, else it
  belongs to the row of P(v) at the last position of window w, and was pooled from P(v) alone.

So two branches that diverge inside a window own two different entries of the same index. Letters:
N rows, W window, C closing rows, R raw rows of an entry, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dspark.base_model.cache import Lane, SlotState, V4Cache
from dspark.base_model.config import CSA_RATIO
from dspark.base_model.pool import ZERO_ROW, IntArray
from dspark.target import RowSpan, TokenBatch

__all__ = ["LaneStep", "SlotEntries", "Step", "plan_step"]


@dataclass(frozen=True, slots=True)
class SlotEntries:
    """The entries that the rows of one slot choose from.

    Attributes:
        start: First row of the slot.
        stop: One past its last.
        rows: int64 [E], entry rows in the pool: the committed ones by index, then those that this
            forward's rows close, by row; along every path that is by index too.
        committed: How many of them are committed.
        owned: bool [stop - start, E - committed], True where the staged entry belongs to the row
            or to an ancestor of it.
    """

    start: int
    stop: int
    rows: Tensor
    committed: int
    owned: Tensor

    @property
    def run(self) -> slice | None:
        """The committed entries as one slice of the pool, None if they are not in a row."""
        if self.committed == 0:
            return None
        first = int(self.rows[0])
        in_a_row = int(self.rows[self.committed - 1]) - first == self.committed - 1
        return slice(first, first + self.committed) if in_a_row else None


@dataclass(frozen=True, slots=True)
class LaneStep:
    """What layers of one compression rate read and write.

    Attributes:
        raw: int64 [N], where the rows' raw rows go.
        closing: int64 [C], rows of the batch that close a window.
        index: int64 [C], the entry's index w.
        pooled: int64 [C, R], raw rows it is pooled from, by position.
        present: bool [C, R], False for rows before the text began.
        staged: int64 [C], where the entries go.
        seen: int64 [N], entries a row sees.
        entries: int64 [N, E], their rows in the pool (HCA), ZERO_ROW behind the last.
        slots: The entries by slot (CSA).
    """

    raw: Tensor
    closing: Tensor
    index: Tensor
    pooled: Tensor
    present: Tensor
    staged: Tensor
    seen: Tensor
    entries: Tensor
    slots: tuple[SlotEntries, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward's reads and writes on one device.

    Attributes:
        token_ids: int64 [N].
        positions: int64 [N].
        stage: int64 [N], where the window rows go.
        window: int64 [N, W], window rows by position, ZERO_ROW where the text had not begun.
        in_window: bool [N, W], False there.
        lanes: By compression rate.
    """

    token_ids: Tensor
    positions: Tensor
    stage: Tensor
    window: Tensor
    in_window: Tensor
    lanes: dict[int, LaneStep]


class _Paths:
    """Finds the row of P(v) at a position, for the rows v of one slot."""

    def __init__(self, batch: TokenBatch, span: RowSpan, length: int) -> None:
        self.start = span.start
        self.length = length
        self.positions = batch.positions[span.start : span.stop]
        self._paths: IntArray | None = None
        if not span.is_chain:
            self._paths = self._ancestors(batch.parent[span.start : span.stop])

    def _ancestors(self, parent: IntArray) -> IntArray:
        """Row of the path to v at every depth: [rows, depths], -1 beyond v."""
        depth = self.positions - self.length
        paths = np.full((len(parent), int(depth.max()) + 1), -1, dtype=np.int64)
        for row, above in enumerate(parent):
            if above >= 0:
                paths[row] = paths[above - self.start]
            paths[row, depth[row]] = row
        return paths

    def rows_at(self, wanted: IntArray) -> IntArray:
        """Local rows of the slot's part at positions [rows, K], clipped where there is none."""
        depth = wanted - self.length
        if self._paths is None:
            return np.clip(depth, 0, len(self.positions) - 1)
        return np.take_along_axis(self._paths, np.clip(depth, 0, self._paths.shape[1] - 1), axis=1)

    def lies_on(self, rows: Sequence[int]) -> NDArrayBool:
        """Say which rows lie on every row's path: bool [rows of the slot, len(rows)]."""
        ancestors = np.asarray(rows, dtype=np.int64)
        own = np.arange(len(self.positions))[:, None]
        if self._paths is None:
            return ancestors[None] <= own
        depth = self.positions[ancestors] - self.length
        found: NDArrayBool = self._paths[:, depth] == ancestors[None]
        return found


NDArrayBool = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(slots=True)
class _LaneParts:
    """What the slots add to a lane, before it is joined."""

    raw: list[IntArray] = field(default_factory=list)
    closing: list[IntArray] = field(default_factory=list)
    index: list[IntArray] = field(default_factory=list)
    pooled: list[IntArray] = field(default_factory=list)
    present: list[NDArrayBool] = field(default_factory=list)
    staged: list[IntArray] = field(default_factory=list)
    entries: list[IntArray] = field(default_factory=list)
    slots: list[tuple[int, int, IntArray, int, NDArrayBool]] = field(default_factory=list)


def plan_step(batch: TokenBatch, cache: V4Cache, device: torch.device) -> Step:
    """Work out the reads and writes of a forward that `cache.begin` was told of.

    Args:
        batch: The rows.
        cache: The cache.
        device: Where the index tensors are wanted.
    """
    stage, window, valid = [], [], []
    parts = {ratio: _LaneParts() for ratio in cache.lanes}
    for span in batch.spans:
        state = cache.state(span.slot)
        paths = _Paths(batch, span, state.length)
        rows, ok, staged = _window_rows(cache, state, paths)
        stage.append(staged)
        window.append(rows)
        valid.append(ok)
        for ratio, lane in cache.lanes.items():
            _add_lane(parts[ratio], lane, state, span, paths)

    def tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    lanes = {}
    for ratio, part in parts.items():
        lanes[ratio] = LaneStep(
            raw=tensor(np.concatenate(part.raw)),
            closing=tensor(np.concatenate(part.closing)),
            index=tensor(np.concatenate(part.index)),
            pooled=tensor(np.concatenate(part.pooled)),
            present=tensor(np.concatenate(part.present)),
            staged=tensor(np.concatenate(part.staged)),
            seen=tensor((batch.positions + 1) // ratio),
            entries=tensor(_pad_columns(part.entries)),
            slots=tuple(
                SlotEntries(a, b, tensor(rows), committed, tensor(owned))
                for a, b, rows, committed, owned in part.slots
            ),
        )
    return Step(
        token_ids=tensor(batch.token_ids),
        positions=tensor(batch.positions),
        stage=tensor(np.concatenate(stage)),
        window=tensor(np.concatenate(window)),
        in_window=tensor(np.concatenate(valid)),
        lanes=lanes,
    )


def _window_rows(
    cache: V4Cache, state: SlotState, paths: _Paths
) -> tuple[IntArray, NDArrayBool, IntArray]:
    """Window rows [n, W] of a slot's rows, which of them exist, and where new rows go [n]."""
    pool, n = cache.window, len(paths.positions)
    size = pool.page_rows
    wanted = paths.positions[:, None] + np.arange(1 - size, 1)
    staged, ring = pool.rows_of(state.stage, n), pool.rows_of(state.window)
    old = ring[wanted % size]
    rows = np.where(wanted < state.length, old, staged[paths.rows_at(wanted)])
    valid = wanted >= 0
    return np.where(valid, rows, ZERO_ROW), valid, staged


def _add_lane(
    parts: _LaneParts, lane: Lane, state: SlotState, span: RowSpan, paths: _Paths
) -> None:
    of, ratio = state.lanes[lane.ratio], lane.ratio
    pending = state.pending
    closing = np.asarray(pending.closing[ratio] if pending else [], dtype=np.int64)
    raw = lane.raw.rows_of(of.raw_stage, len(paths.positions))
    staged = lane.entries.rows_of(of.entry_stage, len(closing))
    parts.raw.append(raw)
    parts.closing.append(closing + span.start)
    parts.index.append(paths.positions[closing] // ratio)
    parts.staged.append(staged)

    # Of the closing rows' paths only: a slot without one needs no index at all.
    wanted = paths.positions[:, None] + np.arange(1 - lane.reach, 1)
    old = lane.raw.rows_of(of.ring)[wanted % lane.reach]
    rows = np.where(wanted < state.length, old, raw[paths.rows_at(wanted)])
    valid = wanted >= 0
    parts.pooled.append(np.where(valid, rows, ZERO_ROW)[closing])
    parts.present.append(valid[closing])

    committed = lane.entries.rows_of(of.pages, state.length // ratio)
    if ratio == CSA_RATIO:
        known = np.concatenate((committed, staged))
        parts.slots.append(
            (span.start, span.stop, known, len(committed), paths.lies_on(closing.tolist()))
        )
        parts.entries.append(np.zeros((len(raw), 0), dtype=np.int64))
    else:
        parts.entries.append(_entry_rows(paths, ratio, committed, closing, staged))


def _entry_rows(
    paths: _Paths, ratio: int, committed: IntArray, closing: IntArray, staged: IntArray
) -> IntArray:
    """Entry rows [n, E] that every row sees, by index, ZERO_ROW behind its last."""
    seen = (paths.positions + 1) // ratio
    index = np.arange(int(seen.max()))
    owner = paths.rows_at(np.broadcast_to(index * ratio + ratio - 1, (len(seen), len(index))))
    ordinal = np.zeros(len(seen), dtype=np.int64)
    ordinal[closing] = np.arange(len(closing))
    fresh = staged[ordinal[owner]] if len(staged) else np.zeros_like(owner)
    old = np.concatenate((committed, np.zeros(len(index), dtype=np.int64)))[: len(index)]
    rows = np.where(index < len(committed), old, fresh)
    return np.where(index < seen[:, None], rows, ZERO_ROW)


def _pad_columns(parts: Sequence[IntArray]) -> IntArray:
    width = max((part.shape[1] for part in parts), default=0)
    padded = [
        np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=ZERO_ROW)
        for part in parts
    ]
    return np.concatenate(padded)
