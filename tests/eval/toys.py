"""A target whose logits are a table of the last two tokens, with an honest cache: fast."""

from __future__ import annotations

import numpy as np
import torch

from dspark.cache import CacheUsage
from dspark.errors import ShapeError
from dspark.target import ExactnessReport, TargetInfo, TargetOutput

VOCAB = 16


class ToyCache:
    """Tokens in the place of K/V."""

    def __init__(self):
        self.committed: dict[int, list[int]] = {}
        self.last: dict[int, tuple[list[int], list[int]]] = {}
        self.opened = 0

    def open(self, tokens):
        slot, self.opened = self.opened, self.opened + 1
        self.committed[slot] = []
        return slot, 0

    def reserve(self, slot, rows):
        pass

    def commit(self, slot, path):
        tokens, parents = self.last.pop(slot)
        above = -1
        for row in path:
            if parents[row] != above:
                raise ShapeError("not a path")
            self.committed[slot].append(tokens[row])
            above = row

    def length(self, slot):
        return len(self.committed[slot])

    def release(self, slot):
        del self.committed[slot]
        self.last.pop(slot, None)

    def scrub(self, slot):
        pass

    def forget_kept(self):
        pass

    def usage(self):
        return CacheUsage(0, 1, 0, None, len(self.committed))

    def page_bytes(self):
        return 1


class ToyTarget:
    """Logits of a context: a row of a random table, chosen by its last two tokens."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.info = TargetInfo(
            name="toy",
            family="toy",
            vocab_size=VOCAB,
            hidden_size=1,
            num_layers=1,
            max_positions=4096,
            eos_token_ids=(),
            dtype="float32",
            device="cpu",
        )
        self.exactness = ExactnessReport(
            enabled=True, holds=True, min_rows=1, backend="table", cost=None, reason="on, a table"
        )

    def new_cache(self, *, memory_limit=None):
        return ToyCache()

    def forward(self, batch, cache, *, capture=()):
        before = np.zeros(batch.num_rows, dtype=np.int64)
        for span in batch.spans:
            committed = cache.committed[span.slot]
            parents = batch.parent[span.start : span.stop]
            last = committed[-1] if committed else 0
            before[span.start : span.stop] = np.where(parents < 0, last, batch.token_ids[parents])
            local = np.where(parents < 0, -1, parents - span.start).tolist()
            cache.last[span.slot] = (batch.token_ids[span.start : span.stop].tolist(), local)
        rows = (before * VOCAB + batch.token_ids)[batch.output_rows]
        return TargetOutput(self.table[torch.from_numpy(rows)])


def toy_pair() -> tuple[ToyTarget, ToyTarget]:
    """A target and a draft that agrees with it in part."""
    rng = np.random.default_rng(5)
    table = rng.normal(size=(VOCAB * VOCAB, VOCAB)) * 1.5
    other = 0.7 * table + 0.9 * rng.normal(size=table.shape)
    return tuple(ToyTarget(torch.from_numpy(values).float()) for values in (table, other))
