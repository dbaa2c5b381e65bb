"""The check behind exact mode: does a tree equal its paths, bit by bit, and at what cost?

Exact mode promises that a row's logits do not depend on the rows that ride along. That rests on
properties of the machine's kernels, so it is checked on the machine, with the real weights: a
context that ends just under a boundary of pages or windows, prefilled in one chunk and in two, a
branching tree that crosses the boundary beside another request, against each of its paths decoded
token by token. What is found is kept in a record per machine and weights.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dspark.cache import Cache
from dspark.target import BatchPart, ExactnessReport, Target, TokenBatch

__all__ = [
    "DEFAULT_MAX_COST",
    "SwitchableTarget",
    "check_trees",
    "measure_cost",
    "probe_key",
    "read_probe",
    "report",
    "write_probe",
]

DEFAULT_MAX_COST = 0.10
"""Exact mode is the default unless it slows a one-row step by more than this."""

_SCHEMA = 8

_CONTEXT = 253
"""Tokens of the check's context: a page of 256 ends inside the tree, and so do shorter windows."""

_TREE_PARENT = (-1, 0, 0, 1, 1, 2, 3, 3, 5, 6, 8, 9, 10)
"""Rows of the probe's tree: row 0 is the anchor."""


class SwitchableTarget(Target, Protocol):
    """A target whose exact mode can be switched."""

    def switch_exact(self, on: bool) -> None:
        """Run forwards in exact mode or not."""
        ...


def check_trees(target: Target, *, most: int = _CONTEXT) -> bool:
    """Compare a tree's logits with those of its paths run alone, bit by bit.

    Args:
        target: A target in exact mode.
        most: Tokens of the context, fewer where the target has no room for them.

    Returns:
        True if every compared row is bitwise the same.
    """
    rng = np.random.default_rng(0)
    vocab, room = target.info.vocab_size, target.info.max_positions
    length = min(most, max(2, room - 16))
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
            # Once from scratch, then by way of a prefix that a finished request has left.
            alone.forget_kept()
            alone.release(_prefill(target, alone, context, chunks=1))
    return True


def _prefill(target: Target, cache: Cache, tokens: list[int], *, chunks: int) -> int:
    slot, shared = cache.open([*tokens, 0])
    for part in np.array_split(np.asarray(tokens[shared:], dtype=np.int64), chunks):
        if len(part) == 0:
            continue
        cache.reserve(slot, len(part))
        rows = BatchPart.chain(slot, part, cache.length(slot), want_last=False)
        target.forward(TokenBatch.build([rows]), cache)
        cache.commit(slot, range(len(part)))
    return int(slot)


def measure_cost(exact: SwitchableTarget, *, repeats: int = 15) -> float:
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
        # Where the folder lies is no fact about the model.
        "config": {key: value for key, value in config.items() if key != "_name_or_path"},
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
    *,
    wanted: bool | None,
    holds: bool,
    min_rows: int,
    backend: str,
    cost: float | None,
    max_nodes: int | None = None,
) -> ExactnessReport:
    """Decide about exact mode from what the probe found.

    Args:
        wanted: What the user asked for, None for the default.
        holds: The check's finding.
        min_rows: Fewest rows of a linear layer.
        backend: Linear kernel.
        cost: Measured cost, or None.
        max_nodes: Drafted nodes of a request that exact mode holds for, None for any number.
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
        max_nodes=max_nodes if enabled else None,
        backend=backend,
        cost=cost,
        reason=reason,
    )
