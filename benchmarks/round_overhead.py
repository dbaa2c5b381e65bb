"""What a round costs outside the target's and the draft's forward: the engine's own bookkeeping.

    python benchmarks/round_overhead.py [--rounds 300] [--vocab 512] [--profile]

The target looks its logits up in a table and the draft gives the same tree in every round, so what
is left of a round is scheduling, batching, verification, caches and text. Time inside the two is
measured and taken off. Every case is an engine that runs `--rounds` rounds; cases take turns,
`--repeats` times, and the figure of a turn is its median round, in the thread's own time, so that
other programs hardly show. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import describe, finish, interleave

import dspark
from dspark.cache import CacheUsage
from dspark.draft.base import DraftContext
from dspark.target import ExactnessReport, TargetInfo, TargetOutput, TokenBatch
from dspark.tree import DraftTree, Proposal
from dspark.verify import noise

BATCHES = (1, 4, 16)
RULES = {"greedy": 0.0, "coupled": 1.0, "rejection": 1.0}
SHAPES = ("plain", "chain", "tree")


class Counted:
    """Time spent inside what is not measured."""

    def __init__(self) -> None:
        self.seconds = 0.0


class Notes:
    """A cache that holds tokens and nothing else."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}

    def open(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A slot without anything in it."""
        slot = len(self.lengths)
        self.lengths[slot] = 0
        return slot, 0

    def reserve(self, slot: int, rows: int) -> None:
        """There is room."""

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Count the rows."""
        self.lengths[slot] += len(path)

    def length(self, slot: int) -> int:
        """Committed tokens."""
        return self.lengths[slot]

    def release(self, slot: int) -> None:
        """Nothing to give back."""

    def scrub(self, slot: int) -> None:
        """Nothing is left behind."""

    def forget_kept(self) -> None:
        """Nothing is kept."""

    def usage(self) -> CacheUsage:
        """No memory."""
        return CacheUsage(0, 256, 0, None, len(self.lengths))

    def page_bytes(self) -> int:
        """Bytes of one page."""
        return 1


class Table:
    """A target whose logits depend on the last token alone, one of 64 rows.

    Args:
        vocab: V.
        counted: Where its time goes.
    """

    def __init__(self, vocab: int, counted: Counted) -> None:
        self.table = torch.from_numpy(np.random.default_rng(3).normal(size=(64, vocab)) * 2).float()
        self.counted = counted
        self.info = TargetInfo(
            name="table",
            family="table",
            vocab_size=vocab,
            hidden_size=1,
            num_layers=1,
            max_positions=1 << 30,
            eos_token_ids=(),
            dtype="float32",
            device="cpu",
        )
        self.exactness = ExactnessReport(
            enabled=True, holds=True, min_rows=1, backend="table", cost=None, reason="on, a table"
        )

    def new_cache(self, *, memory_limit: int | None = None) -> Notes:
        """An empty cache."""
        return Notes()

    def forward(
        self, batch: TokenBatch, cache: Notes, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        """Look rows up."""
        start = time.thread_time()
        logits = self.table[torch.from_numpy(batch.token_ids[batch.output_rows] % 64)]
        self.counted.seconds += time.thread_time() - start
        return TargetOutput(logits)


class Fixed:
    """A draft of one shape, right about a third of the time.

    Args:
        target: Whose tokens it guesses.
        shape: "chain" of 7 nodes or "tree" of 15.
    """

    name = "fixed"
    capture = ()

    def __init__(self, target: Table, shape: str) -> None:
        self.counted = target.counted
        is_chain = shape == "chain"
        self.parents = (
            list(range(-1, 6)) if is_chain else [-1, -1, -1, *(i // 2 for i in range(12))]
        )
        tree = DraftTree.build([0] * len(self.parents), self.parents)
        self.survival = np.minimum(0.7**tree.depth, 1.0)
        self.table = target.table
        law = torch.softmax(self.table.double(), dim=1)
        self.laws = law[:1].expand(len(self.parents), -1)

    def propose(self, contexts: list[DraftContext]) -> list[Proposal]:
        """One tree per context."""
        start = time.thread_time()
        found = [self._one(context) for context in contexts]
        self.counted.seconds += time.thread_time() - start
        return found

    def release(self, request_id: int) -> None:
        """Nothing is kept."""

    def _one(self, context: DraftContext) -> Proposal:
        tokens = [int(self.table[context.tokens[-1] % 64].argmax())] * len(self.parents)
        if context.rule.draws_from_laws:
            row = self.table[:1]
            for parent in set(self.parents):
                children = [i for i, p in enumerate(self.parents) if p == parent]
                key, number = [context.noise], [context.round]
                ids, _ = noise.draft_topk(row, key, number, [parent], len(children))
                for child, token in zip(children, ids[0].tolist(), strict=True):
                    tokens[child] = token
        size = min(len(tokens), context.budget)
        tree = DraftTree.build(tokens[:size], self.parents[:size], self.survival[:size])
        if not context.rule.draws_from_laws:
            return Proposal(tree)
        law_of = np.array(self.parents[:size], dtype=np.int64) + 1
        return Proposal(tree, self.laws, law_of)


@dataclass(frozen=True)
class Case:
    """What is measured."""

    shape: str
    rule: str
    batch: int

    @property
    def name(self) -> str:
        """As the result has it."""
        return f"{self.shape}, {self.rule}, batch {self.batch}"


def running(case: Case, vocab: int) -> tuple[dspark.Engine, Counted]:
    """An engine in the middle of its requests."""
    counted = Counted()
    target = Table(vocab, counted)
    drafter = None if case.shape == "plain" else Fixed(target, case.shape)
    limits = dspark.RoundLimits(max_rows=1 << 12)
    config = dspark.EngineConfig(
        auto_off=False,
        limits=limits,
        step_seconds=lambda rows, context: 0.02 + 0.0002 * rows,
    )
    engine = dspark.Engine(target, drafter=drafter, config=config)
    for number in range(case.batch):
        params = dspark.SamplingParams(
            max_tokens=1 << 28,
            temperature=RULES[case.rule],
            rule="auto" if case.rule == "greedy" else case.rule,
            seed=number,
        )
        engine.submit([1 + number] * 200, params)
    for _ in range(20):
        engine.step()
    return engine, counted


def median_round(engine: dspark.Engine, counted: Counted, rounds: int) -> float:
    """Milliseconds of the median round outside target and draft."""
    times = []
    for _ in range(rounds):
        counted.seconds = 0.0
        start = time.thread_time()
        engine.step()
        times.append(time.thread_time() - start - counted.seconds)
    return 1e3 * statistics.median(times)


def show_profile(cases: list[Case], vocab: int, rounds: int) -> None:
    """Where the time of each case goes, by function."""
    for case in cases:
        engine, _ = running(case, vocab)
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(rounds):
            engine.step()
        profile.disable()
        print(case.name)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--rule", choices=RULES, action="append")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--profile", action="store_true", help="say where the time goes instead")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        Case(shape, rule, batch)
        for shape in args.shape or SHAPES
        for rule in args.rule or RULES
        for batch in args.batch or BATCHES
        if not (shape == "plain" and rule == "rejection")
    ]
    if args.profile:
        show_profile(cases, args.vocab, args.rounds)
        return
    runs: dict[str, Callable[[], float]] = {}
    for case in cases:
        engine, counted = running(case, args.vocab)
        runs[case.name] = lambda engine=engine, counted=counted: median_round(
            engine, counted, args.rounds
        )
    figures = interleave(runs, args.repeats)
    rounded = {name: [round(value, 4) for value in values] for name, values in figures.items()}
    report: dict[str, Any] = {
        "schema": 1,
        "run": describe(),
        "vocab": args.vocab,
        "rounds": args.rounds,
        "milliseconds of a round": rounded,
        "best": {name: min(values) for name, values in rounded.items()},
        "median": {name: statistics.median(values) for name, values in rounded.items()},
    }
    finish(report, args.out)


if __name__ == "__main__":
    main()
