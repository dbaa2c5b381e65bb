"""Fixtures shared by all tests: tiny random models of every family."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.adapters.hf.target import HFTarget
from dspark.registry import LoadOptions

VOCAB = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA4_LAYERS = ["sliding_attention", "full_attention"] * 3

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, sliding_window=20),
    "phi3": lambda: transformers.Phi3Config(**_COMMON),
    "qwen2": lambda: transformers.Qwen2Config(
        **_COMMON, use_sliding_window=True, sliding_window=20, max_window_layers=2
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=32),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_COMMON, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_COMMON, head_dim=16, sliding_window=20),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_COMMON, head_dim=32, sliding_window=20),
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **{**_COMMON, "num_hidden_layers": 6},
        head_dim=16,
        global_head_dim=32,
        sliding_window=20,
        num_kv_shared_layers=2,
        layer_types=_GEMMA4_LAYERS,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCAB,
    ),
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models run faster on one thread, and do not fight over cores."""
    if "DSPARK_TEST_THREADS" not in os.environ:
        torch.set_num_threads(1)


def random_model(
    family: str, dtype: torch.dtype = torch.float32, *, layers: int | None = None
) -> Any:
    """A transformers model with random weights large enough that every branch matters."""
    config = FAMILIES[family]()
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    if layers is not None:
        decoder = model.get_decoder()
        decoder.layers = decoder.layers[:layers]
        model.config.num_hidden_layers = layers
    return model.to(dtype).eval()


@functools.cache
def random_target(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    exact: bool | None = None,
    layers: int | None = None,
) -> HFTarget:
    """A wrapped random model; made once per combination."""
    model = random_model(family, dtype, layers=layers)
    options = LoadOptions(name=f"random-{family}", exact=exact)
    return wrap_model(model, adapter_for(model.config.model_type), options, eos_token_ids=(2,))
