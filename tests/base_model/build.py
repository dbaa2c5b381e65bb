"""Small V4 models for tests, and runs of them through the target's own interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark.base_model.cache import V4Cache
from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import DictExperts
from dspark.base_model.model import V4Model
from dspark.base_model.weights import DictSource
from dspark.target import BatchPart, TokenBatch


def build_model(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, **options: Any
) -> V4Model:
    source = DictSource(weights)
    return V4Model(V4Config.from_dict(config), source, DictExperts(weights), dtype=dtype, **options)


def part_of(
    slot: int, start: int, tokens: Sequence[int], parent: Sequence[int] | None = None
) -> BatchPart:
    """Rows behind `start` committed tokens, all logits wanted; a chain without `parent`."""
    above = list(range(-1, len(tokens) - 1)) if parent is None else list(parent)
    depth: list[int] = []
    for row in above:
        depth.append(0 if row < 0 else depth[row] + 1)
    positions = start + np.asarray(depth)
    return BatchPart(slot, list(tokens), positions, above, range(len(tokens)))


def run(
    model: V4Model,
    cache: V4Cache,
    slot: int,
    tokens: Sequence[int],
    parent: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """Logits [rows, V] of rows that stay uncommitted."""
    cache.reserve(slot, len(tokens))
    part = part_of(slot, cache.length(slot), tokens, parent)
    return model.forward(TokenBatch.build([part]), cache, **options).logits


def feed(
    model: V4Model, cache: V4Cache, slot: int, tokens: Sequence[int], chunks: Sequence[int] = ()
) -> Tensor:
    """Logits [n, V] of tokens run and committed in chunks of these sizes, the last one the rest."""
    done, out = 0, []
    for size in [*chunks, len(tokens)]:
        chunk = tokens[done : done + size]
        if chunk:
            out.append(run(model, cache, slot, chunk))
            cache.commit(slot, range(len(chunk)))
            done += len(chunk)
    return torch.cat(out)


def open_slot(cache: V4Cache) -> int:
    """An empty slot."""
    slot, shared = cache.open([])
    if shared:
        raise ValueError("an empty prompt shares nothing")
    return slot


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number."""
    return float((got - expected).abs().max() / expected.abs().max())
