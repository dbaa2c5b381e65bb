"""Recipes: what they may say, and how errors name what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark.errors import ConfigError
from dspark.training.packing import position_weights
from dspark.training.recipe import make_recipe, read_recipe

LEAST = {"target": "toy", "data": {"shards": ["a.jsonl"]}, "run": {"steps": 3}}
RECIPES = Path(__file__).parents[2] / "recipes"


def change(key: str, value: object) -> dict:
    section, _, name = key.rpartition(".")
    if not section:
        return {**LEAST, name: value}
    return {**LEAST, section: {**LEAST.get(section, {}), name: value}}


def test_what_is_left_out_has_its_default():
    recipe = make_recipe(LEAST)
    assert recipe.draft.kind == "dspark"
    assert recipe.draft.rank == 256
    assert recipe.draft.has_confidence
    assert (recipe.loss.ce, recipe.loss.l1, recipe.loss.confidence) == (0.1, 0.9, 1.0)
    dflash = make_recipe(change("draft.kind", "dflash")).draft
    assert (dflash.rank, dflash.has_confidence, dflash.anchor_predicts) == (0, False, False)


@pytest.mark.parametrize(("kind", "layers"), [("eagle3", 3), ("mtp", 1)])
def test_unrolled_kinds_have_defaults_of_their_own(kind, layers):
    recipe = make_recipe(change("draft.kind", kind))
    draft, loss = recipe.draft, recipe.loss
    assert (draft.layers, draft.target_layers, draft.unroll) == (1, layers, 5)
    assert (loss.ce, loss.l1, loss.labels) == (1.0, 0.0, "target")
    assert position_weights(4, loss.decay) == pytest.approx([1.0, 0.8, 0.64, 0.512])
    other = make_recipe({**change("draft.kind", kind), "loss": {"l1": 0.5, "decay": 2}}).loss
    assert (other.ce, other.l1, other.labels, other.decay) == (1.0, 0.5, "target", 2.0)
    assert make_recipe(recipe.to_json()) == recipe


def test_a_recipe_is_what_its_json_says():
    recipe = make_recipe(change("draft.init_from_target", [3, 5, 7]))
    assert recipe.draft.init_from_target == (3, 5, 7)
    assert make_recipe(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("drafts", {}, "no key drafts"),
        ("draft.layer", 3, r"no key draft\.layer; known are kind"),
        ("draft.layers", "3", r"draft\.layers is '3', but must be an integer"),
        ("draft.layers", 0, r"draft\.layers is 0, but must be >= 1"),
        ("draft.layers", True, r"draft\.layers is True, but must be an integer"),
        ("draft.kind", "medusa", r"draft\.kind is 'medusa', but must be one of dspark, dflash, ea"),
        ("draft.unroll", 3, r"draft\.unroll is 3, but a draft of kind dspark has no use for it"),
        ("draft", {"kind": "eagle3", "block_size": 4}, r"draft\.block_size is 4, but .* eagle3"),
        ("draft", {"kind": "mtp", "markov_rank": 8}, r"draft\.markov_rank is 8, but .* mtp"),
        ("draft", {"kind": "mtp", "target_layer_ids": [1]}, r"draft\.target_layer_ids is \(1,\)"),
        ("draft", {"kind": "mtp", "target_layers": 3}, "1 for mtp: the last one"),
        ("draft", {"kind": "eagle3", "layers": 2}, r"draft\.layers is 2, but must be 1"),
        ("draft", {"kind": "eagle3", "unroll": 0}, r"draft\.unroll is 0, but must be >= 1"),
        ("draft", {"kind": "eagle3", "storage": "int8"}, "one of bfloat16, float32"),
        ("draft", 3, "draft is 3, but must be a section"),
        ("loss.labels", "law", r"loss\.labels is 'law', but must be one of text, target"),
        ("draft.storage", "int4", r"draft\.storage"),
        ("draft.init_from_target", "middle", r"draft\.init_from_target"),
        ("draft.init_from_target", [1], "one layer of the target for each of 3"),
        ("draft", {"kind": "dflash", "markov_rank": 4}, r"draft\.markov_rank is 4"),
        ("data.shards", [], r"data\.shards"),
        ("data.shards", [1], r"data\.shards is 1, but must be a string"),
        ("data.validation_share", 1.0, "from 0 to below 1"),
        ("loss.ce", -0.1, r"loss\.ce"),
        ("loss", {"ce": 0, "l1": 0}, "not both 0"),
        ("loss.temperature", 0, r"loss\.temperature"),
        ("loss.decay", 0.0, r"loss\.decay"),
        ("optimizer.kind", "sgd", "adamw, muon"),
        ("optimizer.betas", [0.9], "two numbers"),
        ("optimizer.lr", 0, r"optimizer\.lr"),
        ("schedule.warmup", 1.5, r"schedule\.warmup"),
        ("schedule", {"warmup": 0.9, "fall": 0.3}, "at most 1"),
        ("run.epochs", 2.0, "one of them"),
        ("run", {}, "one of them"),
        ("run", {"steps": 1, "sequences_per_step": 1, "tokens_per_step": 9}, "one of them"),
        ("run.anchors", 2.5, "whole number above 1"),
        ("run.dtype", "float16", r"run\.dtype"),
        ("data", {}, r"lacks data\.shards"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(key, value, message):
    with pytest.raises(ConfigError, match=message):
        make_recipe(change(key, value))


def test_changes_go_before_the_file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('target = "toy"\n[data]\nshards = ["a/*.jsonl"]\n[run]\nsteps = 3\n')
    recipe = read_recipe(
        path,
        [
            "target=other",
            "run.steps=5",
            'run.cache="c"',
            "draft.kind=dflash",
            "optimizer.betas=[0.8, 0.99]",
            "loss.decay=4",
        ],
    )
    assert recipe.target == "other"
    assert recipe.run.steps == 5
    assert recipe.run.cache == str(tmp_path / "c")
    assert recipe.data.shards == (str(tmp_path / "a/*.jsonl"),)
    assert recipe.draft.kind == "dflash"
    assert recipe.optimizer.betas == (0.8, 0.99)
    assert recipe.loss.decay == 4.0
    taken_back = read_recipe(path, ["run.steps=null", "run.epochs=2"])
    assert (taken_back.run.steps, taken_back.run.epochs) == (None, 2.0)


@pytest.mark.parametrize("change", ["run.steps", "target.name=3"])
def test_changes_of_another_form_are_refused(tmp_path, change):
    path = tmp_path / "r.toml"
    path.write_text('target = "toy"\n')
    with pytest.raises(ConfigError, match="--set"):
        read_recipe(path, [change])


@pytest.mark.parametrize("text", [b"target = ", b"\xff"])
def test_a_file_that_is_no_toml_is_named(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"r\.toml is not TOML"):
        read_recipe(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


TRAINED = sorted(path.name for path in RECIPES.glob("smo*.toml"))


@pytest.mark.parametrize("name", TRAINED)
def test_the_recipes_of_the_repository_are_right(name):
    recipe = read_recipe(RECIPES / name)
    assert recipe.target == "smollm2-135m"
    assert any(line.startswith("draft.block_size = ") for line in recipe.lines())


@pytest.mark.parametrize("kind", ["dflash", "eagle3", "rnn"])
def test_recipes_to_compare_kinds_differ_in_the_draft_and_its_loss_alone(kind):
    """Same data, budget, optimizer and captured layers: what is measured is the kind."""
    base = read_recipe(RECIPES / "smollm2-135m.toml")
    recipe = read_recipe(RECIPES / f"smollm2-135m-{kind}.toml")
    for name in ("target", "data", "optimizer", "schedule", "run"):
        assert getattr(recipe, name) == getattr(base, name), name
    for name in ("target_layer_ids", "vocabulary", "style", "hidden_size", "intermediate_size"):
        assert getattr(recipe.draft, name) == getattr(base.draft, name), name
    depth = recipe.draft.unroll if recipe.draft.is_unrolled else recipe.draft.block_size
    assert depth == base.draft.block_size
