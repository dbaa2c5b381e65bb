"""The scheduler in the engine: never in the text, always in the rows."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import numpy as np
import pytest

import dspark
from dspark.draft.base import DraftContext, Drafter
from dspark.draft.combined import CombinedDrafter
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.request import SamplingParams
from dspark.tree import DraftTree, Proposal
from tests.conftest import VOCAB as LLAMA_VOCAB
from tests.conftest import random_target
from tests.eval.toys import VOCAB, ToyTarget, toy_pair

SCHEDULES = ("auto", "early-stop", "global", "async", "threshold:0.3", "fixed:2", "off")
RAGGED = [[5, 6, 7, 5, 6, 7, 5, 6], [11], [2, 3, 4, 1] * 6, [4, 3, 1, 3, 2, 3, 1, 3], [9, 9]]


def jagged(rows: int, context: int) -> float:
    """A step every four rows, and every seventh row count out of line."""
    return 1.0 + 0.3 * (rows // 4) + 0.2 * (rows % 7 == 0) + 1e-4 * context


def dear(rows: int, context: int) -> float:
    """So dear that no drafted row pays."""
    return float(rows)


@functools.cache
def drafter(kind: str, target: str, sampling: str = "greedy") -> Drafter:
    if kind == "lookup":  # knows answers to some of the prompts
        return LookupDrafter(
            corpus=[a + b for a, b in zip(RAGGED, plain(target, sampling), strict=True)][1:]
        )
    if target == "toy":
        model = ModelDrafter(toy_pair()[1], vocab_size=VOCAB)
    else:
        model = ModelDrafter(random_target(layers=2, exact=False), vocab_size=LLAMA_VOCAB)
    return model if kind == "model" else CombinedDrafter(LookupDrafter(), model)


def target(name: str) -> dspark.target.Target:
    return toy_pair()[0] if name == "toy" else random_target(layers=1, exact=True)


def engine(
    draft: Drafter | None, target_: dspark.target.Target, schedule: str = "auto", **config: object
) -> dspark.Engine:
    settings = {"auto_off": False, "step_seconds": jagged, **config}
    return dspark.Engine(
        target_, drafter=draft, config=dspark.EngineConfig(schedule=schedule, **settings)
    )


PARAMS = {
    "greedy": SamplingParams(max_tokens=9),
    "coupled": SamplingParams(max_tokens=9, temperature=1.0, seed=3, top_k=12),
    "match": SamplingParams(max_tokens=9, temperature=0.7, seed=3, rule="sample-match"),
}


@functools.cache
def plain(name: str, sampling: str) -> list[list[int]]:
    own = dspark.Engine(target(name))
    return [result.token_ids for result in own.generate(RAGGED, PARAMS[sampling])]


# -- what the schedule must not change -------------------------------------------------------------


CASES = [
    ("toy", "model", "coupled"),
    ("toy", "combined", "greedy"),
    ("toy", "lookup", "match"),
    ("llama", "model", "greedy"),
    *(
        pytest.param("toy", *cell, marks=pytest.mark.slow)
        for cell in (
            ("model", "greedy"),
            ("model", "match"),
            ("combined", "coupled"),
            ("combined", "match"),
        )
    ),
]


@pytest.mark.parametrize(("name", "kind", "sampling"), CASES)
def test_the_text_does_not_depend_on_the_schedule(name: str, kind: str, sampling: str) -> None:
    verified = set()
    for schedule in SCHEDULES:
        results = engine(drafter(kind, name, sampling), target(name), schedule).generate(
            RAGGED, PARAMS[sampling], priority=[1, 5, 1, 0.2, 1]
        )
        assert [result.token_ids for result in results] == plain(name, sampling), schedule
        verified.add(sum(result.stats.verified for result in results))
    assert len(verified) > 2  # the schedules did differ


@pytest.mark.parametrize("schedule", ["auto", "async"])
def test_the_text_does_not_depend_on_measured_time(schedule: str) -> None:
    own = engine(drafter("model", "toy"), target("toy"), schedule, step_seconds=None, auto_off=True)
    for _ in range(3):
        results = own.generate(RAGGED, PARAMS["coupled"])
        assert [result.token_ids for result in results] == plain("toy", "coupled")


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_the_global_search_is_refused_where_it_would_change_the_law(rule: str) -> None:
    own = engine(drafter("model", "toy"), target("toy"), "global")
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=1, rule=rule)
    good, refused = own.generate([[5], [5]], [SamplingParams(max_tokens=4), params])
    assert good.error is None
    assert f"'global' with rule '{rule}'" in refused.error
    assert "early-stop" in refused.hint
    with pytest.raises(dspark.DataError, match="'global' with rule"):
        next(own.stream([5], params))
    assert own.generate([[5]], replace(params, draft=False))[0].error is None  # nothing is cut


def test_a_schedule_that_is_none_is_refused() -> None:
    with pytest.raises(dspark.ConfigError, match="schedule is 'best'"):
        dspark.EngineConfig(schedule="best")


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "global"])
@pytest.mark.parametrize("rule", ["greedy", "rejection"])
def test_a_tree_budget_of_its_own_is_a_promise(schedule: str, rule: str) -> None:
    temperature = 0.0 if rule == "greedy" else 1.0
    params = SamplingParams(
        max_tokens=20, temperature=temperature, rule=rule, seed=1, tree_budget=7, width=1, depth=7
    )
    own = engine(drafter("model", "toy"), target("toy"), schedule, step_seconds=dear)
    (result,) = own.generate([[5, 6]], params)
    assert result.stats.verified == result.stats.proposed > 0


def test_where_rows_are_dear_nothing_is_verified_and_soon_nothing_drafted() -> None:
    calls = []

    class Counted(ModelDrafter):
        def propose(self, contexts: list[DraftContext]) -> list[Proposal]:
            calls.append(len(contexts))
            return super().propose(contexts)

    def counted(auto_off: bool) -> dspark.GenerationResult:
        calls.clear()
        draft = Counted(toy_pair()[1], vocab_size=VOCAB)
        own = engine(draft, target("toy"), step_seconds=dear, auto_off=auto_off)
        (result,) = own.generate([[5, 6]], SamplingParams(max_tokens=120, ignore_eos=True))
        assert result.stats.rounds == 119
        return result

    assert counted(auto_off=True).stats.verified == 0
    assert 5 <= sum(calls) < 15
    counted(auto_off=False)
    assert sum(calls) > 100


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_no_more_is_drafted_than_may_be_taken_unless_that_would_tell_of_outcomes(rule: str) -> None:
    """Rows beyond two are dear, so that of a longer proposal at most one node is taken."""
    asked = []

    class Counted(ModelDrafter):
        def propose(self, contexts: list[DraftContext]) -> list[Proposal]:
            asked.extend(context.budget for context in contexts)
            return super().propose(contexts)

    def cliff(rows: int, context: int) -> float:
        return 1.0 if rows <= 2 else 10.0 * rows

    draft = Counted(toy_pair()[1], vocab_size=VOCAB)
    own = engine(draft, target("toy"), step_seconds=cliff)
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=2, rule=rule, ignore_eos=True)
    own.generate([[5, 6]], params)
    assert asked[0] == asked[3] == max(asked) > 4
    assert set(asked[10:]) == ({4} if rule == "coupled" else {asked[0]})


def test_drafting_resumes_as_soon_as_a_first_node_pays_again() -> None:
    price = [dear]
    draft = drafter("model", "toy")
    own = engine(
        draft,
        target("toy"),
        auto_off=True,
        step_seconds=lambda rows, context: price[0](rows, context),
    )
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    (request,) = own.submit([5, 6], params)
    for _ in range(40):
        own.step()
    assert request.stats.verified == 0
    offered = request.stats.proposed
    own.step()
    assert request.stats.proposed == offered  # not even drafted
    # A profile does not change; only here, where its readings of another context are new ones.
    price[0] = lambda rows, context: 1.0 + 0.01 * rows
    for _ in range(60):
        own.step()
    assert request.stats.verified > 0


def test_the_schedule_follows_the_load() -> None:
    """Rows beyond eight are dear: one request may use them, eight leave none."""

    def cliff(rows: int, context: int) -> float:
        return 1.0 if rows <= 8 else 0.5 * rows

    shares = []
    for count in (1, 8):
        own = engine(drafter("model", "toy"), target("toy"), step_seconds=cliff)
        results = own.generate([[5, 6 + i] for i in range(count)], SamplingParams(max_tokens=30))
        rounds = sum(r.stats.rounds for r in results)
        shares.append(sum(r.stats.verified for r in results) / rounds)
    assert shares[0] > 3
    assert shares[1] < 0.2


def test_prompt_rows_that_ride_along_count() -> None:
    """A prompt's chunk takes the cheap rows while it is there."""

    def cliff(rows: int, context: int) -> float:
        return 1.0 if rows <= 16 else 0.5 * rows

    own = engine(
        drafter("model", "toy"),
        target("toy"),
        step_seconds=cliff,
        limits=dspark.RoundLimits(prefill_chunk=15, keep_rounds=True),
    )
    (first,) = own.submit([5, 6], SamplingParams(max_tokens=60))
    for _ in range(4):
        own.step()
    own.submit([3, 4] * 30, SamplingParams(max_tokens=2))
    for _ in range(8):
        own.step()
    verified = [entry.verified for entry in first.stats.round_log]
    assert verified[2] > 5
    assert verified[3:7] == [0] * 4
    assert verified[9] > 5


def test_exact_modes_most_nodes_are_kept_to() -> None:
    inner = toy_pair()[0]
    limited = ToyTarget(inner.table)
    limited.exactness = replace(inner.exactness, max_nodes=3)
    for schedule in SCHEDULES:
        limits = dspark.RoundLimits(keep_rounds=True)
        own = engine(
            drafter("model", "toy"), limited, schedule, limits=limits, step_seconds=lambda r, c: 1.0
        )
        (result,) = own.generate([[5, 6]], SamplingParams(max_tokens=20))
        assert max(entry.verified for entry in result.stats.round_log) <= 3


def test_rows_go_by_priority() -> None:
    verified = []
    for priority in ([1.0, 1.0], [9.0, 1.0], [1.0, 9.0]):
        own = engine(
            drafter("model", "toy"), target("toy"), step_seconds=lambda rows, c: 2.0 + 0.8 * rows
        )
        results = own.generate([[5, 6]] * 2, SamplingParams(max_tokens=40), priority=priority)
        verified.append([result.stats.verified for result in results])
    assert verified[0][0] == verified[0][1]
    assert verified[1][0] > 2 * verified[1][1]
    assert verified[2][1] > 2 * verified[2][0]


@pytest.mark.parametrize("priority", [0.0, -1.0, float("nan"), float("inf"), [1.0, 2.0, 3.0]])
def test_a_priority_out_of_range_is_refused(priority: object) -> None:
    own = engine(None, target("toy"))
    with pytest.raises(dspark.ConfigError, match="priorit"):
        own.generate([[5], [6]], priority=priority)
    assert own.num_unfinished == 0


# -- learning and failing --------------------------------------------------------------------------


class Boastful(ModelDrafter):
    """States that every token is certain."""

    def propose(self, contexts: list[DraftContext]) -> list[Proposal]:
        return [
            replace(p, tree=replace(p.tree, survival=np.ones(p.tree.num_nodes)))
            for p in super().propose(contexts)
        ]


def test_a_boastful_draft_is_seen_through(caplog: pytest.LogCaptureFixture) -> None:
    limits = dspark.RoundLimits(keep_rounds=True)
    own = engine(
        Boastful(toy_pair()[1], vocab_size=VOCAB),
        target("toy"),
        step_seconds=lambda rows, context: 1.0 + 0.3 * rows,
        limits=limits,
    )
    with caplog.at_level(logging.INFO, logger="dspark"):
        (result,) = own.generate([[5, 6]], SamplingParams(max_tokens=300, ignore_eos=True))
    verified = [entry.verified for entry in result.stats.round_log]
    assert verified[0] == 15
    assert np.mean(verified[-40:]) < 5
    assert "times as often as their survival says" in caplog.text


class Crooked(ModelDrafter):
    """Survival that rises from parent to child, against the rules of trees."""

    def propose(self, contexts: list[DraftContext]) -> list[Proposal]:
        tree = DraftTree.build([1, 2], [-1, 0])
        return [Proposal(replace(tree, survival=np.array([0.1, self.deep]))) for _ in contexts]

    deep = 0.9


@pytest.mark.parametrize("deep", [0.9, float("nan")])
def test_a_tree_that_breaks_its_promises_costs_speed_and_not_the_answer(
    deep: float, caplog: pytest.LogCaptureFixture
) -> None:
    draft = Crooked(toy_pair()[1], vocab_size=VOCAB)
    draft.deep = deep
    own = engine(draft, target("toy"), "fixed:1")
    results = own.generate(RAGGED, PARAMS["greedy"])
    assert [result.token_ids for result in results] == plain("toy", "greedy")
    assert "decoding plainly" in caplog.text
