"""Noise is a pure function of its words, uniform to 53 bits, and its shortcuts are exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dspark.errors import CapabilityError, ConfigError, ShapeError
from dspark.verify import noise, noise_vectors
from dspark.verify.noise import (
    MAX_GUMBEL,
    NoiseKey,
    Stream,
    draft_gumbel,
    draft_topk,
    gumbel,
    perturbed_argmax,
    perturbed_topk,
    uniform,
)

KEY = NoiseKey(1234, 5)


@pytest.fixture(params=["kernels", "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of making wide noise; the tests that do not ask for it take the kernels."""
    monkeypatch.setenv("DSPARK_PATH", "plain" if request.param == "numpy" else "auto")
    if request.param == "kernels" and noise.noise_library() is None:
        pytest.skip("no C++ compiler")
    noise_vectors.forget_vectors()
    return str(request.param)


def to_uniform(g: np.ndarray) -> np.ndarray:
    return np.exp(-np.exp(-g))


def brute_force(row: torch.Tensor, g: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    values = row.double().numpy() + g
    ids = np.argsort(-values, kind="stable")[:m]
    return ids, values[ids]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 999), min_size=1, max_size=40),
)
def test_a_subset_gets_the_bits_of_the_full_vector(
    seed: int, position: int, ids: list[int]
) -> None:
    key = NoiseKey(seed)
    full = gumbel(key, position, np.arange(1000))
    assert np.array_equal(gumbel(key, position, ids), full[ids])


def test_the_values_do_not_change_between_versions() -> None:
    """A seed names a text for good, so the words' mixing is part of the interface."""
    assert uniform(NoiseKey(0), 0, 0) == 0.6876521047405095
    assert uniform(NoiseKey(2**64 - 1, 3), 7, -1) == 0.8410852840777551


def test_the_mapping_reaches_both_ends_without_leaving_the_open_interval() -> None:
    bits = np.array([0, 1 << 11, 2 << 11, (1 << 64) - 1], dtype=np.uint64)
    assert noise._unit(bits).tolist() == [2.0**-53, 2.0**-53, 2.0**-52, 1 - 2.0**-53]
    g = noise._to_gumbel(bits)
    assert np.isfinite(g).all()
    assert 36.7 < g[0] < MAX_GUMBEL
    assert -3.7 < g[-1] < -3.5
    beyond_24_bits = noise._to_gumbel(np.array([1 << 38], dtype=np.uint64))
    assert beyond_24_bits[0] == pytest.approx(26 * math.log(2), abs=1e-6)
    assert beyond_24_bits[0] > 16.7


def test_uniforms_use_all_53_bits() -> None:
    numerators = [int(uniform(KEY, i) * 2**53) for i in range(2000)]
    ones = np.array([[n >> b & 1 for b in range(53)] for n in numerators]).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / math.sqrt(2000)


def test_noise_is_uniform_and_independent_along_every_word() -> None:
    tokens = to_uniform(gumbel(KEY, 0, np.arange(100_000)))
    positions = np.array([to_uniform(gumbel(KEY, t, [7]))[0] for t in range(2000)])
    seeds = np.array([to_uniform(gumbel(NoiseKey(s), 3, [7]))[0] for s in range(2000)])
    samples = np.array([to_uniform(gumbel(NoiseKey(9, s), 3, [7]))[0] for s in range(2000)])
    rules = np.array([uniform(KEY, 3, n) for n in range(5000)])
    for values in (tokens, positions, seeds, samples, rules):
        assert stats.kstest(values, "uniform").pvalue > 1e-4
        pairs = np.histogram2d(values[:-1:2], values[1::2], bins=8, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-4
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(len(values))


def test_neighbouring_names_and_streams_give_uncorrelated_vectors() -> None:
    ids = np.arange(50_000)
    base = gumbel(NoiseKey(1), 1, ids)
    others = [
        gumbel(NoiseKey(1), 2, ids),
        gumbel(NoiseKey(2), 1, ids),
        gumbel(NoiseKey(1, 1), 1, ids),
        gumbel(NoiseKey(1 + 2**63), 1, ids),
        draft_gumbel(NoiseKey(1), 1, 0, ids),
        draft_gumbel(NoiseKey(1), 0, 1, ids),
        draft_gumbel(NoiseKey(1), 1, -1, ids),
    ]
    for other in others:
        for shift in (0, 1, 2):
            r = np.corrcoef(base[: len(ids) - shift], other[shift:])[0, 1]
            assert abs(r) < 5 / math.sqrt(len(ids))


@pytest.mark.usefixtures("path")
def test_the_approximation_is_within_its_bound() -> None:
    """The bound is one-sided: clamped values may only be too large."""
    size = 100_000
    for state in (1, 2**63, noise.state_of(KEY, Stream.RULE, 4)):
        exact = noise._to_gumbel(noise._bits(state, np.arange(size)))
        gap = exact - noise.noise_vector(state, size)
        assert gap.max() < 2e-5
        assert gap[exact > -1.9].min() > -2e-5


@pytest.mark.parametrize("size", [1, 5, 512, 513, 5000, 49_152])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 30.0, 1e5])
@pytest.mark.usefixtures("path")
def test_topk_is_the_brute_force_one(size: int, scale: float) -> None:
    for seed in range(3):
        rows = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)) * scale
        keys, positions, m = [NoiseKey(seed), NoiseKey(seed, 1)], [0, 4], min(6, size)
        ids, values = perturbed_topk(rows, keys, positions, m)
        best = perturbed_argmax(rows, keys, positions)
        for r in range(2):
            g = gumbel(keys[r], positions[r], np.arange(size))
            want_ids, want_values = brute_force(rows[r], g, m)
            assert np.array_equal(ids[r].numpy(), want_ids)
            assert np.array_equal(values[r].numpy(), want_values)
            assert best[r] == want_ids[0]


@pytest.mark.parametrize("m", [1, 2, 7, 40, 3000])
@pytest.mark.usefixtures("path")
def test_topk_is_exact_where_the_perturbed_values_nearly_tie(m: int) -> None:
    """Logits that cancel the noise to float32 leave the order to the last bits."""
    size = 3000
    g = gumbel(KEY, 2, np.arange(size))
    for offset in (0.0, 100.0, -3e4):
        row = torch.from_numpy(offset - g).float()[None]
        ids, values = perturbed_topk(row, [KEY], [2], m)
        want_ids, want_values = brute_force(row[0], g, m)
        assert np.array_equal(ids[0].numpy(), want_ids)
        assert np.array_equal(values[0].numpy(), want_values)


@pytest.mark.usefixtures("path")
def test_topk_is_exact_where_a_token_with_very_low_noise_leads() -> None:
    size = 20_000
    g = gumbel(KEY, 0, np.arange(size))
    low = int(g.argmin())
    for gap in (-3.0, -0.5, 0.5, 3.0):
        row = torch.zeros(1, size)
        row[0, low] = float(g.max() - g[low]) + gap
        ids, _ = perturbed_topk(row, [KEY], [0], 3)
        assert np.array_equal(ids[0].numpy(), brute_force(row[0], g, 3)[0])


def test_narrow_and_wide_rows_take_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    rows[2, ::3] = -math.inf
    keys, positions = [NoiseKey(s) for s in range(8)], list(range(8))
    narrow = perturbed_topk(rows, keys, positions, 4)
    monkeypatch.setattr(noise, "NARROW", 0)
    sparse = perturbed_topk(rows, keys, positions, 4)
    monkeypatch.setattr(noise, "_SPARSE", 0)
    wide = perturbed_topk(rows, keys, positions, 4)
    for other in (sparse, wide):
        assert torch.equal(narrow[0], other[0])
        assert torch.equal(narrow[1], other[1])


@pytest.mark.parametrize("size", [20, 5000])
@pytest.mark.usefixtures("path")
def test_removed_tokens_are_never_chosen(size: int) -> None:
    row = torch.full((1, size), -math.inf)
    row[0, [3, 11]] = torch.tensor([-1000.0, 2.0])
    ids, values = perturbed_topk(row, [KEY], [0], 4)
    assert ids[0].tolist() == [11, 3, -1, -1]
    assert values[0, 2:].tolist() == [-math.inf] * 2
    assert perturbed_argmax(row, [KEY], [0]).tolist() == [11]
    with pytest.raises(CapabilityError, match="row 1"):
        perturbed_argmax(torch.cat([row, row - math.inf]), [KEY, KEY], [0, 0])


def test_equal_values_go_to_the_lowest_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_to_gumbel", lambda bits: np.zeros(len(bits)))
    monkeypatch.setattr(noise, "noise_vector", lambda _, size: np.zeros(size, np.float32))
    for size in (50, 5000):
        ids, _ = perturbed_topk(torch.zeros(1, size), [KEY], [0], 3)
        assert ids[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [513, 1000, 4099, 49_152])
@pytest.mark.parametrize("m", [1, 3, 64, 65])
def test_both_paths_find_the_same(size: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(6, size, generator=torch.Generator().manual_seed(m)) * torch.tensor(
        [[0.01], [1.0], [4.0], [20.0], [3e4], [1.0]]
    )
    rows[
        5, torch.randperm(size, generator=torch.Generator().manual_seed(0))[: size // 2]
    ] = -torch.inf
    keys, positions = [NoiseKey(s) for s in range(6)], list(range(6))
    found = []
    for path in ("plain", "auto"):
        monkeypatch.setenv("DSPARK_PATH", path)
        noise_vectors.forget_vectors()
        found.append(perturbed_topk(rows, keys, positions, m))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_the_kernels_noise_is_within_its_bound_at_both_ends() -> None:
    """Words whose hash is a given number: the finaliser can be run backwards."""
    library = noise.noise_library()
    if library is None:
        pytest.skip("no C++ compiler")
    units = [0, 1, 2, 3, 1000, 2**20, 2**33, *(2**k - 1 for k in range(34, 54)), 2**53 - 2**42]
    units += [int(f * 2**53) for f in (0.0199999, 0.02, 0.0200001, 0.3, 0.5, 0.7, 0.999)]
    words = np.array([_unmixed(unit << 11) for unit in units], dtype=np.uint64)
    exact = noise._to_gumbel(np.array(units, dtype=np.uint64) << np.uint64(11))
    gap = exact - library.vectors(words, [0], 1)[0]
    assert gap.max() < 2e-5
    assert gap[exact > -1.9].min() > -2e-5


def _unmixed(word: int) -> int:
    """What SplitMix64's finaliser makes `word` of."""
    mask = (1 << 64) - 1
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        back = word
        for _ in range(3):
            back = word ^ (back >> shift)
        word = back * pow(factor, -1, 1 << 64) & mask
    return word


def test_rows_that_are_no_numbers_are_left_to_numpy() -> None:
    library = noise.noise_library()
    if library is None:
        pytest.skip("no C++ compiler")
    row, zero = np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    assert library.candidates(row, zero, 1, 0.1) is not None
    for place in (0, 500, 999):
        row[place] = np.nan
        assert library.candidates(row, zero, 1, 0.1) is None
        row[place] = 0
    assert (
        library.candidates(np.full(9000, 1.0, np.float32), np.zeros(9000, np.float32), 1, 0) is None
    )
    assert library.candidates(np.full(1000, -np.inf, np.float32), zero, 1, 0.1) is None


def test_drafts_and_target_draws_use_their_own_streams() -> None:
    row = torch.zeros(1, 2000)
    ids = np.arange(2000)
    drafted, _ = draft_topk(row, [KEY], [2], [-1], 3)
    assert np.array_equal(drafted[0], np.argsort(-draft_gumbel(KEY, 2, -1, ids))[:3])
    matched = perturbed_argmax(row, [KEY], [2], stream=Stream.MATCH)
    coupled = perturbed_argmax(row, [KEY], [2])
    assert len({int(matched), int(coupled), int(drafted[0, 0])}) == 3


def test_a_row_does_not_depend_on_its_batch() -> None:
    rows = torch.randn(5, 3000, generator=torch.Generator().manual_seed(1))
    keys = [NoiseKey(s) for s in range(5)]
    together = perturbed_topk(rows, keys, range(5), 4)
    for r in range(5):
        alone = perturbed_topk(rows[r : r + 1], [keys[r]], [r], 4)
        assert torch.equal(together[0][r], alone[0][0])
        assert torch.equal(together[1][r], alone[1][0])


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="seed"):
        NoiseKey(-1)
    with pytest.raises(ConfigError, match="sample"):
        NoiseKey(0, -1)
    with pytest.raises(ConfigError, match="m is 0"):
        perturbed_topk(torch.zeros(1, 3), [KEY], [0], 0)
    with pytest.raises(ShapeError, match="one row per key"):
        perturbed_argmax(torch.zeros(2, 3), [KEY], [0])
    with pytest.raises(ShapeError, match="counters"):
        perturbed_argmax(torch.zeros(1, 3), [KEY], [0, 1])
    assert perturbed_argmax(torch.zeros(0, 3), [], []).shape == (0,)
