"""Draws in one pass against rows that are shaped first and perturbed then."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.errors import CapabilityError
from dspark.request import Rule, SamplingParams
from dspark.tree import Proposal
from dspark.tree_build import chain
from dspark.verify import noise_rows, noise_vectors, verifier
from dspark.verify.noise import NoiseKey, Stream, gumbel, perturbed_argmax, state_of, states_of
from dspark.verify.noise_native import noise_library
from dspark.verify.noise_rows import scaled_argmax
from dspark.verify.sampling import scale_of, shape_logits
from dspark.verify.verifier import VerifyJob, verify

TEMPERATURES = (1.0, 0.7, 0.05, 1e-20, 1.9, 33.0)


@pytest.fixture(autouse=True)
def _needs_kernels():
    if noise_library() is None:
        pytest.skip("no C++ compiler")


def make_rows(count, size, seed=0, spread=4.0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * spread


def slowly(rows, params, keys, positions):
    return perturbed_argmax(shape_logits(rows, params), keys, positions).tolist()


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([513, 1000, 4099, 49_152]),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([1e-6, 0.01, 1.0, 5.0, 30.0]),
    temperatures=st.lists(st.sampled_from(TEMPERATURES), min_size=1, max_size=6),
)
def test_the_tokens_are_those_of_shaped_rows(size, seed, spread, temperatures):
    count = len(temperatures)
    rows = make_rows(count, size, seed, spread)
    rows[0, ::3] = -math.inf
    params = [SamplingParams(temperature=t) for t in temperatures]
    keys, positions = [NoiseKey(seed + s) for s in range(count)], list(range(count))
    scales = [scale_of(own) for own in params]
    found = scaled_argmax(rows, scales, states_of(keys, Stream.COUPLED, positions))
    assert found == slowly(rows, params, keys, positions)


@pytest.mark.parametrize("position", [1998, 6018, 13383])
def test_the_lowest_noise_leaves_out_no_token(position):
    """The likelier of two has noise lower than vectors hold it, so that the other one is drawn."""
    row = torch.full((1, 1024), -50.0)
    row[0, [7, 9]] = torch.tensor([10.0, 8.0])
    own = SamplingParams(temperature=1.0)
    beside = replace(own, top_k=5)

    def job(start, params):
        key = NoiseKey(0)
        return VerifyJob(
            start=start, params=params, rule=Rule.COUPLED, noise=key, position=position
        )

    alone = verify(row, [job(0, own)])[0]
    together = verify(row.repeat(2, 1), [job(0, own), job(1, beside)])[0]
    assert slowly(row, [own], [NoiseKey(0)], [position]) == [9]
    assert (alone.closing, together.closing) == (9, 9)


def test_temperatures_that_are_one_in_single_precision():
    """They shape a row, in double precision; near-ties tell."""
    params, key = SamplingParams(temperature=1 + 1e-9), NoiseKey(5)
    for position in range(200):
        first, second = gumbel(key, position, [3, 4])
        row = torch.full((1, 600), -60.0)
        row[0, [0, 3, 4]] = torch.tensor([0.7, -1.3, float(-1.3 + first - second)])
        states = states_of([key], Stream.COUPLED, [position])
        found = scaled_argmax(row, [scale_of(params)], states)
        assert found in (None, slowly(row, [params], [key], [position]))


def test_many_draws_follow_the_law():
    """Three tokens far above the others; 3,000 positions."""
    row = torch.full((1, 600), -40.0)
    row[0, [7, 300, 599]] = torch.tensor([0.5, 0.2, 0.3]).log()
    seen = [
        scaled_argmax(row, [1.0], [state_of(NoiseKey(3), Stream.MATCH, t)]) for t in range(3000)
    ]
    shares = [seen.count([token]) / 3000 for token in (7, 300, 599)]
    np.testing.assert_allclose(shares, [0.5, 0.2, 0.3], atol=0.03)


@pytest.mark.parametrize("size", [600, 5000])
def test_close_ones_are_told_apart_exactly(size, monkeypatch):
    """All sums are equal as float32, so that every token is looked at again."""
    rows = torch.zeros(2, size)
    rows[:, 20:] = -50.0
    rows[1, 5] = 1e-4
    level = [np.zeros(size, np.float32)]
    monkeypatch.setattr(noise_rows, "noise_vectors", lambda states, *_: level * len(states))
    asked = []

    def exact(values, state, ids):
        asked.append((values.tolist(), ids.tolist()))
        order = np.argsort(-values, kind="stable")
        return ids[order], values[order]

    monkeypatch.setattr(noise_rows.noise, "ranked", exact)
    assert scaled_argmax(rows[1:], [1.0], [1]) is None  # twenty are more than there is room for
    rows[:, 8:] = -50.0
    assert scaled_argmax(rows, [1.0, 0.5], [1, 2]) == [0, 5]
    values, ids = asked[1]
    assert ids == list(range(8))
    assert values[5] == 0.0
    assert values[0] == pytest.approx(-2e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rows_without_a_token_are_refused_as_ever(bad, temperature):
    rows = make_rows(2, 700)
    rows[1] = bad
    if bad != -math.inf:
        rows[1, 3:] = 0.0
    job = VerifyJob(
        start=0,
        proposal=Proposal(chain([4], [0.5])),
        params=SamplingParams(temperature=temperature),
        rule=Rule.COUPLED,
        noise=NoiseKey(1),
        round=1,
        position=3,
    )
    with pytest.raises(CapabilityError, match="row 1"):
        verify(rows, [job])


def test_wide_values_and_other_places_are_left_to_the_other_path():
    assert scaled_argmax(make_rows(1, 700) + 5000.0, [1.0], [1]) is None
    assert scaled_argmax(make_rows(1, 700) + 5000.0, [0.5], [1]) is not None  # less its largest
    assert scaled_argmax(make_rows(1, 700).to(torch.bfloat16), [1.0], [1]) is None
    assert scaled_argmax(make_rows(1, 512), [1.0], [1]) is None
    assert scaled_argmax(make_rows(2, 700).T.contiguous().T, [1.0, 1.0], [1, 2]) is None
    assert scaled_argmax(make_rows(0, 700), [], []) is None


@pytest.mark.parametrize("rule", [Rule.COUPLED, Rule.SAMPLE_MATCH])
def test_verdicts_are_those_without_it(rule, monkeypatch):
    """Of jobs side by side, and of one whose rows another kind of request takes part with."""
    rows = make_rows(12, 900, spread=2.0)
    plain = SamplingParams(temperature=0.9)
    jobs = [
        VerifyJob(
            start=3 * i,
            proposal=Proposal(chain([5, 6], [0.5, 0.4])),
            params=plain if i else SamplingParams(temperature=1.4),
            rule=rule,
            noise=NoiseKey(i),
            round=2,
            position=4 + i,
        )
        for i in range(4)
    ]
    calls = []

    def counted(*args):
        calls.append(len(args[2]))
        return scaled_argmax(*args)

    monkeypatch.setattr(verifier, "scaled_argmax", counted)
    found = verify(rows, jobs)
    assert calls == [12]
    monkeypatch.setattr(verifier, "scaled_argmax", lambda *_: None)
    assert found == verify(rows, jobs)


def test_vectors_are_kept_and_shared():
    noise_vectors.forget_vectors()
    one, two = noise_vectors.noise_vectors([5, 6], 2000, 2)
    again = noise_vectors.noise_vectors([6, 7, 6], 2000)
    assert again[0] is two
    assert again[2] is two
    assert noise_vectors.noise_vector(5, 2000) is one
    assert not one.flags.writeable
    for state in range(100, 200):
        noise_vectors.noise_vector(state, 600)
    assert noise_vectors.noise_vector(5, 2000) is not one
    np.testing.assert_array_equal(noise_vectors.noise_vector(5, 2000), one)
