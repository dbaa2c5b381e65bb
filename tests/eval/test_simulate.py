"""The simulator against what can be worked out by hand: queues, tokens, recorded rounds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import ConfigError, DataError
from dspark.eval.log import RunLog, read_log
from dspark.eval.prompts import Question
from dspark.eval.simulate.costs import Costs, Line
from dspark.eval.simulate.figures import compare_frontiers, frontier, point_figures
from dspark.eval.simulate.parametric import (
    PUBLISHED,
    beta_auroc,
    chain_pool,
    concentration,
    conditional_rates,
    tree_pool,
)
from dspark.eval.simulate.policy import parse_policy
from dspark.eval.simulate.pool import NEW, Pool
from dspark.eval.simulate.recorded import Shape, correction, find_records, recorded_pool
from dspark.eval.simulate.run import Limits, Outcome, Server, simulate
from dspark.eval.simulate.workload import (
    Fixed,
    Lognormal,
    Workload,
    closed_loop,
    open_loop,
    parse_lengths,
)
from dspark.request import RoundStats
from tests.conftest import examples
from tests.eval.log_of import chain_round, record_of, turn_of


class LinearSteps:
    """A forward takes base + each rows seconds."""

    def __init__(self, base: float = 1.0, each: float = 0.0) -> None:
        self.base, self.each = base, each

    def seconds(self, rows: np.ndarray, requests: np.ndarray, context: np.ndarray) -> np.ndarray:
        shape = np.broadcast_shapes(rows.shape, requests.shape, context.shape)
        return np.broadcast_to(self.base + self.each * rows, shape).copy()


def _serve(
    policy: str,
    workload: Workload,
    pool: Pool | None = None,
    *,
    costs: Costs | None = None,
    seed: int = 0,
    **limits: int | None,
) -> Outcome:
    server = Server(
        policy=parse_policy(policy, skips=False),
        costs=costs or Costs(steps=LinearSteps()),
        limits=Limits(**{"max_batch": 4, "prefill_chunk": None, **limits}),
        pool=pool,
    )
    return simulate(server, workload, seed=seed)


def _drained(
    output: list[int], *, prompt: int = 10, arrival: list[float] | None = None
) -> Workload:
    """One replica that answers these requests, in order, to the last."""
    count = len(output)
    return Workload(
        prompt=np.full((1, count), prompt),
        output=np.array([output]),
        start=np.zeros((1, count), dtype=np.int64),
        arrival=np.array([arrival or [0.0] * count]),
        is_open=arrival is not None,
        drains=True,
    )


# -- queues -----------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_plain_decoding_in_a_closed_loop_makes_a_token_a_request_and_step(concurrency: int) -> None:
    steps = LinearSteps(0.01, 0.002)
    rng = np.random.default_rng(0)
    workload = closed_loop(None, (Fixed(5), Fixed(21)), replicas=3, requests=40, warm_up=8, rng=rng)
    outcome = _serve("plain", workload, costs=Costs(steps=steps), max_batch=concurrency)
    found = point_figures(outcome)
    expected = concurrency / (0.01 + 0.002 * concurrency)
    assert found["tokens_per_second"] == pytest.approx(expected, rel=1e-9)
    assert found["tokens_per_second_per_user"] == pytest.approx(expected / concurrency, rel=1e-9)
    assert found["mean_under_way"] == pytest.approx(concurrency, rel=1e-9)


def test_requests_under_way_are_arrivals_times_the_time_they_stay() -> None:
    """Little's law: the time integral of requests in the server equals the sum of their stays."""
    rng = np.random.default_rng(1)
    drawn = open_loop(
        None,
        (Fixed(10), Lognormal(20, 0.5)),
        rate=0.1,
        replicas=1,
        requests=50,
        warm_up=0,
        rng=rng,
    )
    outcome = _serve("plain", replace(drawn, drains=True), max_batch=4)
    stays = np.concatenate(outcome.finished.whole) - np.concatenate(outcome.finished.waited)
    assert len(stays) == 50
    assert float(outcome.request_seconds.sum()) == pytest.approx(float(stays.sum()), rel=1e-9)
    assert np.concatenate(outcome.finished.waited).max() > 0


def test_a_light_load_is_served_at_its_rate_without_waiting() -> None:
    rng = np.random.default_rng(2)
    workload = open_loop(
        None, (Fixed(1), Fixed(3)), rate=0.01, replicas=4, requests=120, warm_up=10, rng=rng
    )
    outcome = _serve("plain", workload, max_batch=16)
    waited = np.concatenate(outcome.finished.waited)
    # At most one round that was under way: they take a second each.
    assert waited.max() <= 1.0
    # Prompts run elsewhere, so do first tokens; at the ends of the window some are cut.
    assert float(outcome.tokens.sum()) == pytest.approx(len(waited) * 2, abs=4 * 3 * 4)


def test_an_arrival_waits_for_a_slot() -> None:
    workload = _drained([5, 5, 2], arrival=[0.0, 0.5, 0.5])
    outcome = _serve("plain", workload, max_batch=1)
    # The first token is there on arrival, each further one takes a second.
    assert np.concatenate(outcome.finished.waited).tolist() == [0.0, 3.5, 7.5]
    assert np.concatenate(outcome.finished.whole).tolist() == [4.0, 7.5, 8.5]


def test_a_full_cache_makes_requests_wait() -> None:
    workload = _drained([5, 5, 5, 5], prompt=10)
    free = _serve("plain", workload, kv_tokens=60)
    tight = _serve("plain", workload, kv_tokens=44)
    assert free.seconds.tolist() == [4.0]
    assert tight.seconds.tolist() == [8.0]
    with pytest.raises(ConfigError, match="15 tokens does not fit into a cache of 14"):
        _serve("plain", workload, kv_tokens=14)


def test_prompts_are_run_in_chunks_that_ride_along() -> None:
    workload = _drained([2, 3], prompt=10)
    outcome = _serve("plain", workload, costs=Costs(steps=LinearSteps(0, 1)), prefill_chunk=15)
    # Rows: 15 (10 + 5); 5 and an anchor; an anchor; and an anchor for the third token.
    assert outcome.seconds.tolist() == [15 + 6 + 1 + 1]
    assert np.concatenate(outcome.finished.first_token).tolist() == [15.0, 21.0]
    assert outcome.prompt_tokens.tolist() == [20]
    rated = Costs(steps=LinearSteps(0, 1), prefill_rate=10.0)
    outcome = _serve("plain", workload, costs=rated, prefill_chunk=15)
    assert outcome.seconds.tolist() == [pytest.approx(1.5 + 1.5 + 1 + 1)]


# -- tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", ["plain", "fixed:2", "dspark", "chain:global", "chain:async", "chain:threshold:0.6"]
)
def test_answers_get_their_tokens_and_no_more(policy: str) -> None:
    pool = chain_pool((0.9, 0.8, 0.7), name="p", auroc=0.8, size=500)
    lengths = [1, 2, 3, 17, 40, 5, 8, 1, 30]
    costs = Costs(steps=LinearSteps(1.0, 0.02), draft={"chain": Line(0.1, 0.01)})
    outcome = _serve(policy, _drained(lengths), pool, costs=costs, prefill_chunk=16)
    assert float(outcome.tokens.sum()) == sum(lengths)
    assert float(outcome.committed.sum()) == sum(lengths) - len(lengths)
    assert np.concatenate(outcome.finished.tokens).sum() == sum(lengths)
    assert float(outcome.accepted.sum()) <= float(outcome.nodes.sum())


def test_a_seed_decides_everything() -> None:
    pool = chain_pool((0.9, 0.6), name="p", auroc=0.8, size=500)
    rng = [np.random.default_rng(7) for _ in range(2)]
    made = [
        closed_loop(
            None, (Fixed(10), Lognormal(30, 0.5)), replicas=2, requests=50, warm_up=5, rng=own
        )
        for own in rng
    ]
    first, second = (_serve("dspark", own, pool, seed=3) for own in made)
    other = _serve("dspark", made[0], pool, seed=4)
    assert first.seconds.tolist() == second.seconds.tolist()
    assert first.accepted.tolist() == second.accepted.tolist()
    assert first.accepted.tolist() != other.accepted.tolist()


def test_drafting_that_cannot_pay_is_left_out() -> None:
    pool = chain_pool((0.05,), name="p", size=10)
    costs = Costs(steps=LinearSteps(0.0, 1.0), draft={"chain": Line(0.0, 1.0)})
    server = Server(
        policy=parse_policy("dspark"), costs=costs, limits=Limits(max_batch=2), pool=pool
    )
    outcome = simulate(server, _drained([200, 200], prompt=1))
    assert 0 < float(outcome.asked.sum()) < 0.1 * float(outcome.request_rounds.sum())
    assert float(outcome.nodes.sum()) == 0


# -- recorded rounds --------------------------------------------------------------------------


def _three_rounds() -> Pool:
    """Accepted 2 of 3, 0 of 2, 3 of 3."""
    turn = turn_of(
        chain_round(2, 3, survival=(0.8, 0.4, 0.2)),
        chain_round(0, 2, survival=(0.5, 0.5)),
        chain_round(3, 3, survival=(0.9, 0.9, 0.9)),
        prompt=7,
    )
    return recorded_pool([record_of(turn)], name="three")


def test_whole_proposals_replay_what_was_recorded() -> None:
    outcome = _serve("chain:off", _drained([1 + 3 + 1 + 4]), _three_rounds())
    assert outcome.rounds.tolist() == [3]
    assert outcome.nodes.tolist() == [3 + 2 + 3]
    assert outcome.accepted.tolist() == [2 + 0 + 3]


def test_shorter_proposals_end_inside_the_recorded_path() -> None:
    """With one token a round: +2 (1 accepted), +1 (the third was wrong), +1, +2, +2 of 8 tokens."""
    outcome = _serve("fixed:1", _drained([1 + 8]), _three_rounds())
    assert outcome.rounds.tolist() == [5]
    assert outcome.accepted.tolist() == [1 + 0 + 0 + 1 + 1]


def test_survival_inside_a_path_is_over_that_of_the_token_before() -> None:
    pool = _three_rounds()
    second = int(pool.following[pool.starts[0], 1])
    # One token of (0.8, 0.4, 0.2) and the next, the target's own, are there: 0.2 / 0.4 is left.
    assert pool.survival[second].tolist() == [pytest.approx(0.5), -1, -1]
    assert pool.gain[second].tolist() == [0, 0, 0, 0]


def test_a_text_goes_on_with_another_one() -> None:
    outcome = _serve("chain:off", _drained([100]), _three_rounds())
    assert float(outcome.tokens.sum()) == 99  # and the first, made elsewhere
    assert float(outcome.rounds.sum()) > 30


def test_trees_yield_what_the_admitted_part_of_their_path_does() -> None:
    # The second child of the anchor is right, and its child.
    nodes = ((-1, 0.6, False), (-1, 0.3, True), (0, 0.5, False), (1, 0.2, True))
    item = RoundStats(proposed=4, verified=4, accepted=2, committed=3, depth=2, path=2, nodes=nodes)
    pool = recorded_pool([record_of(turn_of(item))], name="tree")
    assert not pool.is_chain
    assert pool.survival[0].tolist() == [0.6, 0.5, 0.3, 0.2]
    assert pool.gain[0].tolist() == [0, 0, 0, 1, 2]
    # With three nodes, the target itself says the fourth's token: nothing is left of the path.
    assert pool.following[0].tolist()[3] == NEW
    assert recorded_pool([record_of(turn_of(item))], name="few", budget=3).width == 3


def test_old_logs_of_trees_are_refused_but_for_chains() -> None:
    item = RoundStats(
        proposed=4, verified=4, accepted=1, committed=2, depth=2, survival=(0.6, 0.5), matched=1
    )
    records = [record_of(turn_of(item))]
    with pytest.raises(DataError, match="written before dspark kept their nodes"):
        recorded_pool(records, name="old")
    assert recorded_pool(records, name="old", as_chain=True).gain[0].tolist() == [0, 1, 1]


def test_survival_is_corrected_where_it_is_far_off() -> None:
    shapes = [Shape([-1, 0], [0.5, 0.5], [0, 1] if i % 10 else []) for i in range(1000)]
    first, second = correction(shapes)
    assert first == pytest.approx(906 / 506)
    assert second == pytest.approx((900 + 6 * 906 / 506) / 506)
    right = [Shape([-1], [0.9], [0] if i % 10 else []) for i in range(1000)]
    assert correction(right) == [1.0]


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    question = Question(question_id=1, category="a", turns=("x",))
    nodes = ((-1, 0.6, False), (-1, 0.3, True))
    tree = RoundStats(proposed=2, verified=2, accepted=1, committed=2, depth=1, nodes=nodes)
    drafted = record_of(turn_of(tree), question_id=1)
    plain = record_of(turn_of(RoundStats(0, 0, 0, 1, 0)), question_id=1)
    log = RunLog(tmp_path / "log.jsonl")
    log.append("old", question, plain, configuration="tree T=0")
    log.append("new", question, drafted, configuration="tree T=0")
    log.append("none", question, plain, configuration="none")
    log.close()
    found = read_log(tmp_path / "log.jsonl")
    assert found == {"tree T=0": [drafted], "none": [plain]}
    assert find_records(tmp_path / "log.jsonl", None) == [drafted]
    with pytest.raises(DataError, match="holds 0 configurations whose name has 'mtp'"):
        find_records(tmp_path / "log.jsonl", "mtp")


def test_a_log_of_before_nodes_were_kept_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    record = record_of(turn_of(chain_round(1, 2, survival=(0.5, 0.25))))
    log.append("k", Question(question_id=1, category="a", turns=("x",)), record, configuration="c")
    log.close()
    path.write_text(path.read_text().replace(", []]]", "]]"), encoding="utf-8")
    assert '"rounds": [[2, 2, 1, 2, 2, 2, 1, 1, [0.5, 0.25]]]' in path.read_text()
    assert read_log(path) == {"c": [record]}


# -- stated acceptance ------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("auroc", [None, 0.85])
def test_published_accepted_lengths_come_out(name: str, auroc: float | None) -> None:
    pool = chain_pool(conditional_rates(PUBLISHED[name]), name=name, auroc=auroc)
    for drafted, length in enumerate(PUBLISHED[name], start=1):
        assert pool.mean_committed(drafted) == pytest.approx(length, abs=0.03)


@pytest.mark.parametrize("rate", [0.3, 0.84])
@pytest.mark.parametrize("wanted", [0.6, 0.85, 0.95])
def test_confidence_has_the_auroc_asked_for(rate: float, wanted: float) -> None:
    spread = concentration(rate, wanted)
    assert beta_auroc(rate, spread) == pytest.approx(wanted, abs=1e-3)
    rng = np.random.default_rng(8)
    chance = rng.beta(rate * spread, (1 - rate) * spread, 4000)
    hit = rng.random(4000) < chance
    above = (chance[hit][:, None] > chance[~hit]).mean()
    assert above == pytest.approx(wanted, abs=0.03)


def test_stated_confidence_is_calibrated() -> None:
    pool = chain_pool((0.8, 0.6), name="p", auroc=0.85)
    for position in (0, 1):
        told = pool.survival[:, position]
        inside = (told > 0.4) & (told < 0.6)
        came = pool.gain[inside, position + 1] > position
        assert came.mean() == pytest.approx(told[inside].mean(), abs=0.03)


def test_a_stated_tree_finds_more_than_its_chain() -> None:
    rates = (0.7, 0.6, 0.5)
    chain = chain_pool(rates, name="c", auroc=0.8)
    tree = tree_pool(rates, name="t", recovery=0.5, budget=12, auroc=0.8, size=2000)
    narrow = tree_pool(rates, name="n", recovery=0.5, budget=3, width=1, auroc=0.8, size=2000)
    assert narrow.mean_committed(3) == pytest.approx(chain.mean_committed(3), abs=0.06)
    assert tree.mean_committed(12) > chain.mean_committed(3) + 0.3
    assert (np.diff(tree.survival, axis=1) <= 0).all()
    # Survival sums to the tokens that are accepted.
    told = np.where(tree.survival > 0, tree.survival, 0).sum(axis=1).mean()
    assert told == pytest.approx(tree.mean_committed(12) - 1, abs=0.06)


@examples(4, 60)
@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=4), st.integers(0, 1000))
def test_free_rows_make_longer_proposals_no_slower(rates: list[float], seed: int) -> None:
    pool = chain_pool(rates, name="p", size=2000, seed=seed)
    work = _drained([120] * 8)
    took = [
        float(_serve(f"fixed:{count}", work, pool, seed=seed, max_batch=8).seconds.sum())
        for count in range(1, len(rates) + 1)
    ]
    plain = float(_serve("plain", work, max_batch=8).seconds.sum())
    assert took[0] <= plain
    for short, long in itertools.pairwise(took):
        assert long <= 1.1 * short  # other draws; more is expected to be accepted, never less


# -- frontiers and wrong input ----------------------------------------------------------------


def _point(user: float, whole: float) -> dict[str, float]:
    return {"tokens_per_second_per_user": user, "tokens_per_second": whole}


def test_frontiers_are_compared_where_both_reach() -> None:
    base = frontier([_point(100, 100), _point(50, 400), _point(40, 300)])
    better = frontier([_point(200, 150), _point(100, 500)])
    assert base.tolist() == [[50, 400], [100, 100]]
    found = compare_frontiers(better, base, [100, 75, 150])
    first, second, third = found["at_speed"]
    assert (first["policy"], first["baseline"]) == (pytest.approx(500), pytest.approx(100))
    assert first["ratio"] == pytest.approx(5)
    # Half-way in speed, half-way in the logarithm of throughput.
    assert (second["policy"], second["baseline"]) == (pytest.approx(500), pytest.approx(200))
    assert third["baseline"] is None
    assert third["ratio"] is None
    at = {row["throughput"]: row for row in found["at_throughput"]}
    assert at[100]["policy"] == 200
    assert at[400]["policy"] == pytest.approx(100 + 100 * math.log(500 / 400) / math.log(500 / 150))


@pytest.mark.parametrize(
    ("text", "said"),
    [("mtp", "is not known"), ("fixed:x", "must be auto"), ("chain", "is not known")],
)
def test_unknown_policies_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_policy(text)


@pytest.mark.parametrize("text", ["0", "many", "lognormal:0:1", "lognormal:9", "lognormal:9:-1"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-tokens"):
        parse_lengths("--output-tokens", text)


def test_figures_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="must add more than 0"):
        conditional_rates((1.8, 1.7))
    with pytest.raises(ConfigError, match=r"\(0\.5, 0\.99\]"):
        concentration(0.5, 0.5)
    with pytest.raises(ConfigError, match="rates in"):
        chain_pool((0.5, 1.5), name="p")
    with pytest.raises(ConfigError, match="max_rows is 0"):
        Limits(max_batch=1, max_rows=0)
    with pytest.raises(ConfigError, match="needs proposals"):
        _serve("dspark", _drained([3]))
    with pytest.raises(ConfigError, match="arrival rate"):
        open_loop(
            None,
            (Fixed(1), Fixed(1)),
            rate=0.0,
            replicas=1,
            requests=1,
            warm_up=0,
            rng=np.random.default_rng(0),
        )
    with pytest.raises(ConfigError, match="lengths were to come from a trace"):
        closed_loop(
            None,
            (None, Fixed(1)),
            replicas=1,
            requests=1,
            warm_up=0,
            rng=np.random.default_rng(0),
        )
    with pytest.raises(DataError, match="holds no answer"):
        recorded_pool([], name="nothing")
