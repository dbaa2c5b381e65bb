"""Saved V4 checkpoints of a few megabytes, with a tokenizer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers

from dspark.base_model.checkpoint import Layout
from dspark.base_model.checkpoint_write import random_checkpoint
from dspark.base_model.config import V4Config
from dspark.base_model.presets import preset

SPECIAL = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
]
SMALL: V4Config = replace(
    preset("v4-tiny"),
    hidden_size=64,
    num_hidden_layers=3,  # one of every kind
    compress_ratios=(0, 4, 8),
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=32,
    hc_sinkhorn_iters=3,
    index_topk=4,
    max_position_embeddings=1024,
    moe_intermediate_size=32,
)


def byte_tokenizer() -> Any:
    """One token a byte, and those of V4's chat layout."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator([], trainer)
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


@pytest.fixture(scope="session")
def v4_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by layout: "official" with FP4 experts and FP8 layers, "transformers" in bf16."""
    folders = {}
    for layout in Layout:
        folder = tmp_path_factory.mktemp("v4") / layout.value
        random_checkpoint(folder, SMALL, seed=1, quantised=layout is Layout.OFFICIAL, layout=layout)
        byte_tokenizer().save_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            os.utime(file, ns=(0, 0))  # the same weights are checked once, by whichever process
        folders[layout.value] = folder
    return folders
