"""The part of the exactness check that is about attention over the K/V store.

The end-to-end check (dspark.exactness) runs the real model; attention is checked by itself too,
with the largest tree and in float32: a model in bfloat16 would hide most differences there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dspark.adapters.hf.attention import MAX_EXACT_NODES, QUERY_ROWS, Step, exact_span
from dspark.adapters.hf.store import PAGE_TOKENS, LayerShape, StoreCache
from dspark.target import BatchPart, TokenBatch

if TYPE_CHECKING:
    from dspark.adapters.hf.target import HFTarget

__all__ = ["check_attention", "find_query_rows"]


def find_query_rows(target: HFTarget) -> int | None:
    """Find the fewest query rows with which attention holds, or None if none of QUERY_ROWS does."""
    return next((rows for rows in QUERY_ROWS if check_attention(target, rows)), None)


def check_attention(target: HFTarget, least_rows: int) -> bool:
    """Compare attention of a tree of MAX_EXACT_NODES with that of its paths, bit by bit.

    Args:
        target: A target.
        least_rows: Fewest query rows of a product.

    Returns:
        True if every compared row is bitwise the same for every shape of K/V heads.
    """
    shapes = {(shape.heads, shape.head_dim) for shape in target.kv_layers}
    return all(_check_attention(target, *shape, least_rows) for shape in sorted(shapes))


def _check_attention(target: HFTarget, heads: int, dim: int, least_rows: int) -> bool:
    rng = np.random.default_rng(1)
    device = torch.device(target.info.device)
    shape = LayerShape(layer=0, heads=heads, head_dim=dim)
    cache = StoreCache([shape], dtype=torch.float32, device=device)
    length, rows = PAGE_TOKENS - 9, MAX_EXACT_NODES + 1
    parent = [-1, *(int(rng.integers(max(0, row - 6), row)) for row in range(1, rows))]
    depth = [0] * rows
    for row in range(1, rows):
        depth[row] = depth[parent[row]] + 1

    def random(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size, dtype=np.float32)).to(device)

    context = random(2, heads, length, dim)
    key, value = random(heads, rows, dim), random(heads, rows, dim)
    query = random(target.query_heads, rows, dim)

    def run(slot: int, part: BatchPart, which: list[int], window: int | None) -> torch.Tensor:
        batch = TokenBatch.build([part])
        cache.reserve(slot, len(which))
        cache.begin(batch)
        step = Step.plan(
            batch, cache, exact=True, kv_source=(0,), device=device, least_rows=least_rows
        )
        cache.write(0, cache.state(slot), key[:, which], value[:, which])
        return exact_span(step, 0, 0, query[:, which], dim**-0.5, window, None)

    def start() -> int:
        slot, _ = cache.open([])
        cache.reserve(slot, length + rows)
        cache.begin(TokenBatch.build([BatchPart.chain(slot, [0] * length, 0, want_last=False)]))
        cache.write(0, cache.state(slot), context[0], context[1])
        cache.commit(slot, range(length))
        return slot

    positions = [length + d for d in depth]
    whole = BatchPart(start(), [0] * rows, positions, parent, [])
    for window in (None, 100):
        tree = run(whole.slot, whole, list(range(rows)), window)
        for leaf in (rows - 1, rows - 2, rows // 2):
            path = [leaf]
            while parent[path[0]] >= 0:
                path.insert(0, parent[path[0]])
            line = start()
            for step, row in enumerate(path):
                part = BatchPart.chain(line, [0], length + step, want_last=False)
                alone = run(line, part, [row], window)
                cache.commit(line, [0])
                if not torch.equal(alone[:, 0], tree[:, row]):
                    return False
    return True
