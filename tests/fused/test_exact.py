"""On the fused path a row has the same bits in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dspark
from dspark import exactness
from dspark.adapters.fused.choose import check_rows
from dspark.draft.lookup import LookupDrafter
from dspark.target import BatchPart, TargetOutput
from tests.fused.models import (
    FUSED_FAMILIES,
    forward,
    fused_target,
    needs_compiler,
    prefill,
    random_tokens,
    tree_part,
)

pytestmark = needs_compiler


# Every family and every seed, which is a context and a tree.
FAST = (("llama", 0), ("gemma2", 1), ("gemma3", 2), ("llama", 3), ("gemma3", 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_the_check_at_load_holds(family: str, dtype: torch.dtype) -> None:
    target = fused_target(family, dtype)
    assert target.exactness.holds
    assert target.exactness.enabled
    assert target.exactness.cost == 0
    assert check_rows(target)
    assert exactness.check_trees(target)


def test_the_check_sees_a_row_that_depends_on_its_company() -> None:
    target = fused_target("llama")

    class Leaky:
        info, new_cache = target.info, staticmethod(target.new_cache)

        def forward(self, batch, cache, *, capture=()):
            logits = target.forward(batch, cache, capture=capture).logits.clone()
            logits[0, 0] += 1e-4 * batch.num_rows
            return TargetOutput(logits)

    assert not check_rows(Leaky())


@pytest.mark.parametrize(
    ("family", "seed"),
    [
        pytest.param(family, seed, marks=() if (family, seed) in FAST else pytest.mark.slow)
        for family in ("llama", "gemma2", "gemma3")
        for seed in range(4)
    ],
)
def test_random_trees_equal_their_paths(family: str, seed: int) -> None:
    target, rng = fused_target(family), np.random.default_rng(seed)
    nodes, length = int(rng.integers(2, 90)), int(rng.choice([1, 15, 16, 250, 300]))
    context, tokens = random_tokens(rng, length), random_tokens(rng, nodes)
    parent = [-1] + [int(rng.integers(max(0, row - 5), row)) for row in range(1, nodes)]
    cache = target.new_cache()
    others = [prefill(target, cache, random_tokens(rng, 7 * n)) for n in range(1, 4)]
    slot = prefill(target, cache, context, chunks=int(rng.integers(1, 4)))
    lines = [
        BatchPart.chain(other, random_tokens(rng, 2), cache.length(other), want_last=False)
        for other in others
    ]
    tree = forward(target, cache, lines[0], tree_part(slot, tokens, parent, length), *lines[1:])
    for leaf in {nodes - 1, nodes // 2, int(rng.integers(nodes))}:
        path = [leaf]
        while parent[path[0]] >= 0:
            path.insert(0, parent[path[0]])
        alone = target.new_cache()
        line = prefill(target, alone, context)
        for step, row in enumerate(path):
            part = BatchPart.chain(line, [tokens[row]], length + step, want_last=True)
            assert torch.equal(forward(target, alone, part).logits[0], tree.logits[row])
            alone.commit(line, [0])


def test_what_follows_a_commit_is_what_plain_decoding_leaves() -> None:
    target, rng = fused_target("qwen3"), np.random.default_rng(8)
    context, tokens = random_tokens(rng, 254), random_tokens(rng, 6)
    cache = target.new_cache()
    slot = prefill(target, cache, context)
    forward(target, cache, tree_part(slot, tokens, [-1, 0, 0, 1, 2, 2], len(context)))
    cache.commit(slot, [0, 2, 5])
    kept = [*context, tokens[0], tokens[2], tokens[5]]
    fresh = target.new_cache()
    line = prefill(target, fresh, kept)
    for _ in range(3):
        token = random_tokens(rng, 1)
        ends = [
            forward(target, c, BatchPart.chain(s, token, c.length(s), want_last=True)).logits
            for c, s in ((cache, slot), (fresh, line))
        ]
        assert torch.equal(*ends)
        cache.commit(slot, [0])
        fresh.commit(line, [0])


def test_drafts_do_not_change_texts() -> None:
    target, rng = fused_target("llama"), np.random.default_rng(4)
    phrase = random_tokens(rng, 6)
    prompts = [phrase * 4, random_tokens(rng, 30)]
    for params in (
        dspark.SamplingParams(max_tokens=28, temperature=0.0, ignore_eos=True),
        dspark.SamplingParams(max_tokens=28, temperature=0.9, seed=3, ignore_eos=True),
    ):
        plain = dspark.Engine(target).generate(prompts, params)
        drafted = dspark.Engine(target, drafter=LookupDrafter()).generate(prompts, params)
        assert [r.token_ids for r in plain] == [r.token_ids for r in drafted]
        assert sum(sum(r.stats.verified_at_depth) for r in drafted) > 0


def test_threads_do_not_change_bits() -> None:
    target, rng = fused_target("gemma3"), np.random.default_rng(9)
    tokens, before = random_tokens(rng, 33), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cache = target.new_cache()
            slot = prefill(target, cache, tokens)
            part = BatchPart(slot, tokens, np.arange(33, 66), np.arange(-1, 32), np.arange(33))
            found.append(forward(target, cache, part).logits)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
