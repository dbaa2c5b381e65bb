"""A target whose logits pass through transformers' processors before anything judges them.

A processor gets what it would get in plain decoding: the tokens so far, here prompt, output and the
node's path, with the row's left padding in front, and the logits of that node. A node that its
parent's processed logits rule out is never reached, so processors do not see it: a grammar need
not cope with a path that breaks it.

Letters: N rows of the batch, M rows with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from dspark.active import ActiveRequest
from dspark.adapters.hf.target import HFTarget
from dspark.cache import Cache
from dspark.target import ExactnessReport, RowSpan, TargetInfo, TargetOutput, TokenBatch

__all__ = ["ProcessedRow", "ProcessedTarget"]


@dataclass(frozen=True, slots=True, eq=False)
class ProcessedRow:
    """One row of a call to generate.

    Attributes:
        request: Its request.
        padding: Token ids of its left padding.
        processors: What its logits pass through; the same result for the same tokens.
    """

    request: ActiveRequest
    padding: tuple[int, ...]
    processors: LogitsProcessorList


class ProcessedTarget:
    """Target (dspark.target) over another, with processors inside `processing`.

    Args:
        inner: The target that computes.
    """

    def __init__(self, inner: HFTarget) -> None:
        self._inner = inner
        self._rows: Sequence[ProcessedRow] = ()

    @property
    def info(self) -> TargetInfo:
        """Facts about the model."""
        return self._inner.info

    @property
    def exactness(self) -> ExactnessReport:
        """What the probe found."""
        return self._inner.exactness

    def new_cache(self, *, memory_limit: int | None = None) -> Cache:
        """Make an empty cache."""
        return self._inner.new_cache(memory_limit=memory_limit)

    @contextmanager
    def processing(self, rows: Sequence[ProcessedRow]) -> Iterator[None]:
        """Apply the rows' processors to every forward inside the block."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = ()

    def forward(
        self, batch: TokenBatch, cache: Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        """Run one ragged batch; see `dspark.target.Target.forward`."""
        output = self._inner.forward(batch, cache, capture=capture)
        by_slot = {row.request.slot: row for row in self._rows if row.processors}
        if not by_slot:
            return output
        logits = output.logits.to(torch.float32, copy=True)
        index = {int(row): place for place, row in enumerate(batch.output_rows)}
        for span in batch.spans:
            row = by_slot.get(span.slot)
            if row is not None:
                context = row.request.tokens[: cache.length(span.slot)]
                _process(logits, batch, span, index, row, [*row.padding, *context])
        return replace(output, logits=logits)


def _process(
    logits: Tensor,
    batch: TokenBatch,
    span: RowSpan,
    index: dict[int, int],
    row: ProcessedRow,
    context: list[int],
) -> None:
    """Process one span's logits in place, all nodes of a depth at once.

    Args:
        logits: float32 [M, V].
        batch: The batch.
        span: Its rows that belong to one slot.
        index: Row of the batch -> row of `logits`.
        row: Whose they are.
        context: Padding and tokens before the span.
    """
    paths: dict[int, list[int]] = {-1: []}
    levels: dict[int, list[int]] = {}
    for number in range(span.start, span.stop):
        token = int(batch.token_ids[number])
        paths[number] = [*paths[int(batch.parent[number])], token]
        if number in index:
            levels.setdefault(len(paths[number]), []).append(number)
    dropped: set[int] = set()
    for _, level in sorted(levels.items()):
        alive = []
        for number in level:
            parent = int(batch.parent[number])
            ruled_out = parent in index and bool(
                torch.isneginf(logits[index[parent], int(batch.token_ids[number])])
            )
            if ruled_out or parent in dropped:
                dropped.add(number)
            else:
                alive.append(number)
        if alive:
            places = [index[number] for number in alive]
            ids = torch.tensor([context + paths[n] for n in alive], device=logits.device)
            logits[places] = row.processors(ids, logits[places])  # type: ignore[arg-type]
