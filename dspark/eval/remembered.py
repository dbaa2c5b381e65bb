"""A target that remembers its logits, so that thousands of samples cost few forwards.

Testing the law of what the engine emits takes thousands of samples at the same context. Nearly all
their rows are the same few continuations, so a row is computed once, by the real target, and then
remembered. Everything else (drafter, rounds, noise, verification, what is committed) is the real
code. Since plain law and samples come from the same remembered logits, rounding plays no part.

A request's first token is drawn when its prompt is prefilled, without any draft. So that all
samples begin their first drafted round in the same context, the law after the prompt is made
certain of the context's last token.

Letters: N rows, M rows asked for, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from dspark.cache import Cache, CacheUsage
from dspark.errors import ConfigError, ShapeError
from dspark.target import BatchPart, ExactnessReport, Target, TargetInfo, TargetOutput, TokenBatch

__all__ = ["RememberedCache", "RememberedTarget"]

_BYTES = 512 << 20
_ROWS = 32  # rows of a forward that fills in what is missing
_CHUNK = 512


class RememberedCache:
    """Tokens in the place of K/V: only what was committed counts, by construction."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}
        self._rows: dict[int, tuple[list[int], list[int]]] = {}
        self._opened = 0

    def open(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Open a slot; nothing is shared."""
        slot, self._opened = self._opened, self._opened + 1
        self._tokens[slot] = []
        return slot, 0

    def tokens(self, slot: int) -> list[int]:
        """Committed tokens of a slot."""
        return self._tokens[slot]

    def keep_rows(self, slot: int, tokens: list[int], parents: list[int]) -> None:
        """Note the rows of a forward, until they are committed."""
        self._rows[slot] = (tokens, parents)

    def reserve(self, slot: int, rows: int) -> None:
        """Nothing to reserve."""

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep the rows of a path."""
        tokens, parents = self._rows.pop(slot)
        above = -1
        for row in path:
            if parents[row] != above:
                raise ShapeError(f"row {row} was committed after {above}, not its parent.")
            self._tokens[slot].append(tokens[row])
            above = row

    def length(self, slot: int) -> int:
        """Committed tokens of the slot."""
        return len(self._tokens[slot])

    def release(self, slot: int) -> None:
        """Close the slot."""
        self._tokens.pop(slot, None)
        self._rows.pop(slot, None)

    def scrub(self, slot: int) -> None:
        """Nothing is left behind."""

    def forget_kept(self) -> None:
        """Nothing is kept."""

    def usage(self) -> CacheUsage:
        """No memory to speak of."""
        return CacheUsage(0, 1, 0, None, len(self._tokens))

    def page_bytes(self) -> int:
        """Bytes of one page."""
        return 1


@dataclass(frozen=True, slots=True)
class _Row:
    logits: torch.Tensor  # [V]
    hidden: dict[int, torch.Tensor]  # [D] each


class RememberedTarget:
    """A target over another that knows one context and what follows it.

    Args:
        target: The real target.
        context: Tokens that samples start from, at least two. The prompt to submit is all but the
            last one, which will come out first.
        capture: Layers whose hidden states the drafter needs.
        memory: Bytes of logits to remember.

    Attributes:
        prompt: The prompt to submit.
        computed: Rows that were run through the real target after the prompt.

    Raises:
        ConfigError: If there is only one token.
    """

    def __init__(
        self,
        target: Target,
        context: Sequence[int],
        *,
        capture: Sequence[int] = (),
        memory: int = 256 << 20,
    ) -> None:
        if len(context) < 2:
            raise ConfigError(f"a context has {len(context)} tokens, but needs 2 or more.")
        self._target = target
        self._capture = tuple(capture)
        self.prompt = [int(token) for token in context[:-1]]
        self.computed = 0
        self._forced = int(context[-1])
        self._cache: Cache = target.new_cache()
        self._known: OrderedDict[tuple[int, ...], _Row] = OrderedDict()
        self._most = max(256, memory // (4 * target.info.vocab_size))
        self._slot, self._inside = self._prefill()

    @property
    def info(self) -> TargetInfo:
        """Facts about the model."""
        return self._target.info

    @property
    def exactness(self) -> ExactnessReport:
        """The real target's, without its limit on nodes, which says nothing about laws."""
        return replace(self._target.exactness, max_nodes=None)

    def new_cache(self, *, memory_limit: int | None = None) -> RememberedCache:
        """Make an empty cache; it needs no memory, so the limit means nothing."""
        return RememberedCache()

    def logits(self, suffix: Sequence[int]) -> torch.Tensor:
        """Logits [V] after the prompt and tokens that follow it."""
        key = tuple(suffix)
        self._fill([key])
        return self._known[key].logits

    def forward(
        self, batch: TokenBatch, cache: Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        """Answer a batch from memory; what is missing is computed first."""
        if not isinstance(cache, RememberedCache):
            raise ConfigError("the cache is not one that this target has made.")
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        places = _places_of(batch, cache, len(self.prompt))
        self._fill([suffix for _, suffix in places if suffix])
        rows = [self._known[suffix] if suffix else self._inside[at] for at, suffix in places]
        asked = [rows[int(row)].logits for row in batch.output_rows]
        hidden = {layer: torch.stack([row.hidden[layer] for row in rows]) for layer in capture}
        width = self.info.vocab_size
        return TargetOutput(torch.stack(asked) if asked else torch.zeros(0, width), hidden)

    def _prefill(self) -> tuple[int, list[_Row]]:
        """Run the prompt through the real target; its slot, and what rows of the prompt give."""
        slot, _ = self._cache.open([] if self._capture else self.prompt)
        parts: dict[int, list[torch.Tensor]] = {}
        while (done := self._cache.length(slot)) < len(self.prompt):
            chunk = self.prompt[done : done + _CHUNK]
            self._cache.reserve(slot, len(chunk))
            batch = TokenBatch.build([BatchPart.chain(slot, chunk, done, want_last=False)])
            output = self._target.forward(batch, self._cache, capture=self._capture)
            self._cache.commit(slot, range(len(chunk)))
            for layer, rows in output.hidden.items():
                parts.setdefault(layer, []).append(rows)
        hidden = {layer: torch.cat(rows) for layer, rows in parts.items()}
        forced = torch.full((self.info.vocab_size,), -torch.inf)
        forced[self._forced] = 0.0
        inside = range(len(self.prompt))
        return slot, [_Row(forced, {k: rows[at] for k, rows in hidden.items()}) for at in inside]

    def _fill(self, suffixes: Iterable[tuple[int, ...]]) -> None:
        """Compute what is not known yet of these continuations of the prompt."""
        missing = sorted({suffix for suffix in suffixes if suffix not in self._known})
        if not missing:
            return
        limit = self._target.exactness.max_nodes
        most = _ROWS if limit is None else max(1, min(_ROWS, limit))
        step = max(1, most // max(map(len, missing)))
        for start in range(0, len(missing), step):
            self._compute(missing[start : start + step])

    def _compute(self, suffixes: Sequence[tuple[int, ...]]) -> None:
        """Run continuations as one tree, and forget them in the real cache."""
        rows: dict[tuple[int, ...], int] = {}
        for suffix in suffixes:
            for size in range(1, len(suffix) + 1):
                rows.setdefault(suffix[:size], len(rows))
        first = len(self.prompt)
        part = BatchPart(
            self._slot,
            [path[-1] for path in rows],
            [first + len(path) - 1 for path in rows],
            [rows[path[:-1]] if len(path) > 1 else -1 for path in rows],
            range(len(rows)),
        )
        self._cache.reserve(self._slot, len(rows))
        batch = TokenBatch.build([part])
        output = self._target.forward(batch, self._cache, capture=self._capture)
        self._cache.commit(self._slot, [])
        self.computed += len(rows)
        logits = output.logits.detach().cpu()
        for path, row in rows.items():
            hidden = {layer: values[row].clone() for layer, values in output.hidden.items()}
            # What is known stays: another shape of forward might round otherwise.
            self._known.setdefault(path, _Row(logits[row].clone(), hidden))


def _places_of(
    batch: TokenBatch, cache: RememberedCache, size: int
) -> list[tuple[int, tuple[int, ...]]]:
    """Where every row stands: its position, and the tokens after the prompt up to and with it.

    The cache learns of the rows.
    """
    seen: list[tuple[int, tuple[int, ...]]] = []
    for span in batch.spans:
        committed = cache.tokens(span.slot)
        start = len(committed) - 1, tuple(committed[size:])
        parents = batch.parent[span.start : span.stop].tolist()
        tokens = batch.token_ids[span.start : span.stop].tolist()
        for token, above in zip(tokens, parents, strict=True):
            at, suffix = start if above < 0 else seen[above]
            seen.append((at + 1, (*suffix, token) if at + 1 >= size else ()))
        local = [-1 if above < 0 else above - span.start for above in parents]
        cache.keep_rows(span.slot, tokens, local)
    return seen
