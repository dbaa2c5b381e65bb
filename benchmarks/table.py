"""One table of all ways to decode: transformers, dspark, llama.cpp, vLLM; figures and texts.

    python benchmarks/table.py [--threads 2] [--turns 5] [--questions 2] [--tokens 128]
        [--prompts FOLDER] [--llama-python PYTHON --gguf FILE ...] [--vllm-python PYTHON]
        [--out FILE]

Everything is greedy and ends at the model's own end. In a turn every way answers the same
questions, in an order that changes from turn to turn, and only one computes at any moment; the
table shows medians over turns, in brackets least and largest, and ratios are taken turn by turn.
Engines of other projects run in processes of their own (engines.py, docs/comparison.md); one that
is not given is left out. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ALIAS, Stock, describe, finish, forget_prompts, spread
from engines import Child
from fused import Steps, bandwidth
from pick_prompts import SETS, pick
from table_text import (
    ROWS,
    STOCK,
    Figures,
    Group,
    Run,
    Texts,
    Way,
    print_goals,
    print_speeds,
    print_steps,
)

import dspark
from dspark.adapters.fused.target import FusedTarget
from dspark.errors import DsparkError
from dspark.eval.prompts import OWN, load_prompts
from dspark.models import resolve_model

PAUSE = 0.3
"""Seconds between two ways, in which threads that wait for work fall asleep."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", help="of all but the quantised rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--questions", type=int, default=2, help="of each category, one at a time")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="questions that are asked at once")
    parser.add_argument("--prompts", default=OWN, help="a folder of pick_prompts.py, or a file")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a question")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python")
    parser.add_argument("--gguf", nargs="+", default=[], help="the same model for it, a row a file")
    parser.add_argument("--vllm-python", help="interpreter that has vLLM's build for CPUs")
    parser.add_argument("--vllm-dtype", help="if another than --dtype")
    parser.add_argument("--vllm-eager", action="store_true", help="without torch.compile")
    parser.add_argument("--seed", type=int, default=0, help="of the order in a turn")
    parser.add_argument("--out")
    return parser.parse_args()


def note(text: str) -> None:
    """Say what happens."""
    print(text, file=sys.stderr, flush=True)


# -- what is asked ------------------------------------------------------------------------------


def questions(spec: str, each: int) -> dict[str, list[str]]:
    """First turns by category."""
    found: dict[str, list[str]] = {}
    folder = Path(spec).expanduser()
    if spec != OWN and folder.is_dir():
        sets = len(SETS) // len(set(SETS.values()))
        rows = pick(folder, -(-each // sets))
        rows.sort(key=lambda row: int(row["question_id"].rpartition("-")[2]))
        asked = [(row["category"], row["turns"][0]) for row in rows]
    else:
        asked = [(item.category, item.turns[0]) for item in load_prompts(spec).questions]
    for category, text in asked:
        found.setdefault(category, []).append(text)
    return found


def make_groups(args: argparse.Namespace, asked: dict[str, list[str]], codec: Any) -> list[Group]:
    """Each category one at a time, and questions of all of them at once."""
    prompts = {}
    for name, texts in asked.items():
        found = [codec.encode_chat([{"role": "user", "content": text}]) for text in texts]
        prompts[name] = [prompt for prompt in found if len(prompt) <= args.longest]
    groups = [Group(name, found[: args.questions]) for name, found in prompts.items() if found]
    mixed = [p for row in zip_longest(*prompts.values()) for p in row if p is not None]
    if len(mixed) < args.batch:
        raise SystemExit(
            f"{args.prompts} has {len(mixed)} questions of up to {args.longest} tokens, but "
            f"--batch is {args.batch}"
        )
    return [*groups, Group(f"{args.batch} at once", mixed[: args.batch], is_together=True)]


# -- who answers --------------------------------------------------------------------------------


def run_stock(stock: Stock, **options: Any) -> Run:
    """transformers.generate."""

    def run(prompts: Texts, is_together: bool, tokens: int) -> tuple[float, Texts]:
        seconds, texts = 0.0, []
        for batch in [prompts] if is_together else [[prompt] for prompt in prompts]:
            took, made = stock.run(batch, tokens, **options)
            seconds += took
            texts += made
        return seconds, texts

    return run


def run_ours(engine: dspark.Engine) -> Run:
    """An engine of dspark."""

    def run(prompts: Texts, is_together: bool, tokens: int) -> tuple[float, Texts]:
        params = dspark.SamplingParams(max_tokens=tokens)
        batches = [prompts] if is_together else [[prompt] for prompt in prompts]
        results = []
        start = time.perf_counter()
        for batch in batches:
            forget_prompts(engine)  # or it would keep them from the turn before
            results += engine.generate(batch, params)
        return time.perf_counter() - start, [list(result.token_ids) for result in results]

    return run


def run_other(child: Child, mode: str, stop: list[int]) -> Run:
    """An engine in another process."""

    def run(prompts: Texts, is_together: bool, tokens: int) -> tuple[float, Texts]:
        return child.run(mode=mode, prompts=prompts, together=is_together, tokens=tokens, stop=stop)

    return run


def load_ours(args: argparse.Namespace) -> dict[str, dspark.Engine]:
    """Engines of dspark with their default draft, by the name of the path."""
    engines: dict[str, dspark.Engine] = {}
    for name, path, quant in (
        ("dspark, plain path", "plain", "none"),
        ("dspark", "fused", "none"),
        ("dspark int8", "fused", "int8"),
        ("dspark int4", "fused", "int4"),
    ):
        os.environ["DSPARK_PATH"] = path
        try:
            engines[name] = dspark.Engine.load(
                ALIAS, "auto", dtype=args.dtype, threads=args.threads, quant=quant
            )
        except DsparkError as exc:
            note(f"{name} is left out: {exc}")
    del os.environ["DSPARK_PATH"]
    return engines


def our_ways(engines: dict[str, dspark.Engine]) -> list[Way]:
    """Each path plainly, and the fused ones with the default draft."""
    ways = []
    for name, engine in engines.items():
        plain = dspark.Engine(engine.target, codec=engine.codec)
        ways.append(Way(name, run_ours(plain)))
        if name != "dspark, plain path":
            ways.append(Way(f"{name}, drafted", run_ours(engine), like=name))
    return ways


def start_others(args: argparse.Namespace, context: int) -> dict[str, Child]:
    """The engines that the command line gives."""
    children = {}
    sizes = {"batch": args.batch, "context": context}
    for file in args.gguf if args.llama_python else ():
        name = f"llama.cpp {Path(file).stem.rpartition('.')[2]}"  # MODEL.Q4_1.gguf
        options = {"model": file, **sizes}
        children[name] = Child(args.llama_python, "llama-cpp", options, args.threads)
    if not children:
        note("llama.cpp is left out: give --llama-python and --gguf")
    if args.vllm_python:
        options = {
            "model": str(resolve_model(ALIAS)),
            "dtype": args.vllm_dtype or args.dtype,
            "is_eager": args.vllm_eager,
            **sizes,
        }
        children["vLLM"] = Child(args.vllm_python, "vllm", options, args.threads)
    else:
        note("vLLM is left out: give --vllm-python")
    for name, child in children.items():
        note(f"{name} is ready: {child.about}")
    return children


def make_ways(
    stock: Stock, engines: dict[str, dspark.Engine], children: dict[str, Child], stop: list[int]
) -> list[Way]:
    """All rows of the table."""
    ways = [
        Way(STOCK, run_stock(stock)),
        Way(
            "transformers, its prompt lookup",
            run_stock(stock, prompt_lookup_num_tokens=10),
            is_single=True,
        ),
        *our_ways(engines),
    ]
    note("transformers' assisted generation is left out: no smaller model has this tokenizer")
    for name, child in children.items():
        ways.append(Way(name, run_other(child, "plain", stop)))
        if child.kind == "llama-cpp":
            look = run_other(child, "lookup", stop)
            ways.append(Way(f"{name}, its lookup", look, like=name, is_single=True))
    return ways


# -- measuring ----------------------------------------------------------------------------------


def trimmed(text: list[int], stop: list[int]) -> list[int]:
    """A text up to its end."""
    ends = [place for place, token in enumerate(text) if token in stop]
    return text[: ends[0]] if ends else text


@dataclass
class Bench:
    """Ways, questions, and what was measured."""

    ways: list[Way]
    groups: list[Group]
    tokens: int
    stop: list[int]
    figures: Figures = field(default_factory=Figures)

    def warm_up(self) -> None:
        """One short answer of every way, not counted."""
        for way in self.ways:
            for group in (self.groups[0], self.groups[-1])[: 1 if way.is_single else 2]:
                note(f"warming up: {way.name}, {group.name}")
                way.run(group.prompts, group.is_together, 4)

    def turn(self, order: np.random.Generator, tell: Callable[[], None]) -> None:
        """Every way answers every group once."""
        for group in self.groups:
            texts = {}
            for place in order.permutation(len(self.ways)):
                way = self.ways[place]
                if way.is_single and group.is_together:
                    continue
                time.sleep(PAUSE)
                seconds, made = way.run(group.prompts, group.is_together, self.tokens)
                texts[way.name] = [trimmed(text, self.stop) for text in made]
                key = way.name, group.name
                self.figures.tokens.setdefault(key, []).append(sum(map(len, texts[way.name])))
                self.figures.seconds.setdefault(key, []).append(seconds)
                tell()
            self._compare(group.name, texts)

    def _compare(self, group: str, texts: dict[str, Texts]) -> None:
        for way in self.ways:
            if way.name in texts and way.like in texts:
                pairs = zip(texts[way.name], texts[way.like], strict=True)
                found = [a == b for a, b in pairs]
                count = self.figures.same.setdefault((way.name, group), [0, 0])
                count[0] += sum(found)
                count[1] += len(found)

    def num_runs(self) -> int:
        """Runs of a turn."""
        kinds = [(way.is_single, group.is_together) for way in self.ways for group in self.groups]
        return len(kinds) - kinds.count((True, True))


def step_turn(steps: dict[str, Steps], block: torch.Tensor, figures: Figures) -> None:
    """Seconds of a step by path and rows, and of reading memory."""
    for rows in ROWS:
        for name, runs in steps.items():
            figures.steps.setdefault((name, rows), []).append(runs.seconds(rows))
    figures.memory.append(max(bandwidth(block, time.perf_counter) for _ in range(3)))


def progress(total: int) -> Callable[[], None]:
    """Tells after each run how far it is and what is left."""
    start, done = time.monotonic(), 0

    def tell() -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - start) / done * (total - done)
        note(f"run {done} of {total}, about {left:.0f} s left")

    return tell


def measure(bench: Bench, steps: dict[str, Steps], args: argparse.Namespace) -> int:
    """Run all turns; Ctrl-C ends with those that are whole.

    Returns:
        Turns that count.
    """
    order = np.random.default_rng(args.seed)
    block = torch.ones(2**26)
    bench.warm_up()
    tell = progress(args.turns * bench.num_runs())
    for turn in range(args.turns):
        try:
            bench.turn(order, tell)
            step_turn(steps, block, bench.figures)
        except KeyboardInterrupt:
            note(f"interrupted: {turn} turns count")
            return turn
    return args.turns


def main() -> None:
    """Load everything, measure in turns, print the table."""
    args = arguments()
    torch.set_num_threads(args.threads)
    asked = questions(args.prompts, 2 * max(args.questions, -(-args.batch // 3)))
    stock = Stock(args.dtype)
    engines = load_ours(args)
    if not engines:
        raise SystemExit("no path of dspark could be loaded")
    first = next(iter(engines.values()))
    groups = make_groups(args, asked, first.codec)
    longest = max(len(prompt) for group in groups for prompt in group.prompts)
    context = -(-(longest + args.tokens + 16) // 256) * 256
    stop = list(first.target.info.eos_token_ids)
    children = start_others(args, context)
    bench = Bench(make_ways(stock, engines, children, stop), groups, args.tokens, stop)
    context_tokens = np.random.default_rng(0).integers(3, 40_000, 128).tolist()
    steps = {
        name: Steps(engine.target, context_tokens, time.perf_counter)
        for name, engine in engines.items()
    }
    weights = sum(p.numel() * p.element_size() for p in stock.model.parameters())
    sizes = {
        name: e.target.decoder.bytes_read if isinstance(e.target, FusedTarget) else weights
        for name, e in engines.items()
    }
    turns = measure(bench, steps, args)
    for child in children.values():
        child.close()
    if not turns:
        raise SystemExit(130)
    report = {
        "schema": 1,
        # Names of files alone: where they lie is nobody's business.
        "run": describe() | {"command": " ".join(Path(word).name for word in sys.argv)},
        "target": ALIAS,
        "turns": turns,
        "backends": {name: e.target.exactness.backend for name, e in engines.items()},
        "others": {name: {**c.about, "idle CPU s": c.idle} for name, c in children.items()},
        "questions": {group.name: len(group.prompts) for group in groups},
        "speeds": print_speeds(bench.ways, groups, bench.figures, turns),
        "goals": print_goals(bench.ways, groups, bench.figures, turns),
        "memory GB/s": spread([value / 1e9 for value in bench.figures.memory], 1),
        "step ms": print_steps(bench.figures, sizes),
    }
    finish(report, args.out)


if __name__ == "__main__":
    main()
