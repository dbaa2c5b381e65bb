"""Whole runs of EAGLE-3 and MTP on a tiny target: what holds for other kinds holds for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark import Engine, EngineConfig, SamplingParams
from dspark.draft.eagle3_format import load_eagle3, read_module
from dspark.errors import CheckpointError, ConfigError
from dspark.training.engine import StepEngine
from dspark.training.metrics import figures_of
from dspark.training.samples import anchors_of
from dspark.training.setup import prepare
from tests.training.runs import KINDS, log_of, make_run, train, write_shard, write_target

EAGLE3, MTP = KINDS["eagle3"], KINDS["mtp"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_run(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_a_run_leaves_a_draft_that_loads(folder, kind):
    setup, outcome = train(folder, **KINDS[kind])
    assert outcome.is_done
    assert outcome.skipped == 0
    lines = log_of(folder)
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [2, 4]
    assert all(len(line["acceptance"]) == 3 for line in lines)
    assert all(line["loss"] == line["ce"] for line in lines)
    for name in ("last", "best"):
        loaded = load_eagle3(folder / "out" / name, setup.target)
        assert loaded.capture == ((3,) if kind == "mtp" else (0, 2))
    stored = read_module(folder / "out" / "last", setup.target.info)
    assert stored.config == setup.module.config
    for key, tensor in setup.module.state_dict().items():
        kept = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(stored.state_dict()[key], kept), key
    shared = setup.head.head_rows(setup.module.target_ids()).weight
    assert torch.equal(stored.lm_head.weight, shared.bfloat16())
    facts = json.loads((folder / "out" / "best" / "config.json").read_text())["dspark_training"]
    assert facts["training"]["recipe"]["draft"]["kind"] == kind
    assert facts["target"]["fingerprint"]
    card = (folder / "out" / "best" / "README.md").read_text()
    assert {"eagle3": "EAGLE-3", "mtp": "MTP"}[kind] in card
    assert "48 of 96 tokens" in card
    assert not list((folder / "out").rglob("*.part"))


@pytest.mark.parametrize("cache", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bitwise(folder, cache):
    changes = {**EAGLE3, "draft_owns_head": cache, "optimizer_kind": "adamw"}
    whole = {**changes, "run_cache": str(folder / "one")} if cache else changes
    parted = {**changes, "run_cache": str(folder / "two")} if cache else changes
    train(folder, "whole", **whole)
    train(folder, "parted", stop_after=3, **parted)
    _, outcome = train(folder, "parted", **parted)
    assert outcome.is_done
    assert log_of(folder, "parted") == log_of(folder, "whole")
    same = Path("last") / "model.safetensors"
    assert (folder / "parted" / same).read_bytes() == (folder / "whole" / same).read_bytes()


def sums_of(folder, **changes):
    setup = prepare(make_run(folder, **EAGLE3, **changes), device="cpu")
    engine, run = StepEngine(setup), setup.recipe.run
    batch = [(sample, anchors_of(sample, run, 0)) for sample in setup.samples.train[:4]]
    result = engine.step(batch, 1e-3)
    return figures_of(result.sums, engine.terms), result.gradient, engine.weights()


def test_parts_of_a_step_add_up(folder):
    one, length, weights = sums_of(folder, run_tokens_per_forward=1000)
    other, same_length, others = sums_of(folder, run_tokens_per_forward=30)
    assert one.positions == other.positions > 40
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert same_length == pytest.approx(length, rel=1e-4)
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=1e-3, atol=2e-4, msg=key)


def test_bfloat16_says_nearly_the_same(folder):
    one, _, _ = sums_of(folder)
    other, length, _ = sums_of(folder, run_dtype="bfloat16")
    assert length > 0
    assert one.loss != other.loss
    assert other.loss == pytest.approx(one.loss, rel=0.02)


def test_the_target_s_parts_are_not_trained(folder):
    setup = prepare(make_run(folder, **EAGLE3), device="cpu")
    names = dict(setup.module.named_parameters())
    assert not any(name.startswith(("embed_tokens", "lm_head")) for name in names)
    ids = torch.arange(96)
    before = setup.head.head_rows(None).weight, setup.head.embed(ids).clone()
    engine, run = StepEngine(setup), setup.recipe.run
    engine.step([(s, anchors_of(s, run, 0)) for s in setup.samples.train[:2]], 1e-2)
    assert torch.equal(setup.head.head_rows(None).weight, before[0])
    assert torch.equal(setup.head.embed(ids), before[1])
    owned = prepare(make_run(folder, **MTP, draft_owns_head=True), device="cpu")
    assert owned.module.lm_head.weight.requires_grad


def test_a_step_that_is_not_finite_is_skipped(folder, monkeypatch):
    from dspark.training import engine

    original, seen = engine.pack, [0]

    def pack(*args, **options):
        packed = original(*args, **options)
        seen[0] += 1
        if seen[0] == 2:
            packed.features[0, 0] = torch.inf
        return packed

    monkeypatch.setattr(engine, "pack", pack)
    changes = {"run_tokens_per_forward": 1000, "run_validate_every": 0, "run_steps": 3}
    setup, outcome = train(folder, **EAGLE3, **changes)
    assert outcome.skipped == 1
    assert all(torch.isfinite(p).all() for p in setup.module.parameters())


# -- where weights come from ------------------------------------------------------------------


def test_the_layer_may_start_as_one_of_the_target_s(folder):
    changes = {**EAGLE3, "draft_vocabulary": None}
    module = prepare(make_run(folder, **changes, draft_init_from_target=[2]), device="cpu").module
    stored = load_file(folder / "target" / "model.safetensors")
    layer = dict(module.layers[0].named_parameters())
    for name in ("q", "k", "v"):
        weight = layer[f"self_attn.{name}_proj.weight"]
        assert torch.equal(weight[:, 64:], stored[f"model.layers.2.self_attn.{name}_proj.weight"])
        assert 0 < float(weight.detach()[:, :64].abs().max()) < 0.2
    for name in (
        "mlp.up_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
    ):
        assert torch.equal(layer[name], stored[f"model.layers.2.{name}"]), name
    norm = "input_layernorm.weight"
    assert torch.equal(layer["hidden_norm.weight"], stored[f"model.layers.2.{norm}"])
    assert torch.equal(layer[norm], stored[f"model.layers.0.{norm}"])
    assert torch.equal(module.norm.weight, stored["model.norm.weight"])
    mean = torch.eye(64).repeat(1, 2) / 2
    assert float((module.fc.weight.detach() - mean).abs().max()) < 0.15
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        prepare(make_run(folder, **changes, draft_init_from_target=[9]), device="cpu")


@pytest.mark.parametrize("owned", [False, True])
def test_a_run_may_start_from_a_draft(folder, owned):
    changes = {**EAGLE3, "draft_storage": "float32", "draft_owns_head": owned}
    setup, _ = train(folder, **changes, run_steps=1, run_validate_every=0)
    start = {"draft_init_from_draft": str(folder / "out" / "last")}
    again = prepare(make_run(folder, **changes, **start), device="cpu").module
    assert again.state_dict().keys() == setup.module.state_dict().keys()
    for name, tensor in setup.module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(ConfigError, match="another target_layers"):
        prepare(make_run(folder, **changes, **start, draft_target_layer_ids=[0, 1]), device="cpu")
    start = {"draft_init_from_draft": str(folder / "target")}
    with pytest.raises(CheckpointError, match="not that of an EAGLE-3 draft"):
        prepare(make_run(folder, **changes, **start), device="cpu")


@pytest.mark.parametrize(
    ("ids", "message"), [([4], r"-1 \(its embeddings\) to 3"), ([0, 0], "dis")]
)
def test_layers_that_are_not_there_are_refused(folder, ids, message):
    with pytest.raises(ConfigError, match=rf"draft\.target_layer_ids .*{message}"):
        prepare(make_run(folder, **EAGLE3, draft_target_layer_ids=ids), device="cpu")


@pytest.mark.parametrize(
    "family",
    # "qwen3" has nothing of its own here: norms of queries are the draft's in all three.
    [pytest.param("qwen3", marks=pytest.mark.slow), "gemma2", "gemma4"],
)
def test_other_families_are_trained_for(tmp_path, family):
    write_target(tmp_path / "target", family)
    write_shard(tmp_path / "shard.jsonl.gz")
    changes = {**EAGLE3, "draft_style": "qwen3", "run_steps": 1, "run_validate_every": 0}
    setup, outcome = train(tmp_path, **changes)
    assert outcome.skipped == 0
    loaded = read_module(tmp_path / "out" / "last", setup.target.info)
    assert loaded.config == setup.module.config
    assert loaded.config.logit_softcap == setup.head.head_rows(None).softcap


# -- overfitting ------------------------------------------------------------------------------


def answer_shard(folder: Path, prompts: list[list[int]], max_tokens: int) -> None:
    """A shard of the target's own greedy answers."""
    engine = Engine.load(folder / "target", "none", dtype="float32", exact=False)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    lines = [
        json.dumps({"prompt_ids": prompt, "response_ids": list(result.token_ids)})
        for prompt, result in zip(prompts, engine.generate(prompts, params), strict=True)
    ]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.slow  # trains
@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_one_batch_is_learnt_by_heart_and_drafted(folder, kind):
    """Tau that the engine reaches with the published draft, on the answers it was trained on."""
    depth, rounds = 3, 7
    prompts = [[5, 7, 9, 11], [3, 1, 4, 1, 5, 9, 2, 6]]
    answer_shard(folder, prompts, 1 + rounds * (depth + 1))
    changes = {
        **KINDS[kind],
        "draft_vocabulary": None,
        "draft_storage": "float32",
        "data_shards": [str(folder / "answers.jsonl")],
        "data_validation_share": 0.0,
        # The toy's laws are nearly flat, and a drafter goes no further than it is sure.
        "loss_labels": "text",
        "optimizer_lr": 5e-3,
        "run_steps": 60,
        "run_anchors": 1.0,
        "run_tokens_per_forward": 1000,
        "run_validate_every": 0,
        "run_checkpoint_every": 1000,
    }
    train(folder, **changes)
    config = EngineConfig(auto_off=False)
    draft = folder / "out" / "last"
    engine = Engine.load(folder / "target", draft, dtype="float32", exact=False, config=config)
    params = SamplingParams(
        max_tokens=1 + rounds * (depth + 1),
        temperature=0.0,
        ignore_eos=True,
        depth=depth,
        width=1,
        tree_budget=depth,
    )
    results = engine.generate(prompts, params)
    committed = sum(result.stats.committed for result in results)
    tau = committed / sum(result.stats.rounds for result in results)
    assert tau > 0.95 * (depth + 1)
