"""Checks that no other file makes: positions are relative, sampled texts have the target's law."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark import SamplingParams
from dspark.base_model.attention import Attention, attend
from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import DictExperts
from dspark.base_model.model import V4Model
from dspark.base_model.presets import preset
from dspark.base_model.random_weights import random_tensors
from dspark.base_model.rotary import Rotation
from dspark.base_model.target import V4Target
from dspark.base_model.weights import DictSource
from dspark.draft.model import ModelDrafter
from dspark.engine import Engine
from tests.base_model.build import feed, open_slot

TOY: V4Config = replace(
    preset("v4-tiny"),
    vocab_size=6,
    hidden_size=32,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 8),
    num_hash_layers=1,
    sliding_window=6,
    index_topk=2,
)


def model_of(config: V4Config, seed: int, dtype: torch.dtype) -> V4Model:
    tensors = dict(random_tensors(config, seed=seed, quantised=False))
    return V4Model(config, DictSource(tensors), DictExperts(tensors), dtype=dtype)


# -- positions -------------------------------------------------------------------------------------


def window_attention(attention: Attention, model: V4Model, x: Tensor, first: int) -> Tensor:
    """A layer's attention over its window alone, rows at positions from `first` on."""
    n = len(x)
    theta = model._theta[attention.ratio > 0]
    rotation = Rotation.at(torch.arange(first, first + n), theta)
    _, query = attention.queries(x, rotation)
    keys = attention.keys(x, rotation)
    rows = torch.arange(n).expand(n, n)
    seen = rows <= torch.arange(n)[:, None]
    heads = attend(query, [(keys, rows, seen)], attention.sink, model.numerics)
    return attention.output(heads, rotation)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_windows_do_not_know_where_in_a_text_they_are(layer: int) -> None:
    """Draft stages have nothing but a window, so where their positions start does not matter."""
    model = model_of(TOY, 0, torch.float64)
    attention = model.blocks[layer].attention
    x = torch.randn(12, TOY.hidden_size, dtype=torch.float64, generator=_generator(1))
    with torch.inference_mode():
        here, there = (window_attention(attention, model, x, first) for first in (0, 1001))
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)
        # A key that is not turned along with the query would show.
        theta = model._theta[attention.ratio > 0]
        moved = [attention.keys(x, Rotation.at(torch.arange(12) + at, theta)) for at in (0, 1)]
        assert float((moved[0] - moved[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("ratio", [4, 8])
def test_entries_are_cut_at_absolute_places(ratio: int) -> None:
    """The same tokens pooled from another offset give other entries, a whole window apart the same.

    The rotation by the entry's position is taken out: only values, gates and biases are compared.
    """
    config = replace(TOY, compress_ratios=(ratio,) * 3)
    model = model_of(config, 0, torch.float64)
    compressor = model.blocks[0].attention.compressor
    assert compressor is not None
    reach = 2 * ratio if ratio == 4 else ratio
    still = Rotation.at(torch.zeros(1, dtype=torch.int64), model._theta[1])
    with torch.inference_mode():
        x = torch.randn(reach, TOY.hidden_size, dtype=torch.float64, generator=_generator(2))
        raw = compressor.project(x)
        present = torch.ones(1, reach, dtype=torch.bool)
        whole = compressor.pool(raw[None], present, still)
        rolled = compressor.pool(raw.roll(1, 0)[None], present, still)
    assert float((whole - rolled).abs().max()) > 1e-3


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- laws ------------------------------------------------------------------------------------------

PROMPT = [2, 5, 3, 2, 4, 3, 5]
SAMPLES = 500
TOKENS = 3


@functools.cache
def toy_target() -> V4Target:
    return V4Target(model_of(TOY, 3, torch.float32), name="toy", eos_token_ids=[])


@functools.cache
def law() -> np.ndarray:
    """The probability of every continuation of the prompt: [6, 6, 6]."""
    model = toy_target().model
    cache = model.new_cache()
    out = np.empty((6,) * TOKENS)
    for a in range(6):
        for b in range(6):
            logits = feed(model, cache, open_slot(cache), [*PROMPT, a, b])[-3:].double()
            first, second, third = logits.softmax(-1).numpy()
            out[a, b] = first[a] * second[b] * third
    return out


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_sampled_texts_have_the_targets_law(rule: str) -> None:
    """Drafted by a model of other weights; every continuation of three tokens is counted."""
    draft = V4Target(model_of(TOY, 4, torch.float32), name="draft", eos_token_ids=[])
    engine = Engine(toy_target(), drafter=ModelDrafter(draft, vocab_size=6))
    params = [
        SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=seed, rule=rule, ignore_eos=True)
        for seed in range(SAMPLES)
    ]
    results = engine.generate([PROMPT] * SAMPLES, params)
    drafted = sum(r.stats.committed - r.stats.rounds for r in results)
    assert drafted > SAMPLES / 10  # some drafts were taken
    counts = np.zeros_like(law())
    for result in results:
        counts[tuple(result.token_ids)] += 1
    assert chi_square_fits(counts, law())
    assert not chi_square_fits(counts, law().swapaxes(0, 1))


def chi_square_fits(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Pearson's test at about 4 standard deviations; cells of less than 5 expected are pooled."""
    expected = probabilities.ravel() * counts.sum()
    order = np.argsort(-expected)
    large = order[expected[order] >= 5]
    rest = order[len(large) :]
    wanted = np.append(expected[large], expected[rest].sum())
    found = np.append(counts.ravel()[large], counts.ravel()[rest].sum())
    statistic = ((found - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    return bool(statistic < freedom + 4 * (2 * freedom) ** 0.5)
