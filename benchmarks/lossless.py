"""Is speculative output the output of plain decoding? Token by token, over a pairwise design.

    python benchmarks/lossless.py [--out docs/reports/lossless.jsonl] [--cells 3] [--prompts 20]

Every cell runs real prompts through one combination of model, dtype, drafter, tree shape, batch
size and sampling in exact mode, and compares the token ids with those of plain decoding under the
same seeds. The cells cover every pair of settings of two factors. Finished cells are appended to
--out and skipped when the script runs again, so it can be interrupted. Exit status 3 if any token
differs; the last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import code_version, describe
from prompts import FREE, LONG_TEXTS, REPEATING
from transformers import AutoModelForCausalLM

import dspark
from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.draft.combined import CombinedDrafter
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.models import cache_root, resolve_model
from dspark.registry import LoadedTarget, LoadOptions, load_target

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("smollm2-135m", "gemma3-270m"),
    "dtype": ("float32", "bfloat16"),
    "draft": ("none", "lookup", "model", "lookup+model"),
    "shape": ("chain", "budget 1", "budget 7", "budget 15", "budget 31"),
    "batch": (16, 4, 1),
    "sampling": ("T0", "T0.7", "T1", "T0.7 top-k 50 top-p 0.9", "T1 top-k 50 top-p 0.9"),
}
SAMPLING: dict[str, dict[str, Any]] = {
    "T0": {},
    "T0.7": {"temperature": 0.7},
    "T1": {"temperature": 1.0},
    "T0.7 top-k 50 top-p 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "T1 top-k 50 top-p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
}
SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"width": 1, "tree_budget": 7, "depth": 7},
    **{f"budget {n}": {"tree_budget": n} for n in (1, 7, 15, 31)},
}
KEPT_LAYERS = {"smollm2-135m": 10, "gemma3-270m": 6}
"""Layers of the truncated copy that drafts."""


def pairwise(seed: int = 0) -> list[dict[str, Any]]:
    """Cells that hold every pair of settings of every two factors, greedily few."""
    names = list(FACTORS)
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in FACTORS[a]
        for y in FACTORS[b]
    }
    rng = random.Random(seed)  # noqa: S311 - a design, not a secret
    cells = []
    while wanted:
        best, gain = None, -1
        for _ in range(200):
            cell = {name: rng.choice(FACTORS[name]) for name in names}
            pairs = set(itertools.combinations(cell.items(), 2))
            if len(pairs & wanted) > gain:
                best, gain = cell, len(pairs & wanted)
        cells.append(best)
        wanted -= set(itertools.combinations(best.items(), 2))
    return sorted(cells, key=_cost)


def _cost(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key: cheap cells first, so that an interrupted run has covered the most."""
    drafts = FACTORS["draft"].index(cell["draft"]) > 1
    return (drafts + (cell["batch"] == 1), cell["dtype"] == "bfloat16", cell["model"], str(cell))


@cache
def target(model: str, dtype: str) -> LoadedTarget:
    """The model in exact mode; only the last one stays in memory."""
    folder = resolve_model(model)
    options = LoadOptions(name=model, dtype=dtype, exact=True, probe_folder=cache_root() / "probes")
    return load_target(folder, options)


@cache
def truncated(model: str, dtype: str) -> ModelDrafter:
    """A copy of the target without its last layers, as a draft model."""
    stock = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=getattr(torch, dtype))
    decoder = stock.get_decoder()
    decoder.layers = decoder.layers[: KEPT_LAYERS[model]]
    stock.config.num_hidden_layers = KEPT_LAYERS[model]
    wrapped = wrap_model(
        stock,
        adapter_for(stock.config.model_type),
        LoadOptions(name=f"{model}, {KEPT_LAYERS[model]} layers", exact=False),
    )
    return ModelDrafter(wrapped, vocab_size=wrapped.info.vocab_size)


def drafter(name: str, model: str, dtype: str) -> Any:
    """The drafter of a cell."""
    if name == "none":
        return None
    if name == "lookup":
        return LookupDrafter()
    if name == "model":
        return truncated(model, dtype)
    return CombinedDrafter(LookupDrafter(), truncated(model, dtype))


def prompt_ids(model: str, dtype: str, count: int) -> list[list[int]]:
    """Prompts of a model; at least 4 of every 20 are longer than Gemma's window of 512."""
    codec = target(model, dtype).codec
    texts = [*REPEATING, *FREE, *LONG_TEXTS[:4]]
    texts = [texts[(i * 7) % len(texts)] for i in range(len(texts))][:count]
    if codec.has_chat_template:
        return [codec.encode_chat([{"role": "user", "content": text}]) for text in texts]
    return [codec.encode(text) for text in texts]


def run(
    cell: dict[str, Any], prompts: list[list[int]], tokens: int
) -> list[dspark.GenerationResult]:
    """Run a cell; every prompt has a seed of its own."""
    config = dspark.EngineConfig(max_batch=cell["batch"], auto_off=False)
    loaded = target(cell["model"], cell["dtype"])
    draft = drafter(cell["draft"], cell["model"], cell["dtype"])
    engine = dspark.Engine(loaded.target, drafter=draft, codec=loaded.codec, config=config)
    base = dspark.SamplingParams(
        max_tokens=tokens, ignore_eos=True, **SAMPLING[cell["sampling"]], **SHAPES[cell["shape"]]
    )
    if "model" in cell["draft"]:  # every level of the tree is a forward of the draft
        base = replace(base, depth=4)
    return engine.generate(prompts, [replace(base, seed=i) for i in range(len(prompts))])


def reference(
    cell: dict[str, Any], prompts: list[list[int]], tokens: int, folder: Path
) -> list[list[int]]:
    """Plain decoding's tokens, kept on disk."""
    plain = {**cell, "draft": "none", "batch": 16, "shape": "budget 1"}
    name = "-".join(str(plain[k]) for k in ("model", "dtype", "sampling")).replace(" ", "_")
    # Other code may round differently, and so may another number of threads.
    folder = folder / f"{code_version()}-{torch.get_num_threads()}"
    path = folder / f"{name}-{len(prompts)}x{tokens}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        ids = [r.token_ids for r in run(plain, prompts, tokens)]
        path.write_text(json.dumps(ids))
    return json.loads(path.read_text())


def measure(cell: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Compare one cell with plain decoding."""
    if cell["model"] != measure.model or cell["dtype"] != measure.dtype:  # type: ignore[attr-defined]
        target.cache_clear()
        truncated.cache_clear()
        measure.model, measure.dtype = cell["model"], cell["dtype"]  # type: ignore[attr-defined]
    prompts = prompt_ids(cell["model"], cell["dtype"], args.prompts)
    expected = reference(cell, prompts, args.tokens, cache_root() / "benchmarks" / "lossless")
    start = time.perf_counter()
    results = run(cell, prompts, args.tokens)
    seconds = time.perf_counter() - start
    first = []
    for index, (result, ids) in enumerate(zip(results, expected, strict=True)):
        if result.token_ids != ids:
            pairs = zip(result.token_ids, ids, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            first.append({"prompt": index, "token": at})
    rounds = sum(r.stats.rounds for r in results)
    return {
        **cell,
        "prompts": len(prompts),
        "longest prompt": max(map(len, prompts)),
        "tokens": sum(len(r.token_ids) for r in results),
        "mismatching prompts": len(first),
        "first differences": first,
        "accepted": sum(r.stats.accepted for r in results),
        "rejected": sum(r.stats.verified - r.stats.accepted for r in results),
        "tau": round(sum(r.stats.committed for r in results) / rounds, 3),
        "seconds": round(seconds, 1),
        "exact": target(cell["model"], cell["dtype"]).target.exactness.reason,
        "run": describe(),
    }


measure.model = measure.dtype = None  # type: ignore[attr-defined]


def main() -> None:
    """Run the cells that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/reports/lossless.jsonl")
    parser.add_argument("--cells", type=int, help="cells to run now at the most")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--model", help="only cells of this model")
    parser.add_argument("--dtype", help="only cells of this dtype")
    args = parser.parse_args()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text().splitlines() if out.exists() else []
    done = [json.loads(line) for line in lines]
    names = list(FACTORS)
    finished = {tuple(record[name] for name in names) for record in done}
    cells = pairwise()
    print(f"{len(cells)} cells, {len(finished)} done", file=sys.stderr)
    todo = [c for c in cells if tuple(c[name] for name in names) not in finished]
    todo = [c for c in todo if args.model in (None, c["model"])]
    todo = [c for c in todo if args.dtype in (None, c["dtype"])]
    for cell in todo[: args.cells]:
        record = measure(cell, args)
        done.append(record)
        with out.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        shown = {k: record[k] for k in (*names, "mismatching prompts", "tau", "seconds")}
        print(json.dumps(shown), file=sys.stderr)
    mismatches = sum(record["mismatching prompts"] for record in done)
    print(
        json.dumps(
            {
                "cells": len(cells),
                "done": len(done),
                "tokens": sum(r["tokens"] for r in done),
                "rejected nodes": sum(r["rejected"] for r in done),
                "mismatching prompts": mismatches,
            }
        )
    )
    sys.exit(3 if mismatches else 0)


if __name__ == "__main__":
    main()
