"""Plain decoding against transformers.generate, lookup against plain: interleaved, ratios, spread.

    python benchmarks/speed.py [--dtype float32] [--tokens 64] [--repeats 5] [--prompts 4]

All runs of a turn follow each other in one process, so that a noisy machine slows all of them.
`transformers.generate` runs a stock model of its own (its linear layers are torch's). Ratios are
taken turn by turn. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from common import ALIAS, Stock, describe, finish, forget_prompts, interleave, ratio
from prompts import FREE, REPEATING

import dspark


def run_stock(stock: Stock, prompts: list[list[int]], tokens: int, **options: Any) -> float:
    """Tokens per second of one batch of transformers.generate."""
    seconds, texts = stock.run(prompts, tokens, min_new_tokens=tokens, **options)
    return sum(len(text) for text in texts) / seconds


def run_engine(
    engine: dspark.Engine, prompts: list[list[int]], params: dspark.SamplingParams
) -> tuple[float, list[dspark.GenerationResult]]:
    """Tokens per second of one batch, and its results."""
    forget_prompts(engine)
    start = time.perf_counter()
    results = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    return sum(len(r.token_ids) for r in results) / seconds, results


def one_by_one(
    engine: dspark.Engine, prompts: list[list[int]], params: dspark.SamplingParams, log: list[Any]
) -> float:
    """Tokens per second over prompts run one after another."""
    tokens, seconds = 0, 0.0
    for prompt in prompts:
        forget_prompts(engine)
        start = time.perf_counter()
        (result,) = engine.generate([prompt], params)
        seconds += time.perf_counter() - start
        tokens += len(result.token_ids)
        log.append(result)
    return tokens / seconds


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each kind run singly")
    parser.add_argument("--out")
    args = parser.parse_args()

    stock = Stock(args.dtype)
    plain = dspark.Engine.load(target=ALIAS, draft="none", dtype=args.dtype)
    lookup = dspark.Engine(
        plain.target, drafter=dspark.Engine.load(target=ALIAS, draft="lookup").drafter
    )
    codec = plain.codec
    free = [codec.encode_chat([{"role": "user", "content": text}]) for text in FREE]
    repeating = [codec.encode_chat([{"role": "user", "content": text}]) for text in REPEATING]
    fixed = dspark.SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    single, repeating = free[: args.prompts], repeating[: args.prompts]
    natural = dspark.SamplingParams(max_tokens=2 * args.tokens)
    logs: dict[str, list[Any]] = {"repeating": [], "free": [], "plain": [], "batch": []}

    def batch_8() -> float:
        speed, results = run_engine(plain, free, fixed)
        logs["batch"].extend(results)
        return speed

    figures = interleave(
        {
            "generate, batch 1": lambda: run_stock(stock, free[:1], args.tokens),
            "plain, batch 1": lambda: run_engine(plain, free[:1], fixed)[0],
            "generate lookup, batch 1": lambda: run_stock(
                stock, repeating[:1], args.tokens, prompt_lookup_num_tokens=10
            ),
            "generate, batch 8": lambda: run_stock(stock, free, args.tokens),
            "plain, batch 8": batch_8,
            "plain, repeating": lambda: one_by_one(plain, repeating, natural, logs["plain"]),
            "lookup, repeating": lambda: one_by_one(lookup, repeating, natural, logs["repeating"]),
            "plain, free": lambda: one_by_one(plain, single, natural, []),
            "lookup, free": lambda: one_by_one(lookup, single, natural, logs["free"]),
        },
        args.repeats,
    )
    report = {
        "schema": 1,
        "run": describe(),
        "target": plain.target.info.name,
        "dtype": plain.target.info.dtype,
        "exact": plain.target.exactness.reason,
        "tokens_per_second": {k: [round(x, 1) for x in v] for k, v in figures.items()},
        "plain / generate, batch 1": ratio(figures["plain, batch 1"], figures["generate, batch 1"]),
        "plain / generate, batch 8": ratio(figures["plain, batch 8"], figures["generate, batch 8"]),
        "lookup / plain, repeating": ratio(
            figures["lookup, repeating"], figures["plain, repeating"]
        ),
        "lookup / plain, free": ratio(figures["lookup, free"], figures["plain, free"]),
        "same text": same_text(logs["plain"], logs["repeating"]),
        "tau, repeating": tau(logs["repeating"]),
        "tau, free": tau(logs["free"]),
        "round share outside target and drafter": {
            "plain, batch 1": outside(logs["plain"]),
            "lookup, batch 1": outside(logs["repeating"]),
            "plain, batch 8": outside(logs["batch"]),
        },
    }
    finish(report, args.out)


def same_text(plain: list[Any], drafted: list[Any]) -> bool:
    """True if every drafted answer has the tokens of the plain one."""
    pairs = zip(plain, drafted, strict=True)
    return all(a.token_ids == b.token_ids for a, b in pairs)


def tau(results: list[Any]) -> float:
    """Committed tokens per round over all results."""
    rounds = sum(r.stats.rounds for r in results)
    return round(sum(r.stats.committed for r in results) / rounds, 3)


def outside(results: list[Any]) -> float:
    """Share of the rounds' time outside target and drafter forwards."""
    rest = sum(r.stats.seconds_rest for r in results)
    inside = sum(r.stats.seconds_verify + r.stats.seconds_draft for r in results)
    return round(rest / (rest + inside), 4)


if __name__ == "__main__":
    main()
