"""V4's own drafts behind the engine: the law of what is sampled, and its tokens.

As tests/draft/test_laws.py does for wrapped models; the target's law comes from chains that are run
from the beginning, none of them drafted.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

import dspark
from dspark.request import SamplingParams
from tests.base_model.law_models import KINDS, drafter_of, logits_of, target_of
from tests.draft.law_check import (
    ALPHA,
    PROCESSORS,
    RULES,
    best_drafts,
    drafts_share_noise,
    params_of,
    smallest_p,
)
from tests.eval import planted

pytestmark = pytest.mark.slow  # many samples of a V4 model

FEW, MANY = 128, 10_000


def p_of(kind: str, rule: str, processors: str, count: int) -> float:
    """The least p-value of a cell's tests."""
    params = params_of(rule, processors)
    return smallest_p(target_of(kind), drafter_of(kind), logits_of(kind), params, count)


CELLS = [
    (kind, rule, list(PROCESSORS)[(2 * i + j) % len(PROCESSORS)])
    for i, kind in enumerate(KINDS)
    for j, rule in enumerate(RULES)
]
QUICK = [cell for cell in CELLS if "rejection" in cell[1] or cell[1] == "block"]


@pytest.mark.parametrize(("kind", "rule", "processors"), QUICK)
def test_sampled_texts_have_the_targets_law(kind: str, rule: str, processors: str) -> None:
    assert p_of(kind, rule, processors, FEW) > ALPHA


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "rule", "processors"), CELLS)
def test_many_sampled_texts_have_the_targets_law(kind: str, rule: str, processors: str) -> None:
    assert p_of(kind, rule, processors, MANY) > ALPHA


@pytest.mark.parametrize(
    ("plant", "kind", "rule", "processors"),
    [
        (best_drafts, "dspark", "rejection, tree", "hot"),
        (drafts_share_noise, "mtp", "rejection, tree", "plain"),
        (planted.noise_reused, "dspark", "sample-match", "plain"),
        (planted.cold_target, "mtp", "rejection, tree", "hot"),
    ],
)
def test_a_planted_fault_is_seen(
    plant: planted.Plant,
    kind: str,
    rule: str,
    processors: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    assert p_of(kind, rule, processors, FEW) < ALPHA


# -- tokens ----------------------------------------------------------------------------------------

PROMPTS = [[3], [2, 5, 3, 1], [4, 0, 1] * 8, [1, 5, 2, 0, 3, 3] * 9, [0, 0], [5, 4, 3] * 5]
SHAPES = {"chain": {"width": 1, "tree_budget": 3}, "tree": {"width": 3, "tree_budget": 9}}


def mixed_params(shape: str) -> list[SamplingParams]:
    """Greedy, coupled and sample-match requests, two of each."""
    base = SamplingParams(max_tokens=12, ignore_eos=True, seed=4, **SHAPES[shape])
    noisy = [replace(base, temperature=0.9, rule=rule) for rule in ("coupled", "sample-match")]
    return [base, noisy[0], noisy[1]] * 2


@functools.cache
def plain_texts(kind: str) -> list[list[int]]:
    engine = dspark.Engine(target_of(kind, exact=True))
    return [result.token_ids for result in engine.generate(PROMPTS, mixed_params("chain"))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_plain_decoding_in_mixed_batches(kind: str, shape: str) -> None:
    engine = dspark.Engine(
        target_of(kind, exact=True),
        drafter=drafter_of(kind, exact=True),
        config=dspark.EngineConfig(max_batch=4, auto_off=False),
    )
    results = engine.generate(PROMPTS, mixed_params(shape))
    assert [result.token_ids for result in results] == plain_texts(kind)
    assert sum(result.stats.accepted for result in results) > 2
    assert any(0 < result.stats.accepted < result.stats.verified for result in results)
