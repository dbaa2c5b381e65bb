"""Forwards against each other: rounding noise, trees against plain decoding, rollback.

The noise of a target is how far the logits of one context move when only the shape of the forward
changes; it tells a numeric tie from a real divergence. In exact mode it must be zero.

The rollback check runs a tree, keeps a path of it that leaves rejected rows before, between and
after, decodes the next token plainly, and compares with a fresh prefill of the same tokens. What a
rejected row left behind shows as a difference.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dspark.cache import Cache
from dspark.errors import DsparkError
from dspark.eval.audit_report import CheckResult, Status
from dspark.target import BatchPart, Target, TokenBatch

__all__ = ["RollbackAudit", "TargetNoise", "fresh_logits", "measure_noise"]

_CHUNK = 512
_SAFETY = 4.0  # two values are compared, each moves either way, and a few contexts are measured
_EXPLICABLE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}
"""Noise that a dtype's rounding may explain, as a part of the largest logit."""

# Row 0 is the anchor. Accepted is 0, 2, 5: rejected rows stand before, between and after.
_PARENTS = (-1, 0, 0, 1, 2, 2, 5)
_PATH = (0, 2, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetNoise:
    """How far logits move with the shape of the forward.

    Attributes:
        measured: Largest difference seen, in logits.
        tolerance: Differences of two logits up to this are called ties; 0 in exact mode.
        contexts: Contexts measured at.
    """

    measured: float
    tolerance: float
    contexts: int


def _prefill(target: Target, cache: Cache, tokens: Sequence[int], *, rest: int) -> int:
    """Open a slot and commit all but the last `rest` tokens."""
    slot, shared = cache.open(tokens)
    end = len(tokens) - rest
    for start in range(shared, end, _CHUNK):
        chunk = tokens[start : min(start + _CHUNK, end)]
        cache.reserve(slot, len(chunk))
        part = BatchPart.chain(slot, chunk, start, want_last=False)
        target.forward(TokenBatch.build([part]), cache)
        cache.commit(slot, range(len(chunk)))
    return slot


def _last_row(target: Target, cache: Cache, slot: int, tokens: Sequence[int]) -> torch.Tensor:
    """Run what the slot does not hold yet of these tokens; logits float32 [V] of the last."""
    done = cache.length(slot)
    cache.reserve(slot, len(tokens) - done)
    part = BatchPart.chain(slot, tokens[done:], done, want_last=True)
    logits = target.forward(TokenBatch.build([part]), cache).logits[0]
    cache.commit(slot, range(len(tokens) - done))
    return logits.detach().to("cpu", torch.float32)


def fresh_logits(target: Target, tokens: Sequence[int]) -> torch.Tensor:
    """Logits float32 [V] after these tokens, by plain prefill in a cache of their own."""
    cache = target.new_cache()
    slot = _prefill(target, cache, tokens, rest=min(_CHUNK, len(tokens)))
    return _last_row(target, cache, slot, tokens)


def measure_noise(target: Target, contexts: Sequence[Sequence[int]]) -> TargetNoise:
    """Measure how far logits move with the shape of the forward.

    Args:
        target: The target.
        contexts: Token lists.

    Returns:
        The noise. A tree's shape counts only as far as the dtype may explain it, so that a broken
        tree cannot excuse itself.
    """
    plain, tree, largest = 0.0, 0.0, 0.0
    for tokens in contexts:
        reference = fresh_logits(target, tokens)
        largest = max(largest, float(reference.abs().max()))
        stepped_cache = target.new_cache()
        slot = _prefill(target, stepped_cache, tokens, rest=min(2, len(tokens)))
        for end in range(len(tokens) - 1, len(tokens) + 1):
            if end > stepped_cache.length(slot):
                stepped = _last_row(target, stepped_cache, slot, tokens[:end])
        plain = max(plain, float((stepped - reference).abs().max()))
        if target.info.can_verify_trees:
            tree = max(tree, float((_beside_nodes(target, tokens) - reference).abs().max()))
    explicable = largest * _EXPLICABLE.get(target.info.dtype, 3e-2)
    measured = max(plain, min(tree, explicable))
    tolerance = 0.0 if target.exactness.enabled else min(_SAFETY * measured, explicable)
    return TargetNoise(measured=measured, tolerance=tolerance, contexts=len(contexts))


def _beside_nodes(target: Target, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of the last token when it is the anchor of a small tree, in a fresh cache."""
    cache = target.new_cache()
    slot = _prefill(target, cache, tokens, rest=1)
    rows = _rows_allowed(target)
    return _tree_logits(target, cache, slot, [tokens[-1], *tokens[: rows - 1]][:rows])[0]


def _rows_allowed(target: Target) -> int:
    """Rows of the audit's tree that the target takes."""
    most = target.exactness.max_nodes
    return len(_PARENTS) if most is None else min(len(_PARENTS), most + 1)


def _tree_logits(target: Target, cache: Cache, slot: int, tokens: Sequence[int]) -> torch.Tensor:
    """Run a tree's first rows; logits float32 [rows, V]. They stay uncommitted."""
    rows = len(tokens)
    depth = [0] * rows
    for row in range(1, rows):
        depth[row] = depth[_PARENTS[row]] + 1
    start = cache.length(slot)
    cache.reserve(slot, rows)
    positions = [start + d for d in depth]
    part = BatchPart(slot, list(tokens), positions, list(_PARENTS[:rows]), range(rows))
    logits = target.forward(TokenBatch.build([part]), cache).logits
    return logits.detach().to("cpu", torch.float32)


@dataclass(slots=True)
class RollbackAudit:
    """Rounds at the level of target and cache, against fresh prefills.

    Attributes:
        target: The target.
        noise: Its noise.
        seed: Seed of the drafted tokens.
    """

    target: Target
    noise: TargetNoise
    seed: int = 0
    rounds: int = 0
    rejected: int = 0
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, tokens: Sequence[int], rounds: int = 3) -> None:
        """Run rounds after a context of at least two tokens; stop at the first fault."""
        rng = np.random.default_rng([self.seed, len(tokens)])
        text = list(tokens)
        cache = self.target.new_cache()
        slot = _prefill(self.target, cache, text, rest=1)
        rows = _rows_allowed(self.target)
        path = [row for row in _PATH if row < rows]
        before = len(self.faults)
        for _ in range(rounds):
            vocab = self.target.info.vocab_size
            drafted = [text[-1], *rng.integers(0, vocab, rows - 1).tolist()]
            if len(text) + rows + 1 > self.target.info.max_positions:
                return
            try:
                self._round(cache, slot, text, drafted, path)
            except DsparkError as exc:
                self.faults.append(f"the cache refused a round: {exc.message}")
            if len(self.faults) > before:
                return
            self.rounds += 1
            self.rejected += rows - len(path)

    def _round(
        self, cache: Cache, slot: int, text: list[int], drafted: list[int], path: list[int]
    ) -> None:
        """One tree, a commit, and a plain step; `text` grows by the path and a token."""
        logits = _tree_logits(self.target, cache, slot, drafted)
        cache.commit(slot, path)
        text.extend(drafted[row] for row in path[1:])
        if cache.length(slot) != len(text):
            self.faults.append(
                f"after a round the cache holds {cache.length(slot)} tokens instead of {len(text)}"
            )
            return
        self._compare("a tree's row", logits[path[-1]], text)
        text.append(int(drafted[-1]))
        self._compare("the step after a round", _last_row(self.target, cache, slot, text), text)
        text.append(int(drafted[0]))  # the next anchor

    def _compare(self, what: str, logits: torch.Tensor, text: Sequence[int]) -> None:
        difference = float((logits - fresh_logits(self.target, text)).abs().max())
        self.worst = max(self.worst, difference)
        if not difference <= self.noise.tolerance:  # NaN too
            self.faults.append(
                f"{what} differs from a fresh prefill by {difference:.2g} logits after "
                f"{len(text)} tokens, where {self.noise.tolerance:.2g} is allowed"
            )

    def result(self) -> CheckResult:
        """What was seen."""
        details = {
            "rounds": self.rounds,
            "rejected_nodes": self.rejected,
            "worst_difference": self.worst,
            "tolerance": self.noise.tolerance,
            "noise": self.noise.measured,
            "faults": self.faults[:8],
        }
        name = "trees and rollback"
        if self.faults:
            status, evidence = Status.FOUND, self.faults[0]
            advice = "report it; until then decode with --draft none"
        elif not self.rounds:
            status, evidence = Status.INCONCLUSIVE, "no round fitted into the contexts"
            advice = "give longer contexts or a target with more positions"
        else:
            same = "bitwise" if self.noise.tolerance == 0 else f"within {self.noise.tolerance:.2g}"
            status, advice = Status.PASSED, ""
            evidence = (
                f"after {self.rounds} rounds with {self.rejected} rejected rows logits are those "
                f"of a fresh prefill, {same}"
            )
        return CheckResult(
            name=name,
            status=status,
            evidence=evidence,
            advice=advice,
            seconds=self.seconds,
            details=details,
        )
