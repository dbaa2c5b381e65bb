"""What a round hands to drafters that read hidden states."""

from __future__ import annotations

import pytest
import torch

from dspark import SamplingParams
from dspark.engine import Engine, EngineConfig
from dspark.rounds import RoundLimits
from dspark.tree import Proposal
from dspark.verify.scheduler import Scheduler
from tests.conftest import random_target
from tests.eval.toys import toy_pair

CHUNK = 8


class Listener:
    """A drafter that drafts nothing and notes the hidden states it is given."""

    name = "listener"
    capture = (1,)

    def __init__(self):
        self.rows = []  # rows per call
        self.taken = {}  # request -> hidden states, in order
        self.fails = False

    def propose(self, contexts):
        self.observe(contexts)
        return [Proposal.empty() for _ in contexts]

    def observe(self, contexts):
        if self.fails:
            raise RuntimeError("broken on purpose")
        for context in contexts:
            rows = context.features[1]
            self.rows.append(len(rows))
            before = self.taken.get(context.request_id, torch.zeros(0, rows.shape[1]))
            self.taken[context.request_id] = torch.cat([before, rows])
            # The contract of features: they end at the token before the last one.
            assert len(self.taken[context.request_id]) == len(context.tokens) - 1

    def release(self, request_id):
        pass


def engine_of(listener: Listener) -> Engine:
    limits = RoundLimits(prefill_chunk=CHUNK)
    config = EngineConfig(limits=limits, auto_off=False)
    return Engine(random_target("llama"), drafter=listener, config=config)


def test_a_long_prompts_hidden_states_are_handed_over_chunk_by_chunk():
    listener = Listener()
    prompts = [[3 + i % 20 for i in range(45)], [5, 6, 7]]
    results = engine_of(listener).generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    assert all(r.error is None for r in results)
    assert max(listener.rows) <= 2 * CHUNK
    assert len(listener.taken[0]) >= 45


def test_what_is_handed_over_is_what_one_forward_gives():
    whole, parts = Listener(), Listener()
    prompt = [[3 + i * 7 % 20 for i in range(45)]]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    config = EngineConfig(auto_off=False)
    Engine(random_target("llama"), drafter=whole, config=config).generate(prompt, params)
    engine_of(parts).generate(prompt, params)
    assert len(whole.rows) < len(parts.rows)
    torch.testing.assert_close(whole.taken[0], parts.taken[0], rtol=1e-4, atol=1e-4)


def test_hidden_states_are_handed_over_while_the_request_does_not_draft():
    listener = Listener()
    prompt = [[3 + i % 20 for i in range(10)]]
    params = SamplingParams(max_tokens=40, ignore_eos=True, tree_budget=0)
    engine_of(listener).generate(prompt, params)
    assert listener.rows
    assert max(listener.rows) <= 2 * CHUNK


def test_a_listener_that_breaks_costs_no_answer(caplog: pytest.LogCaptureFixture):
    listener = Listener()
    prompt = [[3 + i % 20 for i in range(45)]]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = Engine(random_target("llama")).generate(prompt, params)[0].token_ids
    listener.fails = True
    assert engine_of(listener).generate(prompt, params)[0].token_ids == expected
    assert "decoding plainly" in caplog.text


class Asked(Listener):
    """Notes what it is asked for."""

    capture = ()

    def __init__(self):
        self.asked = []

    def propose(self, contexts):
        self.asked += [(context.budget, context.depth) for context in contexts]
        return [Proposal.empty() for _ in contexts]


@pytest.mark.parametrize(
    ("schedule", "count", "expected"),
    [
        ("auto", 1, (15, 8)),
        ("auto", 8, (7, 7)),
        ("fixed:3", 1, (3, 3)),
        ("fixed:3", 8, (3, 3)),
        ("fixed:12", 8, (7, 7)),
    ],
)
def test_what_the_drafter_is_asked_for(schedule: str, count: int, expected: tuple[int, int]):
    drafter = Asked()
    config = EngineConfig(schedule=schedule, auto_off=False)
    own = Engine(toy_pair()[0], drafter=drafter, config=config)
    own.generate([[3 + i] for i in range(count)], SamplingParams(max_tokens=12))
    assert drafter.asked[0] == expected


def test_a_fixed_budget_of_zero_drafts_nothing():
    drafter = Asked()
    own = Engine(toy_pair()[0], drafter=drafter, config=EngineConfig(schedule="fixed:0"))
    own.generate([[3]], SamplingParams(max_tokens=12))
    assert not drafter.asked
    own.generate([[3]], SamplingParams(max_tokens=12, tree_budget=2))
    assert drafter.asked


def test_the_scheduler_forgets_requests_that_are_done(monkeypatch: pytest.MonkeyPatch):
    gone = []
    monkeypatch.setattr(Scheduler, "release", lambda self, request_id: gone.append(request_id))
    own = Engine(toy_pair()[0], drafter=Asked())
    own.generate([[3], [4]], SamplingParams(max_tokens=3))
    (last,) = own.submit([5], SamplingParams(max_tokens=100))
    own.step()
    own.cancel(last)
    assert sorted(gone) == [0, 1, 2]
