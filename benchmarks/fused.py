"""A step on the plain and on the fused path by rows, against transformers.generate and the floor.

    python benchmarks/fused.py [--dtype float32] [--threads 2] [--turns 7] [--out FILE]

Everything of a turn follows each other in one process, so that a noisy machine slows all of it; the
table shows medians over turns, ratios are taken turn by turn. `transformers.generate` runs a stock
model, greedy, batch 1. "of memory" is what a step reads over what the machine reads in that time in
the same turn. With one thread and --cpu-time, a busy machine can be used: the clock then counts
this process only. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import ALIAS, describe, finish, forget_prompts, milliseconds, ratio
from prompts import FREE
from transformers import AutoModelForCausalLM

import dspark
from dspark.adapters.fused.target import FusedTarget
from dspark.models import cache_root, resolve_model
from dspark.registry import LoadedTarget, LoadOptions, load_target
from dspark.target import BatchPart, Target, TokenBatch

STOCK = "transformers.generate"
ROWS = (1, 2, 4, 8, 16, 32)


@dataclass
class Steps:
    """Steps of a target behind a context, all of them thrown away again."""

    target: Target
    context: list[int]
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.cache = self.target.new_cache()
        self.slot, _ = self.cache.open(self.context)
        self.cache.reserve(self.slot, len(self.context))
        prompt = BatchPart.chain(self.slot, self.context, 0, want_last=False)
        self.target.forward(TokenBatch.build([prompt]), self.cache)
        self.cache.commit(self.slot, range(len(self.context)))

    def seconds(self, rows: int, repeats: int = 3) -> float:
        """Least seconds of a step of one anchor and a binary tree."""
        parent = [(row - 1) // 2 if row else -1 for row in range(rows)]
        positions = [len(self.context) + (row + 1).bit_length() - 1 for row in range(rows)]
        tokens = self.context[:rows]
        part = BatchPart(self.slot, tokens, positions, parent, range(rows))
        times = []
        for _ in range(repeats):
            start = self.clock()
            self.cache.reserve(self.slot, rows)
            self.target.forward(TokenBatch.build([part]), self.cache)
            times.append(self.clock() - start)
        return min(times)


def load(dtype: str, path: str, *, exact: bool | None, quant: str = "none") -> LoadedTarget:
    """The model on one path."""
    options = LoadOptions(
        name=ALIAS,
        dtype=dtype,
        path=path,
        exact=exact,
        quant=quant,
        probe_folder=cache_root() / "probes",
    )
    return load_target(resolve_model(ALIAS), options)


def generate_seconds(model: Any, prompt: list[int], tokens: int, clock: Any) -> float:
    """Seconds a token of transformers.generate, its prefill included."""
    ids = torch.tensor([prompt])
    start = clock()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=2,
        )
    return (clock() - start) / tokens


def decode_seconds(engine: dspark.Engine, prompt: list[int], tokens: int, clock: Any) -> float:
    """Seconds a token of our plain decoding, its prefill included."""
    forget_prompts(engine)
    start = clock()
    engine.generate([prompt], dspark.SamplingParams(max_tokens=tokens, ignore_eos=True))
    return (clock() - start) / tokens


def bandwidth(block: torch.Tensor, clock: Any) -> float:
    """Bytes that are read in a second."""
    start = clock()
    block.sum()
    return block.nbytes / (clock() - start)


def texts(target: Target, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy texts."""
    params = dspark.SamplingParams(max_tokens=tokens, ignore_eos=True)
    return [r.token_ids for r in dspark.Engine(target).generate(prompts, params)]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--cpu-time", action="store_true", help="with one thread: count CPU time")
    parser.add_argument("--out")
    return parser.parse_args()


@dataclass
class Figures:
    """Seconds by turn.

    Attributes:
        decode: A token, by who decodes.
        steps: A step, by path and rows.
        memory: Bytes that memory gives in a second.
    """

    decode: dict[str, list[float]]
    steps: dict[str, dict[int, list[float]]]
    memory: list[float]


def measure(
    stock: Any, loaded: dict[str, LoadedTarget], prompt: list[int], args: argparse.Namespace
) -> Figures:
    """All turns, after one that warms up."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    context = np.random.default_rng(0).integers(3, 40_000, args.context).tolist()
    runs = {name: Steps(model.target, context, clock) for name, model in loaded.items()}
    engines = {name: dspark.Engine(loaded[name].target) for name in ("plain", "fused")}
    figures = Figures(
        {name: [] for name in (STOCK, *engines)}, {n: {r: [] for r in ROWS} for n in runs}, []
    )
    block = torch.ones(2**26)
    for turn in range(args.turns + 1):
        decode = {STOCK: generate_seconds(stock, prompt, args.tokens, clock)}
        for name, engine in engines.items():
            decode[name] = decode_seconds(engine, prompt, args.tokens, clock)
        steps = {(n, r): runs[n].seconds(r) for r in ROWS for n in runs}
        read = max(bandwidth(block, clock) for _ in range(3))
        if turn == 0:
            continue
        figures.memory.append(read)
        for name, value in decode.items():
            figures.decode[name].append(value)
        for (name, rows), value in steps.items():
            figures.steps[name][rows].append(value)
    return figures


def main() -> None:
    """Measure and print the table."""
    args = arguments()
    torch.set_num_threads(args.threads)
    stock: Any = AutoModelForCausalLM.from_pretrained(
        resolve_model(ALIAS), dtype=getattr(torch, args.dtype)
    ).eval()
    loaded = {
        "plain": load(args.dtype, "plain", exact=True),
        "plain, not exact": load(args.dtype, "plain", exact=False),
        "fused": load(args.dtype, "fused", exact=True),
    }
    plain, fused = loaded["plain"].target, loaded["fused"].target
    codec = loaded["fused"].codec
    if not isinstance(fused, FusedTarget) or codec is None:
        raise SystemExit("the fused path was not taken")
    prompts = [codec.encode_chat([{"role": "user", "content": text}]) for text in FREE[:4]]
    pairs = zip(texts(plain, prompts, 64), texts(fused, prompts, 64), strict=True)
    same = [a == b for a, b in pairs]
    figures = measure(stock, loaded, prompts[0], args)
    weights = sum(p.numel() for p in stock.parameters())  # the head is the embedding
    width = 4 if args.dtype == "float32" or "f32" in plain.exactness.backend else 2
    sizes = dict.fromkeys(loaded, weights * width) | {"fused": fused.decoder.bytes_read}
    print_table(figures, sizes)
    decode, steps = figures.decode, figures.steps
    report = {
        "schema": 1,
        "run": describe(),
        "target": ALIAS,
        "dtype": args.dtype,
        "clock": "cpu" if args.cpu_time else "wall",
        "backend": {name: model.target.exactness.backend for name, model in loaded.items()},
        "same greedy texts": f"{sum(same)} of {len(same)}, 64 tokens each",
        "memory GB/s": round(statistics.median(figures.memory) / 1e9, 1),
        "ms": {n: {r: milliseconds(t) for r, t in found.items()} for n, found in steps.items()},
        "ms a token": {name: milliseconds(times) for name, times in decode.items()},
        "generate / decode": {n: ratio(decode[STOCK], decode[n]) for n in ("plain", "fused")},
        "generate / step of one row": {n: ratio(decode[STOCK], steps[n][1]) for n in loaded},
        "16 rows / 1": {name: ratio(steps[name][16], steps[name][1]) for name in loaded},
        "exact / not, plain path": ratio(steps["plain"][1], steps["plain, not exact"][1]),
    }
    finish(report, args.out)


def print_table(figures: Figures, sizes: dict[str, int]) -> None:
    """Path by rows: ms, ratio to generate, GB/s, share of what memory gives."""
    generate, memory = figures.decode[STOCK], figures.memory
    print(f"memory read: {statistics.median(memory) / 1e9:.1f} GB/s")
    for name, times in figures.decode.items():
        gain = ratio(generate, times)["median"]
        label = f"decoding, {name}"
        print(
            f"{label:34s} {1e3 * statistics.median(times):7.1f} ms a token {gain:6.2f} x generate"
        )
    print(f"{'path':18s} rows      ms  x generate  of 1 row    GB/s  of memory")
    for name, by_rows in figures.steps.items():
        for rows, times in by_rows.items():
            middle = statistics.median(times)
            shares = [sizes[name] / t / m for t, m in zip(times, memory, strict=True)]
            gain, more = ratio(generate, times)["median"], ratio(times, by_rows[1])["median"]
            print(
                f"{name:18s} {rows:4d} {1e3 * middle:7.1f} {gain:11.2f} {more:9.2f} "
                f"{sizes[name] / middle / 1e9:7.1f} {100 * statistics.median(shares):8.0f} %"
            )


if __name__ == "__main__":
    main()
