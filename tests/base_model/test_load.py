"""V4's cache under load: memory that runs out, samples of one prompt, pools that had grown."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import dspark
from dspark import SamplingParams
from dspark.base_model.cache import V4Cache
from dspark.base_model.target import V4Target
from dspark.cache import CacheFullError
from tests.base_model import oracle
from tests.base_model import reference_drafts as reference
from tests.base_model.build import build_model, feed, open_slot, relative_error

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True, tree_budget=4)


@functools.cache
def target(kind: str) -> V4Target:
    config = reference.tiny_draft_config(kind)
    weights = {
        **oracle.random_weights(config, 1, torch.float64),
        **reference.random_draft_weights(config, kind, seed=1),
    }
    model = build_model(config, weights, torch.float64)
    return V4Target(model, name=kind, eos_token_ids=())


class Watched:
    """A target that remembers its cache and the most that it ever held."""

    def __init__(self, inner: V4Target) -> None:
        self.inner = inner
        self.cache: V4Cache | None = None
        self.most = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def new_cache(self, *, memory_limit: int | None = None) -> V4Cache:
        self.cache = self.inner.new_cache(memory_limit=memory_limit)
        return self.cache

    def forward(self, batch: object, cache: V4Cache, *, capture: tuple = ()) -> object:
        self.most = max(self.most, cache.usage().bytes)
        return self.inner.forward(batch, cache, capture=capture)


def prompts(*sizes: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(6, 96, size).tolist() for size in sizes]


@pytest.mark.parametrize("kind", [pytest.param("mtp", marks=pytest.mark.slow), "dspark"])
def test_preempted_requests_go_on_as_if_nothing_had_been(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark.intake._HEADROOM_TOKENS", 4)
    monkeypatch.setattr("dspark.base_model.cache._ENTRY_PAGE", 2)  # requests grow often
    asked = prompts(9, 9, 9, 9, 9)
    each = [PARAMS, PARAMS, replace(PARAMS, temperature=1.0, seed=2), PARAMS, PARAMS]
    expected = dspark.Engine(target(kind)).generate(asked, each)
    watched = Watched(target(kind))
    sizes = target(kind).new_cache()
    begin, whole = sizes.request_bytes(9 + 4 + 5), sizes.request_bytes(9 + 10 + 5)
    limit = -(-whole // begin) * begin  # so many begin, and none of them can grow
    own = dspark.Engine(
        watched,
        drafter=target(kind).own_drafter(),
        config=dspark.EngineConfig(memory_limit=limit, auto_off=False),
    )
    results = own.generate(asked, each)
    assert [r.error for r in results] == [None] * 5
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert own.stats.preemptions > 0
    assert 0 < watched.most <= limit
    watched.cache.forget_kept()
    assert watched.cache.usage().bytes == 0
    assert own.cache_pages == 0


def test_samples_take_over_the_prompts_state() -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=1, n=3)
    (prompt,) = prompts(60)
    results = dspark.Engine(target("mtp")).generate([prompt], params)
    assert [r.stats.shared_prefix for r in results] == [0, 59, 59]
    alone = dspark.Engine(target("mtp"), drafter=target("mtp").own_drafter())
    again = alone.generate([prompt], params)  # which shares nothing
    assert [r.stats.shared_prefix for r in again] == [0, 0, 0]
    assert [r.token_ids for r in again] == [r.token_ids for r in results]


def test_a_request_needs_what_is_said_and_no_more() -> None:
    model = target("mtp").model
    for rows in (1, 30, 300):
        limit = model.new_cache().request_bytes(rows)
        cache = model.new_cache(memory_limit=limit)
        cache.reserve(open_slot(cache), rows)
        assert cache.usage().bytes == limit
        smaller = model.new_cache(memory_limit=limit - 1)
        slot = open_slot(smaller)
        with pytest.raises(CacheFullError, match="limit"):
            smaller.reserve(slot, rows)


def test_pools_that_were_larger_once_give_way_and_rows_keep_their_contents() -> None:
    """Pages move to lower numbers when memory runs out; what is in them must come along."""
    model = target("mtp").model
    tokens = [np.random.default_rng(seed).integers(6, 96, 70).tolist() for seed in range(6)]
    limit = 3 * model.new_cache().request_bytes(300)
    cache = model.new_cache(memory_limit=limit)
    slots = [open_slot(cache) for _ in tokens]
    for slot, own in zip(slots, tokens, strict=True):
        feed(model, cache, slot, own)
    for slot in slots[:4]:
        cache.release(slot)
    cache.forget_kept()
    used = sum(pool.bytes_used for pool in [cache.window])
    assert cache.window.bytes_held == used  # the pages in use had the highest numbers
    late = open_slot(cache)
    feed(model, cache, late, tokens[0] * 4, (100, 100))
    assert cache.usage().bytes <= limit
    more = tokens[1][:9]
    for slot, own in zip(slots[4:], tokens[4:], strict=True):
        fresh = model.new_cache()
        expected = feed(model, fresh, open_slot(fresh), own + more)[len(own) :]
        assert relative_error(feed(model, cache, slot, more, (2,)), expected) < 1e-9
