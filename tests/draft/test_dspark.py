"""The DSpark drafter against a plain second implementation, and its state over many rounds."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from scipy import stats

import dspark
from dspark.draft.base import Drafter, Observer
from dspark.draft.combined import CombinedDrafter
from dspark.draft.draft_cache import ContextCache, common_length
from dspark.draft.dspark import DSparkDrafter, DSparkDrafterConfig
from dspark.draft.grow import drawn_shape
from dspark.draft.lookup import LookupDrafter
from dspark.errors import ConfigError
from dspark.mtp_head import DraftVocab
from dspark.request import Rule, SamplingParams
from dspark.target import SharesHead
from dspark.tree import DraftTree, Proposal
from dspark.verify.noise import NoiseKey, draft_gumbel, gumbel
from dspark.verify.verifier import VerifyJob, verify
from tests.conftest import random_target
from tests.draft.dspark_models import (
    HEADS,
    LAYER_IDS,
    STYLES,
    VOCAB,
    joined,
    make_config,
    make_features,
    make_module,
    paths_of,
)
from tests.draft.reference_dspark import Reference

RANKED = [Rule.GREEDY, Rule.COUPLED, Rule.SAMPLE_MATCH]
WHOLE = DSparkDrafterConfig(beams=50, min_survival=0.0)


def reference_of(module, context, seed=0):
    return Reference(
        module, joined(make_features(len(context.tokens) - 1, seed)), context.tokens[-1]
    )


def check_against_reference(module, context, proposal, reference):
    """Survival of every node of a ranked tree follows from the reference's logits."""
    tree = proposal.tree
    assert tree.num_nodes
    for node, path in enumerate(paths_of(tree)):
        above = 1.0 if tree.parent[node] < 0 else tree.survival[tree.parent[node]]
        logits = module.vocab.widen(reference.logits(list(path[:-1])))
        share = torch.softmax(logits, 0)[path[-1]]
        assert tree.survival[node] == pytest.approx(above * float(share), rel=2e-5)
        brothers = [tree.token[i] for i in tree.children_of(int(tree.parent[node]))]
        if node == int(tree.children_of(int(tree.parent[node]))[0]):
            assert path[-1] == int(logits.argmax()), brothers


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("anchor", [True, False])
def test_every_head_equals_the_plain_implementation(given, head, anchor):
    module = make_module(head=head, sample_from_anchor=anchor)
    context = given(9, budget=9, depth=5, width=2)
    proposal = DSparkDrafter(module, config=WHOLE).propose([context])[0]
    check_against_reference(module, context, proposal, reference_of(module, context))
    chain = given(9, budget=9, depth=9, width=1, seed=1)
    tree = DSparkDrafter(module, config=WHOLE).propose([chain])[0].tree
    assert tree.max_depth == tree.num_nodes == module.config.gamma == 4 + anchor


@pytest.mark.parametrize("style", STYLES)
def test_every_backbone_equals_the_plain_implementation(given, style):
    module = make_module(style, "vanilla")
    context = given(14, budget=6, depth=5, width=1)
    proposal = DSparkDrafter(module, config=WHOLE).propose([context])[0]
    check_against_reference(module, context, proposal, reference_of(module, context))


@pytest.mark.parametrize("head", HEADS)
def test_confidences_and_base_logits_equal_the_plain_implementation(given, head, monkeypatch):
    module = make_module(head=head)
    drafter, context = DSparkDrafter(module), given(7)
    kept = []
    run = drafter._run
    monkeypatch.setattr(drafter, "_run", lambda jobs: kept.append(run(jobs)) or kept[-1])
    drafter.propose([context])
    reference = reference_of(module, context)
    path = [3, 50, 7, 8]
    for depth in range(5):
        hidden = kept[0].hidden[0, depth]
        torch.testing.assert_close(
            hidden.double(), reference.hidden[depth], rtol=1e-5, atol=2e-5, check_dtype=False
        )
        token = torch.tensor([[context.tokens[-1], *path][depth]])
        mine = torch.sigmoid(module.confidence(hidden[None], token))
        assert float(mine) == pytest.approx(reference.confidence(path[:depth]), abs=1e-5)


def test_a_reduced_vocabulary_proposes_only_its_tokens_and_keeps_the_laws(given):
    vocab = DraftVocab.build(VOCAB, range(1, VOCAB, 3))
    module = make_module(vocab=vocab, head="gated")
    context = given(8, budget=12, depth=4)
    proposal = DSparkDrafter(module, config=WHOLE).propose([context])[0]
    check_against_reference(module, context, proposal, reference_of(module, context))
    drawn = DSparkDrafter(module).propose([given(8, rule=Rule.REJECTION, budget=12)])[0]
    for tree in (proposal.tree, drawn.tree):
        assert set(tree.token.tolist()) <= set(range(1, VOCAB, 3))
    outside = np.delete(drawn.laws.numpy(), np.arange(1, VOCAB, 3), axis=1)
    assert (outside == 0).all()
    np.testing.assert_allclose(drawn.laws.numpy().sum(1), 1)


def test_a_bias_on_a_token_finds_it_in_a_reduced_vocabulary(given):
    module = make_module(vocab=DraftVocab.build(VOCAB, range(1, VOCAB, 3)))
    free = DSparkDrafter(module).propose([given(8, budget=3, depth=1, width=3)])[0].tree.token
    bias = {int(free[0]): -100.0, 3: 100.0}  # the draft has no token 3
    context = given(8, budget=3, depth=1, width=3, params={"logit_bias": bias})
    assert DSparkDrafter(module).propose([context])[0].tree.token[:2].tolist() == free[1:].tolist()


def shaped(module, reference, path, temperature=1.0):
    return (module.vocab.widen(reference.logits(list(path))) / temperature).numpy()


@pytest.mark.parametrize("rule", [Rule.COUPLED, Rule.SAMPLE_MATCH])
@pytest.mark.parametrize("ids", [None, range(1, VOCAB, 3)])
def test_ranked_children_are_the_best_of_all_corrected_logits(given, rule, ids):
    """No step may look only at the best of U: the head can lift any token to the top."""
    module = make_module(head="rnn", vocab=None if ids is None else DraftVocab.build(VOCAB, ids))
    context = given(6, rule=rule, budget=20, depth=3, width=3, temperature=0.8)
    tree = DSparkDrafter(module, config=WHOLE).propose([context])[0].tree
    reference = reference_of(module, context)
    for node in [-1, *range(tree.num_nodes)]:
        path = tree.path_tokens(node)
        children = tree.token[tree.children_of(node)].tolist()
        values = shaped(module, reference, path, 0.8)
        if rule is Rule.COUPLED:
            at = context.output_position + len(path)
            values = values + gumbel(context.noise, at, np.arange(VOCAB))
        assert children == np.argsort(-values)[: len(children)].tolist()


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
@pytest.mark.parametrize("head", ["none", "rnn"])
def test_drawn_children_come_from_the_laws_that_are_kept(given, rule, head):
    module = make_module(head=head)
    context = given(6, rule=rule, budget=9, depth=4, width=3)
    proposal = DSparkDrafter(module).propose([context])[0]
    proposal.validate()
    tree, reference = proposal.tree, reference_of(module, context)
    shape = drawn_shape(9, 4, 1 if rule is Rule.BLOCK else 3)
    assert sorted(tree.depth.tolist()) == sorted(shape.depth.tolist())
    for node in [-1, *range(tree.num_nodes)]:
        children = tree.children_of(node)
        if not len(children):
            continue
        values = shaped(module, reference, tree.path_tokens(node))
        noisy = values + draft_gumbel(context.noise, context.round, node, np.arange(VOCAB))
        assert tree.token[children].tolist() == np.argsort(-noisy)[: len(children)].tolist()
        law = np.exp(values - values.max())
        kept = proposal.laws[int(proposal.law_of[children[0]])].numpy()
        np.testing.assert_allclose(kept, law / law.sum(), atol=1e-6)


def test_the_output_has_the_targets_law_under_rejection(given):
    """Toy size: 400 drafts, each with its own noise, judged by the real verifier."""
    module = make_module(head="vanilla", vocab=DraftVocab.build(VOCAB, [1, 2, 3, 5]), block_size=2)
    drafter, params = DSparkDrafter(module), SamplingParams(temperature=1.0)
    law = np.zeros(VOCAB)
    law[[1, 2, 3, 5, 7]] = [0.1, 0.35, 0.2, 0.05, 0.3]
    row = torch.from_numpy(np.log(np.maximum(law, 1e-30))).float()
    options = {"rule": Rule.REJECTION, "budget": 4, "depth": 2, "width": 2}
    contexts = [given(3, **options) for _ in range(100)]
    counts = np.zeros((2, VOCAB))
    for start in range(0, 400, 100):
        for number, context in enumerate(contexts):
            context.request_id, context.noise = number, NoiseKey(start + number)
        proposals = drafter.propose(contexts)
        rows = np.cumsum([0, *(1 + p.tree.num_nodes for p in proposals)]).tolist()
        jobs = [
            VerifyJob(start=at, params=params, rule=c.rule, noise=c.noise, position=4, proposal=p)
            for at, c, p in zip(rows, contexts, proposals, strict=False)
        ]
        for job, verdict in zip(jobs, verify(row.expand(rows[-1], -1), jobs), strict=True):
            path = [int(job.proposal.tree.token[node]) for node in verdict.path]
            for place, token in enumerate([*path, verdict.closing][:2]):
                counts[place, token] += 1
        for context in contexts:
            context.features = None
    for place in range(2):
        seen = counts[place][law > 0]
        assert counts[place].sum() == seen.sum() > 100
        assert stats.chisquare(seen, seen.sum() * law[law > 0]).pvalue > 1e-4


# -- state over rounds ------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["qwen3", "sliding", "sliding moving"])
def test_state_in_step_equals_scratch(given, style):
    module = make_module(style, "gated")
    drafter, rng = DSparkDrafter(module), np.random.default_rng(4)
    sizes = {seed: 2 + 20 * seed for seed in range(3)}
    known = dict.fromkeys(sizes, 0)  # rows handed over; rounds left out add up
    for number in range(9):
        part = [seed for seed in sizes if (seed + number) % 3]
        contexts = [
            given(sizes[s], new=sizes[s] - 1 - known[s], seed=s, round=number) for s in part
        ]
        for s, proposal in zip(part, drafter.propose(contexts), strict=True):
            fresh = DSparkDrafter(module).propose([given(sizes[s], seed=s, round=number)])[0]
            assert paths_of(proposal.tree) == paths_of(fresh.tree)
            np.testing.assert_allclose(proposal.tree.survival, fresh.tree.survival, rtol=1e-4)
            known[s] = sizes[s] - 1
        for s in sizes:
            sizes[s] += int(rng.integers(1, 7))
    drafter.release(1)
    drafter.release(99)
    assert sorted(drafter._contexts._caches) == [0, 2]


def test_a_request_alone_and_in_a_batch_of_16_proposes_the_same(given):
    module = make_module(head="rnn")
    rules = [*RANKED, Rule.REJECTION, Rule.BLOCK]
    options = [
        {"seed": i, "rule": rules[i % 5], "budget": 3 + i, "depth": 1 + i % 6} for i in range(16)
    ]
    sizes = [2 + 11 * i for i in range(16)]
    pairs = list(zip(sizes, options, strict=True))
    together = DSparkDrafter(module).propose([given(size, **o) for size, o in pairs])
    for (size, o), proposal in zip(pairs, together, strict=True):
        alone = DSparkDrafter(module).propose([given(size, **o)])[0]
        assert paths_of(alone.tree) == paths_of(proposal.tree)
        assert alone.tree.num_nodes
        np.testing.assert_allclose(alone.tree.survival, proposal.tree.survival, rtol=1e-4)


def test_a_context_is_not_copied_every_round():
    cache = ContextCache([None, 8])
    moves, buffers = 0, None
    for _ in range(500):
        rows = [(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))] * 2
        cache.append([0, 0], rows)
        cache.with_block(0, torch.zeros(5, 1, 4), torch.zeros(5, 1, 4), None)
        moves += cache._layers[0].key is not buffers
        buffers = cache._layers[0].key
    assert moves <= 8
    assert cache._layers[1].key.shape[1] <= 100  # a sliding layer forgets


def test_a_recomputed_or_rewritten_context_is_taken_in_anew(given):
    module = make_module()
    drafter = DSparkDrafter(module)
    drafter.propose([given(30)])
    again = given(20)
    fresh = DSparkDrafter(module).propose([again])[0]
    assert paths_of(drafter.propose([again])[0].tree) == paths_of(fresh.tree)
    other = given(25, text=[7] * 400)
    fresh = DSparkDrafter(module).propose([other])[0]
    assert paths_of(drafter.propose([other])[0].tree) == paths_of(fresh.tree)


def test_a_shared_beginning_is_copied_from_the_request_that_had_it(given):
    """The engine does not run shared prompt tokens again, so their hidden states never arrive."""
    module = make_module("sliding", "vanilla")
    drafter = DSparkDrafter(module)
    text = given(40).tokens
    drafter.propose([given(40, text=text)])
    late = given(40, new=9, text=text)
    late.request_id = 7
    whole = given(40, text=text)
    fresh = DSparkDrafter(module).propose([whole])[0]
    assert paths_of(drafter.propose([late])[0].tree) == paths_of(fresh.tree)


def test_samples_of_one_prompt_in_one_call_share_its_beginning(given):
    module = make_module()
    contexts = [given(30), given(30, new=3), given(30, new=1)]
    for number, context in enumerate(contexts):
        context.request_id = number
    trees = [p.tree for p in DSparkDrafter(module).propose(contexts[::-1])]
    assert paths_of(trees[0]) == paths_of(trees[1]) == paths_of(trees[2])


def test_without_a_donor_the_draft_goes_on_from_what_it_has(given):
    drafter = DSparkDrafter(make_module())
    drafter.propose([given(40)])
    drafter.release(0)
    tree = drafter.propose([given(40, new=3)])[0].tree
    assert tree.num_nodes
    known = given(43, new=3)
    assert drafter.propose([known])[0].tree.num_nodes


def test_missing_hidden_states_cost_the_draft_only(given, caplog):
    drafter = DSparkDrafter(make_module())
    context = given(9)
    context.features = {k: v for k, v in context.features.items() if k != LAYER_IDS[0]}
    with caplog.at_level(logging.WARNING):
        assert drafter.propose([context])[0].tree.num_nodes == 0
        assert drafter.propose([context])[0].tree.num_nodes == 0
    assert len(caplog.records) == 1


def test_a_combined_drafter_that_skips_the_second_still_feeds_it(given, make_context):
    class Sure(LookupDrafter):
        def propose(self, contexts):
            chain = DraftTree.build([5], [-1], [0.99])
            sure = Proposal(chain, law_of=np.array([-1]))
            return [sure if c.round == 1 else Proposal.empty() for c in contexts]

    module = make_module()
    combined = CombinedDrafter(Sure(), DSparkDrafter(module))
    options = {"rule": Rule.BLOCK, "budget": 4, "depth": 4}
    assert combined.propose([given(10, round=1, **options)])[0].source == ("lookup",)
    tree = combined.propose([given(14, new=4, round=2, **options)])[0].tree
    moved = given(14, round=2 + (1 << 32), **options)
    assert paths_of(tree) == paths_of(DSparkDrafter(module).propose([moved])[0].tree)


# -- faults and limits ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["lm_head", "norm"])
def test_broken_output_is_an_empty_proposal_said_once(given, caplog, where, value):
    module = make_module()
    getattr(module, where).weight[3] = value
    drafter = DSparkDrafter(module)
    with caplog.at_level(logging.WARNING):
        proposals = drafter.propose([given(5), given(9, seed=1, rule=Rule.REJECTION)])
        drafter.propose([given(7, new=2)])
    assert [p.tree.num_nodes for p in proposals] == [0, 0]
    assert len(caplog.records) == 1


def test_broken_hidden_states_of_one_request_do_not_reach_another(given):
    module = make_module()
    broken, sound = given(9), given(12, seed=1)
    broken.features[LAYER_IDS[1]][4] = math.nan
    first, second = DSparkDrafter(module).propose([broken, sound])
    assert first.tree.num_nodes == 0
    alone = DSparkDrafter(module).propose([given(12, seed=1)])[0]
    assert paths_of(second.tree) == paths_of(alone.tree)


def test_penalties_see_the_path(given):
    module = make_module(head="none")
    module.lm_head.weight *= 0.001
    context = given(6, width=1, depth=5, params={"presence_penalty": 2.0})
    tree = DSparkDrafter(module, config=WHOLE).propose([context])[0].tree
    assert tree.num_nodes == len(set(tree.token.tolist())) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"block_size": 1, "sample_from_anchor": False},
        {"mask_token_id": VOCAB},
        {"target_layer_ids": (2, 1)},
        {"target_layer_ids": (0, 3)},
        {"target_layer_ids": ()},
        {"markov_head_type": "gru"},
        {"markov_rank": 0},
        {"draft_vocab_size": VOCAB + 1},
    ],
)
def test_impossible_modules_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_config(**options)


@pytest.mark.parametrize("options", [{"width": 0}, {"beams": 0}, {"min_survival": 1.0}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ConfigError):
        DSparkDrafterConfig(**options)


def test_texts_in_common():
    rng = np.random.default_rng(1)
    for _ in range(200):
        one = rng.integers(0, 2, rng.integers(0, 12)).tolist()
        other = one[: rng.integers(0, 12)] + rng.integers(0, 2, rng.integers(0, 5)).tolist()
        length = common_length(one, other)
        assert one[:length] == other[:length]
        assert length == min(len(one), len(other)) or one[length] != other[length]


# -- behind the engine ------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [11], [20, 21, 22, 23] * 6]


def target_of(family: str) -> dspark.target.Target:
    """Two layers, as the drafts read what goes into them; Gemma 4's last ones share the others'."""
    return random_target(family, exact=True, layers=None if family == "gemma4" else 2)


def random_drafter(family: str, style: str, *, is_shared: bool = False) -> DSparkDrafter:
    target = target_of(family)
    options = {"num_target_layers": target.info.num_layers, "target_layer_ids": (-1, 0)}
    if is_shared:
        options |= {"shares": target, "owns_embedding": False, "owns_head": False}
    module = make_module(style, "vanilla", **options)
    return DSparkDrafter(module, config=DSparkDrafterConfig(min_survival=0.0))


@pytest.mark.parametrize(
    ("family", "style", "temperature"),
    [
        ("llama", "llama", 0.0),
        pytest.param("qwen3", "qwen3", 1.0, marks=pytest.mark.slow),  # greedy, it is below
        ("gemma3", "gemma4", 1.0),
        ("gemma4", "gemma4 with v", 1.0),
    ],
)
def test_behind_the_engine_the_tokens_are_those_of_plain_decoding(family, style, temperature):
    params = SamplingParams(
        max_tokens=10, temperature=temperature, seed=5, ignore_eos=True, tree_budget=16, n=2
    )
    target = target_of(family)
    config = dspark.EngineConfig(auto_off=False)
    plain = dspark.Engine(target, config=config).generate(PROMPTS, params)
    engine = dspark.Engine(target, drafter=random_drafter(family, style), config=config)
    results = engine.generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert all(r.stats.verified > 5 for r in results)
    assert sum(r.stats.accepted for r in results) > 0
    assert not engine.drafter._contexts._caches


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_behind_the_engine_rejection_gives_the_same_text_alone(rule):
    params = SamplingParams(
        max_tokens=8, temperature=1.0, seed=5, rule=rule, tree_budget=6, ignore_eos=True
    )
    config = dspark.EngineConfig(auto_off=False)

    def texts(prompts):
        drafter = random_drafter("llama", "llama")
        engine = dspark.Engine(target_of("llama"), drafter=drafter, config=config)
        return [r.token_ids for r in engine.generate(prompts, params)]

    assert [texts([prompt])[0] for prompt in PROMPTS] == texts(PROMPTS)


@pytest.mark.slow  # rows in bfloat16 are compared in adapters/test_parity.py
def test_in_bfloat16_the_tokens_are_those_of_plain_decoding():
    target = random_target("llama", torch.bfloat16, exact=True, layers=4)
    drafter = DSparkDrafter(make_module("llama", "rnn").bfloat16())
    params = SamplingParams(max_tokens=16, ignore_eos=True, tree_budget=10)
    results = dspark.Engine(target, drafter=drafter).generate(PROMPTS, params)
    plain = dspark.Engine(target).generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert all(r.stats.verified > 5 for r in results)


def test_auto_off_and_rounds_without_drafts_change_nothing():
    params = SamplingParams(max_tokens=24, ignore_eos=True, tree_budget=3)
    target = target_of("qwen3")
    plain = dspark.Engine(target).generate(PROMPTS, params)
    engine = dspark.Engine(target, drafter=random_drafter("qwen3", "qwen3"))
    results = engine.generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gemma4", "phi3"]
)
def test_a_wrapped_target_shares_its_embedding_and_head(family):
    """Also: the captured state of the last layer comes before the final norm."""
    target = random_target(family, exact=False)
    assert isinstance(target, SharesHead)
    last = target.info.num_layers - 1
    cache = target.new_cache()
    slot, _ = cache.open([5, 6, 7])
    cache.reserve(slot, 3)
    part = dspark.target.BatchPart(slot, [5, 6, 7], [0, 1, 2], [-1, 0, 1], [0, 1, 2])
    output = target.forward(dspark.target.TokenBatch.build([part]), cache, capture=(-1, last))
    with torch.inference_mode():
        torch.testing.assert_close(target.embed(torch.tensor([5, 6, 7])), output.hidden[-1])
        normed = target._backbone.norm(output.hidden[last])
        torch.testing.assert_close(target.unembed(normed), output.logits)


def test_a_module_without_embedding_and_head_uses_the_targets():
    target = target_of("gemma3")
    engine = dspark.Engine(target, drafter=random_drafter("gemma3", "qwen3", is_shared=True))
    params = SamplingParams(max_tokens=8, ignore_eos=True, tree_budget=8)
    plain = dspark.Engine(target).generate(PROMPTS, params)
    results = engine.generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert all(r.stats.verified > 0 for r in results)


def test_the_drafter_meets_the_protocols():
    drafter = DSparkDrafter(make_module(), name="dflash")
    assert isinstance(drafter, Drafter)
    assert isinstance(drafter, Observer)
    assert drafter.name == "dflash"
    assert drafter.capture == LAYER_IDS
