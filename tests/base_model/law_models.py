"""Small random V4 targets of six tokens with drafts of their own, and their law by plain chains."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import DictExperts
from dspark.base_model.model import V4Model
from dspark.base_model.presets import preset
from dspark.base_model.random_weights import random_tensors
from dspark.base_model.target import V4Target
from dspark.base_model.weights import DictSource
from dspark.draft.base import Drafter
from dspark.target import TokenBatch
from tests.base_model.build import part_of
from tests.draft.law_check import PROMPT, VOCAB, Array, Logits, Prefix

KINDS = ("mtp", "dspark")
MORE = {
    "mtp": {},
    "dspark": {
        "draft_stages": 2,
        "dspark_block_size": 3,
        "dspark_noise_token_id": VOCAB - 1,
        "dspark_target_layer_ids": (0, 1, 2),
    },
}


def config_of(kind: str) -> V4Config:
    """Every kind of layer; a window that texts outgrow, and entries that they close."""
    return replace(
        preset(f"v4-tiny-{kind}"),
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 8),
        num_hash_layers=1,
        sliding_window=6,
        index_topk=2,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=32,
        hc_sinkhorn_iters=3,
        moe_intermediate_size=32,
        n_routed_experts=4,
        **MORE[kind],
    )


@functools.cache
def target_of(kind: str, *, exact: bool = False) -> V4Target:
    config = config_of(kind)
    tensors = dict(random_tensors(config, seed=3, quantised=False))
    model = V4Model(config, DictSource(tensors), DictExperts(tensors), dtype=torch.float32)
    target = V4Target(model, name=f"small-{kind}", eos_token_ids=[])
    target.switch_exact(exact)
    return target


def drafter_of(kind: str, *, exact: bool = False) -> Drafter:
    drafter = target_of(kind, exact=exact).own_drafter()
    assert drafter is not None
    return drafter


def logits_of(kind: str) -> Logits:
    """Logits after the prompt and each token of continuations, run as chains of their own."""
    target = target_of(kind)

    def logits(texts: Sequence[Prefix]) -> Array:
        cache, rows = target.new_cache(), []
        for text in texts:
            slot, _ = cache.open([])
            tokens = [*PROMPT, *text]
            cache.reserve(slot, len(tokens))
            rows.append(part_of(slot, 0, tokens))
        found = target.forward(TokenBatch.build(rows), cache).logits
        whole = found.double().numpy().reshape(len(texts), -1, VOCAB)
        return whole[:, len(PROMPT) - 1 :]

    return logits
