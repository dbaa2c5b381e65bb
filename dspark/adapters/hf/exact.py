"""The probe behind exact mode: which kernels agree, whether a tree equals its paths, at what cost.

Exact mode promises that a row's logits do not depend on the rows that ride along. That rests on
properties of the machine's kernels, so it is checked on the machine, with the real weights: a
context that ends just under a page boundary, prefilled in one chunk and in two, a branching tree
that crosses the boundary beside another request, against each of its paths decoded token by token.
Attention is checked by itself too, with the largest tree and in float32: a model in bfloat16 would
hide most differences there.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspark.adapters.hf.attention import MAX_EXACT_NODES, QUERY_ROWS, Step, exact_span
from dspark.adapters.hf.store import PAGE_TOKENS, LayerShape, StoreCache
from dspark.target import BatchPart, ExactnessReport, TokenBatch

if TYPE_CHECKING:
    from dspark.adapters.hf.target import HFTarget

__all__ = [
    "DEFAULT_MAX_COST",
    "check_attention",
    "check_trees",
    "find_query_rows",
    "measure_cost",
    "probe_key",
    "read_probe",
    "report",
    "write_probe",
]

DEFAULT_MAX_COST = 0.10
"""Exact mode is the default unless it slows a one-row step by more than this."""

_SCHEMA = 6

_TREE_PARENT = (-1, 0, 0, 1, 1, 2, 3, 3, 5, 6, 8, 9, 10)
"""Rows of the probe's tree: row 0 is the anchor."""


def check_trees(target: HFTarget) -> bool:
    """Compare a tree's logits with those of its paths run alone, bit by bit.

    Args:
        target: A target in exact mode.

    Returns:
        True if every compared row is bitwise the same.
    """
    rng = np.random.default_rng(0)
    vocab, room = target.info.vocab_size, target.info.max_positions
    length = min(PAGE_TOKENS - 3, max(2, room - 16))
    context = rng.integers(0, vocab, length).tolist()
    other = rng.integers(0, vocab, min(37, length)).tolist()
    tokens = rng.integers(0, vocab, len(_TREE_PARENT)).tolist()
    depth = [0] * len(tokens)
    for row, parent in enumerate(_TREE_PARENT):
        depth[row] = 0 if parent < 0 else depth[parent] + 1

    cache = target.new_cache()
    slot = _prefill(target, cache, context, chunks=2)
    neighbour = _prefill(target, cache, other, chunks=1)
    cache.reserve(slot, len(tokens))
    cache.reserve(neighbour, 1)
    parts = [
        BatchPart.chain(neighbour, [1], len(other), want_last=True),
        BatchPart(
            slot,
            tokens,
            [length + d for d in depth],
            list(_TREE_PARENT),
            range(len(tokens)),
        ),
    ]
    tree = target.forward(TokenBatch.build(parts), cache).logits[1:]

    alone = target.new_cache()
    for leaf in (4, 7, 12, 11):
        path = [leaf]
        while _TREE_PARENT[path[-1]] >= 0:
            path.append(_TREE_PARENT[path[-1]])
        line = _prefill(target, alone, context, chunks=1)
        for step, row in enumerate(reversed(path)):
            alone.reserve(line, 1)
            part = BatchPart.chain(line, [tokens[row]], length + step, want_last=True)
            logits = target.forward(TokenBatch.build([part]), alone).logits
            alone.commit(line, [0])
            if not torch.equal(logits[0], tree[row]):
                return False
        alone.release(line)
        if leaf == 4:
            alone.forget_kept()  # once from scratch, then by way of a shared prefix
    return True


def find_query_rows(target: HFTarget) -> int | None:
    """Find the fewest query rows with which attention holds, or None if none of QUERY_ROWS does."""
    return next((rows for rows in QUERY_ROWS if check_attention(target, rows)), None)


def check_attention(target: HFTarget, least_rows: int) -> bool:
    """Compare attention of a tree of MAX_EXACT_NODES with that of its paths, bit by bit.

    Args:
        target: A target.
        least_rows: Fewest query rows of a product.

    Returns:
        True if every compared row is bitwise the same for every shape of K/V heads.
    """
    shapes = {(shape.heads, shape.head_dim) for shape in target.kv_layers}
    return all(_check_attention(target, *shape, least_rows) for shape in sorted(shapes))


def _check_attention(target: HFTarget, heads: int, dim: int, least_rows: int) -> bool:
    rng = np.random.default_rng(1)
    device = torch.device(target.info.device)
    shape = LayerShape(layer=0, heads=heads, head_dim=dim)
    cache = StoreCache([shape], dtype=torch.float32, device=device)
    length, rows = PAGE_TOKENS - 9, MAX_EXACT_NODES + 1
    parent = [-1, *(int(rng.integers(max(0, row - 6), row)) for row in range(1, rows))]
    depth = [0] * rows
    for row in range(1, rows):
        depth[row] = depth[parent[row]] + 1

    def random(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size, dtype=np.float32)).to(device)

    context = random(2, heads, length, dim)
    key, value = random(heads, rows, dim), random(heads, rows, dim)
    query = random(target.query_heads, rows, dim)

    def run(slot: int, part: BatchPart, which: list[int], window: int | None) -> torch.Tensor:
        batch = TokenBatch.build([part])
        cache.reserve(slot, len(which))
        cache.begin(batch)
        step = Step.plan(
            batch, cache, exact=True, kv_source=(0,), device=device, least_rows=least_rows
        )
        cache.write(0, cache.state(slot), key[:, which], value[:, which])
        return exact_span(step, 0, 0, query[:, which], dim**-0.5, window, None)

    def start() -> int:
        slot, _ = cache.open([])
        cache.reserve(slot, length + rows)
        cache.begin(TokenBatch.build([BatchPart.chain(slot, [0] * length, 0, want_last=False)]))
        cache.write(0, cache.state(slot), context[0], context[1])
        cache.commit(slot, range(length))
        return slot

    positions = [length + d for d in depth]
    whole = BatchPart(start(), [0] * rows, positions, parent, [])
    for window in (None, 100):
        tree = run(whole.slot, whole, list(range(rows)), window)
        for leaf in (rows - 1, rows - 2, rows // 2):
            path = [leaf]
            while parent[path[0]] >= 0:
                path.insert(0, parent[path[0]])
            line = start()
            for step, row in enumerate(path):
                part = BatchPart.chain(line, [0], length + step, want_last=False)
                alone = run(line, part, [row], window)
                cache.commit(line, [0])
                if not torch.equal(alone[:, 0], tree[:, row]):
                    return False
    return True


def _prefill(target: HFTarget, cache: Any, tokens: list[int], *, chunks: int) -> int:
    slot, shared = cache.open([*tokens, 0])
    for part in np.array_split(np.asarray(tokens[shared:], dtype=np.int64), chunks):
        if len(part) == 0:
            continue
        cache.reserve(slot, len(part))
        rows = BatchPart.chain(slot, part, cache.length(slot), want_last=False)
        target.forward(TokenBatch.build([rows]), cache)
        cache.commit(slot, range(len(part)))
    return int(slot)


def measure_cost(exact: HFTarget, *, repeats: int = 15) -> float:
    """Time of a one-row step in exact mode over that of one without, minus 1.

    Args:
        exact: A target in exact mode; it is switched off and on again between steps.
        repeats: Interleaved pairs of steps. The lower quartiles count: whatever else the machine
            does can only make a step slower.
    """
    caches = {}
    for mode in (True, False):
        exact.switch_exact(mode)
        cache = exact.new_cache()
        caches[mode] = (cache, _prefill(exact, cache, list(range(2, 34)), chunks=1))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(repeats + 1):
        for mode in (True, False):
            exact.switch_exact(mode)
            cache, slot = caches[mode]
            cache.reserve(slot, 1)
            part = BatchPart.chain(slot, [1], cache.length(slot), want_last=True)
            batch = TokenBatch.build([part])
            start = time.perf_counter()
            exact.forward(batch, cache).logits.sum().item()
            if turn > 0:  # the first pair warms up
                seconds[mode].append(time.perf_counter() - start)
    exact.switch_exact(True)
    quartile = {mode: statistics.quantiles(times, n=4)[0] for mode, times in seconds.items()}
    return quartile[True] / quartile[False] - 1


def probe_key(config: dict[str, Any], dtype: str, device: str, weights: str) -> str:
    """Name of a probe's record: what its finding depends on.

    Args:
        config: The model's config.
        dtype: Weight dtype.
        device: Device.
        weights: A cheap fingerprint of the checkpoint files.
    """
    facts = {
        "schema": _SCHEMA,
        "config": config,
        "dtype": dtype,
        "device": device,
        "weights": weights,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": [platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability()],
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next((line for line in lines if line.startswith("model name")), "").strip()
    except OSError:
        return platform.processor()


def read_probe(folder: Path, key: str) -> dict[str, Any] | None:
    """Read a probe's record, or None if there is none that can be used."""
    try:
        record = json.loads((folder / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == _SCHEMA else None


def write_probe(folder: Path, key: str, record: dict[str, Any]) -> None:
    """Keep a probe's record; a folder that cannot be written is no error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{key}.tmp"
        temporary.write_text(json.dumps({"schema": _SCHEMA, **record}, indent=1))
        temporary.replace(folder / f"{key}.json")
    except OSError:
        return


def report(
    *, wanted: bool | None, holds: bool, min_rows: int, backend: str, cost: float | None
) -> ExactnessReport:
    """Decide about exact mode from what the probe found.

    Args:
        wanted: What the user asked for, None for the default.
        holds: The check's finding.
        min_rows: Fewest rows of a linear layer.
        backend: Linear kernel.
        cost: Measured cost, or None.
    """
    percent = "unmeasured" if cost is None else f"{100 * cost:+.0f} % per one-row step"
    if wanted is False:
        enabled, reason = False, "off as asked"
    elif not holds:
        enabled = False
        reason = "off: this machine's kernels give a row other bits in other company"
    elif wanted:
        enabled, reason = True, f"on as asked, checked bit by bit at load ({percent})"
    elif cost is not None and cost > DEFAULT_MAX_COST:
        enabled = False
        reason = f"off by default: it costs {percent} here; --exact turns it on"
    else:
        enabled, reason = True, f"on, checked bit by bit at load ({percent})"
    return ExactnessReport(
        enabled=enabled,
        holds=holds,
        min_rows=min_rows,
        max_nodes=MAX_EXACT_NODES if enabled else None,
        backend=backend,
        cost=cost,
        reason=reason,
    )
