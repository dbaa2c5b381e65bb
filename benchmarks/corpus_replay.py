"""How far lookup gets with the target's own earlier answers, without running the target.

    python benchmarks/corpus_replay.py ANSWERS.jsonl.gz [--share 1] [--tokens 200] [--out FILE]

Answers of `dspark data` (greedy and sampled) are split by question: from some a corpus is made, the
greedy ones of the others are replayed. A greedy answer is what the target says whatever is drafted,
so the rounds that lookup needs for it are those that the engine would need. Compared: lookup in the
request's own text alone, and in the corpus too; as chains and as trees. "Right by survival" says
how often the first candidate was right where its survival began with that digit: equal is
calibrated. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import describe, finish

from dspark.draft.base import DraftContext
from dspark.draft.corpus import Corpus
from dspark.draft.lookup import LookupDrafter
from dspark.request import Rule, SamplingParams
from dspark.verify.noise import NoiseKey

SHAPES = {"chain of 5": (5, 1, 5), "tree of 15": (15, 3, 8)}
PARAMS = SamplingParams()


@dataclass
class Tally:
    """Rounds of a kind of question."""

    rounds: int = 0
    tokens: int = 0
    nodes: int = 0
    seconds: float = 0.0
    bins: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    @property
    def tau(self) -> float:
        """Committed tokens a round."""
        return self.tokens / self.rounds


def read(path: Path) -> list[dict[str, Any]]:
    """Answers, one a line."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def replay(drafter: LookupDrafter, row: dict[str, Any], shape: tuple[int, int, int], tally: Tally):
    """Count the rounds that a greedy answer takes."""
    budget, width, depth = shape
    prompt, answer = row["prompt_ids"], row["response_ids"]
    done = 1  # prefill yields the first
    while done < len(answer):
        context = DraftContext(
            request_id=0,
            tokens=[*prompt, *answer[:done]],
            prompt_length=len(prompt),
            params=PARAMS,
            rule=Rule.GREEDY,
            noise=NoiseKey(0),
            round=1,
            budget=budget,
            depth=depth,
            width=width,
        )
        start = time.perf_counter()
        tree = drafter.propose([context])[0].tree
        tally.seconds += time.perf_counter() - start
        accepted, node = 0, -1
        while done + accepted < len(answer):
            wanted = answer[done + accepted]
            children = tree.children_of(node)
            if node == -1 and len(children):
                best = int(children[0])
                cell = tally.bins[min(9, int(10 * tree.survival[best]))]
                cell[0] += 1
                cell[1] += int(tree.token[best]) == wanted
            node = next((int(c) for c in children if tree.token[c] == wanted), -2)
            if node < 0:
                break
            accepted += 1
        committed = min(accepted + 1, len(answer) - done)
        tally.rounds += 1
        tally.tokens += committed
        tally.nodes += tree.num_nodes
        done += committed
    drafter.release(0)


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the corpus answers to use")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the questions")
    parser.add_argument("--tokens", type=int, help="of an answer at the most")
    parser.add_argument("--questions", type=int, help="to replay at the most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = read(options.answers)
    questions = sorted({row["prompt"] for row in rows})
    generator = random.Random(options.seed)  # noqa: S311 - a split of questions
    generator.shuffle(questions)
    held = set(questions[: round(options.held_out * len(questions))])
    texts = [row["response_ids"] for row in rows if row["prompt"] not in held]
    texts = texts[: round(options.share * len(texts))]
    tests = [r for r in rows if r["prompt"] in held and float(r["temperature"]) == 0]
    tests = tests[: options.questions]
    for row in tests:
        row["response_ids"] = row["response_ids"][: options.tokens]
    start = time.perf_counter()
    corpus = Corpus(texts)
    built = time.perf_counter() - start
    print(f"corpus of {corpus.size} tokens in {built:.1f} s, {len(tests)} answers to replay")
    drafters = {
        "own text and corpus": LookupDrafter(corpus=corpus),
        "own text": LookupDrafter(),
    }
    results: dict[str, Any] = {}
    for name, drafter in drafters.items():
        for shape, sizes in SHAPES.items():
            tallies: dict[str, Tally] = defaultdict(Tally)
            for row in tests:
                replay(drafter, row, sizes, tallies[row["source"]])
            results[f"{name}, {shape}"] = show(f"{name}, {shape}", tallies)
    finish({"run": describe(), "corpus_tokens": corpus.size, "results": results}, out=options.out)


def show(name: str, tallies: dict[str, Tally]) -> dict[str, Any]:
    """Print a drafter's figures; returns them."""
    rounds = sum(tally.rounds for tally in tallies.values())
    tau = sum(tally.tokens for tally in tallies.values()) / rounds
    each = {source: round(tally.tau, 2) for source, tally in sorted(tallies.items())}
    cost = 1000 * sum(tally.seconds for tally in tallies.values()) / rounds
    nodes = sum(tally.nodes for tally in tallies.values()) / rounds
    bins: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for tally in tallies.values():
        for place, (count, right) in tally.bins.items():
            bins[place][0] += count
            bins[place][1] += right
    right = {f"{b / 10:.1f}": round(r / c, 2) for b, (c, r) in sorted(bins.items()) if c >= 20}
    print(f"{name}: tau {tau:.2f}, {nodes:.1f} nodes, {cost:.2f} ms a round; {each}; {right}")
    return {"tau": tau, "nodes": nodes, "ms": cost, "by_source": each, "right_by_survival": right}


if __name__ == "__main__":
    main()
