"""Steps of the fused path with versions of its kernels, and with or without large pages.

    git worktree add ../old COMMIT
    python benchmarks/kernels.py ../old/dspark/adapters/fused/kernels dspark/adapters/fused/kernels
    python benchmarks/kernels.py --small-pages --quant int8 dspark/adapters/fused/kernels
    python benchmarks/kernels.py --wide-store --requests 16 --rows 1,2 --context 1024 \
        dspark/adapters/fused/kernels

Versions take turns step by step, a chain of rows for each request, behind its context. Ratios to
the first version are taken turn by turn, and their medians shown. A version with other logits than
the first, in a single bit, is named.
--small-pages puts a first version before the others: the first folder, its weights in small pages.
--wide-store likewise: the first folder, keys and values kept in float32.
--march compiles for another processor, as x86-64-v3 for one with AVX2. The last line of the output
is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import ALIAS, describe, finish

from dspark import native
from dspark.adapters.fused import library, packing
from dspark.adapters.fused.target import FusedTarget
from dspark.models import resolve_model
from dspark.registry import LoadOptions, load_target
from dspark.target import BatchPart, Target, TokenBatch


def load(folder: Path, args: argparse.Namespace, *, small_pages: bool) -> Target:
    """The default model on the kernels of a folder."""
    headers = tuple(sorted(folder.glob("*.h")))
    library._SOURCES = native.Sources("fused", folder / "forward.cpp", headers)
    library._FLAGS = tuple(f"-march={args.march}" if "march" in f else f for f in native.FLAGS)
    library._load.cache_clear()
    place = packing.place
    if small_pages:
        packing.place = lambda tensor: tensor
    try:
        options = LoadOptions(
            name=ALIAS, dtype=args.dtype, quant=args.quant, exact=False, path="fused"
        )
        return load_target(resolve_model(ALIAS), options).target
    finally:
        packing.place = place


def widen_store(target: Target) -> None:
    """Keep keys and values in float32."""
    if not isinstance(target, FusedTarget):
        raise SystemExit("the fused path was not taken")
    target.decoder.keep_in(torch.float32)


class Steps:
    """Steps of one version, all of them thrown away again."""

    def __init__(self, name: str, target: Target, args: argparse.Namespace, most: int) -> None:
        self.name, self._target, self._cache = name, target, target.new_cache()
        self._slots, self._context = [], args.context
        for request in range(args.requests):
            slot, _ = self._cache.open([])
            self._cache.reserve(slot, self._context + most)
            tokens = range(2 + request, 2 + request + self._context)
            part = BatchPart.chain(slot, tokens, 0, want_last=False)
            target.forward(TokenBatch.build([part]), self._cache)
            self._cache.commit(slot, range(self._context))
            self._slots.append(slot)

    def run(self, rows: int) -> tuple[float, torch.Tensor]:
        """Milliseconds and logits of a chain of rows for every request."""
        at, above = range(self._context, self._context + rows), range(-1, rows - 1)
        parts = [BatchPart(slot, [5] * rows, at, above, range(rows)) for slot in self._slots]
        batch = TokenBatch.build(parts)
        start = time.perf_counter()
        logits = self._target.forward(batch, self._cache).logits
        return (time.perf_counter() - start) * 1e3, logits


def measure(versions: list[Steps], counts: list[int], turns: int) -> dict[str, Any]:
    """Milliseconds of every version, rows and turn; a first turn warms up."""
    found: dict[str, Any] = {str(n): {steps.name: [] for steps in versions} for n in counts}
    for turn in range(turns + 1):
        for rows in counts:
            first = versions[0].run(rows)[1].clone() if turn == 0 else None
            for steps in versions:
                milliseconds, logits = steps.run(rows)
                if first is None:
                    found[str(rows)][steps.name].append(milliseconds)
                elif not torch.equal(first, logits):
                    print(f"{steps.name}: other bits than {versions[0].name} with {rows} rows")
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="Steps with versions of the fused kernels.")
    parser.add_argument("folders", type=Path, nargs="+", help="kernels of a version")
    parser.add_argument("--small-pages", action="store_true")
    parser.add_argument("--wide-store", action="store_true")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--quant", default="none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--march", default="native")
    parser.add_argument("--rows", default="1,4,8,16", help="of each request")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    counts = [int(n) for n in args.rows.split(",")]
    plan = [(f"{i}", folder, False) for i, folder in enumerate(args.folders, start=1)]
    if args.small_pages:
        plan.insert(0, ("small pages", args.folders[0], True))
    versions = [
        Steps(name, load(folder, args, small_pages=small), args, max(counts))
        for name, folder, small in plan
    ]
    if args.wide_store:
        target = load(args.folders[0], args, small_pages=False)
        widen_store(target)
        versions.insert(0, Steps("wide store", target, args, max(counts)))
    found = measure(versions, counts, args.turns)
    for rows, by_name in found.items():
        base = by_name[versions[0].name]
        for name, times in by_name.items():
            faster = statistics.median(a / b for a, b in zip(base, times, strict=True))
            took = f"{statistics.median(times):8.2f} ms  x {faster:.3f}"
            print(f"{args.requests} x {rows:<3} rows  {name:<12}{took}")
    finish({"run": describe(), "ms": found}, args.out)


if __name__ == "__main__":
    main()
