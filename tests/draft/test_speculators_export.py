"""Exports for speculators, read by speculators' own configs and loaders.

It pins other versions than dspark needs, so it is in no extra: install it into an environment of
its own beside dspark (`pip install --no-deps speculators==0.9.0` and what its import then asks for)
and run with -m slow.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.draft.formats.stored import read_draft
from tests.draft.convert_drafts import INFO, REDUCED, SHARED, native, run
from tests.draft.test_convert_eagle3 import E3, NEWER, PLAIN, run_eagle3, save

pytestmark = pytest.mark.slow

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    speculators = pytest.importorskip("speculators", reason="speculators is not installed")

DFLASH = {"sample_from_anchor": False, "enable_confidence_head": False, **SHARED}


def read_by_speculators(folder):
    """Config and model as speculators' own classes make them."""
    config = speculators.SpeculatorModelConfig.from_pretrained(folder)
    model_class = speculators.SpeculatorModel.registered_model_class_from_config(config)
    return config, model_class.from_pretrained(folder)


def check_tensors(folder, model):
    """Every stored tensor is a tensor of the model, to the bit; only the target's may be amiss."""
    stored = load_file(folder / "model.safetensors")
    held = model.state_dict()
    for name, tensor in stored.items():
        assert held[name].dtype == tensor.dtype, name
        assert torch.equal(held[name], tensor), name
    # A draft with the target's whole vocabulary needs no map; the model's are empty then.
    lent = ("verifier_", "embed_tokens", "lm_head", "t2d", "d2t")
    assert all(name.startswith(lent) for name in held.keys() - stored.keys())


@pytest.mark.parametrize(
    ("kind", "head", "options"),
    [
        ("dspark", "vanilla", {}),
        ("dspark", "gated", {}),
        ("dspark", "rnn", {}),
        ("dspark", "vanilla", {**SHARED, "vocab": REDUCED}),
        ("dspark", "vanilla", {**SHARED, "sample_from_anchor": False}),
        ("dflash", "none", DFLASH),
    ],
    ids=["vanilla", "gated", "rnn", "reduced", "bonus anchor", "dflash"],
)
def test_speculators_reads_a_block(tmp_path, kind, head, options):
    source = native(tmp_path / "a", "qwen3", head, **options)
    folder = run(source, tmp_path / "b", "speculators").folder
    mine = read_draft(source, INFO).config
    config, model = read_by_speculators(folder)
    assert config.speculators_model_type == kind
    assert config.block_size == mine.block_size
    assert config.sample_from_anchor == mine.sample_from_anchor
    assert config.mask_token_id == mine.mask_token_id
    assert config.draft_vocab_size == mine.draft_vocab_size
    assert config.aux_hidden_state_layer_ids == [i + 1 for i in mine.target_layer_ids]
    method = config.speculators_config.proposal_methods[0]
    assert method.speculative_tokens == mine.gamma
    if kind == "dspark":
        assert (config.markov_rank, config.markov_head_type) == (mine.markov_rank, head)
        assert config.enable_confidence_head == mine.enable_confidence_head
    check_tensors(folder, model)


@pytest.mark.parametrize("options", [PLAIN, NEWER], ids=["plain", "3.1"])
def test_speculators_reads_an_eagle3_draft(tmp_path, options):
    target = LlamaConfig(
        vocab_size=E3.vocab_size,
        hidden_size=E3.hidden_size,
        intermediate_size=24,
        num_hidden_layers=E3.num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    # speculators asks the target for its number of layers, and for its embedding.
    LlamaForCausalLM(target).save_pretrained(tmp_path / "target")
    source = save(tmp_path / "a", options)
    folder = run_eagle3(
        source, tmp_path / "b", "speculators", target=str(tmp_path / "target")
    ).folder
    mine = read_draft(source, E3).config
    config, model = read_by_speculators(folder)
    assert config.eagle_aux_hidden_state_layer_ids == [i + 1 for i in mine.target_layers]
    assert config.draft_vocab_size == mine.draft_vocab_size
    assert config.norm_output == mine.norm_output
    assert config.fc_norm == mine.fc_norm
    check_tensors(folder, model)
