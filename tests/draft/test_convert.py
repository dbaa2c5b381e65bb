"""Conversion of DSpark and DFlash modules: every pair of layouts, and what is refused."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dspark.draft.formats import convert as convert_module
from dspark.draft.formats.detect import load_module
from dspark.draft.formats.native import KEY
from dspark.draft.formats.programs import Program
from dspark.draft.formats.stored import FACTS, facts_of, read_draft
from dspark.errors import CapabilityError, CheckpointError, ConfigError
from tests.draft.convert_drafts import (
    DFLASH,
    INFO,
    REDUCED,
    SHARED,
    Target,
    assert_same_draft,
    native,
    not_asked,
    run,
    tree_of,
)
from tests.draft.dspark_models import VOCAB

FITS = [
    ("qwen3", "vanilla", SHARED, list(Program)),
    ("qwen3", "vanilla", {}, ["dspark", "deepspec", "speculators", "vllm"]),
    ("qwen3", "gated", SHARED, ["dspark", "deepspec", "speculators", "specforge", "sglang"]),
    ("qwen3", "rnn", SHARED, ["dspark", "deepspec", "speculators", "specforge", "sglang"]),
    ("qwen3", "none", {**SHARED, **DFLASH}, ["speculators", "specforge", "vllm", "sglang"]),
    ("qwen3", "none", {"enable_confidence_head": False}, ["dspark", "deepspec", "speculators"]),
    ("qwen3", "vanilla", {**SHARED, "vocab": REDUCED}, ["dspark", "speculators", "vllm"]),
    ("qwen3", "none", {**SHARED, **DFLASH, "vocab": REDUCED}, ["dspark", "speculators", "vllm"]),
    ("qwen3", "vanilla", {**SHARED, "sample_from_anchor": False}, ["speculators", "vllm"]),
    ("gemma4", "vanilla", {}, ["dspark", "deepspec", "vllm"]),
    ("gemma4 with v", "gated", {}, ["dspark", "deepspec"]),
    ("sliding", "vanilla", SHARED, ["dspark", "speculators"]),
    ("sliding causal", "vanilla", {}, ["dspark", "speculators"]),
    ("sliding moving", "vanilla", SHARED, ["dspark", "specforge", "vllm", "sglang"]),
    ("llama", "vanilla", SHARED, ["dspark"]),
]


def fitting() -> list:
    """Every draft to every program; of drafts that fit many, quick tests take every other one.

    The first goes to all of them, and what a program cannot hold is named below.
    """
    cells = []
    for i, (*draft, programs) in enumerate(FITS):
        for j, to in enumerate(programs):
            is_slow = i > 0 and len(programs) > 1 and (i + j) % 2
            cells.append(pytest.param(*draft, to, marks=pytest.mark.slow if is_slow else ()))
    return cells


@pytest.mark.parametrize(
    ("style", "head", "options", "to"),
    fitting(),
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_a_layout_holds_comes_back_and_drafts_the_same(
    tmp_path, make_context, style, head, options, to
):
    source = native(tmp_path / "a", style, head, **options)
    made = run(source, tmp_path / "b", to)
    assert_same_draft(source, made.folder)
    assert tree_of(source, make_context) == tree_of(made.folder, make_context)
    back = run(made.folder, tmp_path / "c", "dspark")
    assert_same_draft(source, back.folder)


PAIRS = [
    # Every program is gone through and arrived at twice in every third pair.
    pytest.param(start, end, marks=pytest.mark.slow) if (i + j) % 3 != 1 else (start, end)
    for i, start in enumerate(Program)
    for j, end in enumerate(Program)
]


@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_every_pair_gives_what_the_direct_way_gives(tmp_path, start, end):
    source = native(tmp_path / "a", **SHARED)
    middle = run(source, tmp_path / "m", start).folder
    both = [run(place, tmp_path / f"{place.name}-{end}", end).folder for place in (source, middle)]
    configs = [json.loads((folder / "config.json").read_text()) for folder in both]
    owned = "owns_embedding", "owns_head"
    for config in configs:  # copies of the target's stay where they were taken
        for name in (*owned, "shares_target_embedding", "shares_target_head"):
            config.get(KEY, {}).get("draft", {}).pop(name, None)
            config.pop(name, None)
    assert configs[0] == configs[1]
    assert_same_draft(*both)


def test_the_target_and_the_training_stay_known(tmp_path):
    source = native(tmp_path / "a", **SHARED)
    place = source
    for to in ("speculators", "specforge", "vllm", "deepspec", "dspark"):
        place = run(place, tmp_path / to, to).folder
        config = json.loads((place / "config.json").read_text())
        assert facts_of(config).name == "org/toy"
        assert (config.get(FACTS) or config[KEY])["training"] == {"steps": 7}
    assert facts_of(config).info().num_layers == 4


@pytest.mark.parametrize(
    ("style", "head", "options", "to", "field"),
    [
        ("llama", "vanilla", SHARED, "vllm", "family"),
        ("llama", "vanilla", SHARED, "deepspec", "family"),
        ("gemma4", "vanilla", {}, "sglang", "family"),
        ("gemma4", "vanilla", {}, "speculators", "family"),
        ("gemma4 with v", "vanilla", {}, "vllm", "attention_k_eq_v"),
        ("qwen3", "rnn", SHARED, "vllm", "markov_head_type"),
        ("qwen3", "gated", SHARED, "vllm", "markov_head_type"),
        ("qwen3", "vanilla", {**SHARED, "vocab": REDUCED}, "sglang", "draft_vocab_size"),
        ("qwen3", "vanilla", {**SHARED, "vocab": REDUCED}, "deepspec", "draft_vocab_size"),
        ("qwen3", "vanilla", {"sample_from_anchor": False}, "sglang", "sample_from_anchor"),
        ("qwen3", "vanilla", {"sample_from_anchor": False}, "specforge", "sample_from_anchor"),
        ("qwen3", "vanilla", {"sample_from_anchor": False}, "deepspec", "sample_from_anchor"),
        ("qwen3", "none", {"enable_confidence_head": False}, "vllm", "sample_from_anchor"),
        ("qwen3", "none", {"sample_from_anchor": False}, "sglang", "enable_confidence_head"),
        ("sliding", "vanilla", SHARED, "vllm", "sliding_window"),
        ("sliding", "vanilla", SHARED, "deepspec", "sliding_window"),
        ("sliding moving", "vanilla", SHARED, "speculators", "sliding_window"),
        ("qwen3", "vanilla", {"logit_softcap": 5.0}, "speculators", "logit_softcap"),
        ("qwen3", "vanilla", {"embed_scale": 8.0}, "deepspec", "embed_scale"),
        ("qwen3", "vanilla", {"target_layer_ids": (-1, 0, 2)}, "sglang", "target_layer_ids"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, style, head, options, to, field):
    source = native(tmp_path / "a", style, head, **options)
    with pytest.raises(CapabilityError, match=f"^{field} of the draft is"):
        run(source, tmp_path / "b", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_int8_is_multiplied_out(tmp_path):
    source = native(tmp_path / "a", storage="int8")
    made = run(source, tmp_path / "b", "deepspec")
    assert made.dtype == "float32"
    expected = load_module(source, Target()).state_dict()
    stored = load_file(made.folder / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_stored_as_asked(tmp_path, dtype):
    source = native(tmp_path / "a", storage="bfloat16")
    assert run(source, tmp_path / "b", "deepspec").dtype == "bfloat16"
    folder = run(source, tmp_path / "c", "deepspec", dtype=dtype).folder
    stored, before = load_file(folder / "model.safetensors"), read_draft(source, INFO).tensors
    for name, tensor in stored.items():
        assert torch.equal(tensor, before[name].to(getattr(torch, dtype)))
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_dspark_stores_no_float16(tmp_path):
    source = run(native(tmp_path / "a"), tmp_path / "b", "vllm", dtype="float16").folder
    assert run(source, tmp_path / "c", "dspark").dtype == "float32"
    with pytest.raises(CapabilityError, match="dtype is float16"):
        run(source, tmp_path / "d", "dspark", dtype="float16")
    with pytest.raises(ConfigError, match="dtype is 'int4'"):
        run(source, tmp_path / "d", "dspark", dtype="int4")


def test_parts_of_the_target_are_copied_only_where_they_must_be(tmp_path):
    source = native(tmp_path / "a", **SHARED, vocab=REDUCED)
    run(source, tmp_path / "b", "dspark", lender=not_asked)
    with pytest.raises(AssertionError, match="was loaded"):
        run(source, tmp_path / "c", "vllm", lender=not_asked)
    made = run(source, tmp_path / "c", "vllm")
    stored = load_file(made.folder / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], Target().weight[REDUCED.ids])
    assert torch.equal(stored["d2t"] + torch.arange(len(REDUCED.ids)), REDUCED.ids)
    assert "embed_tokens.weight" not in stored
    assert made.notes[0] == f"the output head is a copy of {len(REDUCED.ids)} rows of the target's."


@pytest.mark.parametrize("to", ["specforge", "sglang"])
def test_an_own_embedding_is_left_out_only_if_it_is_the_targets(tmp_path, to):
    with pytest.raises(CapabilityError, match=r"embed_tokens\.weight of the draft is not the"):
        run(native(tmp_path / "a"), tmp_path / "b", to)
    copies = run(native(tmp_path / "s", **SHARED), tmp_path / "d", "deepspec").folder
    made = run(copies, tmp_path / "e", to)
    assert sum("was left out" in note for note in made.notes) == 2
    assert (
        not {"embed_tokens.weight", "lm_head.weight"}
        & load_file(made.folder / "model.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("change", "field"), [({"bias": torch.ones(VOCAB)}, "bias"), ({"softcap": 9.0}, "softcap")]
)
def test_a_head_that_is_more_than_its_rows_is_not_copied(tmp_path, change, field):
    class Odd(Target):
        def head_rows(self, ids=None):
            return replace(super().head_rows(ids), **change)

    with pytest.raises(CapabilityError, match=field):
        run(
            native(tmp_path / "a", **SHARED), tmp_path / "b", "deepspec", lender=lambda dtype: Odd()
        )


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    source = native(tmp_path / "a")

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert_module, "save_file", full)
    with pytest.raises(CheckpointError, match="no space left"):
        run(source, tmp_path / "b", "deepspec")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_a_new_or_empty_folder_is_written(tmp_path):
    source = native(tmp_path / "a")
    (tmp_path / "b").mkdir()
    run(source, tmp_path / "b", "deepspec")
    before = (tmp_path / "b" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="not an empty folder"):
        run(source, tmp_path / "b", "vllm")
    assert (tmp_path / "b" / "config.json").read_bytes() == before
    run(source, tmp_path / "deep" / "er" / "c", "dspark")
    readme = (tmp_path / "deep" / "er" / "c" / "README.md").read_text()
    assert "SHA-256" in readme
    assert "from the layout dspark" in readme


def test_a_model_is_no_draft(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(CheckpointError, match="holds no draft module"):
        run(tmp_path / "m", tmp_path / "b", "vllm")
