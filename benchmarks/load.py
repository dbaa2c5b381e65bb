"""The engine under load: plain decoding, fixed lengths and schedules, by concurrency, interleaved.

    python benchmarks/load.py [--target smollm2-135m] [--draft lookup] [--concurrency 1,2,4,8,16,32]
    python benchmarks/load.py --fixed 2,4,8 --schedule auto,async --repeats 5 --out load.json
    python benchmarks/load.py --memory-limit 64        # MiB: short memory, with preemptions

Questions about code and for chat alternate. At a concurrency of C, C requests are under way at all
times: one that ends makes room for the next, until all were asked. Throughput is that of the time
in which C are under way: plain answers of one length end together, drafted ones do not, and how
soon the last few are done says nothing about load. Every configuration has an engine per
concurrency, kept for all turns as a server would keep it; configurations take turns in changing
order, so that a slow moment of the machine does not fall on one of them. Texts of greedy requests
are compared with plain decoding's. The last line is one JSON object; --out keeps it, and after
Ctrl-C it holds the turns that are whole.

Figures of a run: output tokens per second; the median request's tokens per second and time to its
first token; tau; verified nodes per request and round, the average verification budget;
milliseconds of a round in the forward, in drafting and besides; preemptions.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from common import describe, finish, forget_prompts, ratio

import dspark
from dspark.active import ActiveRequest, Phase
from dspark.eval.profile_auto import kept_or_quick
from dspark.eval.prompts import OWN, load_prompts

PLAIN = "plain"
CODE, CHAT = ("code", "editing"), ("writing", "reasoning")


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        kind: "code" or "chat".
        tokens: The prompt.
        seed: Of its noise.
    """

    kind: str
    tokens: tuple[int, ...]
    seed: int


def questions(engine: dspark.Engine) -> list[Asked]:
    """Code and chat in turns."""
    codec = engine.codec
    if codec is None:
        raise SystemExit("the target has no tokenizer")
    found: dict[str, list[tuple[int, ...]]] = {"code": [], "chat": []}
    for question in load_prompts(OWN).questions:
        kind = "code" if question.category in CODE else "chat"
        if question.category in (*CODE, *CHAT):
            message = [{"role": "user", "content": question.turns[0]}]
            has_template = codec.has_chat_template
            tokens = codec.encode_chat(message) if has_template else codec.encode(question.turns[0])
            found[kind].append(tuple(tokens))
    pairs = zip(found["code"], found["chat"], strict=True)
    turns = [(kind, tokens) for pair in pairs for kind, tokens in zip(found, pair, strict=True)]
    return [Asked(kind, tokens, seed) for seed, (kind, tokens) in enumerate(turns)]


@dataclass
class Load:
    """A configuration at one concurrency.

    Attributes:
        name: Of the configuration.
        engine: Its engine.
        concurrency: Requests under way.
    """

    name: str
    engine: dspark.Engine
    concurrency: int

    def run(
        self, asked: list[Asked], params: dspark.SamplingParams
    ) -> tuple[dict[str, float], list[list[int]]]:
        """Answer all questions.

        Returns:
            The figures, and the tokens of every answer.
        """
        engine, waiting = self.engine, deque(asked)
        before = engine.stats.preemptions
        forget_prompts(engine)
        under_way: list[ActiveRequest] = []
        every: list[ActiveRequest] = []
        start = time.perf_counter()
        seconds, tokens = 0.0, 0
        while waiting or under_way:
            while waiting and len(under_way) < self.concurrency:
                own = waiting.popleft()
                fields = {**_fields(params), "seed": own.seed}
                under_way += engine.submit(list(own.tokens), dspark.SamplingParams(**fields))
                every.append(under_way[-1])
            engine.step()
            if len(under_way) == self.concurrency:
                seconds = time.perf_counter() - start
                tokens = sum(request.num_generated for request in every)
            under_way = [request for request in under_way if request.phase is not Phase.DONE]
        results = [request.result() for request in every]
        for result in results:
            if result.error is not None:
                raise SystemExit(f"{self.name} at {self.concurrency}: {result.error}")
        figures = {"tokens per second": tokens / seconds, **_figures(results)}
        figures |= _round_milliseconds(results, self.concurrency)
        figures["preemptions"] = engine.stats.preemptions - before
        return figures, [result.token_ids for result in results]


def _fields(params: dspark.SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in ("max_tokens", "temperature", "ignore_eos")}


def _figures(results: list[dspark.GenerationResult]) -> dict[str, float]:
    stats = [result.stats for result in results]
    rounds = sum(s.rounds for s in stats)
    return {
        "tokens per second of the median request": statistics.median(
            s.tokens_per_second for s in stats
        ),
        "seconds to the first token": statistics.median(s.time_to_first_token for s in stats),
        "seconds to the first token, 95 %": sorted(s.time_to_first_token for s in stats)[
            max(0, -(-95 * len(stats) // 100) - 1)
        ],
        "seconds in the queue": statistics.fmean(s.seconds_waiting for s in stats),
        "tau": sum(s.committed for s in stats) / max(1, rounds),
        "verified nodes per request and round": sum(s.verified for s in stats) / max(1, rounds),
        "drafted nodes per request and round": sum(s.proposed for s in stats) / max(1, rounds),
        "share accepted": sum(s.accepted for s in stats) / max(1, sum(s.verified for s in stats)),
    }


def _round_milliseconds(
    results: list[dspark.GenerationResult], concurrency: int
) -> dict[str, float]:
    """Where the time of a round goes, prompts left out; each request has its share of it."""
    stats = [result.stats for result in results]
    rounds = sum(s.rounds for s in stats) / concurrency
    parts = {
        "forward": sum(s.seconds_verify for s in stats),
        "drafting": sum(s.seconds_draft for s in stats),
        "rest": sum(s.seconds_rest for s in stats),
    }
    return {f"ms of a round, {name}": 1e3 * seconds / rounds for name, seconds in parts.items()}


def configurations(args: argparse.Namespace, base: dspark.Engine) -> list[Load]:
    """Engines for every configuration and concurrency."""
    seconds = kept_or_quick(base.target, base.codec, note=lambda line: print(line, file=sys.stderr))
    schedules = {PLAIN: "off"}
    schedules |= {f"fixed {n}": f"fixed:{n}" for n in args.fixed}
    schedules |= {name: name for name in args.schedule}
    limit = None if args.memory_limit is None else args.memory_limit << 20
    most = max([15, *args.fixed])
    found = []
    for name, schedule in schedules.items():
        for concurrency in args.concurrency:
            # A fixed length is measured at that length, so the row limit must leave room for it.
            rows = max(64, concurrency * (most + 1)) if schedule.startswith("fixed") else 64
            config = dspark.EngineConfig(
                max_batch=concurrency,
                memory_limit=limit,
                schedule=schedule,
                step_seconds=seconds,
                auto_off=not schedule.startswith("fixed"),
                limits=dspark.RoundLimits(max_rows=rows, tree_budget=most),
            )
            drafter = None if name == PLAIN else base.drafter
            engine = dspark.Engine(base.target, drafter=drafter, codec=base.codec, config=config)
            found.append(Load(name, engine, concurrency))
    return found


def measure(
    args: argparse.Namespace, loads: list[Load], asked: list[Asked]
) -> tuple[dict[tuple[str, int], list[dict[str, float]]], int]:
    """Figures of every load, one per turn, and how many texts differed from plain decoding's."""
    params = dspark.SamplingParams(
        max_tokens=args.tokens, temperature=args.temperature, ignore_eos=True
    )
    figures: dict[tuple[str, int], list[dict[str, float]]] = {
        (load.name, load.concurrency): [] for load in loads
    }
    rng, differ = random.Random(args.seed), 0  # noqa: S311 - an order, no secret
    start, done, total = time.perf_counter(), 0, len(loads) * (args.repeats + 1)
    try:
        for turn in range(args.repeats + 1):
            whole: dict[tuple[str, int], dict[str, float]] = {}
            texts: dict[tuple[str, int], list[list[int]]] = {}
            for load in rng.sample(loads, len(loads)):
                count = max(3 * load.concurrency, args.requests)
                # The first turn warms up: it needs no more requests than run together.
                few = asked * (1 + count // len(asked))
                few = few[: load.concurrency if turn == 0 else count]
                key = load.name, load.concurrency
                whole[key], texts[key] = load.run(few, params)
                done += 1
                left = (time.perf_counter() - start) / done * (total - done)
                print(
                    f"turn {turn} of {args.repeats}: {load.name}, {load.concurrency} under way, "
                    f"{whole[key]['tokens per second']:.1f} tok/s, {left:.0f} s left",
                    file=sys.stderr,
                )
            for (_, level), own in texts.items():
                differ += sum(a != b for a, b in zip(own, texts[PLAIN, level], strict=True))
            if turn > 0:
                for key, value in whole.items():
                    figures[key].append(value)
    except KeyboardInterrupt:
        print("interrupted; whole turns are kept", file=sys.stderr)
    return figures, differ


def summary(values: list[dict[str, float]]) -> dict[str, Any]:
    """Median, least and largest of every figure over the turns."""
    out = {}
    for name in values[0] if values else ():
        own = [value[name] for value in values]
        out[name] = {
            "median": round(statistics.median(own), 4),
            "least": round(min(own), 4),
            "largest": round(max(own), 4),
        }
    return out


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Measure every configuration at every concurrency."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="lookup")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--concurrency", type=_numbers, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--fixed", type=_numbers, default=[2, 4, 8], help="fixed lengths")
    parser.add_argument("--schedule", type=lambda text: text.split(","), default=["auto"])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=12, help="at the least; 3 C if more")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-limit", type=int, help="MiB of K/V cache")
    parser.add_argument("--seed", type=int, default=0, help="of the order of runs")
    parser.add_argument("--out")
    args = parser.parse_args()
    base = dspark.Engine.load(args.target, args.draft, dtype=args.dtype, threads=args.threads)
    loads = configurations(args, base)
    figures, differ = measure(args, loads, questions(base))
    by_name: dict[str, dict[str, Any]] = {}
    for (name, level), values in figures.items():
        entry = by_name.setdefault(name, {})[str(level)] = summary(values)
        if name != PLAIN and values:
            speeds = [[v["tokens per second"] for v in figures[n, level]] for n in (name, PLAIN)]
            entry["speed-up over plain"] = ratio(*speeds)
    info = base.target.info
    report = {
        "schema": 1,
        "run": describe(),
        "target": {"name": info.name, "dtype": info.dtype, "device": info.device},
        "exact": base.target.exactness.reason,
        "draft": base.drafter.name,
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "turns": min((len(values) for values in figures.values()), default=0),
        "texts unlike plain decoding": differ,
        "results": by_name,
    }
    finish(report, args.out)


if __name__ == "__main__":
    main()
