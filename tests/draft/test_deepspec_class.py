"""DeepSpec's own Qwen3 class against our reader and the plain second implementation.

It is in no package: put a checkout of DeepSpec on PYTHONPATH and run with -m slow.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, Qwen3Config

from dspark.draft.formats.detect import load_module
from tests.draft.dspark_models import HIDDEN, LAYER_IDS, VOCAB, target_info
from tests.draft.reference_dspark import Reference

pytestmark = pytest.mark.slow
modeling = pytest.importorskip(
    "deepspec.modeling.dspark.qwen3.modeling", reason="DeepSpec is not on PYTHONPATH"
)

BLOCK, SIZE, ANCHOR, MASK = 5, 11, 17, 4


def their_model(head: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        architectures=["Qwen3DSparkModel"],
        layer_types=["full_attention"] * 2,
    )
    own = {
        "num_target_layers": 4,
        "block_size": BLOCK,
        "mask_token_id": MASK,
        "target_layer_ids": list(LAYER_IDS),
        "num_anchors": 8,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": 8,
        "markov_head_type": head,
        "_attn_implementation": "eager",
    }
    for name, value in own.items():
        setattr(config, name, value)
    model: torch.nn.Module = modeling.Qwen3DSparkModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.3 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * size + float("norm" in name))
    return model


@torch.no_grad()
def their_chain(model, features):
    """Greedy tokens, logits and confidences of a block."""
    ids = torch.tensor([[ANCHOR] + [MASK] * (BLOCK - 1)])
    hidden = model._forward_backbone(
        target_hidden_states=features[None],
        noise_embedding=model.embed_tokens(ids),
        position_ids=torch.arange(SIZE + BLOCK)[None],
        attention_mask=None,
        past_key_values=DynamicCache(),
        use_cache=True,
        is_causal=False,
    )
    tokens, logits = model.sample_draft_tokens(
        model.compute_logits(hidden), first_prev_token_ids=ids[:, 0], hidden_states=hidden
    )
    before = torch.cat([ids[:, :1], tokens[:, :-1]], dim=1)
    confidence = model.predict_confidence_step(hidden, prev_token_ids=before)
    return tokens[0].tolist(), logits[0], confidence.flatten().sigmoid()


def save(model: torch.nn.Module, folder: Path) -> Path:
    fields = {k: v for k, v in model.config.to_dict().items() if k != "_attn_implementation"}
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if "rotary" not in k}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_drafts_what_the_second_implementation_drafts(tmp_path, head, seed):
    class Target:
        info = target_info()

    model = their_model(head, seed)
    features = torch.randn(SIZE, len(LAYER_IDS) * HIDDEN)
    tokens, logits, confidence = their_chain(model, features)
    reference = Reference(load_module(save(model, tmp_path), Target()), features, ANCHOR)
    for depth, token in enumerate(tokens):
        mine = reference.logits(tokens[:depth])
        torch.testing.assert_close(logits[depth].double(), mine, rtol=1e-5, atol=2e-5)
        assert int(mine.argmax()) == token
        assert float(confidence[depth]) == pytest.approx(
            reference.confidence(tokens[:depth]), abs=1e-5
        )
