"""From a recipe to a module: sizes, layers, vocabulary, first weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark.errors import CheckpointError, ConfigError
from dspark.training.build import spread_layers
from dspark.training.optimizing import learning_rate, make_optimizers
from dspark.training.progress import SilentReporter
from dspark.training.recipe import OptimizerSection, ScheduleSection
from dspark.training.setup import prepare
from dspark.training.trainer import Trainer
from tests.training.runs import make_run, write_shard, write_target

ALIKE = {"draft_layers": 2, "draft_vocabulary": None}


def built(folder: Path, **changes):
    return prepare(make_run(folder, **changes), device="cpu").module


@pytest.mark.parametrize(
    ("layers", "count", "ids"),
    [
        (36, 5, (1, 9, 17, 25, 33)),  # DeepSpec's for Qwen3-4B
        (30, 3, (1, 14, 27)),
        (4, 1, (1,)),
        (4, 2, (0, 2)),
        (4, 3, (0, 1, 2)),
    ],
)
def test_layers_are_spread(layers, count, ids):
    assert spread_layers(layers, count) == ids


def test_more_layers_than_there_are_cannot_be_read():
    with pytest.raises(ConfigError, match=r"draft\.target_layers is 4"):
        spread_layers(4, 4)


def test_sizes_are_the_target_s_unless_the_recipe_says(tmp_path):
    config = built(tmp_path).config
    assert config.backbone.hidden_size == 64
    assert config.backbone.intermediate_size == 128
    assert (config.backbone.num_heads, config.backbone.num_kv_heads) == (4, 2)
    assert not config.backbone.has_qk_norm
    assert config.target_layer_ids == (0, 2)
    other = built(
        tmp_path,
        draft_intermediate_size=80,
        draft_num_heads=8,
        draft_head_dim=12,
        draft_style="qwen3",
        draft_window=9,
        draft_target_layer_ids=[1],
        draft_sample_from_anchor=False,
    ).config
    assert other.backbone.intermediate_size == 80
    assert (other.backbone.num_heads, other.backbone.head_dim) == (8, 12)
    assert other.backbone.has_qk_norm
    assert other.backbone.windows[0].size == 9
    assert (other.gamma, other.target_layer_ids) == (3, (1,))


def test_a_draft_of_its_own_width_owns_its_ends(tmp_path):
    module = built(
        tmp_path,
        draft_hidden_size=32,
        draft_num_heads=2,
        draft_num_kv_heads=1,
        draft_owns_embedding=True,
        draft_owns_head=True,
    )
    assert module.lm_head.weight.shape == (48, 32)
    with pytest.raises(ConfigError, match="hidden_size is 32"):
        built(tmp_path, draft_hidden_size=32)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    one, again = built(tmp_path).state_dict(), built(tmp_path).state_dict()
    other = built(tmp_path, run_seed=1).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize(
    ("start", "layers"), [("first", (0, 1)), ("last", (2, 3)), ([3, 1], (3, 1))]
)
def test_layers_may_start_as_the_target_s(tmp_path, start, layers):
    module = built(tmp_path, draft_init_from_target=start, **ALIKE)
    stored = load_file(tmp_path / "target" / "model.safetensors")
    for layer, source in zip(module.layers, layers, strict=True):
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, stored[f"model.layers.{source}.{name}"]), name
    assert torch.equal(module.norm.weight, stored["model.norm.weight"])


def test_a_sequential_head_starts_with_the_directions_of_the_embedding(tmp_path):
    module = built(tmp_path, draft_init_from_target="first", **ALIKE)
    stored = load_file(tmp_path / "target" / "model.safetensors")["model.embed_tokens.weight"]
    w1 = module.markov_head.markov_w1.weight.detach()
    spread = w1.T @ w1 / len(w1)
    torch.testing.assert_close(spread, 0.25 * torch.eye(len(spread)), rtol=1e-3, atol=1e-3)
    rows = stored.float() - stored.float().mean(dim=0)
    kept = torch.linalg.lstsq(w1, rows).solution
    missed = (rows - w1 @ kept).square().sum()
    values = torch.linalg.svdvals(rows).square()
    assert missed == pytest.approx(values[w1.shape[1] :].sum().item(), rel=1e-2)
    assert torch.count_nonzero(module.markov_head.markov_w2.weight) == 0


@pytest.mark.parametrize(("family", "more"), [("llama", 0.0), ("gemma2", 1.0), ("gemma4", 0.0)])
def test_the_last_norm_is_copied_as_the_factor_that_it_is(tmp_path, family, more):
    """Gemma's norms, until the fourth, multiply by one more than what is stored."""
    write_target(tmp_path / "target", family)
    write_shard(tmp_path / "shard.jsonl.gz")
    module = built(tmp_path)
    stored = load_file(tmp_path / "target" / "model.safetensors")["model.norm.weight"]
    torch.testing.assert_close(module.norm.weight.detach(), stored + more)


def test_layers_of_other_sizes_cannot_be_copied(tmp_path):
    with pytest.raises(ConfigError, match=r"layer 0 of the target, mlp\.gate_proj"):
        built(tmp_path, draft_init_from_target="first", draft_intermediate_size=32)
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        built(tmp_path, draft_init_from_target=[9])


def test_a_run_may_start_from_a_draft(tmp_path):
    recipe = make_run(tmp_path, run_steps=1, run_validate_every=0, draft_storage="float32")
    setup = prepare(recipe, device="cpu")
    Trainer(setup, tmp_path / "out", reporter=SilentReporter()).run()
    start = str(tmp_path / "out" / "last")
    module = built(tmp_path, draft_init_from_draft=start)
    for name, tensor in setup.module.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert torch.equal(module.vocab.ids, setup.module.vocab.ids)
    with pytest.raises(ConfigError, match="another block_size: 4, not 5"):
        built(tmp_path, draft_init_from_draft=start, draft_block_size=5)
    with pytest.raises(CheckpointError, match="no draft of dspark's own layout"):
        built(tmp_path, draft_init_from_draft=str(tmp_path / "target"))


@pytest.mark.parametrize(
    "family", [pytest.param("qwen3", marks=pytest.mark.slow), "gemma2", "gemma3"]
)
def test_other_families_are_trained_for(tmp_path, family):
    write_target(tmp_path / "target", family)
    write_shard(tmp_path / "shard.jsonl.gz")
    recipe = make_run(tmp_path, run_steps=1, draft_style="qwen3", run_validate_every=0)
    setup = prepare(recipe, device="cpu")
    outcome = Trainer(setup, tmp_path / "out", reporter=SilentReporter()).run()
    assert outcome.is_done
    assert outcome.skipped == 0


# -- optimizers and schedules -----------------------------------------------------------------


def test_muon_has_the_hidden_matrices_and_adamw_the_rest(tmp_path):
    module = built(tmp_path)
    named = dict(module.named_parameters())
    section = OptimizerSection(kind="muon", weight_decay=0.1)
    optimizers = make_optimizers(named.items(), section)
    ids = {
        kind: {id(p) for group in optimizer.param_groups for p in group["params"]}
        for kind, optimizer in optimizers.items()
    }
    assert not ids["muon"] & ids["adamw"]
    assert ids["muon"] | ids["adamw"] == {id(p) for p in named.values()}
    assert id(named["layers.0.mlp.up_proj.weight"]) in ids["muon"]
    for name in ("markov_head.markov_w1.weight", "norm.weight", "confidence_head.proj.weight"):
        assert id(named[name]) in ids["adamw"]
    for group in optimizers["adamw"].param_groups:
        is_matrix = group["params"][0].ndim > 1
        assert group["weight_decay"] == (0.1 if is_matrix else 0.0)


def test_schedules():
    cosine = ScheduleSection(kind="cosine", warmup=0.1, floor=0.1)
    rates = [learning_rate(cosine, 2.0, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    wsd = ScheduleSection(kind="wsd", warmup=0.0, fall=0.2)
    rates = [learning_rate(wsd, 1.0, step, 100) for step in range(100)]
    assert set(rates[:80]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
