from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import zlib
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dspark.base_model.checkpoint import Checkpoint, Layout
from dspark.base_model.checkpoint_write import random_checkpoint
from dspark.base_model.expert_store import (
    DictExperts,
    ExpertWeights,
    PagedExperts,
    ResidentExperts,
)
from dspark.base_model.names import transformers_name
from dspark.base_model.presets import preset
from dspark.base_model.random_weights import random_tensors
from dspark.errors import CheckpointError, ConfigError
from tests.conftest import examples

CONFIG = preset("v4-tiny-dspark")
LAYER = "layers.3.ffn.experts"


def content(weights: ExpertWeights) -> list[torch.Tensor]:
    parts = [t for w in (weights.w1, weights.w2, weights.w3) for t in (w.weight, w.scale)]
    return [t.contiguous().flatten().view(torch.uint8) for t in parts if t is not None]


def is_same(a: ExpertWeights, b: ExpertWeights) -> bool:
    return all(torch.equal(x, y) for x, y in zip(content(a), content(b), strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("experts") / "m"
    random_checkpoint(folder, CONFIG, shard_bytes=700_000)
    return Checkpoint.open(folder)


def stacked(folder: Path) -> Checkpoint:
    """The same weights with the experts of a layer stacked, as transformers holds them."""
    tensors = dict(random_tensors(CONFIG))
    out = {}
    for name, tensor in tensors.items():
        if ".ffn.experts." not in name or name.startswith("mtp"):
            out[transformers_name(name)] = tensor
    for layer in range(CONFIG.num_hidden_layers):
        for suffix, ending in (("weight", ""), ("scale", "_scale_inv")):
            names = [
                [f"layers.{layer}.ffn.experts.{e}.{m}.{suffix}" for m in ("w1", "w3", "w2")]
                for e in range(CONFIG.n_routed_experts)
            ]
            raw = [[tensors[n].view(torch.uint8) for n in three] for three in names]
            dtype = tensors[names[0][0]].dtype
            prefix = f"model.layers.{layer}.mlp.experts."
            both = torch.stack([torch.cat(three[:2]) for three in raw])
            out[f"{prefix}gate_up_proj{ending}"] = both.view(dtype)
            out[f"{prefix}down_proj{ending}"] = torch.stack([t[2] for t in raw]).view(dtype)
    folder.mkdir()
    save_file(out, folder / "model.safetensors")

    (folder / "config.json").write_text(json.dumps(CONFIG.to_transformers()))
    return Checkpoint.open(folder)


def test_all_stores_give_the_same_weights_in_every_layout(checkpoint, tmp_path):
    random_checkpoint(tmp_path / "apart", CONFIG, layout=Layout.TRANSFORMERS)
    apart, together = Checkpoint.open(tmp_path / "apart"), stacked(tmp_path / "stacked")
    together.check()
    wanted = DictExperts(dict(random_tensors(CONFIG)))
    stores = [store(c) for c in (checkpoint, apart, together) for store in (ResidentExperts, paged)]
    for prefix in ("layers.0.ffn.experts", LAYER, "mtp.2.ffn.experts"):
        for expert in range(CONFIG.n_routed_experts):
            for store in stores:
                assert is_same(store.fetch(prefix, expert), wanted.fetch(prefix, expert))


def paged(checkpoint: Checkpoint, experts: int | None = None) -> PagedExperts:
    """A store with room for so many experts."""
    least = PagedExperts(checkpoint, 1 << 40).least_bytes
    return PagedExperts(checkpoint, least // CONFIG.num_experts_per_tok * (experts or 2))


@given(
    room=st.integers(2, 6),
    wanted=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=60),
)
@examples(15, 60)
def test_the_budget_is_never_exceeded_and_the_oldest_goes(checkpoint, room, wanted):
    """Compared with a cache of `room` keys written down in four lines."""
    store, cache, hits = paged(checkpoint, room), OrderedDict(), 0
    resident = ResidentExperts(checkpoint)
    for layer, expert in wanted:
        prefix = f"layers.{layer}.ffn.experts"
        assert is_same(store.fetch(prefix, expert), resident.fetch(prefix, expert))
        hits += (layer, expert) in cache
        cache[layer, expert] = cache.pop((layer, expert), None)
        if len(cache) > room:
            cache.popitem(last=False)
        stats = store.stats
        assert stats.bytes_held <= store.budget_bytes
        assert (stats.hits, stats.misses) == (hits, stats.hits + stats.misses - hits)
        assert stats.misses - stats.evictions == len(cache)
    one = resident.fetch(LAYER, 0).nbytes
    assert store.stats.bytes_read == store.stats.misses * one
    store.close()


def test_weights_outlive_their_eviction(checkpoint):
    store = paged(checkpoint, 2)
    first = store.fetch(LAYER, 0)
    for expert in range(1, 8):
        store.fetch(LAYER, expert)
    assert is_same(first, ResidentExperts(checkpoint).fetch(LAYER, 0))


def test_threads_get_the_right_weights(checkpoint):
    store, resident = paged(checkpoint, 3), ResidentExperts(checkpoint)
    wanted = [resident.fetch(LAYER, e) for e in range(8)]
    wrong = []

    def work(seed):
        gen = torch.Generator().manual_seed(seed)
        for expert in torch.randint(0, 8, (60,), generator=gen).tolist():
            if not is_same(store.fetch(LAYER, expert), wanted[expert]):
                wrong.append(expert)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.stats.hits + store.stats.misses == 240


def test_a_budget_too_small_for_a_token_is_refused_with_the_least(checkpoint):
    least = PagedExperts(checkpoint, 1 << 40).least_bytes
    PagedExperts(checkpoint, least)
    with pytest.raises(ConfigError, match=f"must be at least {least}: a token uses 2 experts"):
        PagedExperts(checkpoint, least - 1)


def test_an_unknown_expert_is_named(checkpoint):
    for store in (paged(checkpoint), ResidentExperts(checkpoint), DictExperts({})):
        with pytest.raises(CheckpointError, match=r"layers\.3\.ffn\.experts"):
            store.fetch(LAYER, 8)


def test_a_file_that_shrinks_is_an_error(tmp_path):
    random_checkpoint(tmp_path / "m", preset("v4-tiny"))
    checkpoint = Checkpoint.open(tmp_path / "m")
    store = paged(checkpoint)
    path = checkpoint.piece(f"{LAYER}.7.w3.weight").path
    with path.open("r+b") as file:
        file.truncate(1 << 18)
    with pytest.raises(CheckpointError, match="has become shorter"):
        store.fetch(LAYER, 7)


CHILD = """
import resource, sys, zlib
import torch
torch.set_num_threads(1)
from dspark.base_model.checkpoint import Checkpoint
from dspark.base_model.expert_store import PagedExperts
checkpoint = Checkpoint.open(sys.argv[1])
store = PagedExperts(checkpoint, int(sys.argv[2]))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + int(sys.argv[2]) + 56_000_000
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    torch.ones(120_000_000, dtype=torch.uint8)
    sys.exit("the limit does not bite")
except (RuntimeError, MemoryError):
    pass
crc = 0
for layer in range(5):
    for expert in range(checkpoint.config.n_routed_experts):
        weights = store.fetch(f"layers.{layer}.ffn.experts", expert)
        for w in (weights.w1, weights.w2, weights.w3):
            for t in (w.weight, w.scale):
                crc = zlib.crc32(t.flatten().view(torch.uint8).numpy().data, crc)
print(crc, store.stats.bytes_read)
"""


def peak() -> int:
    """The most memory that this process has had since the mark was last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(
    not (hasattr(ctypes.CDLL(None), "malloc_trim") and Path("/proc/self/clear_refs").exists()),
    reason="needs glibc and Linux's /proc",
)
def test_reading_all_experts_takes_no_more_memory_than_the_budget(tmp_path):
    config = replace(
        preset("v4-tiny"), hidden_size=512, moe_intermediate_size=512, n_routed_experts=20
    )
    random_checkpoint(tmp_path / "m", config, shard_bytes=20_000_000)
    store, budget = PagedExperts(Checkpoint.open(tmp_path / "m"), 4_000_000), 4_000_000
    # Memory that earlier tests freed could be taken again unnoticed.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark to what is in use now
    before = peak()
    for layer in range(5):
        for expert in range(20):
            store.fetch(f"layers.{layer}.ffn.experts", expert)
    assert store.stats.bytes_read > 10 * budget
    assert peak() - before < 3 * budget


@pytest.mark.slow  # starts a process that imports torch
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA covers such memory on Linux only")
def test_a_model_larger_than_memory_is_read_within_a_limit(tmp_path):
    config = replace(
        preset("v4-tiny"), hidden_size=1024, moe_intermediate_size=512, n_routed_experts=40
    )
    random_checkpoint(tmp_path / "m", config, shard_bytes=80_000_000)
    budget = 26_000_000
    run = [sys.executable, "-c", CHILD, str(tmp_path / "m"), str(budget)]
    # One arena: what malloc sets aside for other threads would count against the limit.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    ran = subprocess.run(run, check=False, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    out = ran.stdout
    resident, crc = ResidentExperts(Checkpoint.open(tmp_path / "m")), 0
    for layer in range(5):
        for expert in range(40):
            for part in content(resident.fetch(f"layers.{layer}.ffn.experts", expert)):
                crc = zlib.crc32(part.numpy().data, crc)
    read = int(out.split()[1])
    assert read > 6 * budget
    assert int(out.split()[0]) == crc
