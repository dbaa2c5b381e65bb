"""Attention of the ragged batch over the K/V store, as transformers attention functions.

`exact` sums in an order that depends on positions alone, so a row's result is bitwise the same
whichever rows ride along, however the context was chunked, and in whichever branch of a tree the
row stands:

- Scores are one product over the head size per (row, column); no order to get wrong.
- The softmax is taken in float32 against the row's own maximum, which is exact.
- Numerator and denominator come out of one product P @ [V, 1], summed block by block of positions.
  Within a block the product adds its columns one after another, so a masked column, an exact zero,
  changes nothing wherever it stands: a node's path gives the same sum as the same tokens side by
  side in plain decoding. Blocks are added in order of position.

Both claims about products are properties of the machine's kernels; the probe at load checks them
(exact.py). `fast` is torch's scaled_dot_product_attention, span by span.

Letters: N rows, S spans, H heads, K K/V heads, g = H / K, n rows of a span, C columns, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspark.adapters.hf.store import PAGE_TOKENS, SUM_COLUMNS, SlotState, StoreCache
from dspark.target import RowSpan, TokenBatch

__all__ = [
    "ATTENTION_NAME",
    "MAX_EXACT_NODES",
    "QUERY_ROWS",
    "Span",
    "Step",
    "attention_forward",
    "exact_span",
    "no_mask",
]

ATTENTION_NAME = "dspark"
"""Name under which the functions are registered with transformers."""

_COLUMN_STEP = 64
"""In exact mode column counts are rounded up to this: kernels treat the columns that are left over
after whole vectors, and products of very few columns, in ways of their own."""

_BLOCK = 128
"""Positions that one product sums; it divides PAGE_TOKENS. A product adds its columns one after
another only up to some number of them, one block of the kernel: 384 were seen with oneMKL on Intel
CPUs, 192 on an AMD one. A block, a tree and the anchor must fit."""

MAX_EXACT_NODES = 64
"""Drafted nodes per request that exact mode is checked for."""

QUERY_ROWS = (8, 16, 32)
"""Fewest rows (heads of a group times tokens) of an attention product in exact mode: the probe
takes the first that holds. With few rows kernels split the sum over the head size in other ways; a
head size of 256 was seen to need 16."""


@dataclass(eq=False, slots=True)
class Span:
    """One slot's rows in a forward.

    Attributes:
        state: The slot's memory.
        start: First row of the batch.
        stop: One past the last row.
        length: Committed context, L.
        columns: Columns of the store that its rows may see, L + n.
        positions: int64 [n].
        visible: bool [n, n], which of the span's own rows a row sees; None for a chain.
    """

    state: SlotState
    start: int
    stop: int
    length: int
    columns: int
    positions: np.ndarray[Any, np.dtype[np.int64]]
    visible: np.ndarray[Any, np.dtype[np.bool_]] | None

    @property
    def rows(self) -> int:
        """Rows of the span, n."""
        return self.stop - self.start

    def column_positions(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Position of every column, int64 [L + n]."""
        return np.concatenate([np.arange(self.length), self.positions])


@dataclass(eq=False, slots=True)
class Step:
    """Everything the attention functions need of one forward.

    Attributes:
        cache: The K/V store.
        spans: Its spans.
        exact: Use the exact form.
        kv_source: Layer whose K/V a layer reads (itself unless layers share K/V).
        device: Where masks are made.
        least_rows: Fewest query rows of a product in exact mode.
    """

    cache: StoreCache
    spans: list[Span]
    exact: bool
    kv_source: tuple[int, ...]
    device: torch.device
    least_rows: int
    _hidden: dict[tuple[int, int | None], tuple[int, Tensor | None]] = field(default_factory=dict)
    _tails: dict[int, list[Tensor | None]] = field(default_factory=dict)
    _queries: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @staticmethod
    def plan(
        batch: TokenBatch,
        cache: StoreCache,
        *,
        exact: bool,
        kv_source: tuple[int, ...],
        device: torch.device,
        least_rows: int = QUERY_ROWS[0],
    ) -> Step:
        """Lay out a forward."""
        spans = [_plan_span(batch, span, cache) for span in batch.spans]
        return Step(cache, spans, exact, kv_source, device, least_rows)

    def hidden(self, index: int, window: int | None) -> tuple[int, Tensor | None]:
        """First column a span needs, and which of the columns from there its rows must not see.

        Args:
            index: Span index.
            window: Sliding window in tokens, or None.

        Returns:
            (first column, bool [n, C] on the device with True for hidden, or None for no mask).
        """
        key = (index, window)
        if key not in self._hidden:
            self._hidden[key] = self._make_hidden(self.spans[index], window)
        return self._hidden[key]

    def _make_hidden(self, span: Span, window: int | None) -> tuple[int, Tensor | None]:
        first, oldest = 0, 0
        if window is not None:
            oldest = max(0, int(span.positions.min()) - window + 1)
            first = min(oldest, span.length) // PAGE_TOKENS * PAGE_TOKENS
        end = self.padded_columns(span) if self.exact else span.columns
        if span.rows == 1 and end == span.columns and oldest <= first:
            return first, None  # a plain step sees every column
        columns = np.full(end - first, np.iinfo(np.int64).max)
        columns[: span.columns - first] = span.column_positions()[first:]
        own = span.length - first
        rows = span.positions[:, None]
        if span.visible is None:
            hidden = columns[None, :] > rows
        else:
            hidden = np.ones((span.rows, end - first), dtype=np.bool_)
            hidden[:, :own] = False
            hidden[:, own : span.columns - first] = ~span.visible
        if window is not None:
            hidden |= columns[None, :] <= rows - window
        if not hidden.any():
            return first, None
        return first, torch.from_numpy(hidden).to(self.device)

    def padded_columns(self, span: Span) -> int:
        """Columns a span's products run over: a multiple of _COLUMN_STEP within its capacity."""
        return min(-(-span.columns // _COLUMN_STEP) * _COLUMN_STEP, span.state.capacity)

    def query_buffer(self, heads: int, rows: int, like: Tensor) -> Tensor:
        """Zeros [heads, rows, d] that every layer of this forward may write its queries into.

        Rows beyond a span's own are never written, so they stay 0.
        """
        key = (heads, rows, like.shape[-1])
        if key not in self._queries:
            shape = (heads, max(rows, self.least_rows), like.shape[-1])
            self._queries[key] = torch.zeros(shape, dtype=self.cache.dtype, device=self.device)
        return self._queries[key]

    def tail_masks(self, index: int) -> list[Tensor | None]:
        """Split of a tree's tail columns into blocks of positions.

        Args:
            index: Span index.

        Returns:
            One entry per block of positions that the tail touches: float32 [tail columns] with 1
            for its columns, or a single None if the tail lies in one block.
        """
        if index not in self._tails:
            span = self.spans[index]
            start = span.length // _BLOCK * _BLOCK
            blocks = span.column_positions()[start:] // _BLOCK
            end = self.padded_columns(span)
            if span.visible is None or blocks[0] == blocks.max():
                self._tails[index] = [None]
            else:
                masks: list[Tensor | None] = []
                for block in range(int(blocks[0]), int(blocks.max()) + 1):
                    mask = np.zeros(end - start, dtype=np.float32)
                    mask[: len(blocks)] = blocks == block
                    masks.append(torch.from_numpy(mask).to(self.device))
                self._tails[index] = masks
        return self._tails[index]


def _plan_span(batch: TokenBatch, span: RowSpan, cache: StoreCache) -> Span:
    state = cache.state(span.slot)
    n = span.stop - span.start
    visible = None
    if not span.is_chain:
        parent = batch.parent[span.start : span.stop] - span.start
        visible = np.zeros((n, n), dtype=np.bool_)
        for row in range(n):
            if parent[row] >= 0:
                visible[row] = visible[parent[row]]
            visible[row, row] = True
    return Span(
        state=state,
        start=span.start,
        stop=span.stop,
        length=state.length,
        columns=state.length + n,
        positions=batch.positions[span.start : span.stop],
        visible=visible,
    )


def no_mask(*args: object, **kwargs: object) -> None:
    """Mask function for transformers: our attention makes its own masks."""


def attention_forward(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dspark_step: Step | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention function for transformers' AttentionInterface.

    Args:
        module: The attention module; its `layer_idx` says which layer this is.
        query: [1, H, N, d], rotated.
        key: [1, K, N, d], rotated.
        value: [1, K, N, d].
        attention_mask: Ignored.
        scaling: Factor of the scores; 1 / sqrt(d) if None.
        sliding_window: Tokens a row sees, itself included, or None.
        softcap: Scores become softcap * tanh(score / softcap).
        dspark_step: The forward's plan.
        **kwargs: What other attention functions take.

    Returns:
        ([1, N, H, d], None).

    Raises:
        TypeError: If the model did not pass `dspark_step` on to its attention.
    """
    if dspark_step is None:
        raise TypeError("the model did not pass dspark_step on to its attention function")
    step, layer = dspark_step, int(module.layer_idx)  # type: ignore[arg-type]
    source = step.kv_source[layer]
    if source == layer:
        for span in step.spans:
            rows = slice(span.start, span.stop)
            step.cache.write(layer, span.state, key[0, :, rows], value[0, :, rows])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    run = exact_span if step.exact else _fast_span
    out = query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3])
    for index, span in enumerate(step.spans):
        q = query[0, :, span.start : span.stop]  # [H, n, d]
        result = run(step, index, source, q, scale, sliding_window, softcap)
        out[0, span.start : span.stop] = result.transpose(0, 1)
    return out, None


def exact_span(
    step: Step,
    index: int,
    source: int,
    q: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Exact attention of one span: [H, n, d] -> [H, n, d]."""
    span = step.spans[index]
    first, hidden = step.hidden(index, window)
    end = step.padded_columns(span)
    keys, values = step.cache.read(source, span.state, first, end)
    kv_heads, dim = keys.shape[0], keys.shape[2]
    n, group = span.rows, q.shape[0] // kv_heads
    rows = step.query_buffer(kv_heads, group * n, q)
    # Filled by a copy, then scaled in the store's dtype, so that bfloat16 rounds only once.
    rows[:, : group * n].view(kv_heads, group, n, dim).copy_(q.view(kv_heads, group, n, dim))
    rows.mul_(scale)
    scores = torch.bmm(rows, keys.transpose(1, 2))  # [K, gn, C]
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        real = scores[:, : group * n].view(kv_heads, group, n, -1)
        real.masked_fill_(hidden, float("-inf"))
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    sums = _sum_blocks(step, index, scores, values, first)
    result = sums[..., :dim] / sums[..., dim : dim + 1]
    return result[:, : group * n].reshape(kv_heads * group, n, dim).to(q.dtype)


def _sum_blocks(step: Step, index: int, weights: Tensor, values: Tensor, first: int) -> Tensor:
    """Sum weights @ values block by block of positions: [K, gn, d + SUM_COLUMNS]."""
    span = step.spans[index]
    columns = weights.shape[2]
    tail = span.length // _BLOCK * _BLOCK - first
    if span.visible is None:
        tail = columns
    if columns <= _BLOCK and (tail == columns or step.tail_masks(index) == [None]):
        return torch.bmm(weights, values)
    total = weights.new_zeros(*weights.shape[:2], values.shape[2])
    for a in range(0, tail, _BLOCK):
        b = min(a + _BLOCK, columns)
        total.baddbmm_(weights[:, :, a:b], values[:, a:b])
    if tail < columns:
        for mask in step.tail_masks(index):
            part = weights[:, :, tail:]
            total.baddbmm_(part if mask is None else part * mask, values[:, tail:])
    return total


def _fast_span(
    step: Step,
    index: int,
    source: int,
    q: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one span by torch's own kernels: [H, n, d] -> [H, n, d]."""
    span = step.spans[index]
    first, hidden = step.hidden(index, window)
    keys, values = step.cache.read(source, span.state, first, span.columns)
    values = values[..., : values.shape[2] - SUM_COLUMNS]
    q = q.to(keys.dtype)
    if softcap is None:
        mask = None if hidden is None else ~hidden
        result = nn.functional.scaled_dot_product_attention(
            q[None], keys[None], values[None], attn_mask=mask, scale=scale, enable_gqa=True
        )[0]
        return result.to(q.dtype)
    group = q.shape[0] // keys.shape[0]
    rows = (q * scale).view(keys.shape[0], group, span.rows, -1)
    scores = torch.matmul(rows, keys[:, None].transpose(2, 3)).float()
    scores = softcap * torch.tanh(scores / softcap)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    result = torch.matmul(scores.softmax(-1).to(values.dtype), values[:, None])
    return result.reshape(q.shape).to(q.dtype)
