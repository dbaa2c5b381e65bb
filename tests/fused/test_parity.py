"""The fused path against stock modules: everything a target does, over one store."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from dspark.adapters.fused.target import FusedTarget
from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.errors import CapabilityError
from dspark.registry import LoadOptions
from dspark.target import BatchPart, Target, TokenBatch
from tests.conftest import random_model, random_target
from tests.fused.models import (
    FUSED_FAMILIES,
    LAYERS,
    choose,
    forward,
    fused_target,
    needs_compiler,
    prefill,
    random_tokens,
    tree_part,
)

pytestmark = needs_compiler

TREE = [-1, 0, 0, 1, 1, 2, 3, 3, 5, 6, 8]
PATH = (0, 2, 5, 8)  # a branch that does not lie side by side
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}


def life_of_requests(target: Target) -> list[torch.Tensor]:
    """Logits and hidden states of chunked prefill, a ragged batch with a tree, and what follows.

    The first request crosses a page (256 tokens) and the windows of the tiny models (20 tokens)
    within its tree; the third shares a prefix with it.
    """
    rng = np.random.default_rng(5)
    cache = target.new_cache()
    long, short = random_tokens(rng, 253), random_tokens(rng, 9)
    first, second = prefill(target, cache, long, chunks=3), prefill(target, cache, short)
    tokens = random_tokens(rng, len(TREE))
    found = []

    def note(output: object) -> None:
        found.append(output.logits)
        found.extend(output.hidden[layer] for layer in sorted(output.hidden))

    tree = tree_part(first, tokens, TREE, len(long))
    line = BatchPart.chain(second, random_tokens(rng, 5), len(short), want_last=True)
    note(forward(target, cache, line, tree, capture=(-1, *range(1, target.info.num_layers + 1))))
    cache.commit(first, PATH)
    cache.commit(second, range(2))
    third = prefill(target, cache, long[:100] + random_tokens(rng, 4))
    for _ in range(3):
        parts = [
            BatchPart.chain(slot, random_tokens(rng, 2), cache.length(slot), want_last=True)
            for slot in (third, first, second)
        ]
        note(forward(target, cache, *parts, capture=(0,)))
        for slot in (first, second, third):
            cache.commit(slot, range(2))
    return found


CELLS = [(family, torch.float32) for family in FUSED_FAMILIES]
# What a family does differently is in its float32 cell, what bfloat16 does in those of three.
CELLS += [
    (family, torch.bfloat16)
    if family in ("llama", "qwen3", "gemma2")
    else pytest.param(family, torch.bfloat16, marks=pytest.mark.slow)
    for family in FUSED_FAMILIES
]


@pytest.mark.parametrize(("family", "dtype"), CELLS)
def test_equals_the_plain_path(family: str, dtype: torch.dtype) -> None:
    ours = life_of_requests(fused_target(family, dtype))
    theirs = life_of_requests(random_target(family, dtype, exact=True, layers=LAYERS.get(family)))
    layers = LAYERS.get(family, 3)
    assert len(ours) == len(theirs) == 2 + layers + 3 * 2
    for a, b in zip(ours, theirs, strict=True):
        assert b.dtype == dtype
        assert torch.equal(a, a.to(dtype).to(a.dtype))  # logits are float32, but rounded
        assert a.shape == b.shape
        assert (a.float() - b.float()).abs().max() <= TOLERANCE[dtype] * b.float().abs().max()


def greedy(target: Target, prompt: list[int], count: int) -> list[int]:
    cache = target.new_cache()
    slot = prefill(target, cache, prompt[:-1])
    text = [prompt[-1]]
    for _ in range(count):
        part = BatchPart.chain(slot, text[-1:], cache.length(slot), want_last=True)
        text.append(int(forward(target, cache, part).logits.argmax()))
        cache.commit(slot, [0])
    return text[1:]


def test_the_rotary_table_reaches_the_last_position() -> None:
    """It begins with 1,024 rows; the last row of a batch is the first to need one more."""
    tokens = random_tokens(np.random.default_rng(2), 1025)
    plain = random_target("llama", torch.float32, exact=True, layers=LAYERS["llama"])
    last = []
    for target in (fused_target("llama"), plain):
        cache = target.new_cache()
        slot, _ = cache.open([])
        last.append(forward(target, cache, BatchPart.chain(slot, tokens, 0, want_last=True)))
    ours, theirs = (output.logits for output in last)
    assert (ours - theirs).abs().max() <= TOLERANCE[torch.float32] * theirs.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_texts_are_those_of_the_plain_path(family: str) -> None:
    prompt = random_tokens(np.random.default_rng(11), 12)
    plain = random_target(family, torch.float32, exact=True, layers=LAYERS[family])
    assert greedy(fused_target(family), prompt, 24) == greedy(plain, prompt, 24)


def test_weights_that_bfloat16_holds_are_stored_so_and_change_nothing() -> None:
    def model() -> torch.nn.Module:
        return random_model("qwen3", layers=2).bfloat16().float()

    target, rounded = choose(model()), model()
    options = LoadOptions(name="rounded", exact=False)
    plain = wrap_model(rounded, adapter_for(rounded.config.model_type), options)
    assert isinstance(target, FusedTarget)
    assert target.decoder.stored == "bfloat16"
    assert fused_target("qwen3").decoder.stored == "float32"
    assert target.info.dtype == "float32"
    for a, b in zip(life_of_requests(target), life_of_requests(plain), strict=True):
        assert (a - b).abs().max() <= TOLERANCE[torch.float32] * b.abs().max()


def odd_model() -> transformers.PreTrainedModel:
    """Sizes that end inside a panel, biases everywhere, a head of its own."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=103,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=80,
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_sizes_that_end_inside_a_panel_and_biases() -> None:
    stock, ids = odd_model(), list(range(5, 45))
    expected = stock(torch.tensor([ids])).logits[0]
    target = choose(stock)
    cache = target.new_cache()
    slot, _ = cache.open(ids)
    part = tree_part(slot, ids, list(range(-1, len(ids) - 1)), 0)
    found = forward(target, cache, part).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "make", [lambda: random_model("gemma3", layers=2), odd_model], ids=["tied", "own"]
)
def test_the_head_and_the_embeddings_can_be_shared(make) -> None:
    model = make()
    weight = model.get_output_embeddings().weight.detach().clone()
    first = model.get_input_embeddings()(torch.tensor([4, 9])).detach().clone()
    target = choose(model)
    cache = target.new_cache()
    slot, _ = cache.open([4, 9, 7])
    last = target.info.num_layers
    part = tree_part(slot, [4, 9, 7], [-1, 0, 1], 0)
    output = forward(target, cache, part, capture=(-1, last))
    assert torch.equal(output.hidden[-1][:2], first)
    assert torch.equal(target.embed(torch.tensor([4, 9])), first)
    assert torch.equal(target.unembed(output.hidden[last]), output.logits)
    assert torch.equal(target.head_rows().weight, weight)
    assert torch.equal(target.head_rows(torch.tensor([8, 2])).weight, weight[[8, 2]])


def families_and_odd() -> list:
    models = {family: lambda f=family: random_model(f, torch.bfloat16, layers=2) for family in FEW}
    models["heads of 80"] = lambda: odd_model().bfloat16()
    return [pytest.param(make, id=name) for name, make in models.items()]


FEW = ("llama", "qwen3", "gemma3")


@pytest.mark.parametrize("make", families_and_odd())
def test_bfloat16_keys_and_values_change_no_bit(make) -> None:
    """A model that rounds them anyway keeps them in half the memory, and computes the same."""
    narrow, wide = choose(make()), choose(make())
    assert isinstance(narrow, FusedTarget)
    wide.decoder.keep_in(torch.float32)
    pages = [target.new_cache().page_bytes() for target in (narrow, wide)]
    assert 2 * pages[0] == pages[1]
    for a, b in zip(life_of_requests(narrow), life_of_requests(wide), strict=True):
        assert torch.equal(a, b)


def test_refusals() -> None:
    target = fused_target("llama")
    cache = target.new_cache()
    slot, _ = cache.open([1, 2])
    part = BatchPart.chain(slot, [1], 0, want_last=True)
    cache.reserve(slot, 1)
    with pytest.raises(CapabilityError, match="layer 9 cannot be captured"):
        target.forward(TokenBatch.build([part]), cache, capture=(9,))
    far = BatchPart.chain(slot, [1], 5000, want_last=True)
    with pytest.raises(CapabilityError, match="past the longest context"):
        target.forward(TokenBatch.build([far]), cache)
    half = random_target("llama", torch.bfloat16, exact=False, layers=2).new_cache()
    with pytest.raises(CapabilityError, match="cannot use"):
        target.forward(TokenBatch.build([part]), half)
    plain = random_target("llama", torch.float32, exact=True, layers=2)
    with pytest.raises(CapabilityError, match="cannot use"):  # it would take values for sums
        plain.forward(TokenBatch.build([part]), cache)
