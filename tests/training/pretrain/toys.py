"""A toy text, its tokenizer, and a recipe small enough for a test."""

from __future__ import annotations

import functools
from typing import Any

from dspark.training.pretrain.settings import Recipe, make_recipe
from dspark.training.pretrain.text import Document
from dspark.training.pretrain.tokenizer import Tokens, train_tokenizer

VOCABULARY = 384
RECIPE: dict[str, Any] = {
    "text": {"vocabulary": VOCABULARY, "holdout": 0.2},
    "model": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
        "compress_ratios": [0, 4, 8, 4],
        "sliding_window": 8,
        "rope_factor": 4.0,
        "rope_original": 64,
        "max_position_embeddings": 512,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 6,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_hash_layers": 1,
        "hc_sinkhorn_iters": 3,
        "draft_stages": 3,
        "dspark_block_size": 3,
        "dspark_noise_token_id": 15,
        "dspark_target_layer_ids": [1, 2, 3],
        "dspark_markov_rank": 8,
    },
    "optimizer": {"muon_lr": 1e-2, "adam_lr": 1e-2},
    "schedule": {"warmup": 2, "fall": 0.5},
    "run": {
        "sequences_per_forward": 2,
        "validate_every": 4,
        "validation_rows": 2,
        "checkpoint_minutes": 0.0,
    },
    "stage": [
        {"steps": 4, "length": 32, "sequences": 4},
        {"steps": 2, "length": 32, "sequences": 4, "indexer": "learn"},
        {"steps": 4, "length": 48, "sequences": 3, "indexer": "select", "experts": "fp4"},
    ],
    "dspark": {"steps": 6, "length": 32, "sequences": 4, "anchors": 6},
    "mtp": {"steps": 6, "length": 32, "sequences": 4, "depth": 3},
}


def recipe(**changes: Any) -> Recipe:
    """The toy recipe, whole sections replaced."""
    return make_recipe({**RECIPE, **changes})


def documents() -> list[Document]:
    """Sums and lists, which a small model can learn something of."""
    found = []
    for i in range(60):
        lines = [f"def add_{i}_{k}(x, y):\n    return x + y + {i * k}\n" for k in range(12)]
        split = "held-out" if i % 5 == 4 else "train"
        kind = ("code", "docs")[i % 2]
        found.append(Document(f"{kind}/{i}.py", kind, split, "\n".join(lines)))
    return found


@functools.cache
def tokenizer() -> Any:
    """Trained on the toy text."""
    return train_tokenizer([d.text for d in documents() if d.split == "train"], VOCABULARY)


@functools.cache
def tokens() -> Tokens:
    """The toy text as tokens."""
    return Tokens.encode(documents(), tokenizer())
