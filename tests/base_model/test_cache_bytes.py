"""The memory of a request is what `dspark plan` says it is, to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dspark.base_model.cache import V4Cache
from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import DictExperts
from dspark.base_model.model import V4Model
from dspark.base_model.plan import cache_bytes
from dspark.base_model.presets import PRESETS, preset
from dspark.base_model.random_weights import random_tensors
from dspark.base_model.weights import DictSource
from tests.base_model.build import feed, open_slot, run

TINY = replace(  # of what a request does not store, next to nothing
    preset("v4-tiny"),
    vocab_size=64,
    hidden_size=64,
    q_lora_rank=32,
    hc_sinkhorn_iters=1,
    moe_intermediate_size=32,
    n_routed_experts=2,
)
CONFIGS: dict[str, V4Config] = {
    "v4-tiny": TINY,
    "sliding only": replace(TINY, compress_ratios=(0,) * 5),
    "sparse only": replace(TINY, compress_ratios=(4,) * 5, sliding_window=3),
    "heavy only, two rates": replace(TINY, compress_ratios=(8, 6, 8, 6, 8), sliding_window=100),
    "as released": replace(TINY, compress_ratios=(0, 4, 128, 4, 128), sliding_window=128),
    "other heads": replace(TINY, head_dim=32, qk_rope_head_dim=8, index_head_dim=16),
}
LENGTHS = (1, 3, 4, 8, 9, 17, 128, 300)


def model_of(config: V4Config, dtype: torch.dtype) -> V4Model:
    tensors = dict(random_tensors(config, quantised=False))
    return V4Model(config, DictSource(tensors), DictExperts(tensors), dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in CONFIGS] + [("v4-tiny", torch.float32)],
)
def test_a_request_holds_the_bytes_that_plan_computes_at_every_length(
    name: str, dtype: torch.dtype
) -> None:
    config = CONFIGS[name]
    model = model_of(config, dtype)
    cache = model.new_cache()
    slot = open_slot(cache)
    assert cache.state_bytes(slot) == cache_bytes(config, 0, dtype.itemsize).total == 0
    for length in LENGTHS:
        feed(model, cache, slot, [length % 64] * (length - cache.length(slot)))
        assert cache.state_bytes(slot) == cache_bytes(config, length, dtype.itemsize).total


def test_what_was_drafted_and_rejected_is_not_held() -> None:
    model = model_of(TINY, torch.float32)
    cache = model.new_cache()
    slot = open_slot(cache)
    feed(model, cache, slot, [1] * 14)
    run(model, cache, slot, [2] * 9)
    assert cache.state_bytes(slot) == cache_bytes(TINY, 14, 4).total
    cache.commit(slot, [0, 1, 2])
    assert cache.state_bytes(slot) == cache_bytes(TINY, 17, 4).total


def test_the_bytes_are_those_of_rows_that_really_lie_in_the_pools() -> None:
    """Counted from the tensors: every row that a later token could read, and no other."""
    model = model_of(TINY, torch.float32)
    cache = model.new_cache()
    slot = open_slot(cache)
    feed(model, cache, slot, list(range(2, 43)))
    state, found = cache.state(slot), 0
    window = cache.window.rows_of(state.window)
    for layer in range(TINY.num_hidden_layers):
        found += _written(cache.window.layer(layer, "row")[window])
    for ratio, lane in cache.lanes.items():
        of = state.lanes[ratio]
        layers = [i for i, m in enumerate(TINY.compress_ratios) if m == ratio]
        for layer in layers:
            for part in ("entry", "key") if ratio == 4 else ("entry",):
                found += _written(lane.entries.layer(layer, part)[lane.entries.rows_of(of.pages)])
                # The ring has room for one row more than an entry that is still to close needs.
                ring = lane.raw.layer(layer, part)[lane.raw.rows_of(of.ring)]
                found += _written(ring) - ring[0].nbytes
    assert found == cache.state_bytes(slot) == cache_bytes(TINY, 41, 4).total


def _written(rows: torch.Tensor) -> int:
    """Bytes of the rows that hold anything."""
    return int((rows != 0).any(-1).sum()) * rows[0].nbytes


@pytest.mark.parametrize("name", [n for n in PRESETS if "tiny" not in n])
@pytest.mark.parametrize(
    "tokens",
    [1, 127, 65536, *(pytest.param(n, marks=pytest.mark.slow) for n in (2049, 1 << 20))],
)
def test_released_models_too(name: str, tokens: int) -> None:
    """No weights and hardly any memory: only the lengths are pretended."""
    config = preset(name)
    devices = dict.fromkeys(range(config.num_hidden_layers), torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float32):
        cache = V4Cache(config, devices=devices, dtype=dtype, wide=torch.float32)
        slot = open_slot(cache)
        cache.state(slot).tokens = [0] * tokens
        assert cache.state_bytes(slot) == cache_bytes(config, tokens, dtype.itemsize).total
