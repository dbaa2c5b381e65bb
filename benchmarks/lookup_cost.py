"""Microseconds that lookup takes a request and round, in Python and in C++.

    python benchmarks/lookup_cost.py ANSWERS.jsonl.gz [--requests 1,32] [--rounds 60] [--out FILE]

Answers of `dspark data` are split by question: some are the corpus, the others are continued as if
the target said them, two tokens a round. Both drafters are asked for the same texts, one after the
other, in the thread's own time. The first round of a request, which reads its prompt, stands apart.
What they offer is compared and must be the same. `--profile` says where the time of C++ goes
instead. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import describe, finish
from corpus_replay import SHAPES, read

from dspark.draft.base import DraftContext
from dspark.draft.corpus import Corpus
from dspark.draft.lookup import LookupDrafter
from dspark.request import Rule, SamplingParams
from dspark.tree import Proposal
from dspark.verify.noise import NoiseKey

PATHS = {"python": "plain", "c++": "fused"}
PARAMS, NOISE = SamplingParams(), NoiseKey(0)
STRIDE = 2


def contexts(
    rows: Sequence[dict[str, Any]], turn: int, shape: tuple[int, int, int]
) -> list[DraftContext]:
    """What the engine would tell the drafter in a round."""
    budget, width, depth = shape
    return [
        DraftContext(
            request_id=number,
            tokens=[*row["prompt_ids"], *row["response_ids"][: 1 + STRIDE * turn]],
            prompt_length=len(row["prompt_ids"]),
            params=PARAMS,
            rule=Rule.GREEDY,
            noise=NOISE,
            round=turn + 1,
            budget=budget,
            depth=depth,
            width=width,
        )
        for number, row in enumerate(rows)
    ]


def contents(proposals: Sequence[Proposal]) -> list[list[list[float]]]:
    """What is offered, to compare."""
    trees = [proposal.tree for proposal in proposals]
    return [[t.token.tolist(), t.parent.tolist(), t.survival.tolist()] for t in trees]


def measure(
    corpus: Corpus | tuple[()], rows: list[dict[str, Any]], shape: str, requests: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Microseconds a request: of the median round, and of the first."""
    drafters = {name: LookupDrafter(corpus=corpus, path=path) for name, path in PATHS.items()}
    times: dict[str, list[float]] = {name: [] for name in drafters}
    firsts: dict[str, list[float]] = {name: [] for name in drafters}
    for start in range(0, len(rows) - requests + 1, requests):
        some = rows[start : start + requests]
        for turn in range(min(rounds, min(len(r["response_ids"]) for r in some) // STRIDE)):
            asked = contexts(some, turn, SHAPES[shape])
            offered = []
            for name, drafter in drafters.items():
                begin = time.thread_time()
                proposals = drafter.propose(asked)
                (times if turn else firsts)[name].append(time.thread_time() - begin)
                offered.append(contents(proposals))
            if offered[0] != offered[1]:
                raise SystemExit("the two offer different trees")
        for drafter in drafters.values():
            for number in range(requests):
                drafter.release(number)
    return {
        name: {
            "round": round(1e6 * statistics.median(times[name]) / requests, 2),
            "mean": round(1e6 * statistics.fmean(times[name]) / requests, 2),
            "first": round(1e6 * statistics.median(firsts[name]) / requests, 1),
        }
        for name in drafters
    }


def show_profile(corpus: Corpus, rows: list[dict[str, Any]], requests: int) -> None:
    """Where the time of C++ goes, by function."""
    drafter = LookupDrafter(corpus=corpus, path="fused")
    asked = [contexts(rows[:requests], turn, SHAPES["tree of 15"]) for turn in range(40)]
    drafter.propose(asked[0])
    profile = cProfile.Profile()
    profile.enable()
    for some in asked[1:]:
        drafter.propose(some)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(15)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("--requests", default="1,32", help="at once, with commas between")
    parser.add_argument("--rounds", type=int, default=60, help="of a request at the most")
    parser.add_argument("--answers-read", type=int, default=64, help="to continue")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.answers)
    questions = sorted({row["prompt"] for row in rows})
    random.Random(args.seed).shuffle(questions)  # noqa: S311 - a split of questions
    held = set(questions[: len(questions) // 10])
    corpus = Corpus([row["response_ids"] for row in rows if row["prompt"] not in held])
    rest = [r for r in rows if r["prompt"] in held and len(r["response_ids"]) >= STRIDE * 30]
    rest = rest[: args.answers_read]
    counts = [int(count) for count in args.requests.split(",")]
    if args.profile:
        show_profile(corpus, rest, counts[-1])
        return
    results: dict[str, Any] = {}
    for kind, shared in (("own text and corpus", corpus), ("own text", ())):
        for shape in SHAPES:
            for count in counts:
                name = f"{kind}, {shape}, {count} at once"
                results[name] = found = measure(shared, rest, shape, count, args.rounds)
                shown = ", ".join(
                    f"{path} {value['round']:.1f} us (first round {value['first']:.0f})"
                    for path, value in found.items()
                )
                print(f"{name}: {shown}", flush=True)
    finish({"run": describe(), "corpus_tokens": corpus.size, "results": results}, out=args.out)


if __name__ == "__main__":
    main()
