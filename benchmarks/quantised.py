"""Quantised targets: how far their laws are from the original's, and what a step takes.

    python benchmarks/quantised.py [--target smollm2-135m] [--questions 12] [--tokens 128]
        [--threads 2] [--turns 7] [--out FILE]

The original answers questions greedily; every target then scores the same texts. KL is of a
token's law from the original's, in nats; "same choice" counts tokens that both would choose;
perplexity is that of the text that was written. Steps are interleaved, behind 128 tokens; ratios
are taken turn by turn. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from common import describe, finish, ratio
from fused import Steps, bandwidth

import dspark
from dspark.eval.prompts import OWN, load_prompts
from dspark.registry import QUANTS
from dspark.target import BatchPart, Target, TokenBatch

ROWS = (1, 4, 8, 16, 32)


def written(engine: dspark.Engine, questions: int, tokens: int) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer, and where the answer begins."""
    codec = engine.codec
    if codec is None:
        raise SystemExit("the target has no tokenizer")
    every = load_prompts(OWN).questions
    chosen = every[:: max(1, len(every) // questions)][:questions]
    found = []
    for question in chosen:
        message = [{"role": "user", "content": question.turns[0]}]
        has_template = codec.has_chat_template
        ids = codec.encode_chat(message) if has_template else codec.encode(question.turns[0])
        params = dspark.SamplingParams(max_tokens=tokens, ignore_eos=True)
        answer = engine.generate([ids], params)[0].token_ids
        found.append(([*ids, *answer], len(ids)))
    return found


def score(target: Target, text: list[int], start: int) -> torch.Tensor:
    """Log probabilities [n, V] of the tokens from `start` on, float32."""
    cache = target.new_cache()
    slot, _ = cache.open(text)
    count = len(text) - 1
    cache.reserve(slot, count)
    at = np.arange(count)
    part = BatchPart(slot, text[:-1], at, at - 1, range(start - 1, count))
    logits = target.forward(TokenBatch.build([part]), cache).logits
    return torch.log_softmax(logits.float(), dim=-1)


def quality(targets: dict[str, Target], texts: list[tuple[list[int], int]]) -> dict[str, Any]:
    """KL, agreement and perplexity by target."""
    sums = {name: {"kl": 0.0, "same": 0.0, "loss": 0.0} for name in targets}
    count = 0
    for text, start in texts:
        wanted = torch.tensor(text[start:])
        laws = {name: score(target, text, start) for name, target in targets.items()}
        own = laws[QUANTS[0]]
        count += len(wanted)
        for name, law in laws.items():
            sums[name]["kl"] += float((own.exp() * (own - law)).sum())
            sums[name]["same"] += int((own.argmax(-1) == law.argmax(-1)).sum())
            sums[name]["loss"] -= float(law.gather(1, wanted[:, None]).sum())
    return {
        name: {
            "kl": round(found["kl"] / count, 5),
            "same choice": round(found["same"] / count, 4),
            "perplexity": round(float(np.exp(found["loss"] / count)), 4),
        }
        for name, found in sums.items()
    }


def main() -> None:
    """Load the target three times and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engines = {
        quant: dspark.Engine.load(args.target, "none", quant=quant, threads=args.threads)
        for quant in QUANTS
    }
    targets = {name: engine.target for name, engine in engines.items()}
    texts = written(engines[QUANTS[0]], args.questions, args.tokens)
    found = quality(targets, texts)
    runs = {name: Steps(t, texts[0][0][:128], time.perf_counter) for name, t in targets.items()}
    seconds: dict[str, dict[int, list[float]]] = {n: {r: [] for r in ROWS} for n in runs}
    block, memory = torch.ones(64_000_000), []
    for turn in range(args.turns + 1):
        for rows in ROWS:
            for name, run in runs.items():
                value = run.seconds(rows)
                if turn:
                    seconds[name][rows].append(value)
        memory.append(bandwidth(block, time.perf_counter))
    for name, run in runs.items():
        decoder = getattr(run.target, "decoder", None)
        steps = {
            rows: {"ms": round(1e3 * statistics.median(v), 2), "as one row": ratio(v, own[1])}
            for own in (seconds[name],)
            for rows, v in own.items()
        }
        found[name] |= {
            "backend": run.target.exactness.backend,
            "bytes": None if decoder is None else decoder.bytes_read,
            "steps": steps,
            "times as fast as none": {
                r: ratio(seconds[QUANTS[0]][r], seconds[name][r]) for r in ROWS
            },
        }
        line = "  ".join(f"{rows}: {step['ms']:6.2f} ms" for rows, step in steps.items())
        print(
            f"{name:5} KL {found[name]['kl']:.5f}  same choice {found[name]['same choice']:.4f}  "
            f"perplexity {found[name]['perplexity']:.3f}  {line}",
            file=sys.stderr,
        )
    tokens = sum(len(text) - start for text, start in texts)
    gigabytes = round(statistics.median(memory) / 1e9, 2)
    finish({**describe(), "tokens": tokens, "memory gb/s": gigabytes, "targets": found}, args.out)


if __name__ == "__main__":
    main()
