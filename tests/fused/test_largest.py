"""The largest logit of every row, which the fused forward finds while it makes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import dspark
from dspark.draft.lookup import LookupDrafter
from dspark.request import SamplingParams
from dspark.target import TargetOutput
from dspark.verify.verifier import verify
from tests.conftest import VOCAB, random_model
from tests.fused.models import (
    choose,
    forward,
    fused_target,
    needs_compiler,
    prefill,
    random_tokens,
    tree_part,
)

pytestmark = needs_compiler


def run(target: object, rows: int = 40, *, threads: int = 2) -> TargetOutput:
    """A tree behind a short prompt."""
    rng, before = np.random.default_rng(rows), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cache = target.new_cache()
        slot = prefill(target, cache, random_tokens(rng, 9))
        parent = [-1] + [int(rng.integers(0, row)) for row in range(1, rows)]
        return forward(target, cache, tree_part(slot, random_tokens(rng, rows), parent, 9))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_it_is_the_lowest_place_of_the_largest(family: str, dtype: torch.dtype) -> None:
    target = fused_target(family, dtype)
    for rows in (1, 3, 40):
        for threads in (1, 2, 3):
            output = run(target, rows, threads=threads)
            expected = output.logits.numpy().argmax(axis=1)
            np.testing.assert_array_equal(output.tops, expected)


def changed_head(change: object, outputs: int = VOCAB) -> object:
    """A model whose logits are the bias of its head."""
    model = random_model("llama", torch.bfloat16, layers=2)
    size = model.config.hidden_size
    model.lm_head = torch.nn.Linear(size, outputs, bias=True, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        change(model.lm_head.bias)
    return choose(model)


@pytest.mark.parametrize("place", [0, 1, 17, 31, 32, VOCAB // 2, VOCAB - 1])
def test_ties_go_to_the_lowest_place_wherever_it_is(place: int) -> None:
    def tie(bias: torch.Tensor) -> None:
        bias[place:] = 2.0

    assert set(run(changed_head(tie), 20).tops.tolist()) == {place}


def test_what_fills_the_last_panel_is_no_logit() -> None:
    """All real logits are below the 0 that padding would give."""

    def lower(bias: torch.Tensor) -> None:
        bias.fill_(-3.0)
        bias[70] = -2.0

    assert set(run(changed_head(lower, outputs=75)).tops.tolist()) == {70}


@pytest.mark.parametrize("place", [0, VOCAB - 1])
def test_a_row_whose_largest_is_infinite_has_none(place: int) -> None:
    def spoil(bias: torch.Tensor) -> None:
        bias[place] = torch.inf

    assert set(run(changed_head(spoil)).tops.tolist()) == {-1}


def test_a_row_with_nan_has_none_and_the_others_have() -> None:
    model = random_model("llama", torch.float32, layers=2)
    target = choose(model)
    with torch.no_grad():  # the check at load would refuse it before
        model.get_input_embeddings().weight[50] = torch.nan
    cache = target.new_cache()
    slot = prefill(target, cache, [7, 8, 9])
    output = forward(target, cache, tree_part(slot, [3, 50, 4, 5], [-1, 0, 0, 1], 3))
    is_broken = output.logits.isnan().any(dim=1).numpy()
    np.testing.assert_array_equal(is_broken, [False, True, False, True])
    np.testing.assert_array_equal(output.tops == -1, is_broken)


@pytest.mark.parametrize("place", [0, 40, VOCAB - 1])
def test_one_nan_among_finite_logits_leaves_none(place: int) -> None:
    target = changed_head(lambda bias: bias.fill_(1.0))
    target.decoder.head.bias[place] = torch.nan  # the check at load would refuse it before
    output = run(target, 3)
    assert output.logits.isnan().sum(dim=1).tolist() == [1, 1, 1]
    assert set(output.tops.tolist()) == {-1}


def test_a_row_of_minus_infinity_alone_has_none_and_single_ones_do_not_matter() -> None:
    def sink(bias: torch.Tensor) -> None:
        bias.fill_(-torch.inf)

    def sink_some(bias: torch.Tensor) -> None:
        bias[:20] = -torch.inf

    assert set(run(changed_head(sink)).tops.tolist()) == {-1}
    assert set(run(changed_head(sink_some)).tops.tolist()) == {20}


def test_other_logits_made_from_them_have_none() -> None:
    output = run(fused_target("llama"))
    assert output.tops is not None
    assert replace(output, logits=output.logits * 2).tops is None


def test_a_soft_cap_leaves_the_search_to_the_verifier() -> None:
    """It may make equal what was not."""
    assert run(fused_target("gemma2")).tops is None


def test_texts_are_the_same_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_tokens(np.random.default_rng(i), 12) for i in range(3)]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    used = []

    def watched(logits: torch.Tensor, jobs: object, tops: object = None) -> object:
        used.append(tops is not None)
        return verify(logits, jobs, tops)

    def blind(logits: torch.Tensor, jobs: object, tops: object = None) -> object:
        return verify(logits, jobs)

    texts = []
    for judge in (watched, blind):
        monkeypatch.setattr("dspark.rounds.verify", judge)
        engine = dspark.Engine(fused_target("llama", torch.bfloat16), drafter=LookupDrafter())
        texts.append([result.token_ids for result in engine.generate(prompts, params)])
    assert texts[0] == texts[1]
    assert all(used)
