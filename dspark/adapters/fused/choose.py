"""Which path a wrapped target takes: the fused decoder or stock modules.

Where the fused decoder can run a model, it is checked with the real weights (rows bit for bit in
any company, logits against the stock modules) and timed against the plain path in the mode that was
asked for. The finding is kept per machine, threads, dtype and weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dspark import exactness
from dspark.adapters.base import FamilyAdapter
from dspark.adapters.fused.layout import NotFused, read_parts
from dspark.adapters.fused.library import Library, load_library
from dspark.adapters.fused.target import FusedTarget
from dspark.adapters.hf.target import HFTarget
from dspark.errors import CapabilityError
from dspark.models.store import cache_root
from dspark.native import PATH_VARIABLE, PATHS, wanted_path
from dspark.registry import LoadOptions
from dspark.target import BatchPart, Target, TargetInfo, TokenBatch

__all__ = ["PATHS", "PATH_VARIABLE", "check_rows", "choose_target", "step_seconds"]

logger = logging.getLogger(__name__)

_LEAST_PARAMETERS = 10_000_000
"""Smaller models stay on the plain path unless asked: compiling would not pay."""

_TIMED_ROWS = (1, 16)
_TIMED_PAIRS = 6
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06}
"""Largest difference from the plain path's logits, relative to the largest logit."""

_ROUNDED = 0.1
"""The same for quantised weights, where the fused path rounds its inputs to int8 as well."""

_CHUNKS = (1, 2, 3, 4, 5, 6, 7, 9, 11, 15, 17)
"""Sizes of forwards that give 80 rows, for the check of row counts."""


def choose_target(
    model: Any,
    adapter: FamilyAdapter,
    options: LoadOptions,
    plain: Callable[[], HFTarget],
    *,
    eos_token_ids: tuple[int, ...] = (),
    fingerprint: str = "",
) -> Target:
    """Make a target of a loaded transformers model, on the faster path.

    Args:
        model: A causal LM as it was loaded; used up, whichever path is taken.
        adapter: Its family.
        options: `path` says which path; "auto" measures if there is a folder to keep the finding.
        plain: Makes the target of the plain path.
        eos_token_ids: Tokens that end a text.
        fingerprint: What tells these weights from others of the same config.

    Raises:
        ConfigError: If the path is none of PATHS.
        CapabilityError: If the fused path was asked for and cannot be taken.
    """
    wanted = wanted_path(options.path)
    if wanted == "plain" or options.has_many_rows:
        return plain()
    if wanted == "auto" and not _pays(model, options):
        return plain()
    try:
        library = load_library(cache_root() / "kernels")
        loading = _Loading(model, adapter, options, library, eos_token_ids)
        return _measured(loading, plain, fingerprint) if wanted == "auto" else loading.forced()
    except NotFused as exc:
        if wanted == "fused":
            raise CapabilityError(
                f"the fused path cannot be taken for {options.name}: {exc}.",
                hint="leave the choice to the check at load, or take the plain path",
            ) from exc
        logger.info("%s takes the plain path: %s", options.name, exc)
        return _with_note(plain(), str(exc))


class _Loading:
    """One model on its way to a fused target."""

    def __init__(
        self,
        model: Any,
        adapter: FamilyAdapter,
        options: LoadOptions,
        library: Library,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        model.eval().requires_grad_(False)
        self.options = options
        self.library = library
        self._model = model
        self._adapter = adapter
        config = model.config.get_text_config()
        self.config: dict[str, Any] = model.config.to_dict()
        self.info = TargetInfo(
            name=options.name,
            family=adapter.family,
            vocab_size=int(model.get_output_embeddings().out_features),
            hidden_size=int(config.hidden_size),
            num_layers=int(config.num_hidden_layers),
            max_positions=int(config.max_position_embeddings),
            eos_token_ids=eos_token_ids,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            device="cpu",
            quant=options.quant,
        )

    def build(self, *, lets_go: bool) -> FusedTarget:
        """Pack the weights; with `lets_go` the model cannot be wrapped any more."""
        quant = self.options.quant
        parts = read_parts(self._model, self._adapter, self.library.lanes, quant)
        return FusedTarget(parts, self.library, self.info, quant=quant, lets_go=lets_go)

    def decide(self, target: FusedTarget, *, holds: bool) -> FusedTarget:
        """Set the target's exact mode from what the check found."""
        if not holds and self.options.exact is not False:
            raise NotFused("its rows depend on their company on this machine")
        target.set_exactness(
            exactness.report(
                wanted=self.options.exact,
                holds=holds,
                min_rows=1,
                backend=target.exactness.backend,
                cost=0.0 if holds else None,
            )
        )
        return target

    def forced(self) -> FusedTarget:
        """The fused target without regard to the plain path; checked, not timed."""
        target = self.build(lets_go=True)
        return self.decide(target, holds=check_rows(target) and exactness.check_trees(target))


def _measured(loading: _Loading, plain: Callable[[], HFTarget], fingerprint: str) -> Target:
    """The faster of both paths, from the record if there is one."""
    options, library = loading.options, loading.library
    folder = options.probe_folder
    what = f"{fingerprint} {library.fingerprint} exact={options.exact} {options.quant}"
    key = exactness.probe_key(loading.config, loading.info.dtype, "cpu", f"path {what}")
    record = exactness.read_probe(folder, key) if folder is not None else None
    stock = None
    if record is None:
        logger.info("timing both paths of %s on this machine (once)", options.name)
        fused = loading.build(lets_go=False)
        stock = plain()
        record = _compare(fused, stock, options.quant)
        if folder is not None:
            exactness.write_probe(folder, key, record)
    if record["path"] == "fused":
        target = fused if stock is not None else loading.build(lets_go=True)
        return loading.decide(target, holds=bool(record["holds"]))
    return _with_note(plain() if stock is None else stock, str(record["reason"]))


def _compare(fused: FusedTarget, stock: HFTarget, quant: str) -> dict[str, Any]:
    """Check the fused path and time both; what is kept."""
    holds = check_rows(fused) and exactness.check_trees(fused)
    difference = _difference(fused, stock)
    agrees = difference <= (_TOLERANCE[fused.decoder.dtype] if quant == "none" else _ROUNDED)
    seconds = step_seconds({"fused": fused, "plain": stock}, _TIMED_ROWS, _TIMED_PAIRS)
    ratios = [seconds["fused"][rows] / seconds["plain"][rows] for rows in _TIMED_ROWS]
    reason = ""
    if not agrees:
        reason = f"its fused logits are off by {difference:.1e}"
    elif not holds:
        reason = "its fused rows depend on their company on this machine"
    elif ratios[0] * ratios[1] >= 1:
        reason = "the fused path is no faster here"
    return {
        "path": "plain" if reason else "fused",
        "reason": reason,
        "holds": holds,
        "difference": difference,
        "seconds": seconds,
    }


def check_rows(target: Target) -> bool:
    """Compare the rows of one long forward with the same rows in forwards of many sizes.

    Args:
        target: A target in exact mode.

    Returns:
        True if all logits are bitwise the same.
    """
    rng = np.random.default_rng(2)
    count = min(sum(_CHUNKS), target.info.max_positions - 1)
    tokens = rng.integers(0, target.info.vocab_size, count)
    whole = _chain_logits(target, tokens, [count])
    return torch.equal(whole, _chain_logits(target, tokens, _CHUNKS))


def _chain_logits(target: Target, tokens: np.ndarray, sizes: Any) -> torch.Tensor:
    """Logits of all rows of a chain that is run in pieces of these sizes."""
    cache = target.new_cache()
    slot, _ = cache.open([])
    found, start = [], 0
    for size in sizes:
        part = tokens[start : start + size]
        if len(part) == 0:
            break
        n = len(part)
        cache.reserve(slot, n)
        rows = BatchPart(slot, part, np.arange(start, start + n), np.arange(-1, n - 1), range(n))
        found.append(target.forward(TokenBatch.build([rows]), cache).logits)
        cache.commit(slot, range(n))
        start += n
    return torch.cat(found)


def _difference(fused: Target, stock: Target) -> float:
    """Largest difference of the logits of a text, relative to the largest logit."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, fused.info.vocab_size, min(24, fused.info.max_positions - 1))
    ours = _chain_logits(fused, tokens, [len(tokens)]).float()
    theirs = _chain_logits(stock, tokens, [len(tokens)]).float()
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    return difference if np.isfinite(difference) else float("inf")


def step_seconds(
    targets: dict[str, Target], rows: tuple[int, ...], pairs: int, *, context: int = 32
) -> dict[str, dict[int, float]]:
    """Seconds of a step by target and number of rows, steps of the targets in turn.

    Args:
        targets: Targets by name.
        rows: Sizes of steps, a chain each.
        pairs: Steps of each; the least counts, for other work can only make a step slower.
        context: Tokens before the step.
    """
    slots = {}
    for name, target in targets.items():
        cache = target.new_cache()
        slot, _ = cache.open([])
        cache.reserve(slot, context)
        prompt = BatchPart.chain(slot, list(range(2, 2 + context)), 0, want_last=False)
        target.forward(TokenBatch.build([prompt]), cache)
        cache.commit(slot, range(context))
        slots[name] = (cache, slot)
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in rows} for name in targets}
    for _ in range(pairs):
        for n in rows:
            for name, target in targets.items():
                cache, slot = slots[name]
                cache.reserve(slot, n)
                at = np.arange(context, context + n)
                part = BatchPart(slot, [1] * n, at, np.arange(-1, n - 1), range(n))
                batch = TokenBatch.build([part])
                start = time.perf_counter()
                target.forward(batch, cache)
                times[name][n].append(time.perf_counter() - start)
    return {name: {n: min(t) for n, t in found.items()} for name, found in times.items()}


def _pays(model: Any, options: LoadOptions) -> bool:
    """Measuring is worth its time: the finding can be kept, and the model is not tiny."""
    if options.probe_folder is None:
        return False
    count = sum(int(p.numel()) for p in model.parameters())
    return count >= _LEAST_PARAMETERS


def _with_note(target: HFTarget, reason: str) -> HFTarget:
    """Say beside the linear kernel why this is the plain path."""
    report = target.exactness
    target.set_exactness(replace(report, backend=f"{report.backend} (plain path: {reason})"))
    return target
