"""The engine under load: plain decoding, fixed lengths and schedules, by concurrency, interleaved.

    python benchmarks/load.py [--target smollm2-135m] [--draft lookup] [--concurrency 1,2,4,8,16,32]
    python benchmarks/load.py --fixed 2,4,8 --schedule auto,async --repeats 5 --out load.json
    python benchmarks/load.py --memory-limit 64        # MiB: short memory, with preemptions
    python benchmarks/load.py --prompts FOLDER         # humaneval, mbpp, mt-bench and arena-hard

Questions about code and for chat alternate: of the built-in set, or first turns of public sets in
.jsonl files of a folder. At a concurrency of C, C requests are under way at all times: one that
ends makes room for the next, until all were asked. Throughput is that from the first time that one
took another's place to the last, so that a prompt is read for every answer that ends. Answers have
lengths from a half of --tokens to one and a half. Every configuration has an engine per
concurrency, kept for all turns as a server would keep it. Configurations run side by side, a round
of one and then a round of another, so that a slow moment of the machine falls on all of them.
Texts of greedy requests are compared with plain decoding's. The last line is one JSON object; --out
keeps it, and after Ctrl-C it holds the turns that are whole.

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
from pathlib import Path
from typing import Any

from common import describe, finish, forget_prompts, ratio

import dspark
from dspark.active import ActiveRequest, Phase
from dspark.eval.profile_auto import kept_or_quick
from dspark.eval.prompts import OWN, load_prompts

PLAIN = "plain"
CODE, CHAT = ("code", "editing"), ("writing", "reasoning")
SETS = {"code": ("humaneval", "mbpp"), "chat": ("mt-bench", "arena-hard")}
PER_SET = 64  # questions of a kind: both are asked by 32 requests, four times over


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        kind: "code" or "chat".
        tokens: The prompt.
        seed: Of its noise.
        share: Length of its answer, as a share of --tokens: from a half to one and a half, for
            answers of one length would begin and end together.
    """

    kind: str
    tokens: tuple[int, ...]
    seed: int
    share: float


def texts(folder: str | None) -> dict[str, list[str]]:
    """Questions about code and for chat; those of a folder's sets in turns."""
    if folder is None:
        own = load_prompts(OWN).questions
        kinds = {"code": CODE, "chat": CHAT}
        return {kind: [q.turns[0] for q in own if q.category in kinds[kind]] for kind in kinds}
    found = {}
    for kind, names in SETS.items():
        sets = [load_prompts(str(Path(folder) / f"{name}.jsonl")).questions for name in names]
        found[kind] = [q.turns[0] for few in zip(*sets, strict=False) for q in few][:PER_SET]
    return found


def questions(engine: dspark.Engine, folder: str | None) -> list[Asked]:
    """Code and chat in turns."""
    codec = engine.codec
    if codec is None:
        raise SystemExit("the target has no tokenizer")
    found: dict[str, list[tuple[int, ...]]] = {}
    for kind, own in texts(folder).items():
        found[kind] = []
        for text in own:
            message = [{"role": "user", "content": text}]
            has_template = codec.has_chat_template
            found[kind].append(
                tuple(codec.encode_chat(message) if has_template else codec.encode(text))
            )
    pairs = zip(found["code"], found["chat"], strict=True)
    turns = [(kind, tokens) for pair in pairs for kind, tokens in zip(found, pair, strict=True)]
    rng = random.Random(0)  # noqa: S311 - lengths, no secret
    return [
        Asked(kind, tokens, seed, rng.uniform(0.5, 1.5))
        for seed, (kind, tokens) in enumerate(turns)
    ]


@dataclass
class Load:
    """A configuration at one concurrency.

    Attributes:
        name: Of the configuration.
        engine: Its engine.
        concurrency: Requests under way.
        seconds: That the run under way took so far.
    """

    name: str
    engine: dspark.Engine
    concurrency: int
    seconds: float = 0.0

    def begin(self, asked: list[Asked], params: dspark.SamplingParams) -> None:
        """Get ready to answer questions."""
        forget_prompts(self.engine)
        self.seconds = 0.0
        self._params = params
        self._before = self.engine.stats.preemptions
        self._waiting = deque(asked)
        self._under_way: list[ActiveRequest] = []
        self._every: list[ActiveRequest] = []
        self._marks: list[tuple[float, int]] = []

    @property
    def is_done(self) -> bool:
        """True once all are answered."""
        return not (self._waiting or self._under_way)

    def step(self) -> None:
        """One round, with new requests in the place of those that ended."""
        is_replacing = self._every and self._waiting and len(self._under_way) < self.concurrency
        if is_replacing:  # throughput counts from the first of these moments to the last
            tokens = sum(request.num_generated for request in self._every)
            self._marks.append((self.seconds, tokens))
        start = time.perf_counter()
        while self._waiting and len(self._under_way) < self.concurrency:
            own = self._waiting.popleft()
            length = round(own.share * self._params.max_tokens)
            fields = {**_fields(self._params), "seed": own.seed, "max_tokens": length}
            params = dspark.SamplingParams(**fields)
            self._under_way += self.engine.submit(list(own.tokens), params)
            self._every.append(self._under_way[-1])
        self.engine.step()
        self.seconds += time.perf_counter() - start
        self._under_way = [r for r in self._under_way if r.phase is not Phase.DONE]

    def end(self) -> tuple[dict[str, float], list[list[int]]]:
        """The figures, and the tokens of every answer."""
        results = [request.result() for request in self._every]
        for result in results:
            if result.error is not None:
                raise SystemExit(f"{self.name} at {self.concurrency}: {result.error}")
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        figures = {"tokens per second": (after - before) / (last - first), **_figures(results)}
        figures |= _round_milliseconds(results, self.concurrency)
        figures["preemptions"] = self.engine.stats.preemptions - self._before
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
    start, done, total = time.perf_counter(), 0, len(args.concurrency) * (args.repeats + 1)
    try:
        for turn in range(args.repeats + 1):
            whole: dict[tuple[str, int], dict[str, float]] = {}
            for level in rng.sample(args.concurrency, len(args.concurrency)):
                # The first turn warms up.
                count = 2 * level + 1 if turn == 0 else max(4 * level, args.requests)
                few = (asked * (1 + count // len(asked)))[:count]
                own = [load for load in loads if load.concurrency == level]
                found = side_by_side(rng.sample(own, len(own)), few, params)
                whole |= {(name, level): figures for name, (figures, _) in found.items()}
                plain = found[PLAIN][1]
                for _, tokens in found.values():
                    differ += sum(a != b for a, b in zip(tokens, plain, strict=True))
                done += 1
                left = (time.perf_counter() - start) / done * (total - done)
                speeds = ", ".join(
                    f"{load.name} {found[load.name][0]['tokens per second']:.1f}" for load in own
                )
                print(
                    f"turn {turn} of {args.repeats}: {level} under way, {speeds} tok/s, "
                    f"{left:.0f} s left",
                    file=sys.stderr,
                )
            if turn > 0:
                for key, value in whole.items():
                    figures[key].append(value)
    except KeyboardInterrupt:
        print("interrupted; whole turns are kept", file=sys.stderr)
    return figures, differ


def side_by_side(
    loads: list[Load], asked: list[Asked], params: dspark.SamplingParams
) -> dict[str, tuple[dict[str, float], list[list[int]]]]:
    """Have all configurations answer, round by round in turns: whoever took least time goes on."""
    for load in loads:
        load.begin(asked, params)
    while busy := [load for load in loads if not load.is_done]:
        min(busy, key=lambda load: load.seconds).step()
    return {load.name: load.end() for load in loads}


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
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer, on average")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=16, help="at the least; 4 C if more")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", metavar="FOLDER", help="of .jsonl files; the built-in set")
    parser.add_argument("--memory-limit", type=int, help="MiB of K/V cache")
    parser.add_argument("--seed", type=int, default=0, help="of the order of runs")
    parser.add_argument("--out")
    args = parser.parse_args()
    base = dspark.Engine.load(args.target, args.draft, dtype=args.dtype, threads=args.threads)
    loads = configurations(args, base)
    figures, differ = measure(args, loads, questions(base, args.prompts))
    by_name: dict[str, dict[str, Any]] = {}
    for (name, level), values in figures.items():
        entry = by_name.setdefault(name, {})[str(level)] = summary(values)
        # Turns side by side compare better than medians of each.
        entry["tokens per second by turn"] = [round(v["tokens per second"], 2) for v in values]
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
