"""The simulator decides as the real scheduler does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.eval.simulate.admission import (
    Budgets,
    FirstNodes,
    admit_alone,
    admit_jointly,
    bars,
)
from dspark.payoff import FirstNode
from dspark.tree import DraftTree
from dspark.verify.scheduler import Load, Offer, Scheduler
from dspark.verify.scheduler_setting import Schedule

SLOTS, WIDTH = 5, 4
SHARED = ("global", "early-stop", "async")


def _tree(rng: np.random.Generator, size: int) -> DraftTree:
    """A random tree; coarse survival makes ties."""
    parent = [int(rng.integers(-1, node)) for node in range(size)]
    survival: list[float] = []
    for up in parent:
        survival.append((survival[up] if up >= 0 else 1.0) * int(rng.integers(1, 5)) / 4)
    return DraftTree.build([0] * size, parent, survival)


def _matrix(trees: list[DraftTree | None]) -> np.ndarray:
    """Survival of each slot, falling, -1 where there is no node: [1, C, W]."""
    rows = np.full((1, SLOTS, WIDTH), -1.0)
    for slot, tree in enumerate(trees):
        if tree is not None:
            values = np.sort(tree.survival)[::-1]
            rows[0, slot, : len(values)] = values
    return rows


def _round(rng: np.random.Generator) -> tuple[list[DraftTree | None], np.ndarray]:
    trees = [
        None if rng.random() < 0.2 else _tree(rng, int(rng.integers(0, WIDTH + 1)))
        for _ in range(SLOTS)
    ]
    jagged = np.cumsum(rng.choice([0.0, 0.02, 0.3], SLOTS * WIDTH + 1)) + 1.0
    return trees, 1.0 / jagged


def _plan(
    scheduler: Scheduler, trees: list[DraftTree | None], rates: np.ndarray, ids: list[int]
) -> list[int]:
    """What the real scheduler verifies, by slot."""
    have = [slot for slot, tree in enumerate(trees) if tree is not None]
    offers = [Offer(request_id=ids[slot], tree=trees[slot]) for slot in have]
    load = Load(float(SLOTS), lambda count: rates[: count + 1])
    counts = [0] * SLOTS
    for slot, cut in zip(have, scheduler.plan(offers, load), strict=True):
        tree = trees[slot]
        assert tree is not None
        counts[slot] = tree.num_nodes if cut.keep is None else int(cut.keep.sum())
    return counts


@pytest.mark.parametrize("name", ["off", "fixed:2", "threshold:0.5", "global", "early-stop"])
def test_every_schedule_verifies_as_many_nodes_of_each_request(name: str) -> None:
    rng = np.random.default_rng(3)
    schedule = Schedule.parse(name)
    counts = set()
    for _ in range(150):
        trees, rates = _round(rng)
        real = _plan(Scheduler(schedule), trees, rates, list(range(SLOTS)))
        survival = _matrix(trees)
        if name in SHARED:
            value = np.array([float(SLOTS)])
            own = admit_jointly(survival, value, rates[None], stops=name == "early-stop")
        else:
            own = admit_alone(schedule, survival)
        assert own[0].tolist() == real
        counts.add(sum(real))
    assert len(counts) > 3  # the rounds differ in what is worth verifying


def test_budgets_of_two_rounds_ago_are_those_of_the_asynchronous_schedule() -> None:
    rng = np.random.default_rng(4)
    scheduler, own = Scheduler(Schedule.parse("async")), Budgets((1, SLOTS))
    ids = list(range(SLOTS))
    for turn in range(150):
        if turn % 7 == 6:  # a request leaves, another one takes its slot
            slot = int(rng.integers(SLOTS))
            scheduler.release(ids[slot])
            ids[slot] = SLOTS + turn
            own.reset(np.arange(SLOTS)[None] == slot)
        trees, rates = _round(rng)
        real = _plan(scheduler, trees, rates, ids)
        survival = _matrix(trees)
        admitted = own.admit((survival >= 0).sum(axis=2))
        worth = admit_jointly(survival, np.array([float(SLOTS)]), rates[None], stops=False)
        own.note(worth, survival[..., 0] >= 0)
        assert admitted[0].tolist() == real


@pytest.mark.parametrize("name", ["global", "early-stop"])
def test_the_bar_is_the_schedulers(name: str) -> None:
    rng = np.random.default_rng(5)
    scheduler = Scheduler(Schedule.parse(name))
    for _ in range(100):
        _, rates = _round(rng)
        nodes = int(rng.integers(1, WIDTH + 1))
        load = Load(3.0, lambda count, rates=rates: rates[: count + 1])
        real = scheduler.bar(load, nodes=nodes, weight=1.0, is_drawn=False)
        own = bars(np.array([3.0]), rates[None], np.array([nodes]), stops=name == "early-stop")
        assert own[0] == real


def test_drafting_is_left_out_in_the_same_rounds() -> None:
    rng = np.random.default_rng(6)
    real, own = [FirstNode() for _ in range(3)], FirstNodes((1, 3))
    skipped = 0
    for turn in range(600):
        bar = 0.5 if turn % 150 < 100 else 0.05
        expected = [switch.pays(bar) for switch in real]
        found = own.pay(np.array([bar]), np.ones((1, 3), dtype=np.bool_))
        assert found[0].tolist() == expected
        skipped += 3 - sum(expected)
        best = rng.random(3) * 0.5
        for switch, asked, value in zip(real, expected, best, strict=True):
            if asked:
                switch.offered(float(value))
        own.offered(best[None], found)
    assert skipped > 500


@given(
    values=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6),
    cost=st.floats(0.0, 0.5),
    factor=st.floats(1.0, 3.0),
)
def test_dearer_rows_admit_no_more(values: list[float], cost: float, factor: float) -> None:
    survival = np.full((1, 1, 6), -1.0)
    survival[0, 0, : len(values)] = sorted(values, reverse=True)
    counts = []
    for each in (cost, cost * factor):
        rates = 1.0 / (1.0 + each * np.arange(7))
        counts.append(int(admit_jointly(survival, np.ones(1), rates[None], stops=True)[0, 0]))
    assert counts[1] <= counts[0]
