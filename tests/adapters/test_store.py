"""The K/V store: commit, rollback, growth, sharing, limits."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dspark.adapters.hf.store import PAGE_TOKENS, LayerShape, StoreCache
from dspark.cache import Cache, CacheFullError
from dspark.errors import ShapeError
from dspark.target import BatchPart, TokenBatch
from tests.conftest import VOCAB, random_target

FAMILY = "gemma3"  # sliding and global layers


def fresh_logits(tokens: list[int]) -> torch.Tensor:
    target = random_target(FAMILY, exact=True, layers=2)
    cache = target.new_cache()
    slot, _ = cache.open(tokens)
    cache.reserve(slot, len(tokens))
    part = BatchPart.chain(slot, tokens, 0, want_last=True)
    return target.forward(TokenBatch.build([part]), cache).logits[0]


@st.composite
def random_parents(draw: st.DrawFn) -> list[int]:
    count = draw(st.integers(1, 12))
    return [-1, *(draw(st.integers(0, row - 1)) for row in range(1, count))]


class CacheMachine(RuleBasedStateMachine):
    """Random trees and accepted paths in two slots: logits equal a fresh prefill's, bit by bit."""

    def __init__(self) -> None:
        super().__init__()
        self.target = random_target(FAMILY, exact=True, layers=2)
        self.cache = self.target.new_cache()
        self.context: dict[int, list[int]] = {}
        self.random = np.random.default_rng(0)

    @initialize(seed=st.integers(0, 2**32 - 1), length=st.sampled_from([1, 5, 19, 40, 252, 255]))
    def start(self, seed: int, length: int) -> None:
        self.random = np.random.default_rng(seed)
        self.open_slot(length)
        self.open_slot(3)

    def open_slot(self, length: int) -> None:
        tokens = self.random.integers(3, VOCAB, length).tolist()
        slot, shared = self.cache.open(tokens)
        self.cache.reserve(slot, length - shared)
        part = BatchPart.chain(slot, tokens[shared:], shared, want_last=False)
        self.target.forward(TokenBatch.build([part]), self.cache)
        self.cache.commit(slot, range(length - shared))
        self.context[slot] = tokens

    @rule(parents=random_parents(), which=st.integers(0, 1), take=st.integers(0, 12))
    def round(self, parents: list[int], which: int, take: int) -> None:
        slot = list(self.context)[which]
        depth = [0] * len(parents)
        for row, parent in enumerate(parents):
            depth[row] = 0 if parent < 0 else depth[parent] + 1
        tokens = self.random.integers(3, VOCAB, len(parents)).tolist()
        start = len(self.context[slot])
        self.cache.reserve(slot, len(parents))
        part = BatchPart(slot, tokens, [start + d for d in depth], parents, range(len(parents)))
        logits = self.target.forward(TokenBatch.build([part]), self.cache).logits
        path = [min(take, len(parents) - 1)]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        self.cache.commit(slot, path)
        self.context[slot] += [tokens[row] for row in path]
        assert torch.equal(logits[path[-1]], fresh_logits(self.context[slot]))

    @rule(cut=st.integers(1, 300))
    def share(self, cut: int) -> None:
        """A request that starts like another takes its rows over and goes on by itself."""
        donor = next(iter(self.context.values()))
        tokens = [*donor[:cut], *self.random.integers(3, VOCAB, 2).tolist()]
        slot, shared = self.cache.open(tokens)
        assert shared >= min(cut, len(donor)) - PAGE_TOKENS
        self.cache.reserve(slot, len(tokens) - shared)
        part = BatchPart.chain(slot, tokens[shared:], shared, want_last=True)
        logits = self.target.forward(TokenBatch.build([part]), self.cache).logits[0]
        self.cache.commit(slot, range(len(tokens) - shared))
        assert torch.equal(logits, fresh_logits(tokens))
        self.cache.release(slot)

    @precondition(lambda self: len(self.context) == 2)
    @invariant()
    def lengths_are_what_was_committed(self) -> None:
        for slot, tokens in self.context.items():
            assert self.cache.length(slot) == len(tokens)


CacheMachine.TestCase.settings = settings(
    max_examples=6,
    stateful_step_count=8,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
test_any_sequence_of_trees_and_paths_leaves_what_plain_decoding_leaves = CacheMachine.TestCase


def small_cache(limit: int | None = None) -> StoreCache:
    shapes = [LayerShape(layer=0, heads=1, head_dim=8), LayerShape(layer=1, heads=1, head_dim=8)]
    return StoreCache(shapes, dtype=torch.float32, device=torch.device("cpu"), memory_limit=limit)


def write_rows(cache: StoreCache, slot: int, tokens: list[int]) -> None:
    cache.reserve(slot, len(tokens))
    start = cache.length(slot)
    batch = TokenBatch.build([BatchPart.chain(slot, tokens, start, want_last=False)])
    cache.begin(batch)
    rows = torch.tensor(tokens, dtype=torch.float32)[None, :, None].expand(1, -1, 8)
    for layer in (0, 1):
        cache.write(layer, cache.state(slot), rows, rows)
    cache.commit(slot, range(len(tokens)))


def test_it_is_a_cache() -> None:
    assert isinstance(small_cache(), Cache)


def test_pages_come_back_when_slots_are_released() -> None:
    cache = small_cache()
    slots = []
    for seed in range(8):
        slot, _ = cache.open([seed])
        write_rows(cache, slot, [seed] * 300)
        slots.append(slot)
    assert cache.usage().pages == 16
    assert cache.usage().bytes == 16 * cache.page_bytes()
    for slot in slots:
        cache.release(slot)
    cache.forget_kept()
    assert cache.usage().pages == 0
    assert cache.usage().slots == 0


def test_growth_moves_nothing_and_reads_across_segments() -> None:
    cache = small_cache()
    slot, _ = cache.open([1])
    for part in range(6):
        write_rows(cache, slot, list(range(part * 200, part * 200 + 200)))
    assert len(cache.state(slot).pieces) > 1
    keys, _ = cache.read(1, cache.state(slot), 100, 1100)
    assert keys[0, :, 0].tolist() == list(range(100, 1100))


@given(shared=st.integers(0, 700), extra=st.integers(1, 5))
@settings(max_examples=15)
def test_a_shared_prefix_takes_pages_only_for_its_last_page(shared: int, extra: int) -> None:
    cache = small_cache()
    donor, _ = cache.open(list(range(700)))
    write_rows(cache, donor, list(range(700)))
    before = cache.usage().pages
    tokens = [*range(shared), *([9999] * extra)]
    slot, found = cache.open(tokens)
    assert found == min(shared, len(tokens) - 1)
    assert cache.usage().pages - before == (1 if found % PAGE_TOKENS else 0)
    if found:
        keys, values = cache.read(0, cache.state(slot), 0, found)
        assert keys[0, :, 0].tolist() == list(range(found))
        assert values[0, :, 8].tolist() == [1.0] * found
    cache.release(slot)
    keys, _ = cache.read(0, cache.state(donor), 0, 700)
    assert keys[0, :, 0].tolist() == list(range(700))


def test_the_memory_limit_is_kept_and_said_clearly() -> None:
    cache = small_cache(limit=3 * small_cache().page_bytes())
    slot, _ = cache.open([1])
    cache.reserve(slot, 2 * PAGE_TOKENS)
    other, _ = cache.open([2])
    with pytest.raises(CacheFullError, match=r"needs 2 more pages.*leaves room for 1"):
        cache.reserve(other, 2 * PAGE_TOKENS)
    assert cache.usage().pages == 2
    cache.reserve(other, PAGE_TOKENS)


def test_kept_prefixes_give_way_when_memory_is_wanted() -> None:
    cache = small_cache(limit=2 * small_cache().page_bytes())
    slot, _ = cache.open([1])
    write_rows(cache, slot, [1] * 300)
    cache.release(slot)
    assert cache.usage().pages == 2
    slot, shared = cache.open([7, 8])
    assert shared == 0
    cache.reserve(slot, 400)
    assert cache.usage().pages == 2


@pytest.mark.parametrize("path", [[1], [0, 2], [0, 1, 1], [5], [0, 0]])
def test_a_path_that_is_none_is_refused(path: list[int]) -> None:
    cache = small_cache()
    slot, _ = cache.open([1])
    cache.reserve(slot, 3)
    part = BatchPart(slot, [4, 5, 6], [0, 1, 2], [-1, 0, 1], [])
    cache.begin(TokenBatch.build([part]))
    with pytest.raises(ShapeError, match="not a path"):
        cache.commit(slot, path)


def test_a_forward_without_room_is_refused() -> None:
    cache = small_cache()
    slot, _ = cache.open([1])
    batch = TokenBatch.build([BatchPart.chain(slot, [1, 2], 0, want_last=False)])
    with pytest.raises(ShapeError, match="reserve"):
        cache.begin(batch)
