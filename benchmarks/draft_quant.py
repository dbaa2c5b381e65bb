"""Weights of a draft module: time of `propose` and tau, stock layers against packed and int8.

    python benchmarks/draft_quant.py FOLDER [FOLDER ...] [--prompts SET] [--out FILE]

The target answers every prompt greedily, once, and gives the hidden states of prompt and answer.
Then rounds are replayed along each answer with every draft as torch runs it ("float"), packed
without rounding ("none") and rounded to int8, in turn: a drafted path counts as far as it is the
answer's own, as verification would find. Time is CPU time of the process, so that other work on
the machine does not count, or the clock's with --wall. tau is tokens per round; its ratio to float
has a 95 % interval from drawing prompts anew. Before that single layers are timed, stock and int8.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe, finish, ratio

import dspark
from dspark.adapters.fused.library import load_library
from dspark.adapters.fused.linear import PackedLinear
from dspark.draft.base import DraftContext, Drafter
from dspark.eval.prompts import OWN, load_prompts
from dspark.folders import cache_root
from dspark.loading import build_drafter
from dspark.models import resolve_model
from dspark.registry import LoadedTarget, LoadOptions
from dspark.request import Rule
from dspark.target import BatchPart, Target, TokenBatch
from dspark.tree import DraftTree
from dspark.verify.noise import NoiseKey

LAYERS = ((256, 512), (384, 512), (512, 512), (576, 1536))
"""Outputs and inputs of single layers."""

KINDS = {"float": ("none", "plain"), "none": ("none", "fused"), "int8": ("int8", "auto")}
DRAWS = 2000


@dataclass(frozen=True)
class Answer:
    """A prompt with its answer, and the target's hidden states there: {layer: [n, D]}."""

    tokens: list[int]
    prompt_length: int
    hidden: dict[int, torch.Tensor]


def questions(source: str, count: int) -> list[str]:
    """First turns of a prompt set, spread over it."""
    texts = [question.turns[0] for question in load_prompts(source).questions]
    return texts[:: max(1, len(texts) // count)][:count]


def answers(
    engine: dspark.Engine, texts: list[str], tokens: int, layers: tuple[int, ...]
) -> list[Answer]:
    """Greedy answers of the target, and the hidden states of these layers."""
    codec = engine.codec
    if codec is None:
        raise SystemExit("the target has no tokenizer")
    prompts = [codec.encode_chat([{"role": "user", "content": text}]) for text in texts]
    results = engine.generate(prompts, dspark.SamplingParams(max_tokens=tokens))
    return [
        Answer([*prompt, *result.token_ids], len(prompt), captured(engine.target, whole, layers))
        for prompt, result in zip(prompts, results, strict=True)
        for whole in [[*prompt, *result.token_ids]]
    ]


def captured(target: Target, tokens: list[int], layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Hidden states of a text."""
    cache = target.new_cache()
    slot, _ = cache.open(tokens)
    cache.reserve(slot, len(tokens))
    batch = TokenBatch.build([BatchPart.chain(slot, tokens, 0, want_last=True)])
    return dict(target.forward(batch, cache, capture=layers).hidden)


def accepted(tree: DraftTree, tokens: list[int]) -> int:
    """Length of the longest path that is the beginning of a text."""
    node, depth = -1, 0
    while depth < len(tokens):
        children = tree.children_of(node)
        match = next((int(c) for c in children if int(tree.token[c]) == tokens[depth]), None)
        if match is None:
            break
        node, depth = match, depth + 1
    return depth


def replay(
    drafter: Drafter, answer: Answer, budget: int, clock: Callable[[], float]
) -> tuple[int, int, float]:
    """Tokens, rounds and mean seconds of a call; the first, which reads the prompt, left out."""
    position, seen, seconds = answer.prompt_length + 1, 0, []
    while position < len(answer.tokens):
        context = DraftContext(
            request_id=0,
            tokens=answer.tokens[:position],
            prompt_length=answer.prompt_length,
            params=dspark.SamplingParams(),
            rule=Rule.GREEDY,
            noise=NoiseKey(0),
            round=1 + len(seconds),
            budget=budget,
            depth=8,
            features={k: answer.hidden[k][seen : position - 1] for k in drafter.capture},
        )
        start = clock()
        proposal = drafter.propose([context])[0]
        seconds.append(clock() - start)
        seen = position - 1
        position += 1 + accepted(proposal.tree, answer.tokens[position:])
    drafter.release(0)
    tokens = len(answer.tokens) - answer.prompt_length - 1
    return tokens, len(seconds), float(np.mean(seconds[1:]))


def tau_ratio(own: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Ratio of tau to another, [prompts, (tokens, rounds)], 95 % interval over prompts."""
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(own), (DRAWS, len(own)))

    def tau(counts: np.ndarray) -> Any:
        return counts[..., 0].sum(-1) / counts[..., 1].sum(-1)

    low, high = np.quantile(tau(own[picked]) / tau(base[picked]), [0.025, 0.975])
    whole = float(tau(own) / tau(base))
    return {"ratio": round(whole, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def compare(
    drafters: dict[str, Drafter], texts: list[Answer], budget: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Time and tau by kind of weights."""
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in drafters}
    seconds: dict[str, list[float]] = {name: [] for name in drafters}
    for number, answer in enumerate(texts, 1):
        for name, drafter in drafters.items():
            tokens, rounds, mean = replay(drafter, answer, budget, clock)
            counts[name].append((tokens, rounds))
            seconds[name].append(mean)
        if number % 6 == 0:
            print(f"prompt {number} of {len(texts)}", file=sys.stderr, flush=True)
    found = {}
    base = np.array(counts["float"])
    for name in drafters:
        own = np.array(counts[name])
        found[name] = {
            "weights": getattr(drafters[name], "weights", ""),
            "propose ms": round(1e3 * float(np.median(seconds[name])), 2),
            "times as fast as float": ratio(seconds["float"], seconds[name]),
            "tau": round(float(own[:, 0].sum() / own[:, 1].sum()), 4),
            "tau against float": tau_ratio(own, base),
        }
        print(name, found[name], file=sys.stderr, flush=True)
    return {"tokens": int(base[:, 0].sum()), **found}


def layer_microseconds(turns: int = 400) -> dict[str, dict[str, float]]:
    """Median CPU time of one layer by rows, stock float32 and int8 in turns."""
    library, found = load_library(cache_root() / "kernels"), {}
    for outputs, inputs in LAYERS:
        stock = torch.nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        layers = {"float": stock, "int8": PackedLinear(stock, library, "int8")}
        for rows in (1, 5):
            x = torch.randn(rows, inputs)
            times: dict[str, list[float]] = {name: [] for name in layers}
            for _ in range(turns):
                for name, layer in layers.items():
                    start = time.process_time()
                    layer(x)
                    times[name].append(1e6 * (time.process_time() - start))
            medians = {name: round(float(np.median(own)), 1) for name, own in times.items()}
            found[f"{outputs} x {inputs}, {rows} rows"] = medians
    return found


def main() -> None:
    """Load the drafts in each kind of weights and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drafts", nargs="+", metavar="FOLDER")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--prompts", default=OWN, help="as for `dspark eval --prompts`")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--budget", type=int, default=15, help="nodes of a tree")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS)[1:], default=list(KINDS)[1:])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="seconds of the clock")
    parser.add_argument("--out")
    args = parser.parse_args()
    engine = dspark.Engine.load(args.target, "none", threads=args.threads)
    layers_us = layer_microseconds()
    print(layers_us, file=sys.stderr, flush=True)
    loaded = LoadedTarget(
        target=engine.target, codec=engine.codec, folder=Path(resolve_model(args.target))
    )
    every: dict[str, dict[str, Drafter]] = {}
    for folder in args.drafts:
        every[Path(folder).name] = {
            name: build_drafter(
                folder, loaded, LoadOptions(name=args.target, draft_quant=quant, path=path)
            )
            for name, (quant, path) in KINDS.items()
            if name in ("float", *args.kinds)
        }
    drafters = [drafter for kinds in every.values() for drafter in kinds.values()]
    layers = tuple(sorted({layer for drafter in drafters for layer in drafter.capture}))
    texts = answers(engine, questions(args.prompts, args.questions), args.tokens, layers)
    print("answers are there", file=sys.stderr, flush=True)
    clock = time.perf_counter if args.wall else time.process_time
    found = {name: compare(kinds, texts, args.budget, clock) for name, kinds in every.items()}
    facts = {**describe(), "threads": torch.get_num_threads(), "questions": len(texts)}
    finish({**facts, "layers, us": layers_us, "drafts": found}, args.out)


if __name__ == "__main__":
    main()
