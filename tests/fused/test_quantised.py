"""Targets whose weights are rounded to int8 or int4 as they are loaded."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dspark
from dspark import exactness
from dspark.adapters.fused.choose import check_rows
from dspark.adapters.fused.library import load_library
from dspark.adapters.fused.packing import pack_gated, pack_stacked
from dspark.adapters.fused.target import FusedTarget
from dspark.adapters.quantise import GROUP, quantise, quantise_modules
from dspark.draft.lookup import LookupDrafter
from dspark.errors import CapabilityError, ConfigError
from dspark.models import cache_root
from dspark.registry import LoadOptions, load_target
from dspark.target import Target
from tests.conftest import random_model
from tests.fused.models import (
    FUSED_FAMILIES,
    LAYERS,
    choose,
    forward,
    needs_compiler,
    random_tokens,
    tree_part,
)
from tests.fused.test_parity import life_of_requests

BOTH = pytest.mark.parametrize("quant", ["int8", "int4"])


@given(
    st.integers(1, 5), st.integers(1, 4), st.sampled_from([1e-4, 1.0, 300.0]), st.integers(0, 99)
)
def test_weights_are_rounded_to_the_nearest(
    outputs: int, groups: int, size: float, seed: int
) -> None:
    weight = torch.randn(outputs, groups * GROUP, generator=torch.Generator().manual_seed(seed))
    weight *= size
    eight, four = quantise(weight, "int8"), quantise(weight, "int4")
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((eight.dequantise() - weight).abs() <= 0.5001 * steps).all()
    # No worse than sixteen even steps over a group's range, each stored with eight bits.
    grouped = weight.view(outputs, groups, GROUP)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    plain = low + ((grouped - low) / step).round() * step
    errors = [(x - grouped).square().sum(-1) for x in (four.dequantise().view_as(grouped), plain)]
    assert (errors[0].sqrt() <= 1.1 * errors[1].sqrt() + 1e-2 * size).all()
    assert four.values.max() <= 15


@BOTH
def test_numbers_that_can_be_kept_are_kept(quant: str) -> None:
    rng = np.random.default_rng(5)
    whole = rng.integers(0, 16, (6, 3 * GROUP))
    whole[:, ::GROUP], whole[:, 1::GROUP] = 0, 15
    if quant == "int8":
        whole = rng.integers(-127, 128, (6, 3 * GROUP))
        whole[:, 0] = 127
    weight = torch.from_numpy(whole).float() * 0.25 - (0 if quant == "int8" else 2)
    assert torch.equal(quantise(weight, quant).dequantise(), weight)


def test_a_row_is_rounded_as_if_it_were_alone() -> None:
    """Paths stack other layers' rows together, and must get the same weights."""
    torch.manual_seed(4)
    kept = torch.randint(0, 16, (512, 2 * GROUP)).float() * 0.25 - 2
    kept[:, 0::GROUP], kept[:, 1::GROUP] = -2, 1.75
    odd = torch.randn(2, 2 * GROUP)
    both = quantise(torch.cat([kept, odd]), "int4").dequantise()
    assert torch.equal(both, torch.cat([quantise(x, "int4").dequantise() for x in (kept, odd)]))


def test_zeros_stay_zeros() -> None:
    for quant in ("int8", "int4"):
        assert not quantise(torch.zeros(3, GROUP), quant).dequantise().any()


def test_int4_needs_whole_groups() -> None:
    with pytest.raises(CapabilityError, match=r"33 inputs .* multiple of 32"):
        quantise(torch.zeros(2, 33), "int4")


@BOTH
@pytest.mark.parametrize("lanes", [4, 16])
def test_packing_can_be_undone(quant: str, lanes: int) -> None:
    torch.manual_seed(1)
    first, second = torch.nn.Linear(96, 64), torch.nn.Linear(96, 40)
    packed = pack_stacked([first, second], lanes, quant)
    weight = torch.cat([first.weight, second.weight]).detach()
    assert torch.equal(packed.unpack(), quantise(weight, quant).dequantise())
    up = torch.nn.Linear(96, 64)
    pairs = torch.stack([first.weight.view(-1, lanes, 96), up.weight.view(-1, lanes, 96)], dim=1)
    expected = quantise(pairs.detach().flatten(0, 2), quant).dequantise()
    assert torch.equal(pack_gated(first, up, lanes, quant).unpack(), expected)


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """x with every GROUP of its last dimension rounded to int8, and multiplied out again."""
    blocks = x.unflatten(-1, (-1, GROUP))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks * torch.where(step > 0, 1 / step, 0.0)).round() * step).flatten(-2)


@functools.cache
def llama(quant: str) -> Target:
    """A random Llama with rounded weights, only to be read."""
    return choose(random_model("llama", layers=1), quant=quant)


@needs_compiler
@BOTH
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 16, 33])
def test_products_are_those_of_the_rounded_numbers(quant: str, rows: int) -> None:
    target = llama("int8")
    assert isinstance(target, FusedTarget)
    head = torch.nn.Linear(64, 103, bias=True)
    torch.manual_seed(2)
    hidden = torch.randn(rows, 64) * torch.tensor([0.1, 7.0]).repeat_interleave(32)
    hidden[0, :32] = 0
    packed = pack_stacked([head], load_library(cache_root() / "kernels").lanes, quant)
    found = unembed_with(target, packed, hidden)
    weight = quantise(head.weight.detach(), quant).dequantise()
    expected = rounded_inputs(hidden).double() @ weight.double().T + head.bias.detach()
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@needs_compiler
@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(quant: str, bad: float) -> None:
    target = llama(quant)
    for place in (0, 15, 16, 31, 63):
        hidden = torch.randn(3, 64)
        hidden[1, place] = bad
        logits = target.unembed(hidden)
        assert not logits[1].isfinite().any()
        assert logits[[0, 2]].isfinite().all()


def unembed_with(target: FusedTarget, packed, hidden: torch.Tensor) -> torch.Tensor:
    """Run one product alone, as the target's output head."""
    from dspark.adapters.fused import structures

    decoder = target.decoder
    own = decoder.head
    decoder.head, decoder._model.head = packed, structures.matrix(packed)
    try:
        return target.unembed(hidden)
    finally:
        decoder.head, decoder._model.head = own, structures.matrix(own)


@needs_compiler
@pytest.mark.parametrize(
    # What a family does differently is in its int4 cell, what int8 does in those of two.
    ("family", "quant"),
    [(family, "int4") for family in FUSED_FAMILIES]
    + [
        (family, "int8")
        if family in ("llama", "gemma2")
        else pytest.param(family, "int8", marks=pytest.mark.slow)
        for family in FUSED_FAMILIES
    ],
)
def test_a_model_is_that_of_the_rounded_weights_and_inputs(family: str, quant: str) -> None:
    stock = random_model(family, layers=LAYERS.get(family))
    quantise_modules(stock, quant)
    for module in stock.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (rounded_inputs(args[0]),))
    target = choose(random_model(family, layers=LAYERS.get(family)), quant=quant)
    assert isinstance(target, FusedTarget)
    assert target.info.quant == target.decoder.stored == quant
    ids = random_tokens(np.random.default_rng(3), 40)
    expected = stock(torch.tensor([ids])).logits[0]
    cache = target.new_cache()
    slot, _ = cache.open(ids)
    found = forward(target, cache, tree_part(slot, ids, list(range(-1, 39)), 0)).logits
    # An input that two orders of a sum leave on either side of a half is rounded to either side.
    difference = (found - expected).abs().amax(dim=1) / expected.abs().max()
    assert (difference <= 2e-6).sum() >= 8  # rows that met no such input
    assert difference.max() <= 0.04


@BOTH
def test_the_plain_path_runs_the_rounded_model(quant: str) -> None:
    expected = random_model("qwen3_moe", layers=1)
    quantise_modules(expected, quant)
    ids = torch.tensor([random_tokens(np.random.default_rng(1), 20)])
    target = choose(random_model("qwen3_moe", layers=1), "plain", exact=False, quant=quant)
    untouched = random_model("qwen3_moe", layers=1)
    logits = [life_of_requests(target)[0]]
    assert not torch.allclose(expected(ids).logits, untouched(ids).logits, rtol=0.01)
    assert torch.equal(
        expected.get_input_embeddings().weight, untouched.get_input_embeddings().weight
    )
    experts = expected.get_decoder().layers[0].mlp.experts
    weight = untouched.get_decoder().layers[0].mlp.experts.down_proj[3]
    assert torch.equal(experts.down_proj[3], quantise(weight.detach(), quant).dequantise())
    plain = choose(expected, "plain", exact=False)
    assert torch.equal(life_of_requests(plain)[0], logits[0])


@needs_compiler
@pytest.mark.parametrize(
    ("family", "quant"),
    [
        ("llama", "int8"),
        ("gemma2", "int4"),
        pytest.param("llama", "int4", marks=pytest.mark.slow),
        pytest.param("gemma2", "int8", marks=pytest.mark.slow),
    ],
)
def test_rows_have_the_same_bits_in_any_company(family: str, quant: str) -> None:
    target = choose(random_model(family, torch.bfloat16, layers=2), quant=quant)
    assert target.exactness.holds
    assert check_rows(target)
    assert exactness.check_trees(target)


@needs_compiler
@BOTH
def test_drafts_do_not_change_texts(quant: str) -> None:
    target, rng = choose(random_model("llama", layers=2), quant=quant), np.random.default_rng(4)
    phrase = random_tokens(rng, 6)
    prompts = [phrase * 4, random_tokens(rng, 30)]
    for params in (
        dspark.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True),
        dspark.SamplingParams(max_tokens=24, temperature=0.3, seed=3, ignore_eos=True),
    ):
        plain = dspark.Engine(target).generate(prompts, params)
        drafted = dspark.Engine(target, drafter=LookupDrafter()).generate(prompts, params)
        assert [r.token_ids for r in plain] == [r.token_ids for r in drafted]
        assert sum(sum(r.stats.verified_at_depth) for r in drafted) > 0


@needs_compiler
def test_sizes_that_are_no_whole_blocks_take_the_plain_path() -> None:
    from tests.fused.test_parity import odd_model

    with pytest.raises(CapabilityError, match="int8 weights have 48 inputs, no multiple of 32"):
        choose(odd_model(), quant="int8")
    target = choose(odd_model(), "plain", exact=False, quant="int8")
    assert target.info.quant == "int8"


def test_exact_mode_is_found_out_for_each_by_itself(tmp_path: Path) -> None:
    folder, probes = tmp_path / "model", tmp_path / "probes"
    random_model("llama", layers=1).save_pretrained(folder)
    for quant in ("none", "int8", "int4"):
        options = LoadOptions(name="x", path="plain", quant=quant, probe_folder=probes)
        assert load_target(folder, options).target.info.quant == quant
    assert len(list(probes.iterdir())) == 3


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v4"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="quant is 'int3', but must be one of none, int8, int4"):
        load_target(tmp_path, LoadOptions(name="x", quant="int3"))
    with pytest.raises(CapabilityError, match="x cannot be rounded to int8"):
        load_target(tmp_path, LoadOptions(name="x", quant="int8"))
