"""Block drafts on the fused path against the same module on its own layers."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from dspark.adapters.fused import drafts
from dspark.adapters.fused.draft_runner import FusedRunner
from dspark.draft.block_runner import PlainRunner, Wanted
from dspark.draft.calibration import Calibration, CalibrationKey, SurvivalMap
from dspark.draft.dspark import DSparkDrafter, DSparkDrafterConfig
from dspark.draft.dspark_config import Window
from dspark.mtp_head import DraftVocab
from dspark.request import Rule
from dspark.verify.noise import NoiseKey
from tests.draft.conftest import make_context  # noqa: F401 - a fixture
from tests.draft.dspark_models import (
    HIDDEN,
    VOCAB,
    joined,
    make_config,
    make_features,
    make_module,
    target_info,
)
from tests.fused.models import needs_compiler

pytestmark = needs_compiler

FUSED = ("qwen3", "llama", "sliding")
RULES = (Rule.GREEDY, Rule.COUPLED, Rule.SAMPLE_MATCH)


def pair(style="qwen3", head="vanilla", *, dtype=torch.float32, **options):
    """A stock module and the same with a runner, unrounded."""
    stock = make_module(style, head, **options).to(dtype)
    mine = copy.deepcopy(stock)
    drafts.pack_draft(mine, "none", "fused")
    assert isinstance(mine.runner, FusedRunner)
    return stock, mine


def blocks(runner, sizes, *, cuts=(), depth=4):
    """Hidden states and base logits behind contexts that arrive in pieces."""
    caches = [runner.new_cache() for _ in sizes]
    starts = [0] * len(sizes)
    for cut in (*cuts, max(sizes)):
        parts = []
        for i, size in enumerate(sizes):
            stop = min(size, cut)
            if stop > starts[i]:
                rows = joined(make_features(stop, seed=i))[starts[i] :]
                tokens = [(7 * t + i) % VOCAB for t in range(stop)]
                parts.append((caches[i], tokens, rows))
                starts[i] = stop
        if parts:
            runner.take(parts)
    return runner.run([5 + i for i in range(len(sizes))], caches, depth)


def tree_of(drafter, contexts):
    proposals = drafter.propose(contexts)
    return [(p.tree.token.tolist(), p.tree.parent.tolist(), p.tree.survival) for p in proposals]


def assert_same_trees(one, two):
    for (token, parent, survival), (token2, parent2, survival2) in zip(one, two, strict=True):
        assert token == token2
        assert parent == parent2
        np.testing.assert_allclose(survival, survival2, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("style", FUSED)
@pytest.mark.parametrize("sizes", [(1,), (9,), (70, 3, 31)])
def test_a_block_is_that_of_the_modules_own_layers(style, sizes):
    stock, mine = pair(style)
    expected = blocks(PlainRunner(stock), sizes, cuts=(2, 8, 40))
    found = blocks(mine.runner, sizes, cuts=(5, 64))
    for one, two in zip(found, expected, strict=True):
        assert one.shape == two.shape
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_block_with_four_norms_and_another_scale():
    config = make_config()
    backbone = replace(
        config.backbone,
        has_four_norms=True,
        attention_scale=0.3,
        activation="gelu_pytorch_tanh",
        windows=(Window(size=11), Window(size=4)),
    )
    stock, mine = pair(backbone=backbone, block_size=3)
    expected, found = (blocks(r, (40, 6), depth=3) for r in (PlainRunner(stock), mine.runner))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    blind = blocks(mine.runner, (12, 6), depth=3)
    assert not torch.allclose(blind[0][0], found[0][0], atol=1e-2)


def test_in_bfloat16_it_is_as_near_to_the_exact_module_as_its_own_layers():
    stock, mine = pair("llama", dtype=torch.bfloat16)
    exact = blocks(PlainRunner(copy.deepcopy(stock).float()), (30, 5))[1]
    plain, fused = (blocks(r, (30, 5)) for r in (PlainRunner(stock), mine.runner))
    assert fused[0].dtype is torch.bfloat16
    far = [(base.float() - exact).abs().mean() for base in (plain[1], fused[1])]
    assert far[1] < 1.5 * far[0]
    assert 0 < far[1] < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("style", ["gemma4", "gemma4 with v", "sliding causal", "sliding moving"])
def test_other_backbones_stay_on_their_own_layers(style):
    module = make_module(style)
    assert drafts.pack_draft(module, "none", "fused") == "float32"
    assert module.runner is None


class Shares:
    """A target's embedding and head."""

    info = target_info()

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.head = torch.randn(VOCAB, HIDDEN, generator=generator)

    def embed(self, tokens):
        return self.table[tokens]

    def unembed(self, hidden):
        return hidden.float() @ self.head.T


def test_a_head_that_is_the_targets_is_left_to_it():
    stock = make_module(shares=Shares(), owns_embedding=False, owns_head=False)
    mine = copy.deepcopy(stock)
    drafts.pack_draft(mine, "none", "fused")
    assert isinstance(mine.runner, FusedRunner)
    for depth in (1, 4):
        found, expected = (
            blocks(runner, (9, 4), depth=depth) for runner in (mine.runner, PlainRunner(stock))
        )
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_sequential_head_that_cannot_be_packed_stays_torchs(make_context, dtype):  # noqa: F811
    stock = make_module(markov_rank=7).to(torch.bfloat16).to(dtype)
    mine = copy.deepcopy(stock)
    drafts.pack_draft(mine, "none", "fused")
    assert isinstance(mine.runner, FusedRunner)
    contexts = [
        [make_context([3, 5, 7, 11], features=make_features(3), request_id=i) for i in range(2)]
        for _ in range(2)
    ]
    trees = [
        tree_of(DSparkDrafter(module), own)
        for module, own in zip((stock, mine), contexts, strict=True)
    ]
    assert trees[0][0][0]
    if dtype is torch.float32:
        assert_same_trees(*trees)


def test_a_combiner_that_cannot_be_packed_keeps_the_modules_own_layers():
    module = make_module(target_layer_ids=(0,), target_hidden_size=33)
    assert drafts.pack_draft(module, "none", "fused") == "float32"
    assert module.runner is None


def test_a_request_has_the_same_bits_alone_with_others_and_with_more_threads():
    _, mine = pair()
    together = blocks(mine.runner, (33, 8, 17))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        alone = blocks(mine.runner, (33,), cuts=(20,))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0][0], together[0][0])
    assert torch.equal(alone[1][0], together[1][0])


@pytest.mark.parametrize("vocab", [None, DraftVocab.build(VOCAB, range(0, VOCAB, 3))])
@pytest.mark.parametrize("has_noise", [False, True])
def test_candidates_are_the_best_of_the_shaped_logits(vocab, has_noise):
    stock, mine = pair(vocab=vocab)
    base = blocks(mine.runner, (9, 4))[1]
    latent = torch.randn(3, 8)
    noise = np.random.default_rng(0).gumbel(size=VOCAB).astype(np.float32) if has_noise else None
    places = [(1, 0), (0, 3), (1, 2)]
    wanted = [Wanted(depth, request, 6, 0.7, noise) for request, depth in places]
    found = mine.runner.find(wanted, latent)
    bias = latent @ stock.markov_head.markov_w2.weight.T
    logits = torch.stack([base[request, depth] for request, depth in places]) + bias
    shaped = (logits - logits.amax(dim=1, keepdim=True)) / 0.7
    ids = torch.arange(VOCAB) if vocab is None else vocab.ids
    if noise is not None:
        shaped = shaped + torch.from_numpy(noise)[ids]
    values, columns = shaped.topk(6, dim=1)
    assert found.tokens.tolist() == ids[columns].tolist()
    np.testing.assert_allclose(found.values, values, rtol=1e-4, atol=1e-5)
    if noise is None:
        np.testing.assert_allclose(found.log_sum, shaped.logsumexp(dim=1), rtol=1e-4, atol=1e-5)


def test_equal_candidates_come_by_rising_token_and_missing_ones_are_none():
    _, mine = pair(head="none")
    mine.runner.run([5], [mine.runner.new_cache()], 1)
    base = torch.full((1, 1, VOCAB), -torch.inf)
    base[0, 0, [60, 7, 33]] = torch.tensor([1.0, 1.0, 3.0])
    mine.runner._base = base
    found = mine.runner.find([Wanted(0, 0, 5, 1.0, None)], None)
    assert found.tokens.tolist() == [[33, 7, 60, -1, -1]]
    base[0, 0, 50] = torch.nan
    assert np.isnan(mine.runner.find([Wanted(0, 0, 5, 1.0, None)], None).log_sum).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head", ["none", "vanilla", "gated", "rnn"])
def test_trees_are_those_of_the_modules_own_layers(make_context, rule, head):  # noqa: F811
    vocab = DraftVocab.build(VOCAB, range(1, VOCAB, 2)) if head == "vanilla" else None
    drafters = [DSparkDrafter(module) for module in pair("llama", head, vocab=vocab)]

    def contexts(length):
        return [
            make_context(
                [(7 * t + i) % VOCAB for t in range(length + i)],
                rule=rule,
                request_id=i,
                noise=NoiseKey(i),
                features=make_features(length + i - 1, seed=i),
                **({} if rule is Rule.GREEDY else {"temperature": 0.8}),
                budget=12,
            )
            for i in range(3)
        ]

    for length in (6, 9):
        one, two = (tree_of(drafter, contexts(length)) for drafter in drafters)
        assert all(len(tokens) > 6 for tokens, _, _ in one)
        assert_same_trees(one, two)


def survival_map(kind, generator):
    """A map of random numbers; "short" has fewer ranks and depths than trees."""
    ranks, depths = (1, 1) if kind == "short" else (6, 5)
    confidence = np.abs(generator.normal(size=ranks)) * (kind == "confidence")
    return SurvivalMap(
        bias=generator.normal(size=ranks),
        share=np.abs(generator.normal(size=ranks)),
        lift=np.abs(generator.normal(size=ranks)),
        confidence=confidence,
        depth=generator.normal(size=depths),
        temperature=np.exp(generator.normal(size=depths) / 3),
    )


@pytest.mark.parametrize("kind", ["none", "plain", "short", "confidence"])
@pytest.mark.parametrize("seed", range(6))
def test_whole_trees_are_those_grown_level_by_level(make_context, monkeypatch, kind, seed):  # noqa: F811
    generator = np.random.default_rng(seed)
    rule = RULES[seed % 3]
    stock, mine = pair("llama", "none" if seed % 2 else "vanilla")
    calibration = None
    if kind != "none":
        key = CalibrationKey(rule=rule, temperature=float(rule is not Rule.GREEDY), is_chain=False)
        calibration = Calibration({key: survival_map(kind, generator)})
    config = DSparkDrafterConfig(
        width=int(generator.integers(2, 7)),
        beams=int(generator.integers(1, 6)),
        min_survival=float(generator.choice([0.0, 0.02, 0.2])),
        calibration=calibration,
    )
    drafters = [DSparkDrafter(module, config=config) for module in (stock, mine)]
    limits = [
        {"budget": int(generator.integers(1, 20)), "depth": int(generator.integers(1, 7))}
        for _ in range(3)
    ]
    contexts = [
        make_context(
            [5, 9, 31 + i], rule=rule, request_id=i, features=make_features(2, seed=i), **limit
        )
        for i, limit in enumerate(limits)
    ]
    monkeypatch.setattr(DSparkDrafter, "_level", no_levels(DSparkDrafter._level, stock))
    one, two = (tree_of(drafter, contexts) for drafter in drafters)
    assert_same_trees(one, two)


def no_levels(level, stock):
    """Levels for the stock module alone."""

    def guarded(drafter, jobs, blocks):
        assert drafter.module is stock
        level(drafter, jobs, blocks)

    return guarded


def test_what_a_temperature_alone_does_not_shape_is_left_to_torch(make_context):  # noqa: F811
    drafters = [DSparkDrafter(module) for module in pair()]
    params = {"top_p": 0.8, "logit_bias": {9: 4.0}}
    contexts = [
        make_context([5, 9, 31], rule=Rule.COUPLED, features=make_features(2), params=params)
    ]
    one, two = (tree_of(drafter, contexts) for drafter in drafters)
    assert_same_trees(one, two)


def test_positions_without_hidden_states_are_borrowed_or_passed_over(make_context):  # noqa: F811
    drafters = [DSparkDrafter(module) for module in pair()]
    tokens = [(5 * t) % VOCAB for t in range(40)]

    def rounds(drafter):
        first = make_context(tokens[:30], request_id=0, features=make_features(29))
        drafter.propose([first])
        tail = {layer: rows[20:] for layer, rows in make_features(39).items()}
        other = [96 - t for t in tokens[:20]] + tokens[20:]
        shares = make_context(tokens, request_id=1, features=tail)
        alone = make_context(other, request_id=2, features=tail)
        return tree_of(drafter, [shares, alone])

    one, two = (rounds(drafter) for drafter in drafters)
    assert_same_trees(one, two)
    assert one[0][0] != one[1][0]


def test_an_output_that_is_no_number_drafts_nothing(make_context, caplog):  # noqa: F811
    _, mine = pair()
    features = {layer: rows * torch.nan for layer, rows in make_features(4).items()}
    with caplog.at_level(logging.WARNING):
        tree = DSparkDrafter(mine).propose([make_context([1, 2, 3, 4, 5], features=features)])
    assert not tree[0].tree.num_nodes
    assert "not finite" in caplog.text
