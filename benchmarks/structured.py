"""What a grammar costs and what forced tokens save.

    python benchmarks/structured.py [--target smollm2-135m] [--threads 1] [--out FILE]

First, milliseconds of CPU time of one mask (parser, unpacking, the end tokens) over the texts of
three schemas, and of removing what it forbids from a row of logits. Then rounds per token of greedy
answers to three prompts under each whitespace: plain, with forced tokens alone, with lookup, and
with lookup but without forced tokens. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import describe, finish

import dspark
from dspark.draft.lookup import LookupDrafter
from dspark.grammar import Grammar, Whitespace
from dspark.request import SamplingParams
from dspark.verify.constraint import PathMasks
from dspark.verify.sampling import shape_logits

CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "get_weather"},
        "arguments": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "maxLength": 30},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location", "unit"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
LINES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "product": {"type": "string", "maxLength": 16},
            "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
            "in_stock": {"type": "boolean"},
        },
        "required": ["product", "quantity", "in_stock"],
        "additionalProperties": False,
    },
    "minItems": 3,
    "maxItems": 3,
}
TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "call": (CALL, "What is the weather in Paris? Call the function."),
    "person": (PERSON, "Anna is 30 years old and likes to read. Describe her as JSON."),
    "lines": (LINES, "We have 3 pears, 12 apples and no plums. List the stock as JSON."),
}
TEXTS = {
    "call": '{"name": "get_weather", "arguments": {"location": "Paris", "unit": "celsius"}}',
    "person": '{"name": "Anna Smith", "age": 30, "hobbies": ["reading", "singing"]}',
    "lines": "["
    + ", ".join(
        f'{{"product": "{name}", "quantity": {count}, "in_stock": true}}'
        for name, count in (("pears", 3), ("apples", 12), ("plums", 1))
    )
    + "]",
}


def masks_of(codec: Any, vocab: int, ends: frozenset[int]) -> Iterator[Any]:
    """Milliseconds of CPU time of every mask along the texts, each asked for twice."""
    for name, (schema, _) in TASKS.items():
        start = time.thread_time()
        grammar = Grammar.json_schema(schema, codec)
        made = time.thread_time() - start
        for _ in range(3):
            masks = PathMasks(grammar, vocab_size=vocab, end_tokens=ends)
            costs = []
            for token in codec.encode_plain(TEXTS[name]):
                start = time.thread_time()
                mask = masks.allowed(())
                costs.append(1e3 * (time.thread_time() - start))
                if not mask[token]:  # spelled otherwise than the grammar would
                    break
                masks.advance(token)
        yield name, 1e3 * made, costs


def removal(vocab: int) -> float:
    """Milliseconds of CPU time that a mask of half the tokens adds to shaping one greedy row."""
    mask = np.random.default_rng(0).random(vocab) < 0.5
    logits, params = torch.randn(1, vocab), [SamplingParams()]
    spent = []
    for own in (None, [mask]):
        start = time.thread_time()
        for _ in range(50):
            shape_logits(logits, params, masks=own)
        spent.append(time.thread_time() - start)
    return 1e3 * (spent[1] - spent[0]) / 50


def rounds(engine: dspark.Engine, params: SamplingParams, prompt: str, *, is_forced: bool) -> Any:
    """Tokens and rounds of an answer."""
    kept = PathMasks.forced
    if not is_forced:
        PathMasks.forced = lambda self, most: []  # type: ignore[method-assign]
    try:
        (result,) = engine.generate([[{"role": "user", "content": prompt}]], params)
    finally:
        PathMasks.forced = kept  # type: ignore[method-assign]
    if result.error is not None:
        raise SystemExit(result.error)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--out")
    args = parser.parse_args()
    plain = dspark.Engine.load(args.target, "none", threads=args.threads)
    target, codec = plain.target, plain.codec
    info = target.info
    lookup = dspark.Engine(target, drafter=LookupDrafter(), codec=codec)
    table_at = time.thread_time()
    Grammar.regex("a", codec)
    cost: dict[str, Any] = {"table_seconds": time.thread_time() - table_at}
    for name, made, costs in masks_of(codec, info.vocab_size, frozenset(info.eos_token_ids)):
        own = {"compile": made, "mean": np.mean(costs), "p95": np.quantile(costs, 0.95)}
        cost[name] = {key: round(float(value), 3) for key, value in own.items()}
        print(f"{name}: {cost[name]} ms over {len(costs)} tokens")
    cost["removal"] = round(removal(info.vocab_size), 3)
    print(f"removing what is forbidden from a row of {info.vocab_size}: {cost['removal']} ms")
    saved: dict[str, Any] = {}
    for space in Whitespace:
        for name, (schema, prompt) in TASKS.items():
            grammar = Grammar.json_schema(schema, codec, whitespace=space)
            params = SamplingParams(max_tokens=args.max_tokens, grammar=grammar)
            runs = {
                "plain": rounds(plain, replace(params, draft=False), prompt, is_forced=False),
                "forced": rounds(plain, params, prompt, is_forced=True),
                "lookup alone": rounds(lookup, params, prompt, is_forced=False),
                "lookup": rounds(lookup, params, prompt, is_forced=True),
            }
            if len({tuple(result.token_ids) for result in runs.values()}) > 1:
                raise SystemExit(f"{space} {name}: the texts differ")
            tokens = len(runs["plain"].token_ids) - 1  # the first comes from prefill
            line = {key: round(run.stats.rounds / tokens, 3) for key, run in runs.items()}
            saved[f"{space}, {name}"] = {"tokens": tokens, **line}
            print(f"{space}, {name}: {tokens} tokens, rounds per token {line}", flush=True)
            print(f"    {json.dumps(runs['plain'].text)} {runs['plain'].finish_reason.value}")
    finish({**describe(), "mask_ms": cost, "rounds_per_token": saved}, args.out)


if __name__ == "__main__":
    main()
