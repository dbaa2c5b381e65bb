"""Drafters that read hidden states, behind the engine: the law of what is sampled, and its tokens.

Targets are wrapped models of six tokens; their laws come from transformers itself (`law_models`).
A p-value under 1e-4 is a failure; seeds are fixed, so a test that passes passes always. The quick
tests see gross faults (`FAULTS`), the slow ones, by hand, what 20 000 samples can show.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

import dspark
from dspark.request import SamplingParams
from tests.draft.law_check import (
    ALPHA,
    PROCESSORS,
    RULES,
    best_drafts,
    drafts_share_noise,
    law_of_other_tokens,
    params_of,
    smallest_p,
)
from tests.draft.law_models import KINDS, SPREAD, drafter_of, logits_of, target_of
from tests.eval import planted

FEW, SOME, MANY = 128, 4_000, 20_000
FAMILIES = list(SPREAD)
DRAWN = [rule for rule in RULES if rule not in ("coupled", "sample-match")]

CELLS = [
    (kind, rule, FAMILIES[(i + j) % 3], list(PROCESSORS)[(i + 2 * j) % 5])
    for i, kind in enumerate(KINDS)
    for j, rule in enumerate(DRAWN)
]
"""Every draft under every rule that draws from laws, on every target; every rule with all
processors, and every target with all of them."""

COMPARED = [
    (KINDS[(2 * i + j) % len(KINDS)], rule, family, list(PROCESSORS)[(i + j) % 5])
    for i, family in enumerate(FAMILIES)
    for j, rule in enumerate(("coupled", "sample-match"))
]
"""Where tokens are compared, the text is the same with any draft, so these cells are few."""

QUICK = [CELLS[3 * i + j] for i, j in enumerate((0, 1, 2, 2, 0, 1, 0, 1))] + COMPARED[:1]
"""Every draft once, every rule but one, every target, all processors."""

SLOW_ONLY = {"vanilla, few", "eagle3"}
"""Their heads and vocabularies are in others of them; the second is drafted with below."""


def p_of(kind: str, rule: str, family: str, processors: str, count: int) -> float:
    """The least p-value of a cell's tests."""
    params = params_of(rule, processors)
    return smallest_p(target_of(family), drafter_of(kind), logits_of(family), params, count)


@pytest.mark.parametrize(
    ("kind", "rule", "family", "processors"), [cell for cell in QUICK if cell[0] not in SLOW_ONLY]
)
def test_sampled_texts_have_the_targets_law(
    kind: str, rule: str, family: str, processors: str
) -> None:
    assert p_of(kind, rule, family, processors, FEW) > ALPHA


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "rule", "family", "processors"), CELLS + COMPARED)
def test_many_sampled_texts_have_the_targets_law(
    kind: str, rule: str, family: str, processors: str
) -> None:
    assert p_of(kind, rule, family, processors, MANY) > ALPHA


# -- faults ----------------------------------------------------------------------------------------


FAULTS = [
    (best_drafts, "vanilla", "rejection, tree", "llama", "plain"),
    (law_of_other_tokens, "eagle3, few", "block", "qwen3", "plain"),
    (drafts_share_noise, "gated", "rejection, chain", "llama", "plain"),
    (planted.noise_reused, "rnn", "coupled", "llama", "plain"),
    (planted.cold_target, "eagle3", "rejection, tree", "gemma3", "hot"),
]


@pytest.mark.parametrize(("plant", "kind", "rule", "family", "processors"), FAULTS)
def test_a_planted_fault_is_seen(
    plant: planted.Plant,
    kind: str,
    rule: str,
    family: str,
    processors: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    assert p_of(kind, rule, family, processors, FEW) < ALPHA


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("plant", "kind", "rule"),
    [
        (planted.warm_draws, "rnn, few", "rejection, tree"),
        (planted.warm_draws, "eagle3", "block"),
        (planted.no_residual, "gated", "rejection, chain"),
        (planted.closing_from_the_draft, "vanilla", "rejection, tree"),
        (planted.closing_from_the_draft, "eagle3, few", "block"),
        (planted.picky_children, "dflash", "rejection, chain"),
    ],
)
def test_a_smaller_fault_is_seen_in_some_thousand_texts(
    plant: planted.Plant, kind: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert p_of(kind, rule, "llama", "plain", SOME) < ALPHA


# -- tokens ----------------------------------------------------------------------------------------

# Trees of "vanilla" and "eagle3" are in test_dspark.py and test_eagle3.py.

VOCAB = 40  # what the check of exact mode needs; all but six tokens are as good as forbidden
ALLOWED = dict.fromkeys(range(6, VOCAB), -50.0)
PROMPTS = [[3], [2, 5, 3, 1], [4, 0, 1] * 8, [1, 5, 2, 0, 3, 3] * 9, [0, 30], [5, 24, 3] * 5]
SHAPES = {"chain": {"width": 1, "tree_budget": 3}, "tree": {"width": 3, "tree_budget": 9}}


def mixed_params(shape: str) -> list[SamplingParams]:
    """Greedy, coupled and sample-match requests, two of each."""
    base = SamplingParams(
        max_tokens=8, ignore_eos=True, seed=4, logit_bias=ALLOWED, **SHAPES[shape]
    )
    noisy = [replace(base, temperature=0.9, rule=rule) for rule in ("coupled", "sample-match")]
    return [base, noisy[0], noisy[1]] * 2


@functools.cache
def plain_texts(family: str) -> list[list[int]]:
    engine = dspark.Engine(target_of(family, VOCAB, exact=True))
    return [result.token_ids for result in engine.generate(PROMPTS, mixed_params("chain"))]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, "chain") for kind in ("vanilla", "eagle3")]
    + [
        pytest.param(kind, "chain", marks=pytest.mark.slow)  # which the tree has in it
        for kind in ("gated", "rnn", "dflash")
    ]
    + [
        pytest.param(kind, "tree", marks=pytest.mark.slow if kind == "vanilla, few" else ())
        for kind in KINDS
        if kind not in ("vanilla", "eagle3")
    ],
)
def test_tokens_are_those_of_plain_decoding_in_mixed_batches(kind: str, shape: str) -> None:
    family = FAMILIES[(KINDS.index(kind) + list(SHAPES).index(shape)) % 3]
    engine = dspark.Engine(
        target_of(family, VOCAB, exact=True),
        drafter=drafter_of(kind, VOCAB),
        config=dspark.EngineConfig(max_batch=4, auto_off=False),
    )
    results = engine.generate(PROMPTS, mixed_params(shape))
    assert [result.token_ids for result in results] == plain_texts(family)
    assert sum(result.stats.accepted for result in results) > 3
    assert any(0 < result.stats.accepted < result.stats.verified for result in results)
