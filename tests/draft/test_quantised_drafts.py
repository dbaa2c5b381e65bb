"""Draft modules on packed weights: the products, the laws, and which modules are packed."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import dspark
from dspark.adapters.fused import drafts
from dspark.adapters.fused.draft_runner import FusedRunner
from dspark.adapters.fused.layout import NotFused
from dspark.adapters.fused.library import load_library
from dspark.adapters.fused.linear import PackedLinear, can_pack
from dspark.adapters.quantise import quantise
from dspark.draft.combined import CombinedDrafter
from dspark.draft.dspark import DSparkDrafter, DSparkDrafterConfig
from dspark.draft.eagle3 import Eagle3Drafter
from dspark.draft.eagle3_module import Eagle3Config, Eagle3Module
from dspark.draft.formats.native import save_module
from dspark.draft.lookup import LookupDrafter
from dspark.errors import ConfigError, ShapeError
from dspark.folders import cache_root
from dspark.loading import build_drafter
from dspark.mtp_head import DraftVocab
from dspark.registry import LoadedTarget, LoadOptions, load_target
from dspark.request import Rule, SamplingParams
from dspark.verify.noise import NoiseKey
from dspark.verify.verifier import VerifyJob, verify
from tests.conftest import random_model, random_target
from tests.draft.dspark_models import HEADS, HIDDEN, STYLES, VOCAB, make_features, make_module
from tests.fused.models import needs_compiler
from tests.fused.test_quantised import rounded_inputs
from tests.training.toys import ToyTeacher

WIDE = {"markov_rank": 32}  # int8 needs a multiple of 32 inputs
PROMPTS = [[5, 9, 31, 7], [44, 3, 60, 21, 8, 12], [70, 71]]


def packed(layer: nn.Linear, quant: str) -> PackedLinear:
    return PackedLinear(layer, load_library(cache_root() / "kernels"), quant)


def linear(inputs: int, outputs: int, *, bias: bool = True, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


class Rounded(nn.Module):
    """What an int8 layer computes, in float64."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = quantise(layer.weight, "int8").dequantise(), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = rounded_inputs(x.float()).double() @ self.weight.double().T
        return (out if self.bias is None else out + self.bias).float()


def rounded_module(module: nn.Module) -> nn.Module:
    """A copy that computes what the packed module does, by the definition alone."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and can_pack(child, "int8"):
                setattr(parent, name, Rounded(child))
    return module


# -- products ---------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_an_int8_product_is_that_of_the_rounded_numbers(rows, bias):
    layer = linear(64, 103, bias=bias)
    x = torch.randn(rows, 64) * torch.tensor([0.1, 7.0]).repeat_interleave(32)
    found, expected = packed(layer, "int8")(x), Rounded(layer)(x)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert (found - layer(x)).abs().max() > 1e-4  # it is rounded


@needs_compiler
@pytest.mark.parametrize("is_half", [True, False])
def test_an_unrounded_product_is_that_of_the_weights(is_half):
    layer = linear(66, 40)
    if is_half:
        layer.weight.data = layer.weight.bfloat16().float()
    mine = packed(layer, "none")
    assert mine.kind == ("bfloat16" if is_half else "float32")
    x = torch.randn(9, 66)
    torch.testing.assert_close(mine(x), layer(x), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_in_bfloat16_outputs_are_rounded_once(quant):
    layer, x = linear(64, 48, dtype=torch.bfloat16), torch.randn(5, 64).bfloat16()
    found = packed(layer, quant)(x)
    wide = copy.deepcopy(layer).float()
    exact = wide(x.float()) if quant == "none" else Rounded(wide)(x.float())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_rows_do_not_depend_on_company_layout_or_threads(quant):
    mine, x = packed(linear(96, 200), quant), torch.randn(40, 96)
    whole = mine(x)
    assert torch.equal(whole, torch.cat([mine(row[None]) for row in x]))
    assert torch.equal(whole[3:20], mine(x[3:20]))
    assert torch.equal(whole, mine(x.T.contiguous().T))
    assert torch.equal(whole.view(4, 10, 200), mine(x.view(4, 10, 96)))
    assert torch.equal(whole[::2], mine(x[::2]))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        assert torch.equal(whole, mine(x))
    finally:
        torch.set_num_threads(threads)
    assert mine(x[:0]).shape == (0, 200)


@needs_compiler
def test_calls_at_the_same_time_do_not_meet():
    layers = [packed(linear(64 * n, 300), "int8") for n in (1, 2, 3)]
    inputs = [torch.randn(n, 64 * (n % 3 + 1)) for n in range(1, 31)]
    alone = [layers[x.shape[1] // 64 - 1](x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            both = pool.map(lambda x: layers[x.shape[1] // 64 - 1](x), inputs)
            assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


@needs_compiler
def test_what_is_no_number_stays_in_its_row():
    x = torch.randn(3, 64)
    x[1, 40] = float("nan")
    found = packed(linear(64, 50), "int8")(x)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()


@needs_compiler
def test_rows_of_another_width_are_refused():
    with pytest.raises(ShapeError, match=r"63 numbers, but the layer takes 64"):
        packed(linear(64, 8), "int8")(torch.zeros(2, 63))


def test_layers_that_the_kernels_cannot_run_are_left():
    assert can_pack(linear(64, 8), "int8")
    assert not can_pack(linear(48, 8), "int8")
    assert can_pack(linear(48, 8), "none")
    assert not can_pack(linear(64, 8).double(), "int8")
    assert not can_pack(linear(64, 8).to("meta"), "int8")


# -- drafting ---------------------------------------------------------------------------------


def context(make_context, size, *, seed=0, layers=(0, 1, 2), **options):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, 60).tolist()[:size]
    features = make_features(size - 1, seed, layers)
    return make_context(tokens, request_id=seed, features=features, **options)


def packed_dspark(style="llama", head="vanilla", **options):
    """A stock module, and the same on int8 weights."""
    options = {**(WIDE if head != "none" else {}), **options}
    module = make_module(style, head, **options)
    mine = copy.deepcopy(module)
    assert drafts.pack_draft(mine, "int8", "auto") == "int8"
    return module, mine


def eagle3_module(**options):
    torch.manual_seed(0)
    values = {
        "hidden_size": 32,
        "target_hidden_size": HIDDEN,
        "target_layers": (0, 1, 2),
        "intermediate_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB,
        "has_embedding": True,
        "attention_bias": True,
        **options,
    }
    module = Eagle3Module(Eagle3Config(**values)).requires_grad_(False)
    for tensor in module.parameters():
        if tensor.dim() > 1:
            tensor.data.normal_(std=0.3)
    return module


def assert_same_laws(make, stock, mine, contexts):
    """Laws of a packed module are those of the definition, and not the stock module's."""
    wanted = make(rounded_module(stock)).propose(contexts())[0]
    found = make(mine).propose(contexts())[0]
    other = make(stock).propose(contexts())[0]
    assert found.tree.token.tolist() == wanted.tree.token.tolist()
    np.testing.assert_allclose(found.laws.numpy(), wanted.laws.numpy(), atol=2e-4)
    assert np.abs(found.laws.numpy()[0] - other.laws.numpy()[0]).max() > 1e-3


@needs_compiler
@pytest.mark.parametrize(("style", "head"), [*(("qwen3", h) for h in HEADS), ("gemma4", "rnn")])
def test_laws_of_a_block_draft_are_those_of_its_rounded_weights(make_context, style, head):
    stock, mine = packed_dspark(style, head)
    assert_same_laws(
        DSparkDrafter,
        stock,
        mine,
        lambda: [context(make_context, 9, rule=Rule.REJECTION, budget=6, depth=4)],
    )


@needs_compiler
def test_laws_of_an_eagle3_draft_are_those_of_its_rounded_weights(make_context):
    stock = eagle3_module()
    mine = copy.deepcopy(stock)
    assert drafts.pack_draft(mine, "int8", "auto") == "int8"
    assert_same_laws(
        Eagle3Drafter,
        stock,
        mine,
        lambda: [context(make_context, 9, rule=Rule.REJECTION, budget=6, depth=4)],
    )


@needs_compiler
@pytest.mark.parametrize("style", STYLES)
def test_every_backbone_drafts_unrounded_what_it_did(make_context, style):
    stock = make_module(style, "gated", **WIDE)
    mine = copy.deepcopy(stock)
    assert drafts.pack_draft(mine, "none", "fused") == "float32"
    given = {"budget": 8, "depth": 5}
    one = DSparkDrafter(stock).propose([context(make_context, 12, **given)])[0].tree
    two = DSparkDrafter(mine).propose([context(make_context, 12, **given)])[0].tree
    assert one.num_nodes > 3
    assert one.token.tolist() == two.token.tolist()
    torch.testing.assert_close(one.survival, two.survival, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_the_targets_head_are_packed_too(make_context, monkeypatch, bias):
    teacher, vocab = ToyTeacher(), DraftVocab.build(VOCAB, range(1, VOCAB, 2))
    stated = torch.linspace(-2, 2, vocab.draft_size) if bias else None
    rows = replace(teacher.head_rows(vocab.ids), bias=stated)
    monkeypatch.setattr(teacher, "head_rows", lambda ids=None: rows)
    shared = {"owns_embedding": False, "owns_head": False, "shares": teacher, "vocab": vocab}
    stock, mine = make_module(**shared), make_module(**shared)
    assert drafts.pack_draft(mine, "int8", "auto") == "int8"
    hidden = torch.randn(4, HIDDEN)
    layer = linear(HIDDEN, vocab.draft_size, bias=bias)
    layer.weight.data = rows.weight.detach().float()
    if bias:
        layer.bias.data = stated
    torch.testing.assert_close(
        mine.base_logits(hidden), Rounded(layer)(hidden), rtol=1e-4, atol=1e-4
    )
    assert not torch.equal(mine.base_logits(hidden), stock.base_logits(hidden))
    drafter = DSparkDrafter(mine)
    assert drafter.propose([context(make_context, 8)])[0].tree.num_nodes
    assert mine.head_rows.weight.numel() == 0


@needs_compiler
@pytest.mark.parametrize("rule", [Rule.GREEDY, Rule.REJECTION])
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_a_request_alone_and_among_others_gets_the_same_draft(make_context, rule, kind):
    if kind == "dspark":
        drafter = DSparkDrafter(packed_dspark(head="rnn")[1])
    else:
        module = eagle3_module()
        drafts.pack_draft(module, "int8", "auto")
        drafter = Eagle3Drafter(module)

    def contexts():
        return [context(make_context, 6 + 3 * i, seed=i, rule=rule) for i in range(5)]

    together = drafter.propose(contexts())
    for i, both in enumerate(together):
        drafter.release(i)
        alone = drafter.propose([contexts()[i]])[0]
        assert alone.tree.token.tolist() == both.tree.token.tolist()
        np.testing.assert_array_equal(np.asarray(alone.tree.survival), both.tree.survival)
        if both.laws is not None:
            assert torch.equal(alone.laws, both.laws)


@needs_compiler
def test_the_output_has_the_targets_law_under_rejection(make_context):
    """Toy size: 400 drafts, each with its own noise, judged by the real verifier."""
    vocab = DraftVocab.build(VOCAB, [1, 2, 3, 5])
    drafter = DSparkDrafter(packed_dspark("qwen3", vocab=vocab, block_size=2)[1])
    params, law = SamplingParams(temperature=1.0), np.zeros(VOCAB)
    law[[1, 2, 3, 5, 7]] = [0.1, 0.35, 0.2, 0.05, 0.3]
    row = torch.from_numpy(np.log(np.maximum(law, 1e-30))).float()
    contexts = [
        context(make_context, 3, rule=Rule.REJECTION, budget=4, depth=2, width=2)
        for _ in range(400)
    ]
    for number, one in enumerate(contexts):
        one.request_id, one.noise = number, NoiseKey(number)
    proposals = drafter.propose(contexts)
    starts = np.cumsum([0, *(1 + p.tree.num_nodes for p in proposals)]).tolist()
    jobs = [
        VerifyJob(start=at, params=params, rule=c.rule, noise=c.noise, position=4, proposal=p)
        for at, c, p in zip(starts, contexts, proposals, strict=False)
    ]
    counts = np.zeros(VOCAB)
    for job, verdict in zip(jobs, verify(row.expand(starts[-1], -1), jobs), strict=True):
        first = [int(job.proposal.tree.token[node]) for node in verdict.path[:1]]
        counts[(first or [verdict.closing])[0]] += 1
    assert counts[law > 0].sum() == 400
    assert stats.chisquare(counts[law > 0], 400 * law[law > 0]).pvalue > 1e-4


@needs_compiler
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_texts_are_those_of_plain_decoding(kind, temperature):
    target = random_target("llama", exact=True, layers=2)
    info, layers = target.info, (-1, 0)
    if kind == "dspark":
        options = {"num_target_layers": info.num_layers, "target_layer_ids": layers}
        module = packed_dspark("llama", "vanilla", **options)[1]
        drafter = DSparkDrafter(module, config=DSparkDrafterConfig(min_survival=0.0))
    else:
        module = eagle3_module(target_layers=layers, target_hidden_size=info.hidden_size)
        drafts.pack_draft(module, "int8", "auto")
        drafter = Eagle3Drafter(module)
    params = SamplingParams(
        max_tokens=8, temperature=temperature, seed=5, ignore_eos=True, tree_budget=8
    )
    config = dspark.EngineConfig(auto_off=False)
    plain = dspark.Engine(target, config=config).generate(PROMPTS, params)
    results = dspark.Engine(target, drafter=drafter, config=config).generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert all(r.stats.verified > 5 for r in results)


# -- the setting ------------------------------------------------------------------------------


@pytest.fixture
def from_folder(tmp_path):
    """Make a drafter of a folder that holds a tiny module."""
    target = random_target("llama", exact=True, layers=2)
    options = {"num_target_layers": target.info.num_layers, "target_layer_ids": (-1, 0), **WIDE}
    folder = save_module(tmp_path / "d", make_module("llama", **options), storage="float32")
    loaded = LoadedTarget(target=target, codec=None, folder=tmp_path)

    def make(spec="{}", **options):
        return build_drafter(spec.format(folder), loaded, LoadOptions(name="tiny", **options))

    return make


@needs_compiler
def test_auto_leaves_tiny_modules_and_int8_rounds_them(from_folder, monkeypatch):
    assert from_folder().weights == ""
    assert from_folder(draft_quant="none").weights == ""
    assert from_folder(draft_quant="none", path="fused").weights == "float32"
    assert from_folder(draft_quant="int8", path="plain").weights == ""
    mine = from_folder(draft_quant="int8")
    assert mine.weights == "int8"
    assert type(mine.module.runner) is FusedRunner
    assert mine.module.fc.weight.numel() == 0
    assert from_folder("lookup+{}", draft_quant="int8").weights == "int8"
    monkeypatch.setattr(drafts, "LEAST_LAYER", 4096)
    monkeypatch.setattr(drafts, "LEAST_WEIGHTS", 8192)
    large = from_folder()
    assert large.weights == "int8"
    assert type(large.module.runner) is FusedRunner
    assert type(large.module.confidence_head.proj) is nn.Linear
    assert from_folder(draft_quant="none").weights == "float32"


def test_without_a_compiler_the_stock_layers_stay(from_folder, monkeypatch, caplog):
    def refuse(folder: Path) -> None:
        raise NotFused("there is no C++ compiler")

    monkeypatch.setattr(drafts, "load_library", refuse)
    with caplog.at_level(logging.DEBUG, logger=drafts.__name__):
        mine = from_folder(draft_quant="int8")
    assert mine.weights == ""
    assert type(mine.module.fc) is nn.Linear
    assert [r.message for r in caplog.records] == [
        "the draft stays on stock layers: there is no C++ compiler"
    ]


def test_values_that_do_not_exist_are_refused(from_folder, tmp_path):
    message = r"draft_quant is 'int4', but must be one of auto, none, int8\."
    with pytest.raises(ConfigError, match=message):
        from_folder(draft_quant="int4")
    with pytest.raises(ConfigError, match=message):
        load_target(tmp_path, LoadOptions(name="tiny", draft_quant="int4"))
    with pytest.raises(ConfigError, match=r"the path is 'slow'"):
        from_folder(path="slow")


@pytest.mark.parametrize(
    ("draft_quant", "expected"), [("auto", "int8"), ("none", "none"), ("int8", "int8")]
)
def test_a_draft_model_is_rounded_as_its_target_unless_told(tmp_path, draft_quant, expected):
    random_model("llama", layers=1).save_pretrained(tmp_path)
    target = random_target("llama", exact=True, layers=2)
    loaded = LoadedTarget(target=target, codec=None, folder=tmp_path)
    options = LoadOptions(name="tiny", quant="int8", draft_quant=draft_quant, path="plain")
    assert build_drafter(str(tmp_path), loaded, options)._model.info.quant == expected


def test_drafters_without_weights_say_nothing():
    assert CombinedDrafter(LookupDrafter(), LookupDrafter()).weights == ""
