"""V4's own draft modules against plain second implementations, and behind the engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark import SamplingParams
from dspark.base_model.mtp_drafter import MTPDrafter
from dspark.base_model.target import V4Target
from dspark.draft.base import DraftContext, Drafter
from dspark.engine import Engine
from dspark.request import Rule
from dspark.tree import Proposal
from dspark.verify.noise import NoiseKey
from tests.base_model import oracle
from tests.base_model import reference_drafts as reference
from tests.base_model.build import build_model

KINDS = ("mtp", "dspark")


@functools.cache
def material(kind: str) -> tuple[dict[str, Any], dict[str, Tensor], V4Target]:
    config = reference.tiny_draft_config(kind)
    weights = {
        **oracle.random_weights(config, 1, torch.float32),
        **reference.random_draft_weights(config, kind, seed=1),
    }
    model = build_model(config, weights, torch.float32)
    return config, weights, V4Target(model, name=kind, eos_token_ids=())


def drafter_of(kind: str) -> Drafter:
    drafter = material(kind)[2].own_drafter()
    assert drafter is not None
    return drafter


def tokens_of(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, count).tolist()


@functools.cache
def hidden_of(count: int, seed: int) -> list[Tensor]:
    """Streams of all layers at all positions before the anchor.

    Of one target, as to either kind of draft they are numbers that it is given.
    """
    config, weights, _ = material("mtp")
    return oracle.path_hidden(config, weights, tokens_of(count, seed)[:-1])


@functools.cache
def features_of(kind: str, count: int, seed: int) -> dict[int, Tensor]:
    """What the target would have captured of all positions before the anchor."""
    target, hidden = material(kind)[2], hidden_of(count, seed)
    last = target.info.num_layers
    means = {layer: rows.mean(1) for layer, rows in enumerate(hidden)}
    return {**means, last: hidden[-1].flatten(1)}


def context_of(
    kind: str,
    count: int,
    seed: int,
    *,
    request: int = 0,
    budget: int = 12,
    depth: int = 4,
    since: int = 0,
    rule: Rule = Rule.GREEDY,
    temperature: float = 0.0,
) -> DraftContext:
    features = {k: rows[since:] for k, rows in features_of(kind, count, seed).items()}
    return DraftContext(
        request_id=request,
        tokens=tokens_of(count, seed),
        prompt_length=1,
        params=SamplingParams(temperature=temperature, seed=3),
        rule=rule,
        noise=NoiseKey(3, 0),
        round=1,
        budget=budget,
        depth=depth,
        features=features,
    )


@functools.cache
def block_of(count: int, seed: int) -> tuple[Tensor, Tensor]:
    config, weights, _ = material("dspark")
    captured = reference.captured_hidden(config, hidden_of(count, seed))
    return reference.dspark_block(config, weights, captured, tokens_of(count, seed)[-1])


def reference_logits(kind: str, count: int, seed: int, path: Sequence[int]) -> Tensor:
    """Draft logits after the anchor and after every token of a path, by the reference."""
    return _reference_logits(kind, count, seed, tuple(path))


@functools.cache
def _reference_logits(kind: str, count: int, seed: int, path: tuple[int, ...]) -> Tensor:
    config, weights, _ = material(kind)
    tokens = tokens_of(count, seed)
    if kind == "mtp":
        hidden = hidden_of(count, seed)[-1]
        return reference.mtp_logits(config, weights, hidden, tokens, list(path))
    z, base = block_of(count, seed)
    return reference.dspark_chain(weights, z, base, tokens[-1], list(path))[0]


def paths(proposal: Proposal) -> list[list[int]]:
    tree = proposal.tree
    out = []
    for node in range(tree.num_nodes):
        path, at = [], node
        while at >= 0:
            path.insert(0, int(tree.token[at]))
            at = int(tree.parent[at])
        out.append(path)
    return out


@pytest.mark.parametrize(
    "count",
    [2, 16, 17, 40, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 18))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_trees_hold_the_references_best_tokens(kind: str, count: int) -> None:
    """Every node's token is among the reference's best there, and its survival the product."""
    (proposal,) = drafter_of(kind).propose([context_of(kind, count, seed=count)])
    assert proposal.tree.num_nodes > 4
    survival = proposal.tree.survival
    for node, path in enumerate(paths(proposal)):
        logits = reference_logits(kind, count, count, path[:-1])
        probs = logits.double().softmax(-1)
        expected = np.prod([float(probs[i, token]) for i, token in enumerate(path)])
        assert survival[node] == pytest.approx(expected, rel=2e-3)
        rank = int((logits[len(path) - 1] > logits[len(path) - 1, path[-1]]).sum())
        assert rank < 4


@pytest.mark.parametrize("kind", KINDS)
def test_laws_of_drawn_trees_are_the_references(kind: str) -> None:
    context = context_of(kind, 21, seed=6, rule=Rule.REJECTION, temperature=1.0)
    (proposal,) = drafter_of(kind).propose([context])
    assert proposal.laws is not None
    assert proposal.law_of is not None
    for node, path in enumerate(paths(proposal)):
        expected = reference_logits(kind, 21, 6, path[:-1])[len(path) - 1].double().softmax(-1)
        law = proposal.laws[int(proposal.law_of[node])].double()
        assert float((law - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_features_may_come_in_parts_and_rounds_be_skipped(kind: str) -> None:
    (whole,) = drafter_of(kind).propose([context_of(kind, 40, seed=9)])
    drafter = drafter_of(kind)
    drafter.propose([_prefix(kind, 40, 9, 11, since=0)])
    drafter.propose([_prefix(kind, 40, 9, 14, since=10)])
    (parts,) = drafter.propose([context_of(kind, 40, seed=9, since=13)])
    assert paths(parts) == paths(whole)
    np.testing.assert_allclose(parts.tree.survival, whole.tree.survival, rtol=1e-3)


def _prefix(kind: str, count: int, seed: int, stop: int, *, since: int) -> DraftContext:
    """The context as it was when it had `stop` tokens, with features from `since` on."""
    context = context_of(kind, count, seed)
    context.tokens = list(context.tokens[:stop])
    features = features_of(kind, count, seed)
    context.features = {k: rows[since : stop - 1] for k, rows in features.items()}
    return context


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_drafted_for_alike_alone_and_among_sixteen(kind: str) -> None:
    # Four texts at sixteen lengths.
    contexts = [context_of(kind, 3 + i, seed=20 + i % 4, request=i) for i in range(16)]
    together = drafter_of(kind).propose(contexts)
    for i in (0, 5, 15):
        (alone,) = drafter_of(kind).propose([contexts[i]])
        assert paths(alone) == paths(together[i])


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("mtp", 0.0),
        ("dspark", 1.0),
        pytest.param("mtp", 1.0, marks=pytest.mark.slow),
        pytest.param("dspark", 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_text_is_that_of_plain_decoding(kind: str, temperature: float) -> None:
    target, params = material(kind)[2], SamplingParams(max_tokens=8)
    if temperature:
        params = SamplingParams(max_tokens=8, temperature=temperature, seed=2)
    prompts = [tokens_of(n, n) for n in (2, 13, 30)]
    plain = Engine(target).generate(prompts, params)
    drafted = Engine(target, drafter=drafter_of(kind)).generate(prompts, params)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert all(r.stats.proposed > 0 for r in drafted)


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        ("rejection", "dspark"),
        ("sample-match", "mtp"),
        ("block", "dspark"),
        pytest.param("rejection", "mtp", marks=pytest.mark.slow),
        pytest.param("sample-match", "dspark", marks=pytest.mark.slow),
        pytest.param("block", "mtp", marks=pytest.mark.slow),
    ],
)
def test_every_rule_runs_to_its_end(rule: str, kind: str) -> None:
    target = material(kind)[2]
    width = 1 if rule == "block" else None
    params = SamplingParams(max_tokens=6, temperature=0.8, seed=2, rule=rule, width=width)
    engine = Engine(target, drafter=drafter_of(kind))
    (result,) = engine.generate([tokens_of(12, 3)], params)
    assert result.error is None
    assert len(result.token_ids) == 6
    assert result.stats.proposed > 0


@pytest.mark.parametrize("kind", KINDS)
def test_output_that_is_not_finite_drafts_nothing(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    context = context_of(kind, 12, seed=1)
    context.features = {k: torch.full_like(v, torch.nan) for k, v in context.features.items()}
    (proposal,) = drafter_of(kind).propose([context])
    assert proposal.tree.num_nodes == 0
    assert "not finite" in caplog.text


def test_mtp_begins_later_where_the_beginning_never_came() -> None:
    """A window layer knows relative positions only, so the newest pairs are enough."""
    drafter = drafter_of("mtp")
    assert isinstance(drafter, MTPDrafter)
    (late,) = drafter.propose([context_of("mtp", 40, seed=9, since=22)])  # 17 of a window of 16
    (whole,) = drafter_of("mtp").propose([context_of("mtp", 40, seed=9)])
    assert paths(late) == paths(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_comes_back(kind: str) -> None:
    drafter: Any = drafter_of(kind)
    drafter.propose([context_of(kind, 30, seed=2, request=7)])
    drafter.release(7)
    drafter.release(7)
    if kind == "mtp":
        assert drafter._cache.usage().bytes == 0
