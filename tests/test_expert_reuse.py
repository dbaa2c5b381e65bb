"""Experts that forwards wake: counted while rounds run, and what they make of costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from dspark import Engine, EngineConfig, SamplingParams
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.expert_reuse import ExpertCounter, ExpertReuse, PricesExperts
from dspark.payoff import RoundCosts
from dspark.target import BatchPart, TargetOutput, TokenBatch
from dspark.verify.scheduler import Load, Offer, Scheduler
from tests.conftest import random_target
from tests.eval.toys import VOCAB, ToyCache, ToyTarget, toy_pair
from tests.verify.scheduling import chain_of

CHOSEN = 2


class Prices:
    """Steps of 10 s for the first row, and 1 s for every expert woken beyond its two.

    The measured rows shared half of what they chose. All this is so slow that whatever else a round
    takes is nothing.
    """

    seconds_per_expert = 1.0

    def woken(self, rows: int) -> float:
        return CHOSEN + CHOSEN * (rows - 1) / 2

    def __call__(self, rows: int, context: int) -> float:
        return 10.0 + (self.woken(rows) - CHOSEN)


class Routed(ToyTarget):
    """A toy whose rows choose experts: all the same two, or each two of its own."""

    def __init__(self, *, is_shared: bool) -> None:
        super().__init__(toy_pair()[0].table)
        self.is_shared = is_shared
        self.note: Callable[[int, torch.Tensor], None] | None = None

    @contextmanager
    def watch_experts(self, note: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
        self.note = note
        yield
        self.note = None

    def forward(self, batch: TokenBatch, cache: ToyCache, **options: Any) -> TargetOutput:
        if self.note is not None:
            rows = torch.zeros(batch.num_rows, 1, dtype=torch.int64)
            if not self.is_shared:
                rows = torch.arange(batch.num_rows)[:, None]
            for layer in range(3):
                self.note(layer, rows * CHOSEN + torch.arange(CHOSEN))
        return super().forward(batch, cache, **options)


# -- counting --------------------------------------------------------------------------------------


def test_the_engine_counts_what_rows_choose_and_what_they_wake() -> None:
    """Four layers, two of eight experts a row; the prompt's rows are not counted."""
    target = random_target("qwen3_moe", exact=False, layers=4)
    engine = Engine(target, drafter=LookupDrafter(), config=EngineConfig(schedule="off"))
    prompt = [5, 6, 7, 8] * 5
    (result,) = engine.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))
    assert result.error is None
    stats = engine.stats
    decoded = stats.rows - len(prompt)
    assert decoded > 29
    assert stats.experts_chosen == 4 * 2 * decoded
    least = 4 * 2 * (stats.rounds - 1)
    assert least < stats.experts_woken < stats.experts_chosen


@pytest.mark.parametrize(("is_shared", "woken"), [(True, 2), (False, 2 * 7)])
def test_a_forward_is_counted_by_layer(is_shared: bool, woken: int) -> None:
    target = Routed(is_shared=is_shared)
    counter = ExpertCounter(target)
    cache = target.new_cache()
    slot, _ = cache.open([])
    part = BatchPart.chain(slot, list(range(7)), 0, want_last=False)
    for turn in (1, 2):
        with counter.count():
            target.forward(TokenBatch.build([part]), cache)
        assert (counter.chosen, counter.woken) == (turn * 3 * 14, turn * 3 * woken)
        assert counter.last == woken


def test_a_target_without_experts_is_looked_at_once() -> None:
    looks = []

    class Dense(ToyTarget):
        @contextmanager
        def watch_experts(self, note: object) -> Iterator[None]:
            looks.append(note)
            yield

    counter = ExpertCounter(Dense(toy_pair()[0].table))
    for _ in range(3):
        with counter.count():
            pass
    assert len(looks) == 1
    assert counter.last is None
    with ExpertCounter(toy_pair()[0]).count():  # one that does not tell
        pass


# -- costs -----------------------------------------------------------------------------------------


def test_without_forwards_the_profile_stays_as_it_is() -> None:
    reuse = ExpertReuse(Prices())
    assert isinstance(Prices(), PricesExperts)
    assert reuse.ratio == 1
    assert not reuse.seconds(1, 20).any()
    for _ in range(50):
        reuse.record(1, CHOSEN)  # one row tells nothing
        reuse.record(9, CHOSEN + 8)  # as the profile's own
    assert reuse.ratio == pytest.approx(1)


@pytest.mark.parametrize(("woken", "ratio"), [(CHOSEN, 0.0), (CHOSEN + 4, 0.5), (CHOSEN + 16, 2.0)])
def test_seconds_follow_the_experts_that_are_woken(woken: int, ratio: float) -> None:
    reuse = ExpertReuse(Prices())
    for _ in range(300):
        reuse.record(9, woken)
    assert reuse.ratio == pytest.approx(ratio, abs=0.03)
    expected = [(reuse.ratio - 1) * (rows - 1) for rows in range(3, 8)]
    np.testing.assert_allclose(reuse.seconds(3, 5), expected)


def test_what_was_seen_fades() -> None:
    reuse = ExpertReuse(Prices())
    for woken in (CHOSEN, CHOSEN + 16):
        for _ in range(300):
            reuse.record(9, woken)
    assert reuse.ratio == pytest.approx(2, abs=0.03)


def test_rates_are_corrected_where_measuring_is_allowed() -> None:
    costs = RoundCosts(Prices())
    for _ in range(300):
        costs.record(9, 0.5, CHOSEN)  # all rows alike; its seconds say nothing beside a profile
    alone = 1 / np.array([Prices()(rows, 64) for rows in range(2, 9)])
    np.testing.assert_allclose(costs.rates(2, 64, with_overhead=False)(6), alone)
    shared = costs.rates(2, 64, with_overhead=True)(6)
    assert (shared > alone).all()
    np.testing.assert_allclose(shared, 1 / 10, rtol=0.03)  # next to a step of one row
    assert (shared <= 1 / 10).all()
    assert RoundCosts(lambda rows, context: 1.0).reuse is None


def test_the_scheduler_admits_more_nodes_where_rows_share_experts() -> None:
    tree = chain_of(*(0.85**depth for depth in range(1, 25)))
    counts = []
    for woken in (CHOSEN, CHOSEN + 8, CHOSEN + 16):
        costs = RoundCosts(Prices())
        for _ in range(100):
            costs.record(9, 1.0, woken)
        load = Load(1.0, costs.rates(1, 64, with_overhead=True))
        (cut,) = Scheduler().plan([Offer(request_id=0, tree=tree)], load)
        counts.append(24 if cut.keep is None else int(cut.keep.sum()))
    assert counts[0] > counts[1] > counts[2] > 0


def generated(params: SamplingParams, *, is_shared: bool) -> tuple[list[int], int]:
    """A text, and the nodes that were verified for it."""
    drafter = ModelDrafter(toy_pair()[1], vocab_size=VOCAB)
    config = EngineConfig(step_seconds=Prices(), auto_off=False)
    engine = Engine(Routed(is_shared=is_shared), drafter=drafter, config=config)
    (result,) = engine.generate([[1, 2, 3]], params)
    assert result.error is None
    assert engine.stats.experts_woken > 0
    return result.token_ids, result.stats.verified


def test_more_is_verified_of_trees_whose_rows_share_experts_and_the_text_is_the_same() -> None:
    params = SamplingParams(max_tokens=90, temperature=1.0, seed=4)
    shared, apart = (generated(params, is_shared=is_shared) for is_shared in (True, False))
    assert shared[0] == apart[0]
    assert shared[1] > 1.3 * apart[1]


def test_a_text_that_is_drawn_from_laws_depends_on_the_profile_alone() -> None:
    """What was counted tells of drawn tokens, also of others'."""
    params = SamplingParams(max_tokens=90, temperature=1.0, seed=4, rule="rejection")
    assert generated(params, is_shared=True) == generated(params, is_shared=False)
