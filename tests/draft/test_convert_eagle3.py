"""Conversion of EAGLE-3 drafts: layouts, layer ids by engine, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.draft.eagle3 import Eagle3Drafter
from dspark.draft.eagle3_config import read_config
from dspark.draft.eagle3_format import load_eagle3, save_eagle3
from dspark.draft.formats.convert import convert_draft
from dspark.draft.formats.programs import Program
from dspark.draft.formats.stored import read_draft
from dspark.errors import CapabilityError
from tests.draft import test_eagle3 as eagle3
from tests.draft.convert_drafts import option, started
from tests.draft.dspark_models import target_info

E3 = target_info(vocab_size=23, hidden_size=12, num_layers=6)
PLAIN = {**eagle3.SMALL, "target_layers": (1, 2, 4), "has_embedding": False}
QWEN = {**eagle3.QWEN, "target_layers": (1, 2, 4)}
GEMMA = {**eagle3.GEMMA, "target_layers": (1, 2, 4)}
NEWER = {**PLAIN, "fc_norm": True, "norm_output": True}


class Eagle3Target:
    info = E3

    def embed(self, ids):
        return eagle3.TABLE[ids]

    def unembed(self, hidden):
        return hidden

    def head_rows(self, ids=None):
        raise AssertionError("an EAGLE-3 draft has a head")


def run_eagle3(source, dest, to, lender=lambda dtype: Eagle3Target(), **options):
    return convert_draft(source, dest, Program(to), info=E3, lender=lender, **options)


def save(folder, options, layout="eagle3"):
    save_eagle3(folder, eagle3.make_module(**options), layout=layout, num_target_layers=6)
    return folder


@pytest.mark.parametrize(
    ("options", "layout", "to"),
    [
        *((PLAIN, "eagle3", to) for to in Program if to != "deepspec"),
        *((PLAIN, "speculators", to) for to in Program if to != "deepspec"),
        *((QWEN, "deepspec", to) for to in ("deepspec", "vllm", "speculators", "dspark")),
        *((GEMMA, "deepspec", to) for to in ("deepspec", "dspark")),
        *((NEWER, "eagle3", to) for to in ("vllm", "sglang", "speculators", "dspark")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_eagle3_drafts_come_back_and_draft_the_same(tmp_path, make_context, options, layout, to):
    source = save(tmp_path / "a", options, layout)
    made = run_eagle3(source, tmp_path / "b", to)
    first, second = read_draft(source, E3), read_draft(made.folder, E3)
    assert first.config == second.config
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    trees = []
    for folder in (source, made.folder):
        drafter = load_eagle3(folder, SimpleNamespace(info=E3, embed=Eagle3Target().embed))
        assert isinstance(drafter, Eagle3Drafter)
        rows = eagle3.features(drafter._module, 0, 0, 9)
        context = make_context(list(range(1, 11)), budget=6, features=rows)
        trees.append(drafter.propose([context])[0].tree.token.tolist())
    assert trees[0] == trees[1]
    assert len(trees[0]) > 2


def test_eagle3_layers_are_named_as_each_engine_reads_them(tmp_path):
    source = save(tmp_path / "a", PLAIN)
    programs = ("vllm", "sglang", "specforge")
    made = {to: run_eagle3(source, tmp_path / to, to).folder for to in programs}
    config = {to: json.loads((path / "config.json").read_text()) for to, path in made.items()}
    name = "eagle_aux_hidden_state_layer_ids"
    assert [config[to][name] for to in programs] == [[2, 3, 5]] * 3  # inputs
    assert "eagle_config" not in config["vllm"]
    nested = {"use_aux_hidden_state": True, name: [1, 2, 4]}  # outputs
    assert config["sglang"]["eagle_config"] == config["specforge"]["eagle_config"] == nested
    qwen = run_eagle3(save(tmp_path / "q", QWEN), tmp_path / "v", "vllm").folder
    written = json.loads((qwen / "config.json").read_text())
    assert written["architectures"] == ["Eagle3Qwen3ForCausalLM"]


@pytest.mark.parametrize(
    ("top", "nested", "layers"),
    [
        (None, None, (1, 3, 4)),  # SpecForge's 1, n/2 - 1, n - 4 and vLLM's 2, n/2, n - 3
        (None, [1, 3, 4], (1, 3, 4)),  # SpecForge, SGLang: outputs
        (None, [2, 4, 5], (1, 3, 4)),  # begins with another: inputs
        ([1, 3, 4], None, (0, 2, 3)),  # at top level always inputs
        ([2, 4, 5], [1, 3, 4], (1, 3, 4)),  # both say the same
    ],
)
def test_nested_eagle3_layers_name_outputs_where_they_begin_with_1(tmp_path, top, nested, layers):
    name = "eagle_aux_hidden_state_layer_ids"
    info = replace(E3, num_layers=8)
    path = save(tmp_path / "a", PLAIN) / "config.json"
    raw = json.loads(path.read_text())
    raw.pop(name)
    raw.pop("num_target_layers", None)
    raw.update({} if top is None else {name: top})
    raw.update({} if nested is None else {"eagle_config": {name: nested}})
    assert read_config(raw, info, has_embedding=False).target_layers == layers


def test_vllm_is_told_how_many_layers_are_read(tmp_path):
    source = save(tmp_path / "a", {**PLAIN, "target_layers": (1, 4)})
    folder = run_eagle3(source, tmp_path / "b", "vllm").folder
    written = json.loads((folder / "config.json").read_text())
    assert written["num_aux_hidden_states"] == 2  # it takes 3 if nothing is said


@pytest.mark.parametrize("to", [to for to in Program if to != "deepspec"])
@pytest.mark.parametrize("size", [9, 23])
def test_only_a_reduced_vocabulary_has_a_map(tmp_path, size, to):
    source = save(tmp_path / "a", {**PLAIN, "draft_vocab_size": size})
    stored = load_file(run_eagle3(source, tmp_path / "b", to).folder / "model.safetensors")
    assert ({"d2t", "t2d"} <= stored.keys()) == (size < 23)


def test_norm_output_means_something_else_in_specforge(tmp_path):
    made = run_eagle3(save(tmp_path / "a", PLAIN), tmp_path / "b", "specforge")
    assert "norm_output" not in json.loads((made.folder / "config.json").read_text())
    with pytest.raises(CapabilityError, match=r"^norm_output of the draft is true"):
        run_eagle3(
            save(tmp_path / "c", {**PLAIN, "norm_output": True}), tmp_path / "d", "specforge"
        )


@pytest.mark.parametrize(
    ("change", "to", "field"),
    [
        ({}, "deepspec", "qk_norm"),
        ({"target_layers": (4, 1, 2)}, "vllm", "target_layers"),
        ({"target_layers": (4, 1, 2)}, "sglang", "target_layers"),
        ({"target_layers": (-1, 1, 2)}, "sglang", "target_layers"),
        ({"target_layers": (5,)}, "vllm", "target_layers"),
        ({"target_layers": (2,)}, "sglang", "target_layers"),
        ({"target_layers": (1, 2)}, "specforge", "target_layers"),
        ({"target_layers": (-1, 1, 2)}, "specforge", "target_layers"),
        ({"norm_before_residual": True}, "sglang", "norm_before_residual"),
        ({"norm_before_fc": True}, "specforge", "norm_before_fc"),
        ({"attention_bias": True}, "sglang", "attention_bias"),
        ({"qk_norm": True}, "sglang", "qk_norm"),
        ({"logit_softcap": 3.0}, "vllm", "logit_softcap"),
    ],
    ids=str,
)
def test_an_eagle3_draft_that_does_not_fit_is_named(tmp_path, change, to, field):
    source = save(tmp_path / "a", {**PLAIN, **change})
    with pytest.raises(CapabilityError, match=f"^{field} of the draft is"):
        run_eagle3(source, tmp_path / "b", to)
    assert not (tmp_path / "b").exists()


def test_sglang_overwrites_an_own_embedding_of_eagle3(tmp_path):
    source = save(tmp_path / "a", {**PLAIN, "has_embedding": True})
    with pytest.raises(CapabilityError, match=r"embed_tokens\.weight of the draft is not"):
        run_eagle3(source, tmp_path / "b", "sglang")
    path = source / "model.safetensors"
    save_file({**load_file(path), "embed_tokens.weight": eagle3.TABLE.clone()}, path)
    made = run_eagle3(source, tmp_path / "b", "sglang")
    assert "embed_tokens.weight" not in load_file(made.folder / "model.safetensors")


def test_a_tied_head_is_stored_beside_its_embedding(tmp_path):
    source = save(tmp_path / "a", {**QWEN, "qk_norm": True}, "deepspec")
    path = source / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    stored = load_file(run_eagle3(source, tmp_path / "b", "vllm").folder / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["embed_tokens.weight"])


def test_servers_of_eagle3_draft_a_chain(tmp_path):
    source = save(tmp_path / "a", PLAIN)
    vllm = run_eagle3(source, tmp_path / "v", "vllm", target="t").folder
    settings = json.loads(option(started(vllm, tmp_path)[0], "--speculative-config"))
    assert (settings["method"], settings["num_speculative_tokens"]) == ("eagle3", 5)
    sglang = run_eagle3(source, tmp_path / "s", "sglang", target="t").folder
    arguments, _ = started(sglang, tmp_path)
    steps = [option(arguments, f"--speculative-{n}") for n in ("num-steps", "num-draft-tokens")]
    assert steps == ["5", "6"]
    assert option(arguments, "--speculative-eagle-topk") == "1"
