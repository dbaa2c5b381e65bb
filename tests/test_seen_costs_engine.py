"""What forwards and drafting take reaches the scheduler, by a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import dspark
from dspark.draft.base import DraftContext
from dspark.draft.model import ModelDrafter
from dspark.eval.profile import Profile, ProfileKey, ProfilePoint
from dspark.eval.profile_costs import costs_of
from dspark.request import SamplingParams
from dspark.target import TokenBatch
from dspark.tree import DraftTree, Proposal
from tests.eval.toys import VOCAB, toy_pair

Seconds = Callable[[int, int], float]

PARAMS = SamplingParams(max_tokens=120, ignore_eos=True)


class Clock:
    """Stands in for the time module."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed:
    """A target whose forwards take so long by rows and requests."""

    def __init__(self, target: Any, clock: Clock, seconds: Seconds) -> None:
        self._target, self._clock, self._seconds = target, clock, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def forward(self, batch: TokenBatch, cache: Any, **options: Any) -> Any:
        self._clock.now += self._seconds(batch.num_rows, len(batch.spans))
        return self._target.forward(batch, cache, **options)


class OneOfThree(ModelDrafter):
    """One token a round, right once in three rounds of a request, as it says itself."""

    def __init__(self, clock: Clock, takes: float = 0.0) -> None:
        super().__init__(toy_pair()[0], vocab_size=VOCAB)  # the target: always right
        self._clock, self._takes, self.asked = clock, takes, 0

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        self._clock.now += self._takes
        self.asked += len(contexts)
        found = []
        for context, right in zip(contexts, super().propose(contexts), strict=True):
            token = int(right.tree.token[0])
            token = token if context.round % 3 == 0 else (token + 1) % VOCAB
            tree = replace(DraftTree.build([token], [-1]), survival=np.array([1 / 3]))
            found.append(Proposal(tree))
        return found


def measured(row: float) -> Any:
    """A profile of steps of a second, and so much more for every further row."""
    points = tuple(
        ProfilePoint(context=64, rows=n, requests=1, median=s, low=s, high=s, repeats=3)
        for n, s in ((n, 1 + row * (n - 1)) for n in (1, 2, 4, 8, 16, 32))
    )
    return costs_of(
        Profile(key=KEY, points=points, experts=None, settings={}, header={}, is_interrupted=False)
    )


KEY = ProfileKey(
    target="toy", device="cpu", processor="any", dtype="float32", threads=1, exact=True, torch="any"
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr("dspark.rounds.time", own)
    return own


def engine(clock: Clock, costs: Any, seconds: Seconds, draft: OneOfThree) -> Any:
    target = Timed(toy_pair()[0], clock, seconds)
    limits = dspark.RoundLimits(keep_rounds=True)
    settings = dspark.EngineConfig(step_seconds=costs, limits=limits)
    return dspark.Engine(target, drafter=draft, config=settings)


@pytest.mark.parametrize(("is_measured", "expected"), [(True, 0), (False, 1)])
def test_rows_that_turn_out_dear_are_left_out_unless_costs_were_stated(
    clock: Clock, is_measured: bool, expected: int
) -> None:
    """A node is right once in three times: worth .1 s of a second's step, not .8.

    Every step has two rows at first. That a step of one would take a second is seen once there was
    one, which the engine sees to within 100 rounds.
    """
    costs = measured(0.1) if is_measured else lambda rows, context: 1 + 0.1 * (rows - 1)
    own = engine(clock, costs, lambda rows, requests: 1 + 0.8 * (rows - 1), OneOfThree(clock))
    (result,) = own.generate([[5, 6]], replace(PARAMS, max_tokens=200))
    verified = [entry.verified for entry in result.stats.round_log]
    assert verified[:90] == [1] * 90
    assert verified[120:-1] == [expected] * len(verified[120:-1])
    assert len(verified) > 140


@pytest.mark.parametrize(("context", "least", "most"), [(0.0, 0.0, 0.2), (1.0, 0.8, 1.0)])
def test_contexts_that_cost_make_nodes_cheaper_by_comparison(
    clock: Clock, context: float, least: float, most: float
) -> None:
    """Four rows take 1.6 s, so a node costs .5 tokens; with 3 s for contexts .17."""
    own = engine(
        clock,
        measured(0.2),
        lambda rows, requests: 1 + 0.2 * (rows - 1) + context * (requests - 1),
        OneOfThree(clock),
    )
    own.generate([[5, 6]], PARAMS)
    for _ in range(2):
        results = own.generate([[5, 6], [7, 3], [4, 4], [8, 2]], PARAMS)
    rounds = sum(result.stats.rounds for result in results)
    assert least <= sum(result.stats.verified for result in results) / rounds <= most


@pytest.mark.parametrize(("takes", "least", "most"), [(0.05, 100, 500), (0.5, 0, 15)])
def test_drafting_that_takes_longer_than_it_gains_is_skipped(
    clock: Clock, takes: float, least: int, most: int
) -> None:
    """A node for nothing gains a third of a second, so .5 s of drafting is too much."""
    draft = OneOfThree(clock, takes)
    own = engine(clock, measured(0.0), lambda rows, requests: 1.0, draft)
    (result,) = own.generate([[5, 6]], replace(PARAMS, max_tokens=200))
    assert result.stats.rounds > 100
    assert least <= draft.asked <= most


@pytest.mark.parametrize(("row", "is_switched_off"), [(0.1, False), (0.8, True)])
def test_rows_of_a_tree_that_must_be_verified_count_against_drafting(
    clock: Clock, row: float, is_switched_off: bool
) -> None:
    """A node gains a third of a step. The scheduler may not leave it out, so the switch must."""
    seconds: Seconds = lambda rows, other: 1 + row * (rows - 1)  # noqa: E731
    own = engine(clock, seconds, seconds, OneOfThree(clock))
    (result,) = own.generate([[5, 6]], replace(PARAMS, tree_budget=1))
    assert (result.stats.speculation_switched_off > 0) is is_switched_off
