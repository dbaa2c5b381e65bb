"""V4's routed experts against memory: GB of packed bytes a second, through torch and in C++.

    python benchmarks/experts.py [--threads 1] [--rows 1,4,16] [--turns 7] [--out FILE]

One layer's experts in the shapes of a released model, random bytes, as many as fill --gigabytes, so
that they come from memory and not from a cache. Every row draws its own k of them. The torch path,
the kernels and a plain read of as many bytes are interleaved, each with a draw of its own. Bytes
count once for every distinct expert of a step. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe, finish, ratio

from dspark import native
from dspark.base_model.expert_store import ExpertWeights
from dspark.base_model.moe import RoutedExperts
from dspark.base_model.native_experts import load_kernels
from dspark.base_model.numerics import Numerics
from dspark.base_model.presets import preset
from dspark.base_model.stored import StoredWeight
from dspark.base_model.weights import ExpertsOnDevice
from dspark.models.store import cache_root

FOLDER = cache_root() / "kernels"
SOURCES = native.Sources("read", Path(__file__).parent / "read.cpp")


class Experts:
    """A layer's experts, each in one buffer, as a paged store reads them."""

    def __init__(self, hidden: int, inner: int, count: int, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        shapes = ((inner, hidden), (hidden, inner), (inner, hidden))
        self.nbytes = sum(o * i // 2 + o * i // 32 for o, i in shapes)
        self.buffers = [self._bytes(gen) for _ in range(count)]
        self._experts = [self._weights(buffer, shapes) for buffer in self.buffers]

    def _bytes(self, gen: torch.Generator) -> torch.Tensor:
        words = torch.randint(-(2**63), 2**63 - 1, (self.nbytes // 8,), generator=gen)
        return words.view(torch.uint8)

    def _weights(self, buffer: torch.Tensor, shapes: tuple[tuple[int, int], ...]) -> ExpertWeights:
        matrices, at = [], 0
        for outputs, inputs in shapes:
            codes = buffer[at : at + outputs * inputs // 2].view(outputs, inputs // 2)
            at += codes.numel()
            scales = buffer[at : at + outputs * inputs // 32].view(outputs, inputs // 32)
            at += scales.numel()
            scales.remainder_(2).add_(119)
            scale = scales.view(torch.float8_e8m0fnu)
            matrices.append(StoredWeight.of("w", codes.view(torch.int8), scale))
        return ExpertWeights(*matrices)

    def fetch(self, prefix: str, expert: int) -> ExpertWeights:
        """As `dspark.base_model.expert_store.ExpertStore`."""
        return self._experts[expert]


def reader(experts: Experts, threads: int) -> Callable[[list[int]], None]:
    """A plain read of some experts."""
    library = ctypes.CDLL(str(native.compile_once(SOURCES, FOLDER)))

    def read(wanted: list[int]) -> None:
        places = (ctypes.c_void_p * len(wanted))(*(experts.buffers[e].data_ptr() for e in wanted))
        sizes = (ctypes.c_int64 * len(wanted))(*(experts.nbytes for _ in wanted))
        count = ctypes.c_int64(len(wanted))
        library.read_buffers(places, sizes, count, ctypes.c_int64(threads))

    return read


class Bench:
    """A layer's routed experts on both paths, and the plain read.

    Args:
        args: The command line's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        config = preset(args.preset)
        self._config, self._dtype = config, getattr(torch, args.dtype)
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.expert_bytes = 3 * hidden * inner * 17 // 32
        wanted = int(args.gigabytes * 1e9 / self.expert_bytes)
        self.count = min(config.n_routed_experts, wanted)
        experts = Experts(hidden, inner, self.count, seed=0)
        self._read = reader(experts, args.threads)
        self._rng = np.random.default_rng(0)
        self._clock = time.process_time if args.cpu_time else time.perf_counter
        cpu = torch.device("cpu")
        self._paths = {}
        for name in ("kernels",) if args.no_torch else ("torch", "kernels"):
            numerics = Numerics.of(self._dtype, cpu)
            numerics.kernels = load_kernels(FOLDER) if name == "kernels" else None
            at_hand = ExpertsOnDevice(experts, cpu)
            self._paths[name] = RoutedExperts("layer", config, numerics, at_hand)
        self.names = (*self._paths, "read")

    def step(self, name: str, rows: int) -> tuple[float, int]:
        """GB/s of a step of so many rows, and its distinct experts."""
        k = self._config.num_experts_per_tok
        draws = [self._rng.permutation(self.count)[:k] for _ in range(rows)]
        chosen = torch.from_numpy(np.stack(draws))
        distinct = torch.unique(chosen).tolist()
        weights = torch.full(chosen.shape, 0.25)
        x = torch.randn(rows, self._config.hidden_size).to(self._dtype)
        start = self._clock()
        if name == "read":
            self._read(distinct)
        else:
            self._paths[name](x, chosen, weights)
        return len(distinct) * self.expert_bytes / (self._clock() - start) / 1e9, len(distinct)

    def measure(self, rows: int, turns: int) -> dict[str, Any]:
        """Speeds of all paths, in turn after one turn to warm up."""
        found: dict[str, list[float]] = {name: [] for name in self.names}
        woken = []
        for turn in range(turns + 1):
            for name in self.names:
                speed, distinct = self.step(name, rows)
                if turn > 0:
                    found[name].append(speed)
                    woken.append(distinct)
            print(f"{rows} rows, turn {turn} of {turns}", file=sys.stderr)
        result: dict[str, Any] = {"distinct experts": round(statistics.mean(woken), 1)}
        for name, speeds in found.items():
            median = statistics.median(speeds)
            share = ratio(speeds, found["read"])
            result[name] = {
                "GB/s": {"median": median, "least": min(speeds), "largest": max(speeds)},
                "share of read": share,
            }
            print(
                f"{rows:3d} rows  {name:8s} {median:6.2f} GB/s ({min(speeds):.2f} to "
                f"{max(speeds):.2f}), {100 * share['median']:5.1f} % of a plain read"
            )
        return result


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="v4-flash")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-torch", action="store_true", help="leave out the slow path")
    parser.add_argument("--cpu-time", action="store_true", help="time of this process only")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    report = {
        "schema": 1,
        "run": describe(),
        "settings": vars(args),
        "experts": bench.count,
        "expert_bytes": bench.expert_bytes,
    }
    with torch.inference_mode():
        report["rows"] = {n: bench.measure(n, args.turns) for n in map(int, args.rows.split(","))}
    finish(report, args.out)


if __name__ == "__main__":
    main()
