"""Routed experts in C++: torch's numbers, rows that ignore their company, and who gets them."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspark import Engine, SamplingParams, native
from dspark.base_model import native_experts
from dspark.base_model.checkpoint_write import random_checkpoint
from dspark.base_model.expert_store import ExpertWeights
from dspark.base_model.fp4 import quantise_fp4
from dspark.base_model.moe import RoutedExperts
from dspark.base_model.native_experts import ExpertKernels, load_kernels
from dspark.base_model.numerics import Numerics
from dspark.base_model.presets import preset
from dspark.base_model.stored import StoredWeight
from dspark.base_model.target import V4Target
from dspark.base_model.weights import ExpertsOnDevice
from dspark.draft.base import Drafter
from dspark.draft.lookup import LookupDrafter
from dspark.errors import CapabilityError, ConfigError
from dspark.exactness import check_trees
from dspark.models.store import cache_root
from dspark.registry import LoadOptions, load_target
from tests.base_model.conftest import SMALL
from tests.conftest import examples

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.01}
"""Largest difference from torch, of the largest number: the order of sums, in bfloat16 behind each
product a rounding that may fall to the other side."""


class Store:
    """Random experts in any storage.

    Args:
        count: Experts.
        hidden: D.
        inner: I.
        seed: Of the bytes.
        scales: The scale bytes that occur.
    """

    def __init__(
        self, count: int, hidden: int, inner: int, seed: int, scales: tuple[int, ...] = (121, 122)
    ) -> None:
        gen = torch.Generator().manual_seed(seed)

        def matrix(outputs: int, inputs: int) -> StoredWeight:
            codes = torch.randint(0, 256, (outputs, inputs // 2), generator=gen).to(torch.uint8)
            which = torch.randint(0, len(scales), (outputs, inputs // 32), generator=gen)
            bytes_ = torch.tensor(scales, dtype=torch.uint8)[which]
            return StoredWeight.of("w", codes.view(torch.int8), bytes_)

        self.experts = [
            ExpertWeights(matrix(inner, hidden), matrix(hidden, inner), matrix(inner, hidden))
            for _ in range(count)
        ]

    def fetch(self, prefix: str, expert: int) -> ExpertWeights:
        return self.experts[expert]


@pytest.fixture(scope="module")
def kernels() -> ExpertKernels:
    return load_kernels(cache_root() / "kernels")


def layer(
    store: Store,
    kernels: ExpertKernels | None,
    *,
    chosen: int = 2,
    limit: float = 10.0,
    dtype: torch.dtype = torch.float32,
    fake_quant: bool = False,
) -> RoutedExperts:
    """A layer of these experts that runs in C++ or, without kernels, in torch."""
    inner, hidden = store.experts[0].w1.shape
    config = replace(
        preset("v4-tiny"),
        hidden_size=hidden,
        moe_intermediate_size=inner,
        n_routed_experts=len(store.experts),
        num_experts_per_tok=chosen,
        swiglu_limit=limit,
    )
    numerics = Numerics.of(dtype, CPU)
    numerics.kernels, numerics.fake_quant = kernels, fake_quant
    return RoutedExperts("layer", config, numerics, ExpertsOnDevice(store, CPU))


def rows_of(
    n: int, hidden: int, experts: int, chosen: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their experts and their weights."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden, generator=gen).to(dtype)
    picked = torch.rand(n, experts, generator=gen).argsort(1)[:, :chosen]
    return x, picked, torch.rand(n, chosen, generator=gen)


def difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    return float((got - expected).abs().max() / expected.abs().max())


# -- the numbers -----------------------------------------------------------------------------------


@needs_compiler
@given(
    hidden=st.integers(1, 9),
    inner=st.integers(1, 9),
    experts=st.integers(1, 9),
    chosen=st.integers(1, 4),
    n=st.integers(1, 40),
    limit=st.sampled_from([0.0, 1.0, 10.0]),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    seed=st.integers(0, 1000),
)
@examples(20, 120)
def test_kernels_give_what_torch_gives(
    kernels: ExpertKernels,
    hidden: int,
    inner: int,
    experts: int,
    chosen: int,
    n: int,
    limit: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    chosen = min(chosen, experts)
    store = Store(experts, 32 * hidden, 32 * inner, seed)
    batch = rows_of(n, 32 * hidden, experts, chosen, seed, dtype)
    options = {"chosen": chosen, "limit": limit, "dtype": dtype}
    ours = layer(store, kernels, **options)(*batch)
    theirs = layer(store, None, **options)(*batch)
    assert difference(ours, theirs) <= TOLERANCE[dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str), ids=str)
def test_activations_are_rounded_as_the_release_does(
    kernels: ExpertKernels, dtype: torch.dtype
) -> None:
    """To FP8 before both products: what is left is far smaller than that rounding."""
    store = Store(6, 256, 128, seed=1)
    batch = rows_of(9, 256, 6, 2, seed=1, dtype=dtype)
    ours = layer(store, kernels, dtype=dtype, fake_quant=True)(*batch)
    theirs = layer(store, None, dtype=dtype, fake_quant=True)(*batch)
    plain = layer(store, None, dtype=dtype)(*batch)
    assert difference(ours, theirs) < 0.2 * difference(plain, theirs)
    assert difference(plain, theirs) > 0.005


@needs_compiler
def test_every_code_and_every_scale_is_its_number(kernels: ExpertKernels) -> None:
    """One input at a time, and a gate that is 1: what comes out are the weights themselves."""
    hidden = inner = 256
    store = Store(1, hidden, inner, seed=2, scales=tuple(range(1, 120)))
    of = store.experts[0]
    ones = quantise_fp4(torch.full((inner, hidden), 2.0))
    gate = StoredWeight.of("gate", *ones)
    identity = StoredWeight.of("down", *quantise_fp4(torch.eye(inner)))
    store.experts[0] = ExpertWeights(w1=gate, w2=identity, w3=of.w3)
    x = torch.eye(hidden)
    none, weights = torch.zeros(hidden, 1, dtype=torch.int64), torch.ones(hidden, 1)
    ours = layer(store, kernels, chosen=1, limit=0.0)(x, none, weights)
    silu = float(torch.nn.functional.silu(torch.tensor(2.0)))
    expected = of.w3.dequantise(torch.float32).T
    codes = of.w3.weight.view(torch.uint8)
    assert len(torch.unique(codes)) == 256
    torch.testing.assert_close(ours, silu * expected, rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize(("byte", "is_finite"), [(0, True), (255, False)])
def test_the_least_scale_is_no_zero_and_a_scale_of_nan_shows(
    kernels: ExpertKernels, byte: int, is_finite: bool
) -> None:
    store = Store(2, 128, 64, seed=3, scales=(121, byte))
    batch = rows_of(5, 128, 2, 1, seed=3)
    batch = (batch[0] * 1e30 if is_finite else batch[0], *batch[1:])
    ours = layer(store, kernels, chosen=1, limit=10.0)(*batch)
    theirs = layer(store, None, chosen=1, limit=10.0)(*batch)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert bool(ours.isfinite().all()) == is_finite
    if is_finite:
        assert difference(ours, theirs) <= TOLERANCE[torch.float32]


@needs_compiler
def test_a_row_that_is_not_finite_stays_so_alone(kernels: ExpertKernels) -> None:
    store = Store(2, 64, 64, seed=4)
    x, chosen, weights = rows_of(6, 64, 2, 2, seed=4)
    x[2, 5] = torch.nan
    out = layer(store, kernels)(x, chosen, weights)
    assert out.isnan().all(1).tolist() == [False, False, True, False, False, False]


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("machine", ["x86-64", "x86-64-v3"])
def test_other_instruction_sets_give_the_same_numbers(tmp_path: Path, machine: str) -> None:
    """Four and eight lanes, codes decoded by arithmetic and by a table of sizes."""
    changes = {"-march=native": f"-march={machine}", "-O3": "-O0"}  # -O0: compiled sooner
    flags = tuple(changes.get(flag, flag) for flag in native.FLAGS)
    other = load_kernels(tmp_path, flags)
    assert other.lanes == {"x86-64": 4, "x86-64-v3": 8}[machine]
    store, batch = Store(3, 160, 96, seed=5), rows_of(12, 160, 3, 2, seed=5)
    found = layer(store, other)(*batch)
    assert difference(found, layer(store, None)(*batch)) <= TOLERANCE[torch.float32]
    row = layer(store, other)(*(part[7:8] for part in batch))
    assert torch.equal(row, found[7:8])


# -- company ---------------------------------------------------------------------------------------


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("fake_quant", [False, True], ids=["", "rounded"])
@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str), ids=str)
def test_a_row_has_the_same_bits_in_any_company(
    kernels: ExpertKernels, dtype: torch.dtype, fake_quant: bool
) -> None:
    """One to forty rows of an expert, alone and among others, on one thread and on several."""
    store = Store(4, 384, 128, seed=6)
    routed = layer(store, kernels, dtype=dtype, fake_quant=fake_quant)
    x, chosen, weights = rows_of(40, 384, 4, 2, seed=6, dtype=dtype)
    whole = routed(x, chosen, weights)
    gen = torch.Generator().manual_seed(7)
    for size in (*range(1, 12), 23, 39):
        torch.set_num_threads(1 + size % 3)
        some = torch.randperm(40, generator=gen)[:size]
        assert torch.equal(routed(x[some], chosen[some], weights[some]), whole[some])


# -- what else experts may be stored as ------------------------------------------------------------


@needs_compiler
def test_experts_that_are_stored_otherwise_go_through_torch_in_their_place(
    kernels: ExpertKernels,
) -> None:
    """Float weights, float scales and FP8 among packed ones; the order of adding stays."""
    store = Store(7, 128, 128, seed=8)
    for expert, change in ((1, _as_float), (4, _with_float_scales), (5, _as_fp8)):
        of = store.experts[expert]
        store.experts[expert] = ExpertWeights(*(change(w) for w in (of.w1, of.w2, of.w3)))
    batch = rows_of(8, 128, 7, 5, seed=8)
    mixed = layer(store, kernels, chosen=5)(*batch)
    assert difference(mixed, layer(store, None, chosen=5)(*batch)) <= TOLERANCE[torch.float32]


def _as_float(stored: StoredWeight) -> StoredWeight:
    return StoredWeight(stored.dequantise(torch.bfloat16))


def _with_float_scales(stored: StoredWeight) -> StoredWeight:
    assert stored.scale is not None
    return StoredWeight(stored.weight, stored.scale.float())


def _as_fp8(stored: StoredWeight) -> StoredWeight:
    codes = stored.dequantise(torch.float32).mul(2.0**7).to(torch.float8_e4m3fn)
    return StoredWeight(codes, torch.full((1, 1), 2.0**-7))


@needs_compiler
def test_gradients_and_double_precision_go_through_torch(kernels: ExpertKernels) -> None:
    store = Store(3, 64, 64, seed=9)
    x, chosen, weights = rows_of(4, 64, 3, 2, seed=9)
    x.requires_grad_()
    tracked = layer(store, kernels)(x, chosen, weights)
    assert tracked.requires_grad
    assert torch.equal(tracked, layer(store, None)(x, chosen, weights))
    wide = [part.double() if part.is_floating_point() else part for part in (x, chosen, weights)]
    routed = layer(store, kernels, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(routed(*wide), layer(store, None, dtype=torch.float64)(*wide))


@needs_compiler
def test_no_rows_are_no_rows(kernels: ExpertKernels) -> None:
    store = Store(3, 64, 64, seed=10)
    out = layer(store, kernels)(*rows_of(0, 64, 3, 2, seed=10))
    assert out.shape == (0, 64)


# -- whole models ----------------------------------------------------------------------------------


def loaded(folder: Path, path: str = "fused", **settings: Any) -> V4Target:
    """A checkpoint's target on a path."""
    options = LoadOptions(name="v4", dtype="float32", path=path)
    target = load_target(folder, replace(options, **settings)).target
    assert isinstance(target, V4Target)
    return target


@needs_compiler
def test_texts_are_those_of_torch_drafted_or_not_mapped_or_paged(
    v4_folders: dict[str, Path],
) -> None:
    folder, params = v4_folders["official"], SamplingParams(max_tokens=5, ignore_eos=True)
    rng = np.random.default_rng(3)
    prompts = [(rng.integers(6, 250, n).tolist() * 3)[: 2 * n + 3] for n in (5, 19)]

    def texts(target: V4Target, drafter: Drafter | None = None) -> list[list[int]]:
        target.switch_exact(True)
        results = Engine(target, drafter=drafter).generate(prompts, params)
        return [list(result.token_ids) for result in results]

    expected = texts(loaded(folder, "plain", exact=False))
    fused = loaded(folder, exact=False)
    assert "experts in C++" in fused.exactness.backend
    assert texts(fused) == expected
    assert texts(fused, LookupDrafter()) == expected
    assert check_trees(fused)  # against their paths, bit by bit
    paged = loaded(folder, exact=False, expert_memory=16_000)
    assert texts(paged, LookupDrafter()) == expected
    stats = paged.model.experts.stats
    assert stats.evictions > stats.hits
    assert stats.bytes_held <= 16_000


@needs_compiler
def test_auto_takes_kernels_for_models_that_are_worth_compiling_for(
    v4_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(native.PATH_VARIABLE, raising=False)

    def found(path: str = "auto", **settings: Any) -> ExpertKernels | None:
        target = loaded(v4_folders["official"], path, exact=False, **settings)
        return target.model.numerics.kernels

    assert found() is None
    monkeypatch.setattr(native_experts, "_LEAST_WEIGHTS", 0)
    assert found() is not None
    assert found("plain") is None
    assert found(has_many_rows=True) is None
    monkeypatch.setenv(native.PATH_VARIABLE, "plain")
    assert found() is None
    monkeypatch.setenv(native.PATH_VARIABLE, "swift")
    with pytest.raises(ConfigError, match="'swift'"):
        found()


def test_without_a_compiler_experts_go_through_torch(
    v4_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv(native.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(native_experts, "_LEAST_WEIGHTS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO):
        target = loaded(v4_folders["official"], "auto", exact=False)
    assert target.model.numerics.kernels is None
    assert "go through torch: there is no C++ compiler (no-such-compiler)" in caplog.text
    with pytest.raises(CapabilityError, match=r"no C\+\+ compiler"):
        loaded(v4_folders["official"], exact=False)


def test_models_whose_experts_are_not_packed_say_so(
    v4_folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CapabilityError, match="not stored in FP4"):
        loaded(v4_folders["transformers"], exact=False)
    random_checkpoint(tmp_path / "base", replace(SMALL, expert_dtype="fp8"), seed=1)
    with pytest.raises(CapabilityError, match="not stored in FP4"):
        loaded(tmp_path / "base", exact=False)
    with pytest.raises(CapabilityError, match="activations are float16"):
        loaded(v4_folders["official"], exact=False, dtype="float16")
