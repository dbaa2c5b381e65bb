"""Tiny models on both paths, for the tests of the fused one."""

from __future__ import annotations

import functools
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from dspark.adapters.fused.choose import choose_target
from dspark.adapters.fused.target import FusedTarget
from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.adapters.hf.target import HFTarget
from dspark.registry import LoadOptions
from dspark.target import BatchPart, Target, TargetOutput, TokenBatch
from tests.conftest import VOCAB, random_model

FUSED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")

# Where layers are alike, or alternate, two are enough; qwen2's third one has a window.
LAYERS = {family: 2 for family in FUSED_FAMILIES if family != "qwen2"}

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


def choose(model: Any, path: str = "fused", **options: Any) -> Target:
    """A model's target on the path that `choose_target` takes."""
    adapter = adapter_for(model.config.model_type)
    wanted = LoadOptions(name="tiny", path=path, **options)

    def plain() -> HFTarget:
        return wrap_model(model, adapter, wanted)

    return choose_target(model, adapter, wanted, plain)


@functools.cache
def fused_target(family: str, dtype: torch.dtype = torch.float32) -> FusedTarget:
    """A random model of a family on the fused path."""
    target = choose(random_model(family, dtype, layers=LAYERS.get(family)))
    assert isinstance(target, FusedTarget)
    return target


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    """Token ids."""
    return rng.integers(3, VOCAB, count).tolist()


def prefill(target: Target, cache: Any, tokens: list[int], chunks: int = 1) -> int:
    """Open a slot and run its tokens in chunks."""
    slot, shared = cache.open([*tokens, 0])
    for part in np.array_split(np.asarray(tokens[shared:], dtype=np.int64), chunks):
        if len(part):
            cache.reserve(slot, len(part))
            rows = BatchPart.chain(slot, part, cache.length(slot), want_last=False)
            target.forward(TokenBatch.build([rows]), cache)
            cache.commit(slot, range(len(part)))
    return slot


def tree_part(slot: int, tokens: list[int], parent: list[int], length: int) -> BatchPart:
    """A tree behind `length` committed tokens, logits of all its rows wanted."""
    depth: list[int] = []
    for row in parent:
        depth.append(0 if row < 0 else depth[row] + 1)
    return BatchPart(slot, tokens, [length + d for d in depth], parent, range(len(tokens)))


def forward(target: Target, cache: Any, *parts: BatchPart, capture: Any = ()) -> TargetOutput:
    """Reserve and run."""
    for part in parts:
        cache.reserve(part.slot, len(part.token_ids))
    return target.forward(TokenBatch.build(parts), cache, capture=capture)
