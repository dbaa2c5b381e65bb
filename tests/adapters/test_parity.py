"""Wrapped targets against the stock transformers models they wrap."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from dspark.adapters.hf.target import HFTarget
from dspark.errors import CapabilityError
from dspark.target import BatchPart, TokenBatch
from tests.conftest import FAMILIES, VOCAB, random_model, random_target

# Where layers are alike, or alternate, two are enough.
LAYERS = dict.fromkeys(("mistral", "phi3", "qwen3", "qwen3_moe", "gemma2"), 2)
TREE_PARENT = (-1, 0, 0, 1, 1, 2, 3, 5, 5, 7)
DEPTH = (0, 1, 1, 2, 2, 2, 3, 3, 3, 4)


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()


@functools.cache
def stock(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return random_model(family, dtype, layers=LAYERS.get(family))


def wrapped(family: str, dtype: torch.dtype | None = None, *, exact: bool) -> HFTarget:
    return random_target(family, dtype, exact=exact, layers=LAYERS.get(family))


def stock_logits(family: str, ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return _stock_logits(family, tuple(ids), dtype)


@functools.cache
def _stock_logits(family: str, ids: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return stock(family, dtype)(torch.tensor([ids])).logits[0]


def prefill(target: HFTarget, cache: object, ids: list[int], *, chunks: int = 1) -> int:
    slot, shared = cache.open([*ids, 0])
    for chunk in np.array_split(np.asarray(ids[shared:], dtype=np.int64), chunks):
        if len(chunk):
            cache.reserve(slot, len(chunk))
            part = BatchPart.chain(slot, chunk, cache.length(slot), want_last=False)
            target.forward(TokenBatch.build([part]), cache)
            cache.commit(slot, range(len(chunk)))
    return slot


def tree_part(slot: int, ids: list[int], start: int) -> BatchPart:
    return BatchPart(slot, ids, [start + d for d in DEPTH], TREE_PARENT, range(len(ids)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_gives_the_stock_logits(family: str, dtype: torch.dtype) -> None:
    ids = tokens(70, 1)  # past the sliding windows of 20
    # The check of exact mode takes longer than all else, so in bfloat16 three families have it.
    is_exact = dtype == torch.float32 or family in ("llama", "qwen3_moe", "gemma4")
    target = wrapped(family, dtype, exact=is_exact)
    cache = target.new_cache()
    slot, _ = cache.open(ids)
    cache.reserve(slot, len(ids))
    part = BatchPart(slot, ids, range(70), range(-1, 69), range(70))
    logits = target.forward(TokenBatch.build([part]), cache).logits
    expected = stock_logits(family, ids, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        return
    # bf16 rounds at 2^-8, through 4 to 6 layers, against logits of scale 5; in a mixture of
    # experts that may also send a row to another expert, so single rows may differ by more.
    errors = (logits - expected).abs().amax(1)
    assert errors.median() < 0.15
    assert (errors < 0.4).float().mean() > (0.85 if family == "qwen3_moe" else 0.999)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_beside_another_request_gives_the_logits_of_its_paths(
    family: str, exact: bool
) -> None:
    target = wrapped(family, exact=exact)
    first, second, drafted = tokens(41, 2), tokens(7, 3), tokens(len(TREE_PARENT), 4)
    cache = target.new_cache()
    a, b = prefill(target, cache, first, chunks=3), prefill(target, cache, second)
    cache.reserve(a, len(drafted))
    cache.reserve(b, len(drafted))
    batch = TokenBatch.build([tree_part(b, drafted, 7), tree_part(a, drafted, 41)])
    logits = target.forward(batch, cache).logits
    for offset, context in ((0, second), (len(drafted), first)):
        for leaf in sorted(set(range(len(drafted))) - set(TREE_PARENT)):
            path = [leaf]
            while TREE_PARENT[path[0]] >= 0:
                path.insert(0, TREE_PARENT[path[0]])
            alone = stock_logits(family, context + [drafted[i] for i in path])[-len(path) :]
            rows = logits[[offset + row for row in path]]
            torch.testing.assert_close(rows, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_exact_mode_a_row_is_bitwise_independent_of_its_company(family: str) -> None:
    target = wrapped(family, exact=True)
    context, drafted = tokens(250, 5), tokens(len(TREE_PARENT), 6)  # the tree crosses a page
    cache = target.new_cache()
    slot, other = prefill(target, cache, context, chunks=2), prefill(target, cache, tokens(33, 7))
    cache.reserve(slot, len(drafted))
    cache.reserve(other, 1)
    batch = TokenBatch.build(
        [BatchPart.chain(other, [5], 33, want_last=True), tree_part(slot, drafted, 250)]
    )
    tree = target.forward(batch, cache).logits[1:]
    for leaf in (4, 6, 9):
        path = [leaf]
        while TREE_PARENT[path[0]] >= 0:
            path.insert(0, TREE_PARENT[path[0]])
        alone = target.new_cache()
        line = prefill(target, alone, context)
        for step, row in enumerate(path):
            alone.reserve(line, 1)
            part = BatchPart.chain(line, [drafted[row]], 250 + step, want_last=True)
            logits = target.forward(TokenBatch.build([part]), alone).logits[0]
            alone.commit(line, [0])
            assert torch.equal(logits, tree[row]), f"row {row}"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4"])
def test_captured_hidden_states_are_the_stock_ones(family: str) -> None:
    ids = tokens(30, 8)
    target = wrapped(family, exact=True)
    cache = target.new_cache()
    slot, _ = cache.open(ids)
    cache.reserve(slot, len(ids))
    batch = TokenBatch.build([BatchPart.chain(slot, ids, 0, want_last=True)])
    hidden = target.forward(batch, cache, capture=(-1, 0, 1)).hidden
    with torch.no_grad():
        expected = stock(family)(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for layer in (-1, 0, 1):
        torch.testing.assert_close(hidden[layer], expected[layer + 1][0], atol=1e-4, rtol=1e-4)


def test_a_layer_that_does_not_exist_cannot_be_captured() -> None:
    target = random_target(exact=True)
    cache = target.new_cache()
    slot, _ = cache.open([5])
    cache.reserve(slot, 1)
    batch = TokenBatch.build([BatchPart.chain(slot, [5], 0, want_last=True)])
    with pytest.raises(CapabilityError, match=r"layer 5 cannot be captured.*-1 .* to 2, and 3"):
        target.forward(batch, cache, capture=(5,))


def test_a_position_past_the_longest_context_is_refused() -> None:
    target = random_target(exact=True)
    cache = target.new_cache()
    slot, _ = cache.open([5])
    cache.reserve(slot, 1)
    batch = TokenBatch.build([BatchPart(slot, [5], [2048], [-1], [0])])
    with pytest.raises(CapabilityError, match="2048"):
        target.forward(batch, cache)
