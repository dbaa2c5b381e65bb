"""The V4 cache: rollback, sharing, memory, refusals."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from dspark.base_model.cache import V4Cache
from dspark.base_model.config import V4Config
from dspark.base_model.model import V4Model
from dspark.cache import Cache, CacheFullError
from dspark.errors import ShapeError
from dspark.target import TokenBatch
from tests.base_model import oracle
from tests.base_model.build import build_model, feed, open_slot, part_of, relative_error, run


@functools.cache
def model() -> V4Model:
    config = oracle.tiny_config(sliding_window=6)
    return build_model(config, oracle.random_weights(config, 2, torch.float64), torch.float64)


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, count).tolist()


def test_it_is_a_cache() -> None:
    assert isinstance(model().new_cache(), Cache)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 6, 7, 8, 15, 16, 17])
@pytest.mark.parametrize("drafted", [1, 2, 5, 9])
def test_rolling_back_to_any_point_of_a_draft_leaves_no_trace(start: int, drafted: int) -> None:
    tokens, more = text(start + drafted, start), text(9, 99)
    for accepted in range(drafted + 1):
        cache = model().new_cache()
        slot = open_slot(cache)
        if start:
            feed(model(), cache, slot, tokens[:start])
        run(model(), cache, slot, tokens[start:])
        cache.commit(slot, range(accepted))
        kept = tokens[: start + accepted]
        expected = feed(model(), cache, open_slot(cache), kept + more)[len(kept) :]
        assert relative_error(feed(model(), cache, slot, more, (1, 1)), expected) < 1e-9


@pytest.mark.parametrize("length", [1, 5, 8, 256, 263, 300])
def test_a_prompt_that_goes_on_from_a_finished_request_takes_its_state_over(length: int) -> None:
    tokens, more = text(length), text(11, 5)
    cache = model().new_cache()
    slot = open_slot(cache)
    feed(model(), cache, slot, tokens)
    cache.release(slot)
    slot, shared = cache.open(tokens + more)
    assert shared == length == cache.length(slot)
    fresh = model().new_cache()
    expected = feed(model(), fresh, open_slot(fresh), tokens + more)[length:]
    assert relative_error(feed(model(), cache, slot, more, (2,)), expected) < 1e-9
    # The donor is still whole: another prompt takes it over after the first one went its own way.
    again, shared = cache.open(tokens + more)
    assert shared >= length
    rest = (tokens + more)[shared:]
    if rest:
        assert relative_error(feed(model(), cache, again, rest), expected[-len(rest) :]) < 1e-9


def test_a_prompt_that_leaves_a_finished_request_midway_shares_nothing() -> None:
    tokens = text(20)
    cache = model().new_cache()
    slot = open_slot(cache)
    feed(model(), cache, slot, tokens)
    cache.release(slot)
    assert cache.open([*tokens[:19], 96 - tokens[19], 3])[1] == 0
    assert cache.open(tokens)[1] == 0  # the last row must run: its logits are wanted


def test_all_memory_comes_back() -> None:
    cache = model().new_cache()
    empty = cache.usage()
    assert empty.bytes == 0
    slots = [open_slot(cache) for _ in range(6)]
    for slot in slots:
        feed(model(), cache, slot, text(40 + slot, slot))
    assert cache.usage().bytes > 0
    for slot in slots:
        cache.release(slot)
    cache.forget_kept()
    assert cache.usage() == empty


def test_a_state_holds_what_the_formula_says() -> None:
    cache = model().new_cache()
    slot = open_slot(cache)
    feed(model(), cache, slot, text(21))
    c, d, f = 32, 16, 8  # head size, indexer head size, bytes of a float64
    window = 5 * 6 * c * f
    sparse = 2 * (5 * (c + d) + 7 * 4 * (c + d)) * f
    heavy = (2 * c + 7 * 2 * c) * f
    assert cache.state_bytes(slot) == window + sparse + heavy


def test_a_memory_limit_is_kept_and_its_refusal_leaves_the_slot_as_it_was() -> None:
    cache = model().new_cache(memory_limit=900_000)
    slot = open_slot(cache)
    feed(model(), cache, slot, text(30))
    used = cache.usage().bytes
    with pytest.raises(CacheFullError, match="limit"):
        cache.reserve(slot, 1_000_000)
    assert cache.usage().bytes == used <= 900_000
    feed(model(), cache, slot, text(3))
    assert cache.length(slot) == 33


def test_released_requests_make_room_for_new_ones() -> None:
    cache = model().new_cache(memory_limit=900_000)
    for seed in range(12):
        slot = open_slot(cache)
        feed(model(), cache, slot, text(40, seed))
        cache.release(slot)
        assert cache.usage().bytes <= 900_000


def test_a_chunk_longer_than_was_staged_for_can_be_committed() -> None:
    """The pools grow inside the forward; what they grow must be writable outside of it."""
    tokens = text(600)
    cache = model().new_cache()
    slot = open_slot(cache)
    whole = feed(model(), cache, slot, tokens)
    other = model().new_cache()
    parts = feed(model(), other, open_slot(other), tokens, (250, 250))
    assert relative_error(whole[-1:], parts[-1:]) < 1e-9
    assert cache.length(slot) == 600


def test_refusals() -> None:
    cache = model().new_cache()
    slot = open_slot(cache)
    with pytest.raises(ShapeError, match="no rows to commit"):
        cache.commit(slot, [0])
    run(model(), cache, slot, [1, 2, 3, 4], [-1, 0, 0, 1])
    with pytest.raises(ShapeError, match="not a path"):
        cache.commit(slot, [0, 3])
    with pytest.raises(ShapeError, match="not a path"):
        cache.commit(slot, [0, 1, 2])


def test_a_forward_without_room_is_refused() -> None:
    config = V4Config.from_dict(oracle.tiny_config())
    devices = dict.fromkeys(range(5), torch.device("cpu"))
    cache = V4Cache(config, devices=devices, dtype=torch.float32, wide=torch.float32)
    slot = open_slot(cache)
    with pytest.raises(ShapeError, match="reserve"):
        cache.begin(TokenBatch.build([part_of(slot, 0, [1, 2])]))
