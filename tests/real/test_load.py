"""The engine under load with real weights: memory for half of the requests, cancels, arrivals."""

from __future__ import annotations

import random

import pytest

import dspark
from dspark.active import ActiveRequest, Phase
from dspark.request import FinishReason
from tests.real.conftest import exact_target, make_drafter

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
