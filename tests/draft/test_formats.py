"""Draft modules on disk: every layout proposes what was written, and misfits are named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.draft.corpus_file import write_corpus
from dspark.draft.dspark import DSparkDrafter
from dspark.draft.dspark_config import Window
from dspark.draft.formats.deepspec import save_draft
from dspark.draft.formats.detect import is_draft, load_draft, load_module
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.errors import CapabilityError, CheckpointError, ConfigError, DsparkError
from dspark.loading import build_drafter
from dspark.mtp_head import DraftVocab
from dspark.registry import LoadedTarget, LoadOptions
from tests.conftest import random_model, random_target
from tests.draft.dspark_models import (
    HEADS,
    HIDDEN,
    STYLES,
    VOCAB,
    make_features,
    make_module,
    target_info,
)


class ToyTarget:
    """All that a loader asks of a target that shares nothing."""

    def __init__(self, **changes):
        self.info = target_info(**changes)


class SharingTarget(ToyTarget):
    """A target with an embedding and a head, those of a module."""

    def __init__(self, module, **changes):
        super().__init__(**changes)
        self._module = module

    def embed(self, token_ids):
        return self._module.embed_tokens.weight[token_ids]

    def unembed(self, hidden):
        return hidden @ self._module.lm_head.weight.T


def tree_of(drafter, make_context, size=12):
    features = make_features(size - 1, layers=drafter.capture)
    context = make_context(list(range(1, size + 1)), budget=9, features=features)
    return drafter.propose([context])[0].tree


def assert_same_trees(one, other, make_context):
    first, second = tree_of(one, make_context), tree_of(other, make_context)
    assert first.num_nodes > 3
    assert first.token.tolist() == second.token.tolist()
    assert first.parent.tolist() == second.parent.tolist()
    # A fused matrix may sum in another order: one in float32, as probabilities.
    torch.testing.assert_close(first.survival, second.survival, rtol=1e-4, atol=1e-6)


def rewrite(folder, **changes):
    """Change fields of a config.json; None takes a field out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = value
        if value is None:
            del config[name]
    path.write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path):
    """A small module in DeepSpec's layout, as dspark writes it."""
    return save_draft(tmp_path / "draft", make_module())


# -- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [s for s in STYLES if s != "sliding moving"])
@pytest.mark.parametrize("anchor", [True, False])
def test_what_is_written_is_read_back(tmp_path, make_context, style, anchor):
    module = make_module(style, "gated", sample_from_anchor=anchor)
    loaded = load_draft(save_draft(tmp_path / "d", module), ToyTarget())
    assert loaded._module.config == module.config
    assert_same_trees(DSparkDrafter(module), loaded, make_context)
    assert not list((tmp_path / "d").glob("*.part"))


@pytest.mark.parametrize("head", HEADS)
def test_heads_and_reduced_vocabularies_are_read_back(tmp_path, make_context, head):
    vocab = DraftVocab.build(VOCAB, range(2, VOCAB, 2))
    module = make_module(head=head, vocab=vocab)
    loaded = load_draft(save_draft(tmp_path / "d", module), ToyTarget())
    assert loaded.name == ("dflash" if head == "none" else "dspark")
    assert_same_trees(DSparkDrafter(module), loaded, make_context)


def test_a_module_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="sliding"):
        save_draft(tmp_path / "d", make_module("sliding moving"))


def test_a_deepspec_release_has_fewer_fields(folder, make_context):
    """Those that only dspark writes may all be missing, and rotary parameters may be old."""
    own = ("sample_from_anchor", "draft_vocab_size", "shares_target_embedding")
    own += ("shares_target_head", "sliding_window_non_causal", "target_hidden_size")
    gone = dict.fromkeys((*own, "rope_parameters", "layer_types"))
    rewrite(folder, **gone, rope_theta=10000.0, rope_scaling=None)
    assert_same_trees(DSparkDrafter(make_module()), load_draft(folder, ToyTarget()), make_context)


def as_speculators(folder, module, **changes):
    """The same module as speculators writes it."""
    path = save_draft(folder, module) / "config.json"
    fields, config = json.loads(path.read_text()), module.config
    inner = {k: v for k, v in fields.items() if k not in ("architectures", "block_size")}
    gamma = config.gamma
    method = {"proposal_type": "greedy", "speculative_tokens": gamma}
    outer = {
        "speculators_model_type": "dspark" if config.markov_rank else "dflash",
        "architectures": ["DSparkSpeculator"],
        "speculators_config": {"proposal_methods": [method], "verifier": {"name_or_path": "x"}},
        "transformer_layer_config": inner,
        "draft_vocab_size": config.draft_vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
    }
    path.write_text(json.dumps({k: v for k, v in {**outer, **changes}.items() if v is not None}))
    return folder


@pytest.mark.parametrize("head", ["vanilla", "rnn", "none"])
@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("is_written", [True, False])
def test_speculators_layout_proposes_the_same(tmp_path, make_context, head, anchor, is_written):
    vocab = DraftVocab.build(VOCAB, range(5, VOCAB, 2))
    module = make_module(
        head=head, vocab=vocab, sample_from_anchor=anchor, enable_confidence_head=head != "none"
    )
    as_speculators(tmp_path / "s", module)
    if not is_written and (head != "none" or not anchor):
        rewrite(tmp_path / "s", sample_from_anchor=None)
    loaded = load_draft(tmp_path / "s", ToyTarget())
    assert loaded.capture == (0, 1, 2)
    assert_same_trees(DSparkDrafter(module), loaded, make_context)


def test_speculators_ignores_copies_of_the_target(tmp_path, make_context):
    as_speculators(tmp_path / "s", make_module())
    path = tmp_path / "s" / "model.safetensors"
    save_file({**load_file(path), "verifier_norm.weight": torch.ones(HIDDEN)}, path)
    assert tree_of(load_draft(tmp_path / "s", ToyTarget()), make_context).num_nodes


def as_specforge(folder, module, *, moved=(), **changes):
    """The same module as SpecForge writes it, without embedding and head."""
    path = save_draft(folder, module) / "config.json"
    fields, config = json.loads(path.read_text()), module.config
    nested = {
        name: fields.pop(name)
        for name in ("mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")
    }
    nested["attention_mode"] = "gqa"
    nested["confidence_head_alpha"] = 1.0 if config.enable_confidence_head else 0.0
    nested["confidence_head_with_markov"] = config.confidence_head_with_markov
    if config.markov_rank:
        nested["projector_type"] = "dspark"
    for name in ("sample_from_anchor", "enable_confidence_head", "confidence_head_with_markov"):
        fields.pop(name)
    for name in moved:
        fields[f"dspark_{name}"] = nested.pop(name)
    fields["architectures"] = ["DSparkDraftModel" if config.markov_rank else "DFlashDraftModel"]
    path.write_text(json.dumps({**fields, "dflash_config": nested, **changes}))
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if k not in ("embed_tokens.weight", "lm_head.weight")}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("moved", [(), ("mask_token_id", "target_layer_ids")])
def test_specforge_layout_proposes_the_same(tmp_path, make_context, head, moved):
    is_dspark = head != "none"
    module = make_module(head=head, sample_from_anchor=is_dspark, enable_confidence_head=is_dspark)
    as_specforge(tmp_path / "s", module, moved=moved)
    loaded = load_draft(tmp_path / "s", SharingTarget(module))
    assert loaded._module.config.sample_from_anchor == is_dspark
    assert_same_trees(DSparkDrafter(module), loaded, make_context)
    with pytest.raises(CapabilityError, match="embedding or head"):
        load_draft(tmp_path / "s", ToyTarget())


def test_specforge_windows_move_with_the_slot(tmp_path, make_context):
    fixed = make_module("sliding causal")
    as_specforge(tmp_path / "s", fixed)
    loaded = load_draft(tmp_path / "s", SharingTarget(fixed))
    assert loaded._module.config.backbone.windows == (
        Window(size=6, moves=True, is_causal=True),
        None,
    )


def test_early_specforge_names_are_read(tmp_path, make_context):
    module = make_module()
    as_specforge(tmp_path / "s", module)
    path = tmp_path / "s" / "model.safetensors"
    old = {f"logit_head.{k}" if "_head." in k else k: v for k, v in load_file(path).items()}
    save_file(old, path)
    loaded = load_draft(tmp_path / "s", SharingTarget(module))
    assert_same_trees(DSparkDrafter(module), loaded, make_context)


def test_sharded_weights_are_read(folder, make_context):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_trees(DSparkDrafter(make_module()), load_draft(folder, ToyTarget()), make_context)


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        {"block_size": None},
        {"block_size": 0},
        {"block_size": "7"},
        {"mask_token_id": 151669},
        {"mask_token_id": None},
        {"target_layer_ids": [0, 1, 3]},
        {"target_layer_ids": [1, 0, 2]},
        {"target_layer_ids": [0, True, 2]},
        {"num_target_layers": 5},
        {"num_target_layers": None},
        {"vocab_size": VOCAB + 1},
        {"markov_rank": -1},
        {"markov_head_type": "gru"},
        {"enable_confidence_head": 1},
        {"hidden_act": "relu"},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["chunked_attention"] * 2},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"num_key_value_heads": 3},
        {"draft_vocab_size": 10},
        {"target_hidden_size": 32},
    ],
    ids=str,
)
def test_a_field_that_does_not_fit_is_named(folder, field):
    rewrite(folder, **field)
    name = next(iter(field))
    with pytest.raises((CheckpointError, ConfigError), match=name.partition("_parameters")[0]):
        load_draft(folder, ToyTarget())


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 100}, {"num_layers": 9}, {"hidden_size": 128}], ids=str
)
def test_another_target_is_refused(folder, changes):
    with pytest.raises(ConfigError, match="target toy has"):
        load_draft(folder, ToyTarget(**changes))


def test_a_block_of_another_length_than_trained_is_refused(tmp_path):
    as_speculators(tmp_path / "s", make_module())
    method = {"proposal_type": "greedy", "speculative_tokens": 3}
    rewrite(tmp_path / "s", speculators_config={"proposal_methods": [method]})
    with pytest.raises(CheckpointError, match=r"speculative_tokens is 3.*block_size 5"):
        load_draft(tmp_path / "s", ToyTarget())
    as_specforge(tmp_path / "f", make_module(), dspark_block_size=7)
    with pytest.raises(CheckpointError, match=r"block_size is given several times: \[7, 5\]"):
        load_draft(tmp_path / "f", SharingTarget(make_module()))


def test_an_unknown_projector_is_refused(tmp_path):
    as_specforge(tmp_path / "f", make_module(head="none", enable_confidence_head=False))
    rewrite(tmp_path / "f", projector_type="domino")
    with pytest.raises(CheckpointError, match="domino"):
        load_draft(tmp_path / "f", SharingTarget(make_module()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fc.weight", None, r"lacks tensors: fc\.weight"),
        ("layers.9.extra", torch.ones(2), r"unexpectedly, tensors: layers\.9\.extra"),
        ("norm.weight", torch.ones(3), r"norm\.weight .* shape \[3\].*\[64\]"),
        ("norm.weight", torch.ones(HIDDEN, dtype=torch.int8), r"norm\.weight .*int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, name, change, message):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if change is not None:
        tensors[name] = change
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_draft(folder, ToyTarget())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("d2t", None),
        ("d2t", torch.zeros(20)),
        ("d2t", torch.zeros(5, dtype=torch.int64)),
        ("d2t", torch.full((20,), 90)),
        ("t2d", torch.zeros(VOCAB, dtype=torch.int64)),
        ("t2d", torch.zeros(VOCAB, dtype=torch.bool)),
    ],
)
def test_vocabulary_maps_are_checked(tmp_path, name, change):
    module = make_module(vocab=DraftVocab.build(VOCAB, range(0, 60, 3)))
    path = save_draft(tmp_path / "d", module) / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name)
    if change is not None:
        tensors[name] = change
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{name}|draft vocabulary"):
        load_draft(tmp_path / "d", ToyTarget())


def test_a_file_cut_short_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_draft(folder, ToyTarget())


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_broken_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_draft(folder, ToyTarget())


def test_only_safetensors_are_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_draft(folder, ToyTarget())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["Qwen3DSparkModel"]}, True),
        ({"architectures": ["DFlashDraftModel"]}, True),
        ({"architectures": ["K3DSparkModel"]}, True),
        ({"speculators_model_type": "peagle"}, True),
        ({"architectures": ["Qwen3ForCausalLM"]}, False),
        ({"architectures": ["DeepseekV4ForCausalLMDSpark"], "dspark_block_size": 5}, False),
        ({"architectures": None, "model_type": "llama"}, False),
        ({}, False),
    ],
)
def test_drafts_are_told_from_models(config, expected):
    assert is_draft(config) == expected


def test_a_draft_of_an_unknown_kind_is_refused(folder):
    rewrite(folder, architectures=["K3DSparkModel"])
    with pytest.raises(CheckpointError, match="K3DSparkModel"):
        load_module(folder, ToyTarget())


# -- the command line's --draft ---------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path):
    return LoadedTarget(target=random_target("qwen3", layers=4), codec=None, folder=tmp_path)


OPTIONS = LoadOptions(name="t", dtype="float32")


def test_a_folder_is_a_draft_module_or_a_model(folder, loaded, tmp_path):
    drafter = build_drafter(str(folder), loaded, OPTIONS)
    assert isinstance(drafter, DSparkDrafter)
    both = build_drafter(f"{folder}+lookup", loaded, OPTIONS)
    assert both.name == "lookup+dspark"
    assert both.capture == drafter.capture
    random_model("qwen3", layers=4).save_pretrained(tmp_path / "model")
    assert isinstance(build_drafter(str(tmp_path / "model"), loaded, OPTIONS), ModelDrafter)
    shutil.rmtree(folder)
    with pytest.raises(DsparkError):
        build_drafter(str(folder), loaded, OPTIONS)


def test_auto_takes_the_draft_that_the_target_brings(loaded):
    assert isinstance(build_drafter("auto", loaded, OPTIONS), LookupDrafter)

    class Bringing:
        info = target_info()

        def own_drafter(self):
            return "its own"

    bringing = LoadedTarget(target=Bringing(), codec=None, folder=loaded.folder)
    assert build_drafter("auto", bringing, OPTIONS) == "its own"


def test_auto_takes_the_package_s_corpus_before_its_module(folder, loaded, tmp_path, monkeypatch):
    """The module has to be asked for: a corpus costs next to nothing."""
    corpus = tmp_path / "corpus.safetensors"
    facts = {"id": "t", "source": {"alias": "t"}, "fingerprint": "ab", "revision": None}
    write_corpus(corpus, [[1, 2, 3]], target=facts, vocabulary=None)
    monkeypatch.setattr("dspark.loading.find_shipped", lambda model: folder)
    assert isinstance(build_drafter("auto", loaded, OPTIONS), DSparkDrafter)
    monkeypatch.setattr("dspark.loading.find_corpus", lambda model: corpus)
    drafter = build_drafter("auto", loaded, OPTIONS)
    assert isinstance(drafter, LookupDrafter)
    assert drafter.name == f"lookup:{tmp_path.name}"
