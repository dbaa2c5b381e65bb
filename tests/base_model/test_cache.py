"""The V4 cache: rollback, sharing, memory, refusals."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

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


def stepped(cache: V4Cache, rows: Mapping[int, Sequence[int]], kept: Mapping[int, int]) -> Tensor:
    """Logits of rows of several slots in one forward, of which each slot commits so many."""
    for slot, tokens in rows.items():
        cache.reserve(slot, len(tokens))
    parts = [part_of(slot, cache.length(slot), tokens) for slot, tokens in rows.items() if tokens]
    logits = model().forward(TokenBatch.build(parts), cache).logits
    for part in parts:
        cache.commit(part.slot, range(kept[part.slot]))
    return logits


STARTS = (0, 3, 4, 5, 6, 7, 15, 16)
DRAFTED = (1, 2, 5, 9)
WHOLE, MORE = text(max(STARTS) + max(DRAFTED)), text(9, 99)


@functools.cache
def plainly(kept: int) -> Tensor:
    """Logits of MORE after so many tokens of WHOLE, in a cache of their own."""
    cache = model().new_cache()
    return feed(model(), cache, open_slot(cache), WHOLE[:kept] + MORE)[kept:]


@pytest.mark.parametrize(
    "start",
    # Drafts of up to nine tokens cross from the others what the slow ones begin at.
    [n if n in (0, 7, 15) else pytest.param(n, marks=pytest.mark.slow) for n in STARTS],
)
def test_rolling_back_to_any_point_of_a_draft_leaves_no_trace(start: int) -> None:
    """A slot for every length of a draft and every number of its tokens that are accepted.

    They share their forwards, which cost next to the same for one slot as for all 21.
    """
    cache = model().new_cache()
    cases = [(drafted, kept) for drafted in DRAFTED for kept in range(drafted + 1)]
    slots = {open_slot(cache): case for case in cases}
    if start:
        stepped(cache, dict.fromkeys(slots, WHOLE[:start]), dict.fromkeys(slots, start))
    stepped(
        cache,
        {slot: WHOLE[start : start + drafted] for slot, (drafted, _) in slots.items()},
        {slot: kept for slot, (_, kept) in slots.items()},
    )
    found = [
        stepped(cache, dict.fromkeys(slots, part), dict.fromkeys(slots, len(part)))
        for part in (MORE[:1], MORE[1:2], MORE[2:])
    ]
    for at, (drafted, kept) in enumerate(cases):
        own = torch.cat([logits.view(len(cases), -1, logits.shape[-1])[at] for logits in found])
        assert relative_error(own, plainly(start + kept)) < 1e-9, (drafted, kept)


@pytest.mark.parametrize(
    "length", [1, 8, 256, 263, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 300))]
)
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
    window = 3 * 6 * c * f
    sparse = (5 * (c + d) + 7 * 4 * (c + d)) * f
    heavy = (2 * c + 7 * 2 * c) * f
    assert cache.state_bytes(slot) == window + sparse + heavy


def test_a_memory_limit_is_kept_and_its_refusal_leaves_the_slot_as_it_was() -> None:
    cache = model().new_cache(memory_limit=500_000)
    slot = open_slot(cache)
    feed(model(), cache, slot, text(30))
    used = cache.usage().bytes
    with pytest.raises(CacheFullError, match="limit"):
        cache.reserve(slot, 1_000_000)
    assert cache.usage().bytes == used <= 500_000
    feed(model(), cache, slot, text(3))
    assert cache.length(slot) == 33


def test_released_requests_make_room_for_new_ones() -> None:
    cache = model().new_cache(memory_limit=500_000)
    for seed in range(12):
        slot = open_slot(cache)
        feed(model(), cache, slot, text(40, seed))
        cache.release(slot)
        assert cache.usage().bytes <= 500_000


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
    devices = dict.fromkeys(range(3), torch.device("cpu"))
    cache = V4Cache(config, devices=devices, dtype=torch.float32, wide=torch.float32)
    slot = open_slot(cache)
    with pytest.raises(ShapeError, match="reserve"):
        cache.begin(TokenBatch.build([part_of(slot, 0, [1, 2])]))
