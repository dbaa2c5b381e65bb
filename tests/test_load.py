"""The engine under load: arrivals, order, memory that runs out, cancels; none of it in the text."""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

import dspark
from dspark import intake
from dspark.active import ActiveRequest, Phase
from dspark.admission import Admission
from dspark.draft.base import DraftContext, Drafter, SharesContext
from dspark.draft.combined import CombinedDrafter
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.request import FinishReason, SamplingParams
from dspark.tree import Proposal
from dspark.verify import noise
from tests.draft import law_models, test_laws
from tests.eval.toys import VOCAB, toy_pair
from tests.paged_toy import PAGE, PagedTarget

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [11], [2, 3, 4, 1] * 4, [4, 3, 1, 3, 2, 3, 1, 3], [9, 9]]
LONG = SamplingParams(max_tokens=48, ignore_eos=True)
SAMPLING = {
    "greedy": LONG,
    "coupled": replace(LONG, temperature=1.0, seed=3, top_k=12),
    "match": replace(LONG, temperature=0.7, seed=3, rule="sample-match"),
}
TIGHT = 30  # pages, where five requests come to need some 18 each


@pytest.fixture(autouse=True)
def _little_headroom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short requests grow out of what they were admitted with, as long ones do otherwise."""
    monkeypatch.setattr(intake, "_HEADROOM_TOKENS", 4)


def drafter(kind: str) -> Drafter | None:
    if kind == "none":
        return None
    if kind == "lookup":
        return LookupDrafter()
    model = ModelDrafter(toy_pair()[1], vocab_size=VOCAB)
    return model if kind == "model" else CombinedDrafter(LookupDrafter(), model)


def engine(kind: str = "none", pages: int | None = TIGHT, **config: object) -> dspark.Engine:
    settings = {"auto_off": False, "memory_limit": pages, **config}
    return dspark.Engine(
        PagedTarget(), drafter=drafter(kind), config=dspark.EngineConfig(**settings)
    )


def cache_of(own: dspark.Engine) -> object:
    return own.target.cache


def check_empty(own: dspark.Engine) -> None:
    """Every page is back."""
    cache_of(own).forget_kept()
    assert own.num_unfinished == 0
    assert own.cache_pages == 0
    assert not cache_of(own).committed


@functools.cache
def plain(sampling: str) -> list[list[int]]:
    results = engine(pages=None).generate(PROMPTS, SAMPLING[sampling])
    return [result.token_ids for result in results]


# -- preemption ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        ("none", "greedy"),
        ("lookup", "coupled"),
        ("model", "match"),
        ("combined", "coupled"),
        pytest.param("combined", "greedy", marks=pytest.mark.slow),
        pytest.param("combined", "match", marks=pytest.mark.slow),
    ],
)
def test_a_preempted_requests_text_is_that_of_an_undisturbed_one(kind: str, sampling: str) -> None:
    own = engine(kind)
    results = own.generate(PROMPTS, SAMPLING[sampling])
    assert [result.token_ids for result in results] == plain(sampling)
    stats = own.stats
    assert stats.preemptions == sum(result.stats.preemptions for result in results) >= 2
    assert stats.recomputed_tokens == sum(r.stats.recomputed_tokens for r in results) > 20
    assert results[0].stats.preemptions == 0  # the first in order never gives way
    assert cache_of(own).most <= TIGHT
    check_empty(own)


def check_hidden_states(drafter: Drafter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the drafter is asked, it has had each position before the last token once.

    Positions that a request has in common with another one it has from there.
    """
    had: dict[int, int] = {}
    propose, release = drafter.propose, drafter.release

    def checked(contexts: Sequence[DraftContext]) -> list[Proposal]:
        for context in contexts:
            rows = next(iter((context.features or {}).values()), [])
            had[context.request_id] = had.get(context.request_id, 0) + len(rows)
            assert had[context.request_id] == len(context.tokens) - 1
        return propose(contexts)

    def forgets(request_id: int) -> None:
        had.pop(request_id, None)
        release(request_id)

    monkeypatch.setattr(drafter, "propose", checked)
    monkeypatch.setattr(drafter, "release", forgets)
    if isinstance(drafter, SharesContext):
        adopt = drafter.adopt

        def begins(request_id: int, tokens: Sequence[int]) -> None:
            had[request_id] = len(tokens)
            adopt(request_id, tokens)

        monkeypatch.setattr(drafter, "adopt", begins)


@pytest.mark.parametrize("kind", ["vanilla", pytest.param("eagle3", marks=pytest.mark.slow)])
def test_drafters_that_read_hidden_states_are_rebuilt(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a wrapped transformers model with its own store, whose pages hold 256 tokens."""
    vocab = test_laws.VOCAB
    target = law_models.target_of("llama", vocab, exact=True)
    params = replace(test_laws.mixed_params("chain")[0], max_tokens=45)
    noisy = replace(params, temperature=0.9, rule="coupled")
    prompts = [[(3 + i) % 6 for i in range(240)], [(3 + 2 * i) % 6 for i in range(225)]]
    expected = dspark.Engine(target).generate(prompts, [params, noisy])
    limit = 3 * target.new_cache().page_bytes()
    config = dspark.EngineConfig(memory_limit=limit, auto_off=False)
    drafter = law_models.drafter_of(kind, vocab)
    check_hidden_states(drafter, monkeypatch)
    own = dspark.Engine(target, drafter=drafter, config=config)
    results = own.generate(prompts, [params, noisy])
    assert "failed, decoding plainly" not in caplog.text
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert [r.stats.preemptions for r in results] == [0, 1]
    assert results[1].stats.recomputed_tokens > 200
    assert results[1].stats.accepted > 0


def test_a_request_whose_prompt_is_still_running_can_be_preempted() -> None:
    own = engine(pages=28, limits=dspark.RoundLimits(prefill_chunk=2))
    first = own.submit([3] * 8, replace(LONG, max_tokens=60))[0]
    for _ in range(25):
        own.step()
    second = own.submit([4] * 50, replace(LONG, max_tokens=20))[0]
    phases = set()
    while own.num_unfinished:
        own.step()
        if second.stats.preemptions:
            phases.add(second.num_generated)
    assert second.stats.preemptions > 0
    assert 0 in phases
    alone = engine(pages=None).generate([[3] * 8, [4] * 50], replace(LONG, max_tokens=60))
    assert first.generated == alone[0].token_ids
    assert second.generated == alone[1].token_ids[:20]


def test_a_stream_and_logprobs_survive_preemption() -> None:
    params = replace(LONG, logprobs=2)
    own = engine("model")
    others = [own.submit(prompt, LONG)[0] for prompt in PROMPTS[:3]]
    last = own.submit(PROMPTS[3], params)[0]
    chunks = list(own.follow(last))
    assert last.stats.preemptions > 0
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert tokens == plain("greedy")[3]
    assert [entry.token_id for entry in last.logprobs] == tokens
    for other in others:
        own.cancel(other)
    check_empty(own)


def test_a_request_that_fits_alone_is_never_failed() -> None:
    """All pages are needed by each of them, and what one left is taken over by the next."""
    need = -(-(8 + 48 + 16) // PAGE)
    own = engine("model", pages=need)
    results = own.generate([PROMPTS[0]] * 3, LONG)
    assert [result.error for result in results] == [None] * 3
    assert {tuple(result.token_ids) for result in results} == {tuple(plain("greedy")[0])}
    (refused,) = engine("model", pages=need - 1).generate([PROMPTS[0]], LONG)
    assert "K/V cache" in refused.error


def test_rejection_gives_the_same_text_after_a_preemption() -> None:
    """Its noise is named by round and node, and a round that was not run leaves none used."""
    params = replace(LONG, temperature=1.0, rule="rejection", seed=5, tree_budget=4)
    alone = [engine("model", None).generate([p], params)[0].token_ids for p in PROMPTS]
    own = engine("model")
    results = own.generate(PROMPTS, params)
    assert [result.token_ids for result in results] == alone
    assert own.stats.preemptions >= 2


# -- order -----------------------------------------------------------------------------------------


def admitted(own: dspark.Engine, requests: list[ActiveRequest]) -> Iterator[ActiveRequest]:
    """Requests as they leave the queue for the first time."""
    seen: set[int] = set()
    while own.num_unfinished:
        own.step()
        for request in requests:
            if request.request_id not in seen and request.phase is not Phase.WAITING:
                seen.add(request.request_id)
                yield request


def test_first_come_first_served_within_a_priority() -> None:
    own = engine(max_batch=2)
    priorities = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    requests = [
        own.submit([3 + i], replace(LONG, max_tokens=10 - i), priority=p)[0]
        for i, p in enumerate(priorities)
    ]
    order = [request.request_id for request in admitted(own, requests)]
    assert order == [1, 3, 5, 0, 2, 4]


@pytest.mark.parametrize("ageing", [0, 5, 40])
def test_a_stream_of_dear_requests_does_not_starve_a_cheap_one(ageing: int) -> None:
    """A request of priority 4 may overtake if it comes within two times `ageing` rounds."""
    own = engine(max_batch=1, ageing=ageing)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    own.submit([1], params)  # so that there is a queue from the start
    own.step()
    cheap = own.submit([2], params, priority=1.0)[0]
    dear: list[ActiveRequest] = []
    came: list[int] = []
    for number in range(400):
        dear.append(own.submit([3], params, priority=4.0)[0])
        came.append(number)
        own.step()
        if cheap.phase is Phase.DONE:
            break
    assert cheap.phase is Phase.DONE
    before = [at for at, request in zip(came, dear, strict=True) if request.phase is Phase.DONE]
    assert max(before, default=0) <= 2 * ageing
    assert len(before) >= min(2 * ageing, 1)
    for request in dear:
        own.cancel(request)
    check_empty(own)


def test_the_last_in_order_gives_way_and_comes_back_before_its_class() -> None:
    own = engine(pages=28, max_batch=3)
    low = own.submit(PROMPTS[0], LONG, priority=1.0)[0]
    high = [own.submit(prompt, LONG, priority=2.0)[0] for prompt in PROMPTS[1:3]]
    late = own.submit(PROMPTS[3], replace(LONG, max_tokens=5), priority=1.0)[0]
    back = None
    while own.num_unfinished:
        own.step()
        if back is None and low.stats.preemptions and low.phase is not Phase.WAITING:
            back = low.slot, late.slot
    assert low.stats.preemptions > 0
    assert high[0].stats.preemptions == 0
    slot, other = back
    assert other is None or slot < other  # it came later, so it stood behind
    assert late.result().finish_reason is FinishReason.LENGTH


def test_who_stands_first_is_not_passed_by_smaller_ones() -> None:
    own = engine(pages=30)
    own.submit([3] * 8, replace(LONG, max_tokens=60))
    own.step()
    large = own.submit([4] * 80, replace(LONG, max_tokens=5))[0]
    small = own.submit([5], replace(LONG, max_tokens=2))[0]
    for _ in range(10):
        own.step()
    assert large.phase is small.phase is Phase.WAITING
    opened = len(cache_of(own).opened_with)
    for _ in range(10):
        own.step()
    assert len(cache_of(own).opened_with) == opened  # nothing was copied in vain meanwhile
    while own.num_unfinished:
        own.step()
    assert large.result().error is small.result().error is None


def test_a_long_prompt_does_not_hold_up_requests_that_decode() -> None:
    own = engine(pages=None, limits=dspark.RoundLimits(prefill_chunk=16))
    first = own.submit([3], replace(LONG, max_tokens=100))[0]
    own.step()
    own.submit([4, 5] * 200, replace(LONG, max_tokens=2))
    own.target.rows.clear()
    for done in range(1, 25):
        before = first.num_generated
        own.step()
        assert first.num_generated > before, done
    assert max(own.target.rows) <= 16 + 1


# -- samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("chunk", [4, 512])
def test_samples_take_over_the_prompt_from_the_first(is_whole: bool, chunk: int) -> None:
    prompt = [2, 3, 4, 1] * 5
    params = replace(SAMPLING["coupled"], n=3, max_tokens=20)
    limits = dspark.RoundLimits(prefill_chunk=chunk)
    config = dspark.EngineConfig(limits=limits)
    results = dspark.Engine(PagedTarget(is_whole=is_whole), config=config).generate(
        [prompt], params
    )
    assert [result.stats.shared_prefix for result in results] == [0, 19, 19]
    for number, result in enumerate(results):
        again = engine(pages=None).generate([prompt], replace(params, n=number + 1))
        assert again[number].token_ids == result.token_ids


def test_samples_do_not_wait_for_one_that_is_gone() -> None:
    own = engine(pages=None)
    samples = own.submit([2, 3, 4], replace(SAMPLING["coupled"], n=3, max_tokens=5))
    own.cancel(samples[0])
    while own.num_unfinished:
        own.step()
    assert [s.result().finish_reason for s in samples[1:]] == [FinishReason.LENGTH] * 2


# -- cancels ---------------------------------------------------------------------------------------


def test_a_request_can_be_cancelled_in_every_phase() -> None:
    limits = dspark.RoundLimits(prefill_chunk=8)
    own = engine("model", pages=26, limits=limits, max_batch=3)
    requests = [own.submit(prompt * 2, LONG)[0] for prompt in PROMPTS]
    wanted = ["fresh", "prefill", "decode", "preempted"]
    seen = []

    def stands(request: ActiveRequest) -> str:
        if request.phase is Phase.WAITING:
            return "preempted" if request.stats.preemptions else "fresh"
        return request.phase.value

    for _ in range(400):
        found = next((r for r in requests if wanted and stands(r) == wanted[0]), None)
        if found is not None:
            seen.append(wanted.pop(0))
            own.cancel(found)
            own.cancel(found)  # once more does nothing
            assert found.result().finish_reason is FinishReason.CANCELLED
            assert found.result().stats.seconds_total > 0
        if own.num_unfinished < 3:
            requests += own.submit([3, 4, 5] * 4, LONG)
        own.step()
        if not wanted:
            break
    assert not wanted
    for request in requests:
        own.cancel(request)
    assert own.stats.cancelled >= 4
    assert not own.drafter._slots
    check_empty(own)


# -- statistics ------------------------------------------------------------------------------------


def test_statistics_tell_of_waiting_and_of_everybody() -> None:
    own = engine("model", max_batch=2)
    results = own.generate([*PROMPTS, [VOCAB]], LONG)
    waited = [result.stats.seconds_waiting for result in results[:-1]]
    assert waited[-1] > waited[0]
    assert all(r.stats.seconds_waiting <= r.stats.seconds_total for r in results)
    stats = own.stats
    assert (stats.submitted, stats.finished, stats.failed, stats.cancelled) == (6, 5, 1, 0)
    assert stats.seconds_waiting == pytest.approx(sum(waited))
    assert stats.rounds == len(own.target.rows)
    assert stats.rows == sum(own.target.rows)


@pytest.mark.parametrize("ageing", [-1])
def test_ageing_is_checked(ageing: int) -> None:
    with pytest.raises(dspark.ConfigError, match="ageing"):
        dspark.EngineConfig(ageing=ageing)


# -- soak ------------------------------------------------------------------------------------------


def arrivals(count: int) -> Iterator[tuple[list[int], SamplingParams, float]]:
    """Short requests of all rules but one, chats among them that go on from each other."""
    rng = random.Random(11)
    rules = ["auto", "coupled", "sample-match", "rejection"]
    for number in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 9]))]
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 6, 20]),
            temperature=rng.choice([0.0, 1.0]),
            rule="auto",
            seed=number,
            n=rng.choice([1, 1, 1, 2]),
            draft=rng.random() < 0.9,
        )
        if params.temperature:
            params = replace(params, rule=rng.choice(rules))
        yield prompt, params, rng.choice([0.5, 1.0, 1.0, 4.0])


def soak(own: dspark.Engine, count: int) -> list[ActiveRequest]:
    """Submit, step and cancel at random until everything has ended."""
    rng = random.Random(12)
    requests: list[ActiveRequest] = []
    for prompt, params, priority in arrivals(count):
        requests += own.submit(prompt, params, priority=priority)
        while own.num_unfinished > rng.choice([4, 8, 24]):
            own.step()
            if rng.random() < 0.2:
                own.cancel(rng.choice(requests[-10:]))
    while own.num_unfinished:
        own.step()
    return requests


def count_objects(own: dspark.Engine) -> int:
    """Objects that are alive, but for what bounded caches hold."""
    cache_of(own).forget_kept()
    noise._stream_state.cache_clear()
    gc.collect()
    return len(gc.get_objects())


def test_three_hundred_requests_end_and_leave_nothing_behind() -> None:
    limits = dspark.RoundLimits(prefill_chunk=16, tree_budget=4, depth=3)
    own = engine("lookup", pages=36, max_batch=12, limits=limits)
    soak(own, 100)
    before = count_objects(own)
    requests = soak(own, 300)
    kinds = [request.result().finish_reason for request in requests]
    assert all(request.phase is Phase.DONE and request.error is None for request in requests)
    assert set(kinds) == {FinishReason.LENGTH, FinishReason.CANCELLED}
    assert kinds.count(FinishReason.CANCELLED) > 8
    assert own.stats.preemptions > 20
    check_empty(own)
    del requests, kinds
    assert count_objects(own) - before < 75  # fewer than one for four requests


def test_what_was_not_cancelled_in_the_soak_has_the_text_of_its_own() -> None:
    limits = dspark.RoundLimits(prefill_chunk=16, tree_budget=4, depth=3)
    own = engine("model", pages=36, max_batch=12, limits=limits)
    requests = soak(own, 110)
    free = engine("none", pages=None)
    checked = 0
    for request in requests:
        if request.rule.draws_from_laws or request.phase is not Phase.DONE:
            continue
        params = replace(request.params, n=request.noise.sample + 1, draft=False)
        expected = free.generate([request.prompt], params)[-1].token_ids
        assert request.generated == expected[: request.num_generated]
        checked += request.stats.preemptions > 0
    assert checked > 5


# -- planted faults --------------------------------------------------------------------------------


def test_a_page_that_does_not_come_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Admission._close

    def leaky(self: Admission, request: ActiveRequest) -> None:
        if request.phase is not Phase.DONE:
            request.slot = None
        inside(self, request)

    monkeypatch.setattr(Admission, "_close", leaky)
    own = engine()
    results = own.generate(PROMPTS, LONG)
    assert any(result.error for result in results) or cache_of(own).committed


@pytest.mark.parametrize("sampling", ["coupled", "match"])
def test_noise_that_starts_over_after_a_preemption_is_noticed(
    sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = Admission._preempt

    def forgetful(self: Admission, request: ActiveRequest) -> None:
        inside(self, request)
        request.prompt = list(request.tokens)  # what was said counts as prompt
        request.params = replace(request.params, max_tokens=48 - request.num_generated)

    monkeypatch.setattr(Admission, "_preempt", forgetful)
    own = engine()
    requests = [own.submit(prompt, SAMPLING[sampling])[0] for prompt in PROMPTS]
    while own.num_unfinished:
        own.step()
    texts = [r.tokens[len(p) : len(p) + 48] for r, p in zip(requests, PROMPTS, strict=True)]
    assert texts != plain(sampling)
