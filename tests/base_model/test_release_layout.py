"""A checkpoint in the release's layout gives the logits of transformers, loaded by each's own code.

Official names, FP4 experts, FP8 linears, bfloat16 for the rest, compression rates 0, 4 and 128.
Here transformers reads the files itself and dequantises them; elsewhere (test_model.py) it is
handed our numbers.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.quantizers import quantizer_finegrained_fp8

from dspark.base_model.checkpoint import Checkpoint
from dspark.base_model.checkpoint_write import random_checkpoint
from dspark.base_model.names import Storage, expected_tensors
from dspark.base_model.presets import preset
from dspark.base_model.target import V4Target
from dspark.registry import LoadOptions, load_target
from tests.base_model import hf_reference
from tests.base_model.build import feed, open_slot, relative_error

CONFIG = replace(
    preset("v4-tiny"),
    # Several scales in either direction of an FP8 weight, and whole blocks as in the releases:
    # transformers works out the size of a block from the shapes. Their rates and window.
    hidden_size=256,
    q_lora_rank=256,
    moe_intermediate_size=256,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128),
    n_routed_experts=4,
    sliding_window=128,
    index_topk=24,
)
TOKENS = 300


def ids() -> list[int]:
    return np.random.default_rng(5).integers(2, CONFIG.vocab_size, TOKENS).tolist()


@pytest.fixture(scope="module", params=["fp4", pytest.param("fp8", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released models have FP4 experts, the Base models FP8 ones."""
    folder = tmp_path_factory.mktemp("release") / request.param
    config = replace(CONFIG, expert_dtype=request.param)
    random_checkpoint(folder, config, seed=11, shard_bytes=1_000_000)
    return folder


def theirs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    # It asks for accelerate before it loads FP8, and does not use it on a CPU.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    # It leaves what it dequantised in bfloat16, which holds an FP4 or FP8 number times a power of
    # two exactly; from here on float32.
    return hf_reference.logits(model.float().eval(), ids())


def ours(folder: Path) -> V4Target:
    target = load_target(folder, LoadOptions(name="v4", dtype="float32", exact=False)).target
    assert isinstance(target, V4Target)
    return target


@pytest.mark.filterwarnings("ignore")
def test_logits_equal_those_of_transformers_loading_the_same_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both dequantise without rounding, so nothing is left but the order of sums."""
    stored = Checkpoint.open(folder)
    assert stored.stored("layers.1.ffn.experts.0.w1").kind == folder.name
    assert stored.stored("layers.1.attn.wkv").kind == "fp8"
    expected = theirs(folder, monkeypatch)
    model = ours(folder).model
    cache = model.new_cache()
    for chunks in ((), (131, 1, 1, 57)):
        got = feed(model, cache, open_slot(cache), ids(), chunks)
        assert relative_error(got, expected) < 1e-4
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


@functools.cache
def first_rows(folder: Path) -> Tensor:
    """Logits of the first 20 tokens."""
    model = ours(folder).model
    cache = model.new_cache()
    return feed(model, cache, open_slot(cache), ids()[:20])


@pytest.mark.parametrize("kind", ["wq_a", "wo_a", "w2"])
def test_a_scale_that_is_misread_shows(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail: one doubled scale of the last layer is far over the tolerance."""
    prefix = "layers.2.ffn.shared_experts" if kind == "w2" else "layers.2.attn"
    read = Checkpoint.tensor

    def doubled(self: Checkpoint, name: str) -> Tensor:
        tensor = read(self, name)
        if name != f"{prefix}.{kind}.scale":
            return tensor
        raw = tensor.view(torch.uint8).clone()
        raw[0, 0] += 1
        return raw.view(tensor.dtype)

    expected = first_rows(folder)
    monkeypatch.setattr(Checkpoint, "tensor", doubled)
    assert relative_error(first_rows.__wrapped__(folder), expected) > 1e-3


def test_every_tensor_kind_of_the_release_is_in_the_files(folder: Path) -> None:
    storages = {spec.storage for spec in expected_tensors(CONFIG).values()}
    assert storages == set(Storage)
    Checkpoint.open(folder).check()
