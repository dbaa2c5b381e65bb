"""Constraints in the engine: the text stays whatever drafts, forced tokens, what goes wrong."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

import dspark
from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.draft.lookup import LookupDrafter
from dspark.errors import ConfigError
from dspark.grammar.after import AfterToken
from dspark.payoff import PayoffSwitch
from dspark.registry import LoadOptions
from dspark.request import FinishReason, SamplingParams
from dspark.verify.scheduler import Scheduler
from tests.draft import law_models
from tests.eval.toys import VOCAB, ToyTarget
from tests.grammar.toys import (
    AUTOMATON,
    DRAFTERS,
    END,
    ENDLESS,
    FORCED,
    PROMPT,
    Automaton,
    BigramTarget,
    drafter_of,
    ending,
    engine_of,
    toy_codec,
    toy_target,
)
from tests.paged_toy import PagedTarget

GREEDY = SamplingParams(max_tokens=24, grammar=Automaton())
SAMPLED = replace(GREEDY, temperature=1.0, seed=5)
LONG = replace(SAMPLED, grammar=Automaton(ENDLESS), max_tokens=40, temperature=2.0)
PROMPTS = [[*PROMPT, *tail] for tail in ((), (1,), (8, 2), (5, 5, 3), (6,), (7, 4), (2,), (3, 3))]


def plain_texts(params: SamplingParams, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """By plain decoding, one after the other."""
    return [list(_plain_text(params, tuple(prompt))) for prompt in prompts]


@functools.cache
def _plain_text(params: SamplingParams, prompt: tuple[int, ...]) -> list[int]:
    (result,) = engine_of(None).generate([list(prompt)], replace(params, draft=False))
    return result.token_ids


def is_within(text: list[int], table: Mapping[str, Mapping[int, str]] = AUTOMATON) -> bool:
    state = "start"
    for token in text:
        if token not in table.get(state, {}):
            return False
        state = table[state][token]
    return True


def test_plain_decoding_takes_the_best_token_that_is_allowed() -> None:
    (text,) = plain_texts(GREEDY, PROMPTS[:1])
    table, grammar, so_far = toy_target().table.numpy(), Automaton(), list(PROMPTS[0])
    for at, token in enumerate(text):
        mask = grammar.mask(grammar.after("start", text[:at]))
        row = table[so_far[-2] * VOCAB + so_far[-1]]
        assert token == max(mask.nonzero()[0], key=lambda t: row[t])
        so_far.append(token)
    assert is_within(text)


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        # "combined" has both in it.
        pytest.param(kind, 4, marks=pytest.mark.slow if kind in ("lookup", "model") else ())
        for kind in DRAFTERS
    ]
    + [("combined", 1)],
)
def test_a_draft_changes_nothing(kind: str, batch: int) -> None:
    prompts = PROMPTS[::2]
    for params in (GREEDY, SAMPLED, replace(SAMPLED, rule="sample-match", top_k=3)):
        engine = engine_of(drafter_of(kind), max_batch=batch)
        results = engine.generate(prompts, params)
        assert [result.token_ids for result in results] == plain_texts(params, prompts)
        assert sum(result.stats.accepted for result in results) > 0


def test_requests_without_a_grammar_do_not_notice_the_others() -> None:
    free = SamplingParams(max_tokens=24, temperature=1.0, seed=3, logprobs=2)
    alone = engine_of(drafter_of("model")).generate(PROMPTS[:4], free)
    mixed = engine_of(drafter_of("model")).generate(PROMPTS, [free] * 4 + [SAMPLED] * 4)
    for one, other in zip(alone, mixed[:4], strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    assert not any(is_within(result.token_ids) for result in mixed[:4])
    assert all(is_within(result.token_ids) for result in mixed[4:])


@pytest.mark.parametrize("kind", [pytest.param("vanilla", marks=pytest.mark.slow), "eagle3, few"])
def test_drafts_that_read_hidden_states_keep_to_the_grammar(kind: str) -> None:
    """The second has a vocabulary of four tokens, which at times leaves nothing that is allowed."""
    table = {"start": {1: "f", 3: "start", 4: "start"}, "f": {5: "g"}, "g": {0: "start"}}
    model = copy.deepcopy(law_models.plain_model("llama"))
    options = LoadOptions(name="small", exact=False)
    target = wrap_model(model, adapter_for("llama"), options, eos_token_ids=(2,))
    grammar = Automaton(table, vocab_size=6)
    grammar.end_tokens = frozenset({2})
    prompts = [[1, 5, 3, 1], [4, 4, 0], [3, 5, 1, 0, 3]]
    for rule, own in (("coupled", {}), ("rejection", {"width": 2}), ("block", {"width": 1})):
        params = SamplingParams(
            max_tokens=18, temperature=2.0, seed=4, rule=rule, grammar=grammar, **own
        )
        engine = engine_of(law_models.drafter_of(kind), target)
        results = engine.generate(prompts, params)
        assert all(result.error is None for result in results)
        assert all(is_within(result.token_ids, table) for result in results)
        assert sum(result.stats.forced for result in results) > 0
        assert sum(r.stats.accepted - r.stats.forced for r in results) > 0
        if rule == "coupled":
            plain = engine_of(None, target).generate(prompts, replace(params, draft=False))
            assert [r.token_ids for r in results] == [r.token_ids for r in plain]


# -- forced tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["none", "lookup", pytest.param("model", marks=pytest.mark.slow), "anchor-bound"]
)
def test_forced_tokens_save_rounds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, prompts = LONG, PROMPTS[:4]
    free = engine_of(drafter_of(kind)).generate(prompts, params)
    assert sum(result.stats.forced for result in free) > 3
    monkeypatch.setattr("dspark.verify.constraint.PathMasks.forced", lambda self, most: [])
    without = engine_of(drafter_of(kind)).generate(prompts, params)
    assert sum(result.stats.forced for result in without) == 0
    assert [result.token_ids for result in free] == [result.token_ids for result in without]
    rounds = [sum(result.stats.rounds for result in results) for results in (free, without)]
    # A model that knows the mask drafts the forced tokens itself, one forward of its own each.
    assert rounds[0] < rounds[1] if kind in ("none", "lookup") else rounds[0] < 1.1 * rounds[1]


def test_without_a_drafter_the_forced_tokens_are_all_that_is_drafted() -> None:
    limits = dspark.RoundLimits(keep_rounds=True)
    engine = engine_of(None, limits=limits)
    results = engine.generate(PROMPTS, LONG)
    for result in results:
        stats = result.stats
        assert stats.proposed == stats.verified
        assert stats.accepted == stats.forced
        assert stats.committed == stats.rounds + stats.forced == len(result.token_ids) - 1
        for entry in stats.round_log:
            assert entry.forced == entry.verified in (0, 1, len(FORCED) - 1, len(FORCED))
            assert entry.survival == (1.0,) * len(entry.survival)


@pytest.mark.parametrize("limit", [{"tree_budget": 2}, {"depth": 2}, {"tree_budget": 0}])
def test_forced_tokens_keep_to_the_requests_limits(limit: dict[str, int]) -> None:
    params = replace(LONG, **limit)
    engine = engine_of(drafter_of("lookup"), limits=dspark.RoundLimits(keep_rounds=True))
    results = engine.generate(PROMPTS[:3], params)
    assert [result.token_ids for result in results] == plain_texts(params, PROMPTS[:3])
    depths = [entry.depth for result in results for entry in result.stats.round_log]
    assert max(depths) == min(limit.values())


def test_the_scheduler_sees_what_is_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cost and no record of poor drafts keeps forced tokens back, nor do they enter it."""
    noted: list = []
    gains: list[int] = []
    observe, drafted = Scheduler.observe, PayoffSwitch.drafted
    monkeypatch.setattr(
        Scheduler, "observe", lambda self, o: (noted.extend(o), observe(self, o))[1]
    )
    monkeypatch.setattr(
        PayoffSwitch, "drafted", lambda self, *own: (gains.append(own[0]), drafted(self, *own))[1]
    )
    engine = engine_of(
        drafter_of("model"),
        schedule="auto",
        step_seconds=lambda rows, context: 1.0 + 0.02 * rows,
        limits=dspark.RoundLimits(keep_rounds=True, max_rows=1 << 10),
    )
    params, prompts = replace(LONG, max_tokens=50), PROMPTS[:4]
    results = engine.generate(prompts, params)
    log = [entry for result in results for entry in result.stats.round_log]
    assert sum(entry.forced for entry in log) == sum(r.stats.forced for r in results) > 5
    assert len(noted) == sum(entry.proposed > entry.forced for entry in log)
    assert sum(len(o.tree.token) for o in noted) == sum(e.verified - e.forced for e in log)
    assert all(o.tree.parent[0] == -1 and o.tree.depth[0] == 1 for o in noted if o.tree.num_nodes)
    assert sum(o.accepted for o in noted) >= sum(e.accepted - e.forced for e in log if e.proposed)
    plain = sum(e.committed - e.forced for e in log if e.proposed > e.forced)
    assert sum(gains) == plain

    costly = engine_of(
        drafter_of("model"), schedule="auto", step_seconds=lambda rows, context: float(rows) ** 2
    )
    results = costly.generate(prompts, params)
    assert sum(r.stats.forced for r in results) > 15
    assert sum(r.stats.verified - r.stats.forced for r in results) == 0


# -- the life of a request -------------------------------------------------------------------------


def test_a_request_that_gives_way_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark.intake._HEADROOM_TOKENS", 0)
    target = ending(PagedTarget(toy_target().table))
    params = replace(SAMPLED, grammar=Automaton(ENDLESS), max_tokens=30)
    engine = engine_of(drafter_of("lookup"), target, memory_limit=40)
    results = engine.generate(PROMPTS, params)
    assert engine.stats.preemptions > 3
    assert [result.token_ids for result in results] == plain_texts(params)
    assert all(is_within(result.token_ids) for result in results)


def test_samples_of_one_prompt_go_their_own_ways() -> None:
    params = replace(SAMPLED, n=5, temperature=2.0)
    results = engine_of(drafter_of("model")).generate(PROMPTS[:2], params)
    texts = [tuple(result.token_ids) for result in results]
    assert len(set(texts[:5])) > 3
    assert all(is_within(list(text)) for text in texts)
    again = engine_of(None).generate(PROMPTS[:2], replace(params, draft=False))
    assert texts == [tuple(result.token_ids) for result in again]


def test_a_cancelled_request_leaves_the_others_alone() -> None:
    engine = engine_of(drafter_of("lookup"), max_batch=2)
    first, second = (engine.submit(prompt, GREEDY)[0] for prompt in PROMPTS[:2])
    engine.step()
    engine.cancel(first)
    while engine.num_unfinished:
        engine.step()
    assert first.result().finish_reason is FinishReason.CANCELLED
    assert second.result().token_ids == plain_texts(GREEDY, PROMPTS[1:2])[0]


def test_logprobs_are_those_of_the_whole_law() -> None:
    (result,) = engine_of(drafter_of("model")).generate(PROMPTS[:1], replace(SAMPLED, logprobs=1))
    before = (*PROMPTS[0], *result.token_ids)
    for at, entry in enumerate(result.logprobs):
        pair = before[at + len(PROMPTS[0]) - 2 : at + len(PROMPTS[0])]
        row = toy_target().table[pair[0] * VOCAB + pair[1]].log_softmax(0)
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-5)
        assert entry.top[0][0] == int(row.argmax())
    allowed = Automaton().mask("start")
    assert any(not allowed[entry.top[0][0]] for entry in result.logprobs)


def test_masks_act_before_the_law_is_cut() -> None:
    """Top-k counts allowed tokens: were it to act first, nothing might be left."""
    params = replace(SAMPLED, top_k=1, temperature=0.7)
    results = engine_of(None).generate(PROMPTS, params)
    assert [result.error for result in results] == [None] * len(PROMPTS)
    assert [result.token_ids for result in results] == plain_texts(GREEDY)


# -- ends, and none --------------------------------------------------------------------------------


def test_a_complete_text_can_only_end() -> None:
    once = {"start": {7: "middle"}, "middle": {8: "end"}, "end": {END: ""}}
    for params in (GREEDY, SAMPLED):
        (result,) = engine_of(drafter_of("lookup")).generate(
            PROMPTS[:1], replace(params, grammar=Automaton(once))
        )
        assert result.token_ids == [7, 8, END]
        assert result.finish_reason is FinishReason.STOP
        assert result.stats.rounds == 1  # all but the first token were forced


def test_a_dead_end_fails_its_request_alone() -> None:
    dead = {"start": {7: "on", 3: "on"}, "on": {7: "on", 3: "on", 9: "gone"}, "gone": {}}
    params = replace(SAMPLED, grammar=Automaton(dead), max_tokens=200)
    engine = engine_of(drafter_of("model"))
    results = engine.generate(PROMPTS[:4], [params, GREEDY, params, SAMPLED])
    for result in results[::2]:
        assert result.finish_reason is FinishReason.ERROR
        assert result.error.count(".") == 1
        assert "no token that could come next" in result.error
        assert result.token_ids[-1] == 9
        assert set(result.token_ids[:-1]) <= {3, 7}
    assert results[1].token_ids == plain_texts(GREEDY, PROMPTS[1:2])[0]
    assert results[3].token_ids == plain_texts(SAMPLED, PROMPTS[3:4])[0]


def test_bad_words_and_grammar_that_leave_nothing_are_a_dead_end() -> None:
    bias = dict.fromkeys((1, 2, 3), -100.0)
    fine = engine_of(None).generate(PROMPTS[:1], replace(GREEDY, logit_bias=bias))[0]
    assert fine.error is None  # a bias is no ban
    table = toy_target().table.clone()
    table[:, 1:4] = -math.inf
    target = ending(ToyTarget(table))
    (result,) = engine_of(drafter_of("lookup"), target).generate(PROMPTS[:1], GREEDY)
    assert "no token that could come next" in result.error


@pytest.mark.parametrize("kind", ["none", "lookup", "model"])
def test_a_constraint_that_breaks_fails_its_request_alone(kind: str) -> None:
    class Broken(Automaton):
        def after(self, state, text):
            if len(text) > 0 and text[-1] == 5:
                raise ConfigError("the grammar broke.")
            return super().after(state, text)

    params = replace(LONG, grammar=Broken(ENDLESS))
    engine = engine_of(drafter_of(kind))
    results = engine.generate(PROMPTS[:2], [params, SAMPLED])
    assert results[0].error == "the grammar broke."
    assert results[1].token_ids == plain_texts(SAMPLED, PROMPTS[1:2])[0]
    again = engine.generate(PROMPTS[:2], SAMPLED)  # the drafter is still asked
    assert again[1].token_ids == results[1].token_ids
    assert kind == "none" or sum(r.stats.proposed - r.stats.forced for r in again) > 0


def test_masks_of_other_widths_fit() -> None:
    """A head with more rows than the tokenizer has tokens, or with fewer."""
    for size in (12, VOCAB + 9):
        grammar = Automaton(vocab_size=size)
        params = replace(SAMPLED, grammar=grammar, temperature=2.0)
        results = engine_of(drafter_of("lookup")).generate(PROMPTS, params)
        assert all(is_within(result.token_ids) for result in results)


def test_all_end_tokens_of_the_target_end_a_text_and_none_is_text() -> None:
    target = ToyTarget(toy_target().table)
    target.info = replace(target.info, eos_token_ids=(12, 13, 4))
    results = engine_of(None, target).generate(PROMPTS * 4, replace(SAMPLED, n=2, seed=1))
    ends = {result.token_ids[-1] for result in results if result.finish_reason is FinishReason.STOP}
    assert {12, 13} <= ends <= {12, 13, 4}
    for result in results:
        body = result.token_ids[:-1]
        assert is_within(body)
        assert not {END, 4} & set(body)  # 4 is text in the table, but ends this target's


@pytest.mark.parametrize("kind", ["none", pytest.param("lookup", marks=pytest.mark.slow), "model"])
def test_a_grammar_may_begin_behind_a_token(kind: str) -> None:
    marker = 11
    params = replace(SAMPLED, grammar=AfterToken(Automaton(), marker), max_tokens=40)
    results = engine_of(drafter_of(kind)).generate(PROMPTS, params)
    assert [result.token_ids for result in results] == plain_texts(params)
    for text in (result.token_ids for result in results):
        end = text.index(marker) if marker in text else len(text)
        assert END not in text[:end]
        assert is_within(text[end + 1 :])
    reached = [text for text in (r.token_ids for r in results) if marker in text]
    assert any(not is_within(text[: text.index(marker)]) for text in reached)
    assert any(END in text for text in reached)


def test_a_stop_string_may_cut_a_text() -> None:
    target = BigramTarget(3)
    engine = dspark.Engine(target, codec=toy_codec())
    letters = dict.fromkeys(range(40, 90), "on")
    size = target.info.vocab_size
    grammar = Automaton({"start": letters, "on": letters}, vocab_size=size)
    params = SamplingParams(max_tokens=50, grammar=grammar, temperature=3.0, seed=1)
    whole = engine.generate(["Anna"], params)[0]
    stop = whole.text[5:7]
    cut = engine.generate(["Anna"], replace(params, stop=(stop,)))[0]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text == whole.text[: whole.text.index(stop)]


# -- refusals --------------------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="ignore_eos"):
        SamplingParams(grammar=Automaton(), ignore_eos=True)
    with pytest.raises(ConfigError, match=r"grammar is 'a\|b'"):
        SamplingParams(grammar="a|b")
    endless = ToyTarget(toy_target().table)
    (result,) = engine_of(None, endless).generate(PROMPTS[:1], GREEDY)
    assert "end token" in result.error


def test_lookup_goes_on_behind_forced_tokens() -> None:
    """Its match is asked for where the forced tokens end."""
    seen: list[tuple[int, ...]] = []
    drafter = LookupDrafter()
    propose = drafter.propose
    drafter.propose = lambda contexts: (
        seen.extend(tuple(c.tokens) for c in contexts),
        propose(contexts),
    )[1]
    table = torch.zeros_like(toy_target().table)
    table[:, 1] = 5.0  # token 1 as often as it is allowed, which forces three more
    table[:, 7] = 3.0
    engine = engine_of(drafter, ending(ToyTarget(table)))
    params = replace(GREEDY, max_tokens=41)
    (result,) = engine.generate(PROMPTS[:1], params)
    assert result.token_ids[:10] == [1, 4, 5, 6, 7, 1, 4, 5, 6, 7]
    assert any(tokens[-3:] == FORCED for tokens in seen)
    assert result.stats.accepted > 2 * result.stats.forced
