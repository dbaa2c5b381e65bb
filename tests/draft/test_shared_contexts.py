"""Beginnings that a drafter of hidden states takes over from other requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import dspark
from dspark.draft.combined import CombinedDrafter
from dspark.draft.dspark import DSparkDrafter, DSparkDrafterConfig
from dspark.draft.lookup import LookupDrafter
from dspark.request import Rule, SamplingParams
from tests.conftest import random_target
from tests.draft.dspark_models import STYLES, make_module, paths_of
from tests.draft.law_models import drafter_of, target_of

WHOLE = DSparkDrafterConfig(beams=50, min_survival=0.0)


def check_same_offer(one, two):
    assert paths_of(one.tree) == paths_of(two.tree)
    np.testing.assert_allclose(one.tree.survival, two.tree.survival, rtol=1e-4)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("state", ["live", "waiting", "ended", "ended while it waited"])
def test_a_request_goes_on_from_what_another_one_has(given, style, state):
    module = make_module(style)
    drafter = DSparkDrafter(module, config=WHOLE)
    first = given(31)
    if "wait" in state:
        drafter.observe([first])
    else:
        drafter.propose([first])
    if "ended" in state:
        drafter.release(0)
    whole = given(44)
    assert drafter.covered(whole.tokens[:-1]) == 30
    drafter.adopt(1, whole.tokens[:30])
    second = replace(given(44, new=13), request_id=1)
    check_same_offer(
        drafter.propose([second])[0], DSparkDrafter(module, config=WHOLE).propose([whole])[0]
    )


@pytest.mark.parametrize("size", [1, 12, 29])
def test_a_part_of_a_beginning_is_as_good(given, size):
    """The target may have less of it, or none."""
    module = make_module()
    drafter = DSparkDrafter(module)
    drafter.propose([given(31)])
    drafter.adopt(1, given(31).tokens[:size])
    second = replace(given(44, new=43 - size), request_id=1)
    check_same_offer(drafter.propose([second])[0], DSparkDrafter(module).propose([given(44)])[0])


@pytest.mark.parametrize(("style", "length", "covered"), [("qwen3", 9, 9), ("sliding", 9, 0)])
def test_what_a_window_has_passed_is_not_offered(given, style, length, covered):
    """Two hundred rounds on, a window of six has been moved past the ninth position."""
    drafter = DSparkDrafter(make_module(style))
    drafter.propose([given(10)])
    for size in range(11, 210):
        drafter.observe([given(size, new=1)])
        drafter.propose([given(size, new=0)])
    text = given(400).tokens
    fork = [*text[:length], (text[length] + 1) % 90, 5, 6]
    assert drafter.covered(fork) == covered
    assert drafter.covered(text[:300]) == 208


def test_nothing_is_covered_behind_a_gap(given):
    drafter = DSparkDrafter(make_module())
    assert drafter.covered(given(30).tokens) == 0
    drafter.propose([given(20, new=5)])  # fourteen positions that nobody has
    assert drafter.covered(given(30).tokens) == 0


def test_requests_that_ended_are_forgotten_in_time(given):
    drafter = DSparkDrafter(make_module())
    for seed in range(6):
        drafter.propose([given(20, seed=seed)])
        drafter.release(seed)
    assert [drafter.covered(given(30, seed=seed).tokens) for seed in range(6)] == [
        *(0, 0),
        *(19, 19, 19, 19),
    ]


def test_an_id_that_comes_again_begins_anew(given):
    module = make_module()
    drafter = DSparkDrafter(module)
    drafter.observe([given(20)])
    drafter.release(0)
    other = replace(given(31, seed=3), request_id=0)
    check_same_offer(
        drafter.propose([other])[0], DSparkDrafter(module).propose([given(31, seed=3)])[0]
    )


def test_of_two_drafters_both_have_to_cover(given):
    first, second = DSparkDrafter(make_module()), DSparkDrafter(make_module("llama"))
    both = CombinedDrafter(first, second)
    text = given(30).tokens
    first.propose([given(20)])
    second.propose([given(12)])
    assert both.shares_context
    assert both.covered(text) == 11
    both.adopt(7, text[:11])
    assert first.covered(text) == 19
    beside_text = CombinedDrafter(LookupDrafter(), first)
    assert beside_text.shares_context
    assert beside_text.covered(text) == 19
    assert not CombinedDrafter(first, drafter_of("eagle3")).shares_context
    assert CombinedDrafter(first, drafter_of("eagle3")).covered(text) == 0


# -- behind the engine --------------------------------------------------------------------------


def make_engine(kind="dspark"):
    target = random_target("llama", exact=True, layers=2)
    options = {"num_target_layers": target.info.num_layers, "target_layer_ids": (-1, 0)}
    module = make_module("llama", "vanilla", **options)
    drafter = DSparkDrafter(module, config=WHOLE)
    if kind == "combined":
        drafter = CombinedDrafter(LookupDrafter(), drafter)
    config = dspark.EngineConfig(auto_off=False)
    return dspark.Engine(target, drafter=None if kind == "plain" else drafter, config=config)


PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, tree_budget=8)
PROMPT = [3 + i % 90 for i in range(300)]


@pytest.mark.parametrize("kind", ["dspark", "combined"])
def test_the_next_turn_of_a_chat_shares_the_last_one(kind):
    engine, fresh = make_engine(kind), make_engine(kind)
    (first,) = engine.generate([PROMPT], PARAMS)
    turn = [*PROMPT, *first.token_ids, 7, 8, 9]
    (second,) = engine.generate([turn], PARAMS)
    (alone,) = fresh.generate([turn], PARAMS)
    assert second.stats.shared_prefix >= len(PROMPT) + 11  # but for the last token, which is new
    assert alone.stats.shared_prefix == 0
    assert second.token_ids == alone.token_ids
    assert second.stats.accepted == alone.stats.accepted
    assert second.stats.verified == alone.stats.verified > 0


@pytest.mark.parametrize("kind", ["dspark", "combined"])
def test_samples_of_a_prompt_run_it_once(kind):
    params = replace(PARAMS, temperature=1.0, n=3, seed=4, rule=Rule.COUPLED)
    results = make_engine(kind).generate([PROMPT], params)
    assert [r.stats.shared_prefix for r in results] == [0, 299, 299]
    plain = make_engine("plain").generate([PROMPT], params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert all(r.stats.verified > 5 for r in results)


def test_samples_do_not_wait_for_a_prompt_that_they_cannot_share():
    engine = dspark.Engine(target_of("llama"), drafter=drafter_of("eagle3"))
    params = replace(PARAMS, temperature=1.0, n=3, seed=4)
    engine.submit([3 + i % 3 for i in range(40)], params)
    engine.step()
    assert engine.stats.rows >= 120


def test_a_drafter_that_fails_over_a_beginning_costs_speed_only(monkeypatch, caplog):
    engine = make_engine()
    first = engine.generate([PROMPT], PARAMS)

    def breaks(tokens):
        raise RuntimeError("out of order")

    monkeypatch.setattr(engine.drafter, "covered", breaks)
    again = engine.generate([PROMPT], PARAMS)
    assert "failed, decoding plainly: out of order" in caplog.text
    assert again[0].token_ids == first[0].token_ids
    assert again[0].stats.verified == 0
