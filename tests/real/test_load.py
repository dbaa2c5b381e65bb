"""The engine under load with real weights: memory for half of the requests, cancels, arrivals."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import dspark
from dspark.active import ActiveRequest, Phase
from dspark.request import FinishReason
from tests.real.conftest import exact_target, fetched, make_drafter

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(3600)]

NAME, COUNT, LIMIT = "smollm2-135m", 60, 6  # pages of 256 tokens


def ask(engine: dspark.Engine, number: int) -> ActiveRequest:
    """One of several requests; each kind starts some way before a page is full."""
    rng = random.Random(number)
    codec = engine.codec
    text = rng.choice(["The committee met on Tuesday.", "def average(values):\n    total ="])
    filler = codec.encode("One, two, three, four, five, six. ")
    tokens = (filler * 40)[: rng.choice([20, 180, 230])] + codec.encode_plain(text)
    params = dspark.SamplingParams(
        max_tokens=rng.choice([4, 100]), temperature=rng.choice([0.0, 0.8]), seed=number
    )
    (request,) = engine.submit(tokens, params, priority=rng.choice([1.0, 1.0, 3.0]))
    return request


@pytest.mark.parametrize("draft", ["lookup", "model"])
def test_requests_end_leave_nothing_behind_and_keep_their_texts(draft: str) -> None:
    loaded = exact_target(NAME, "float32")
    page = loaded.target.new_cache().page_bytes()
    engine = dspark.Engine(
        loaded.target,
        drafter=make_drafter(draft, NAME, "float32"),
        codec=loaded.codec,
        config=dspark.EngineConfig(memory_limit=LIMIT * page, max_batch=8),
    )
    rng, requests, most = random.Random(1), [], 0
    while len(requests) < COUNT or engine.num_unfinished:
        if len(requests) < COUNT and engine.num_unfinished < 10:
            requests.append(ask(engine, len(requests)))
        engine.step()
        most = max(most, engine.cache_pages)
        if rng.random() < 0.01:
            engine.cancel(rng.choice(requests))
    assert all(request.phase is Phase.DONE and request.error is None for request in requests)
    assert engine.stats.preemptions > 3
    assert 0 < most <= LIMIT
    plain = dspark.Engine(loaded.target, codec=loaded.codec)
    for number, request in enumerate(requests):
        alone = ask(plain, number)
        while plain.num_unfinished:
            plain.step()
        ended = request.finish_reason is not FinishReason.CANCELLED
        assert request.generated == alone.generated[: request.num_generated]
        assert not ended or len(request.generated) == len(alone.generated)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def short_request(engine: dspark.Engine, number: int) -> ActiveRequest:
    """A question with a short answer."""
    rng = random.Random(number)
    topic = rng.choice(["rain", "a loop in Python", "tea", "two plus three", "a poem", "sorting"])
    style = rng.choice(["Explain", "Describe", "Write code for", "Tell me about"])
    tokens = engine.codec.encode_chat([{"role": "user", "content": f"{style} {topic} {number}."}])
    params = dspark.SamplingParams(
        max_tokens=rng.choice([1, 4, 8, 16]), temperature=rng.choice([0.0, 0.0, 0.8]), seed=number
    )
    (request,) = engine.submit(tokens, params, priority=rng.choice([1.0, 1.0, 3.0]))
    return request


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_thousand_short_requests_leave_no_page_and_no_memory_behind() -> None:
    fetched(NAME)
    config = dspark.EngineConfig(memory_limit=400 << 20, max_batch=16)
    engine = dspark.Engine.load(NAME, "auto", config=config)
    rng, waiting = random.Random(3), 2000
    under_way: list[ActiveRequest] = []
    ends: dict[FinishReason | None, int] = {}
    settled = 0
    while waiting or under_way:
        if waiting and engine.num_unfinished < rng.choice([2, 16, 40]):
            waiting -= 1
            under_way.append(short_request(engine, waiting))
        engine.step()
        if rng.random() < 0.02 and under_way:
            engine.cancel(rng.choice(under_way))
        for request in [r for r in under_way if r.phase is Phase.DONE]:
            under_way.remove(request)
            result = request.result()
            assert result.error is None
            ends[result.finish_reason] = ends.get(result.finish_reason, 0) + 1
        if waiting == 1500:  # caches with a bound have filled by then
            settled = max(settled, resident())
    assert sum(ends.values()) == 2000
    assert set(ends) <= {FinishReason.LENGTH, FinishReason.STOP, FinishReason.CANCELLED}
    assert 10 < ends[FinishReason.CANCELLED] < 1000
    assert resident() - settled < 32 << 20
    engine._cache.forget_kept()  # of the last requests, for others to share
    assert engine.cache_pages == 0
