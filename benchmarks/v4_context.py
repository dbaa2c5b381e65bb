"""What a decoded token costs as the context grows: DeepSeek-V4 against a dense-attention twin.

    python benchmarks/v4_context.py [--lengths 1024,4096,16384,65536] [--repeats 5] [--out FILE]

Both models are small, random and alike but for attention: hidden size, layers, heads, size of a
head, vocabulary, and as many numbers in the feed-forward part as a token goes through in V4's
experts. The twin is transformers' Llama behind our own adapter, not a V4 configuration with a
window as long as the context: our V4 gathers the rows that each query sees, which no dense model
would do, so such a twin would lose by its kernels and not by its design. It has ONE key/value head,
the smallest cache that dense attention over all tokens can have with heads of this size; a twin
with a key/value head per query head would hold four times as much.

The contexts are really prefilled, in the engine's chunks, each going on from the one before it. A
step is one row behind a context, taken back afterwards, so that every step sees the same. A turn
takes the median of `--steps` steps of both models at all lengths, so that noise that comes and goes
is common to them; growth is worked out turn by turn. K/V bytes are what the V4 cache says it holds,
and must equal what `dspark plan` computes. "work" is plan's count of FLOPs for one token: what the
design lets the cost grow by. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from common import describe, finish, interleave, ratio
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.adapters.hf.load import wrap_model
from dspark.adapters.llama import ADAPTER
from dspark.base_model.cache import V4Cache
from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import DictExperts
from dspark.base_model.model import V4Model
from dspark.base_model.plan import cache_bytes
from dspark.base_model.plan_v4 import v4_flops
from dspark.base_model.presets import preset
from dspark.base_model.random_weights import random_tensors
from dspark.base_model.target import V4Target
from dspark.base_model.weights import DictSource
from dspark.cache import Cache
from dspark.registry import LoadOptions
from dspark.target import BatchPart, Target, TokenBatch

CONFIG: V4Config = replace(
    preset("v4-tiny"),
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    head_dim=64,
    q_lora_rank=128,
    o_lora_rank=64,
    compress_ratios=(0, 0, 4, 128, 4, 128),
    sliding_window=128,
    rope_factor=16.0,
    rope_original=8192,
    max_position_embeddings=1 << 17,
    index_n_heads=8,
    index_head_dim=64,
    index_topk=512,
    moe_intermediate_size=128,
    num_hash_layers=1,
)
CHUNK = 512


class Run:
    """A target with contexts of several lengths, each in a slot of its own.

    Args:
        target: The target.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.cache = target.new_cache()
        self.slots: dict[int, int] = {}
        self.prefill_seconds: dict[int, float] = {}

    def forward(self, slot: int, tokens: list[int]) -> None:
        """Run tokens behind a context, the last one's logits wanted."""
        self.cache.reserve(slot, len(tokens))
        part = BatchPart.chain(slot, tokens, self.cache.length(slot), want_last=True)
        self.target.forward(TokenBatch.build([part]), self.cache)

    def fill(self, text: list[int]) -> None:
        """Prefill a context, from the longest one that begins it."""
        slot, done = self.cache.open(text)
        self.slots[len(text)] = slot
        start = time.perf_counter()
        for a in range(done, len(text), CHUNK):
            chunk = text[a : a + CHUNK]
            self.forward(slot, chunk)
            self.cache.commit(slot, range(len(chunk)))
        seconds = time.perf_counter() - start
        self.prefill_seconds[len(text)] = round(seconds, 1)
        print(f"{self.target.info.name}: {done} to {len(text)}, {seconds:.1f} s", file=sys.stderr)

    def step(self, tokens: int, steps: int) -> float:
        """Median seconds of one-row steps behind a context, each taken back."""
        slot, seconds = self.slots[tokens], []
        for i in range(steps):
            start = time.perf_counter()
            self.forward(slot, [i])
            self.cache.commit(slot, [])
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


def build_v4(dtype: torch.dtype) -> V4Target:
    """The V4 model."""
    tensors = dict(random_tensors(CONFIG, quantised=False))
    model = V4Model(CONFIG, DictSource(tensors), DictExperts(tensors), dtype=dtype)
    return V4Target(model, name="v4", eos_token_ids=[])


def build_twin(dtype: torch.dtype) -> Target:
    """Dense attention, everything else as near as Llama comes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=(CONFIG.num_experts_per_tok + 1) * CONFIG.moe_intermediate_size,
        num_hidden_layers=CONFIG.num_hidden_layers,
        num_attention_heads=CONFIG.num_attention_heads,
        num_key_value_heads=1,
        head_dim=CONFIG.head_dim,
        max_position_embeddings=CONFIG.max_position_embeddings,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    return wrap_model(model, ADAPTER, LoadOptions(name="dense", exact=False))


def dense_bytes(tokens: int, element: int) -> int:
    """K/V of the twin: a key and a value a layer and token."""
    return 2 * CONFIG.num_hidden_layers * CONFIG.head_dim * element * tokens


def check_bytes(cache: Cache, slot: int, tokens: int, element: int) -> int:
    """K/V bytes that the cache holds; the benchmark ends here if plan says otherwise."""
    if not isinstance(cache, V4Cache):
        raise TypeError(cache)
    held, planned = cache.state_bytes(slot), cache_bytes(CONFIG, tokens, element).total
    if held != planned:
        raise SystemExit(f"the cache holds {held} bytes at {tokens} tokens, plan says {planned}")
    return held


def work(tokens: int) -> int:
    """Plan's FLOPs for the token behind a context."""
    return sum(term.flops for term in v4_flops(CONFIG, tokens + 1))


def report_lengths(
    v4: Run, twin: Run, figures: dict[str, list[float]], element: int
) -> list[dict[str, Any]]:
    """Bytes and times at every length, and what they grew by since the first one."""
    rows: list[dict[str, Any]] = []
    first = min(v4.slots)
    for tokens, slot in sorted(v4.slots.items()):
        ours, dense = figures[f"v4 {tokens}"], figures[f"dense {tokens}"]
        held = check_bytes(v4.cache, slot, tokens, element)
        rows.append(
            {
                "tokens": tokens,
                "v4 step, ms": [round(1e3 * x, 2) for x in ours],
                "dense step, ms": [round(1e3 * x, 2) for x in dense],
                "dense / v4, time": ratio(dense, ours),
                "v4 time over the first length": ratio(ours, figures[f"v4 {first}"]),
                "dense time over the first length": ratio(dense, figures[f"dense {first}"]),
                "v4 work, FLOPs": work(tokens),
                "v4 work over the first length": round(work(tokens) / work(first), 2),
                "v4 K/V bytes": held,
                "planned K/V bytes": cache_bytes(CONFIG, tokens, element).total,
                "v4 K/V bytes a token": round(held / tokens, 1),
                "dense K/V bytes": dense_bytes(tokens, element),
                "dense / v4, bytes": round(dense_bytes(tokens, element) / held, 2),
            }
        )
    return rows


def main() -> None:
    """Fill all contexts, then measure them in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,4096,16384,65536")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    v4, twin = Run(build_v4(dtype)), Run(build_twin(dtype))
    lengths = sorted(int(n) for n in args.lengths.split(","))
    text = np.random.default_rng(0).integers(0, CONFIG.vocab_size, lengths[-1]).tolist()
    for tokens in lengths:
        for run in (v4, twin):
            run.fill(text[:tokens])
    runs = {
        f"{name} {tokens}": partial(run.step, tokens, args.steps)
        for tokens in lengths
        for name, run in (("v4", v4), ("dense", twin))
    }
    figures = interleave(runs, args.repeats)
    report = {
        "schema": 1,
        "run": describe(),
        "note": "a shared, noisy machine: trust ratios, not single times",
        "dtype": args.dtype,
        "v4": CONFIG.to_official(),
        "twin": "llama, 1 key/value head, feed-forward as wide as the active experts",
        "lengths": report_lengths(v4, twin, figures, dtype.itemsize),
        "prefill seconds, from the length before": {
            "v4": v4.prefill_seconds,
            "dense": twin.prefill_seconds,
        },
    }
    finish(report, args.out)


if __name__ == "__main__":
    main()
