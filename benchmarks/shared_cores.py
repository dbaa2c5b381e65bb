"""Forwards on a machine that is not alone: each path on a quiet machine and beside busy programs.

    python benchmarks/shared_cores.py [--threads 2] [--busy 0,1,2] [--rows 1,8,16] [--out FILE]

A busy program is a Python loop, on a core of its own where the system lets us choose. Paths and
numbers of busy programs take turns. The figure is the median forward in milliseconds; "beside one"
is its ratio to the quiet machine's. With two cores and one busy program, what is left are one and a
half cores. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import describe, finish, milliseconds, ratio

from dspark.eval.profile_steps import StepBench, sample_texts
from dspark.models.resolve import resolve_model
from dspark.registry import LoadOptions, load_target

_CONTEXT = 64

_BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
"""A program that computes as long as this one lives."""


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many programs that compute, on the last cores."""
    running = []
    try:
        for i in range(count):
            running.append(subprocess.Popen([sys.executable, "-c", _BUSY]))
            if hasattr(os, "sched_setaffinity"):
                cores = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(running[-1].pid, {cores[-1 - i % len(cores)]})
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Measure both paths beside every number of busy programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--busy", type=_numbers, default=[0, 1])
    parser.add_argument("--rows", type=_numbers, default=[1, 8, 16])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--count", type=int, default=10, help="forwards of a turn")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    paths = {}
    for path in ("plain", "fused"):
        options = LoadOptions(name=args.target, dtype=args.dtype, path=path)
        target = load_target(resolve_model(args.target), options).target
        paths[path] = StepBench(target, sample_texts(target, None, 1, _CONTEXT), time.perf_counter)
        paths[path].extend(_CONTEXT)
    times: dict[tuple[str, int, int], list[float]] = {}
    for turn in range(args.turns + 1):
        for busy in args.busy:
            with busy_programs(busy):
                for path, bench in paths.items():
                    for rows in args.rows:
                        found = [bench.step([rows]) for _ in range(args.count)]
                        if turn:
                            times.setdefault((path, rows, busy), []).extend(found)
        print(f"turn {turn} of {args.turns}", file=sys.stderr)
    milli: dict[str, Any] = {}
    for (path, rows, busy), values in times.items():
        entry = milli.setdefault(path, {}).setdefault(f"{rows} rows", {})
        entry[f"beside {busy}"] = milliseconds(values)
        if busy:
            quiet = times.get((path, rows, 0))
            entry[f"beside {busy} / quiet"] = quiet and ratio(values, quiet)
    report = {"schema": 1, "run": describe(), "threads": args.threads, "forwards": milli}
    finish(report, args.out)


if __name__ == "__main__":
    main()
