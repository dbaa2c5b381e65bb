"""Time of a linear layer by rows, for every kernel: what a verify batch costs against one row.

    python benchmarks/linear.py [--dtype float32] [--layers 24] [--out FILE]

Layers of SmolLM2's shapes, many of each, so that weights come from memory and not from a cache.
Kernels are interleaved; the figure is the median over turns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import describe, finish

from dspark.adapters.hf.linear import KERNELS, available_kernels

SHAPES = ((576, 576), (576, 1536), (1536, 576))
ROWS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    """Measure all kernels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    names = available_kernels(dtype, torch.device("cpu"))
    times: dict[str, dict[int, list[float]]] = {n: {r: [] for r in ROWS} for n in names}
    for inputs, outputs in SHAPES:
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(args.layers)]
        products = {name: [KERNELS[name](w, None) for w in weights] for name in names}
        for rows in ROWS:
            x = torch.randn(rows, inputs).to(dtype)
            for turn in range(args.turns + 1):
                for name in names:
                    start = time.perf_counter()
                    for product in products[name]:
                        product(x)
                    if turn > 0:
                        seconds = (time.perf_counter() - start) / args.layers
                        times[name][rows].append(seconds)
    report = {"schema": 1, "run": describe(), "dtype": args.dtype, "microseconds": {}, "16 / 1": {}}
    for name in names:
        medians = {r: statistics.median(times[name][r]) for r in ROWS}
        report["microseconds"][name] = {r: round(1e6 * medians[r]) for r in ROWS}
        report["16 / 1"][name] = round(medians[16] / medians[1], 2)
    finish(report, args.out)


if __name__ == "__main__":
    main()
