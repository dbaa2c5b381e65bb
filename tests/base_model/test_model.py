"""The V4 target against transformers and against the oracle."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark.base_model.model import V4Model
from dspark.target import TokenBatch
from tests.base_model import hf_reference, oracle
from tests.base_model.build import build_model, feed, open_slot, part_of, relative_error, run

TOLERANCE = 1e-4
CASES: dict[str, dict[str, Any]] = {
    "every kind": {},
    "as many sinkhorn steps as released": {
        "compress_ratios": [0, 4, 8, 4, 0],
        "num_hash_layers": 2,
        "hc_sinkhorn_iters": 20,
    },
    "sliding only": {"compress_ratios": [0, 0], "num_hash_layers": 0, "sliding_window": 5},
    "sparse, one entry kept": {
        "compress_ratios": [4, 4],
        "sliding_window": 6,
        "index_topk": 1,
    },
    "heavy only": {"compress_ratios": [8, 8], "num_hash_layers": 1},
    "ratio 6, window 7": {"compress_ratios": [6, 4, 6], "sliding_window": 7},
    "window 1": {"compress_ratios": [3, 0, 4], "sliding_window": 1},
    "nothing dropped": {"compress_ratios": [4, 4], "index_topk": 100},
    "no yarn": {"compress_ratios": [4, 8], "rope_scaling": None},
    "other sizes": {
        "compress_ratios": [4, 0, 8],
        "num_attention_heads": 6,
        "head_dim": 16,
        "o_groups": 3,
        "index_head_dim": 8,
        "n_routed_experts": 5,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 2,
    },
}
# Around the window (16), both rates (4, 8), and the first length at which entries are dropped.
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 33)


@functools.cache
def material(case: str, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor], V4Model]:
    config = oracle.tiny_config(**CASES[case])
    weights = oracle.random_weights(config, 3, dtype)
    return config, weights, build_model(config, weights, dtype)


def ids(config: dict[str, Any], count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, config["vocab_size"], count).tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_for_prefill_decode_and_chunks(case: str) -> None:
    config, weights, model = material(case, torch.float32)
    tokens = ids(config, 50)
    reference = hf_reference.build(config, weights)
    with hf_reference.stable_topk():
        expected = hf_reference.logits(reference, tokens)
    splits = [(), (7, 1, 1, 1, 5, 11, 2, 9)]
    if case == "every kind":  # token by token past the window (16) and entries of every rate
        splits.append((1,) * 26)
    for chunks in splits:
        cache = model.new_cache()
        got = feed(model, cache, open_slot(cache), tokens, chunks)
        assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_oracle_to_the_last_digits(case: str) -> None:
    config, weights, model = material(case, torch.float64)
    tokens = ids(config, 40, seed=1)
    expected = oracle.path_logits(config, weights, tokens)
    cache = model.new_cache()
    assert relative_error(feed(model, cache, open_slot(cache), tokens, (13, 1, 1)), expected) < 1e-9


@functools.cache
def long_text() -> tuple[list[int], Tensor]:
    """A text of 52 tokens and its logits."""
    config, _, model = material("every kind", torch.float64)
    tokens = ids(config, 52, seed=2)
    cache = model.new_cache()
    return tokens, feed(model, cache, open_slot(cache), tokens)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prefix_gives_the_rows_of_a_longer_text(length: int) -> None:
    _, _, model = material("every kind", torch.float64)
    tokens, whole = long_text()
    cache = model.new_cache()
    part = feed(model, cache, open_slot(cache), tokens[:length])
    assert relative_error(part, whole[:length]) < 1e-9


def test_requests_in_one_batch_do_not_see_each_other() -> None:
    config, _, model = material("every kind", torch.float64)
    cache = model.new_cache()
    texts = [ids(config, n, seed=n) for n in (1, 6, 23, 40)]
    slots = [open_slot(cache) for _ in texts]
    for slot, text in zip(slots, texts, strict=True):
        cache.reserve(slot, len(text))
    parts = [part_of(slot, 0, text) for slot, text in zip(slots, texts, strict=True)]
    together = model.forward(TokenBatch.build(parts), cache).logits
    alone = torch.cat([feed(model, cache, open_slot(cache), text) for text in texts])
    assert relative_error(together, alone) < 1e-9


def test_captured_states_are_means_over_streams() -> None:
    config, weights, model = material("every kind", torch.float64)
    tokens = ids(config, 21, seed=5)
    layers = len(config["compress_ratios"])
    expected = oracle.path_hidden(config, weights, tokens)
    cache = model.new_cache()
    slot = open_slot(cache)
    cache.reserve(slot, len(tokens))
    batch = TokenBatch.build([part_of(slot, 0, tokens)])
    got = model.forward(batch, cache, capture=[-1, 0, 2, layers - 1, layers]).hidden
    for layer in (0, 2, layers - 1):
        assert relative_error(got[layer], expected[layer].mean(1)) < 1e-9
    assert relative_error(got[layers], expected[-1].flatten(1)) < 1e-9
    assert torch.equal(got[-1], weights["embed.weight"][tokens])


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            torch.float32, marks=pytest.mark.slow
        ),  # the check at load does it, in test_target.py
        torch.bfloat16,
    ],
)
def test_in_exact_mode_rows_do_not_depend_on_their_company(dtype: torch.dtype) -> None:
    config = oracle.tiny_config()
    weights = oracle.random_weights(config, 6, torch.float32)
    model = build_model(config, weights, dtype)
    model.numerics.exact = True
    tokens = ids(config, 34, seed=6)
    cache = model.new_cache()
    one = feed(model, cache, open_slot(cache), tokens, [1] * 34)
    chunked = feed(model, cache, open_slot(cache), tokens, (21, 3, 9))
    assert torch.equal(one, chunked)
    slot = open_slot(cache)
    feed(model, cache, slot, tokens[:25])
    parent = [-1, 0, 0, 1, 1, 3, 5, 6, 7]
    path_tokens = [tokens[25], tokens[26], 5, tokens[27], 9, *tokens[28:32]]
    tree = run(model, cache, slot, path_tokens, parent)
    for row, position in ((0, 25), (1, 26), (3, 27), (5, 28), (6, 29), (7, 30), (8, 31)):
        assert torch.equal(tree[row], one[position])


def test_rounding_as_the_release_does_is_small_and_off_by_default() -> None:
    config, weights, model = material("every kind", torch.float32)
    rounded = build_model(config, weights, torch.float32, fake_quant=True)
    tokens = ids(config, 12, seed=7)
    cache, other = model.new_cache(), rounded.new_cache()
    plain = feed(model, cache, open_slot(cache), tokens)
    noisy = feed(rounded, other, open_slot(other), tokens)
    assert 1e-5 < relative_error(noisy, plain) < 0.5
