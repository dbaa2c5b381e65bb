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

import numpy as np
import torch
from common import describe, finish, milliseconds, ratio

from dspark.models.resolve import resolve_model
from dspark.registry import LoadOptions, load_target
from dspark.target import BatchPart, Target, TokenBatch

_CONTEXT = 64


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many programs that compute, on the last cores."""
    running = []
    try:
        for i in range(count):
            running.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            if hasattr(os, "sched_setaffinity"):
                cores = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(running[-1].pid, {cores[-1 - i % len(cores)]})
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


class Forwards:
    """Forwards of any number of rows behind one short prompt.

    Args:
        target: The target.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._cache = target.new_cache()
        self._slot, _ = self._cache.open([])
        self._cache.reserve(self._slot, _CONTEXT)
        prompt = BatchPart.chain(self._slot, list(range(2, 2 + _CONTEXT)), 0, want_last=False)
        target.forward(TokenBatch.build([prompt]), self._cache)
        self._cache.commit(self._slot, range(_CONTEXT))

    def seconds(self, rows: int, count: int) -> list[float]:
        """Time of so many forwards of a chain of `rows`."""
        positions, parents = np.arange(_CONTEXT, _CONTEXT + rows), np.arange(-1, rows - 1)
        times = []
        for _ in range(count):
            self._cache.reserve(self._slot, rows)
            part = BatchPart(self._slot, [1] * rows, positions, parents, range(rows))
            batch = TokenBatch.build([part])
            start = time.perf_counter()
            self._target.forward(batch, self._cache)
            times.append(time.perf_counter() - start)
            self._cache.commit(self._slot, [])
        return times


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
        paths[path] = Forwards(load_target(resolve_model(args.target), options).target)
    times: dict[tuple[str, int, int], list[float]] = {}
    for turn in range(args.turns + 1):
        for busy in args.busy:
            with busy_programs(busy):
                for path, forwards in paths.items():
                    for rows in args.rows:
                        found = forwards.seconds(rows, args.count)
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
