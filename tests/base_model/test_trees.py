"""Trees on compressed attention: every node as its path alone, and commits without a trace."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspark.base_model.model import V4Model
from dspark.target import TokenBatch
from tests.base_model import oracle
from tests.base_model.build import build_model, feed, open_slot, part_of, relative_error, run
from tests.conftest import examples

SETTINGS = examples(6, 60)
VOCAB = 97
parents = st.lists(st.integers(0, 100), min_size=0, max_size=14).map(
    lambda picks: [-1, *(pick % (row + 1) for row, pick in enumerate(picks))]
)
lengths = st.integers(0, 45)
seeds = st.integers(0, 2**16)


@functools.cache
def model_of(dtype: torch.dtype, window: int = 16) -> tuple[dict[str, Any], dict, V4Model]:
    # A layer of every kind is enough: none reads what another one has stored.
    config = oracle.tiny_config(sliding_window=window)
    weights = oracle.random_weights(config, 1, dtype)
    return config, weights, build_model(config, weights, dtype)


def drawn(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def path_to(parent: list[int], row: int) -> list[int]:
    path = [row]
    while parent[path[0]] >= 0:
        path.insert(0, parent[path[0]])
    return path


def prepared(model: V4Model, context: list[int]) -> tuple[Any, int]:
    cache = model.new_cache()
    slot = open_slot(cache)
    if context:
        feed(model, cache, slot, context, (len(context) // 2,))
    return cache, slot


@SETTINGS
@given(length=lengths, parent=parents, seed=seeds)
def test_a_nodes_logits_are_those_of_its_path_alone(
    length: int, parent: list[int], seed: int
) -> None:
    _, _, model = model_of(torch.float64)
    context, tokens = drawn(seed, length), drawn(seed + 1, len(parent))
    cache, slot = prepared(model, context)
    tree = run(model, cache, slot, tokens, parent)
    texts = [context + [tokens[i] for i in path_to(parent, row)] for row in range(len(parent))]
    assert relative_error(tree, last_rows(model, texts)) < 1e-9


def last_rows(model: V4Model, texts: list[list[int]]) -> Tensor:
    """Logits [texts, V] after each text, run from its beginning in a request of its own."""
    cache = model.new_cache()
    slots = [open_slot(cache) for _ in texts]
    for slot, text in zip(slots, texts, strict=True):
        cache.reserve(slot, len(text))
    parts = [part_of(slot, 0, text) for slot, text in zip(slots, texts, strict=True)]
    logits = model.forward(TokenBatch.build(parts), cache).logits
    return logits[np.cumsum([len(text) for text in texts]) - 1]


@SETTINGS
@given(length=lengths, parent=parents, seed=seeds, data=st.data())
def test_after_a_commit_the_cache_is_that_of_plain_decoding(
    length: int, parent: list[int], seed: int, data: st.DataObject
) -> None:
    """Every path is tried over the examples, the empty one and inner nodes included."""
    _, _, model = model_of(torch.float64)
    context, tokens = drawn(seed, length), drawn(seed + 1, len(parent))
    cache, slot = prepared(model, context)
    run(model, cache, slot, tokens, parent)
    leaf = data.draw(st.integers(-1, len(parent) - 1))
    path = [] if leaf < 0 else path_to(parent, leaf)
    cache.commit(slot, path)
    text = context + [tokens[i] for i in path]
    more = drawn(seed + 2, 19)  # goes on past the next window, CSA and HCA boundaries
    got = feed(model, cache, slot, more, (1, 4, 1))
    other = model.new_cache()
    expected = feed(model, other, open_slot(other), text + more)[len(text) :]
    assert relative_error(got, expected) < 1e-9


@examples(4, 60)
@given(length=st.integers(0, 40), parent=parents, seed=seeds)
def test_trees_in_single_precision_but_for_near_ties(
    length: int, parent: list[int], seed: int
) -> None:
    config, weights, model = model_of(torch.float32)
    context, tokens = drawn(seed, length), drawn(seed + 1, len(parent))
    cache, slot = prepared(model, context)
    tree = run(model, cache, slot, tokens, parent)
    for row in {0, len(parent) // 2, len(parent) - 1}:
        text = context + [tokens[i] for i in path_to(parent, row)]
        alone = oracle.run(config, weights, text)
        if alone.margin.min() < 1e-5:
            continue
        assert relative_error(tree[row], alone.logits[-1]) < 1e-4


@SETTINGS
@given(
    rounds=st.lists(st.tuples(parents, st.integers(0, 99), st.booleans()), min_size=1, max_size=6),
    starts=st.lists(st.integers(1, 20), min_size=2, max_size=3),
    seed=seeds,
)
def test_rounds_of_trees_over_several_requests_leave_what_plain_decoding_leaves(
    rounds: list[tuple[list[int], int, bool]], starts: list[int], seed: int
) -> None:
    """Requests of unequal length, drafts of any shape, one request now and then left out."""
    _, _, model = model_of(torch.float64, 5)
    cache = model.new_cache()
    texts = [drawn(seed + i, n) for i, n in enumerate(starts)]
    slots = [open_slot(cache) for _ in texts]
    for slot, text in zip(slots, texts, strict=True):
        feed(model, cache, slot, text)
    for number, (parent, pick, skip) in enumerate(rounds):
        members = slots[1:] if skip else slots
        tokens = drawn(seed + 100 + number, len(parent))
        path = path_to(parent, pick % len(parent))
        for slot in members:
            cache.reserve(slot, len(tokens))
        parts = [part_of(slot, cache.length(slot), tokens, parent) for slot in members]
        model.forward(TokenBatch.build(parts), cache)
        for slot in members:
            cache.commit(slot, path)
            texts[slots.index(slot)].extend(tokens[i] for i in path)
    for slot, text in zip(slots, texts, strict=True):
        other = model.new_cache()
        expected = feed(model, other, open_slot(other), [*text, 7, 8])[-2:]
        assert relative_error(feed(model, cache, slot, [7, 8]), expected) < 1e-9


def test_branches_that_close_the_same_window_own_different_entries() -> None:
    """Teeth: two leaves that differ only in a token inside the window must differ afterwards."""
    _, _, model = model_of(torch.float64)
    cache, slot = prepared(model, drawn(0, 29))
    parent = [-1, 0, 0, 1, 2, 3, 4, 5, 6]  # two branches; position 31 closes CSA and HCA windows
    tokens = [1, 2, 3, 4, 4, 5, 5, 6, 6]
    logits: Tensor = run(model, cache, slot, tokens, parent)
    assert relative_error(logits[7], logits[8]) > 1e-3
