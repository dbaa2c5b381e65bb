"""A toy target whose law at a row is a hash of the row's path, with an honest cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark.cache import CacheFullError
from dspark.draft.base import DraftContext
from dspark.request import Rule, SamplingParams
from dspark.target import TargetInfo, TargetOutput
from dspark.verify.noise import NoiseKey
from tests.draft.dspark_models import VOCAB, make_features


class ToyCache:
    """Tokens instead of K/V; remembers the last forward's rows of every slot."""

    def __init__(self, limit):
        self.limit = limit
        self.committed: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}
        self.last: dict[int, tuple[list[int], list[int]]] = {}
        self.opened = 0

    def open(self, tokens):
        assert len(tokens)
        slot, self.opened = self.opened, self.opened + 1
        self.committed[slot] = []
        return slot, 0

    def reserve(self, slot, rows):
        if self.limit is not None and len(self.committed[slot]) + rows > self.limit:
            raise CacheFullError("the cache is full.")
        self.reserved[slot] = rows

    def commit(self, slot, path):
        tokens, parents = self.last.pop(slot)
        above = -1
        for row in path:
            assert parents[row] == above
            self.committed[slot].append(tokens[row])
            above = row

    def length(self, slot):
        return len(self.committed[slot])

    def release(self, slot):
        del self.committed[slot]


class ToyTarget:
    """A deterministic law per context; every promise of the protocol is checked."""

    def __init__(self, *, vocab=7, seed=0, scale=2.0, max_positions=10_000, limit=None):
        self.info = TargetInfo(
            name="toy",
            family="toy",
            vocab_size=vocab,
            hidden_size=1,
            num_layers=1,
            max_positions=max_positions,
            eos_token_ids=(),
            dtype="float32",
            device="cpu",
        )
        self.exactness = None
        self.seed, self.scale, self.limit = seed, scale, limit
        self.rows: list[int] = []  # rows of every forward
        self.broken: set[tuple[int, ...]] = set()  # paths' endings that yield NaN
        self.cache: ToyCache | None = None

    def new_cache(self, *, memory_limit=None):
        self.cache = ToyCache(self.limit)
        return self.cache

    def logits(self, tokens):
        """float32 [V] after these tokens; depends on all of them."""
        tokens = [int(t) for t in tokens]
        if any(tuple(tokens[-len(end) :]) == end for end in self.broken):
            return np.full(self.info.vocab_size, np.nan, dtype=np.float32)
        rng = np.random.default_rng([self.seed, len(tokens), *tokens])
        return (self.scale * rng.standard_normal(self.info.vocab_size)).astype(np.float32)

    def forward(self, batch, cache, *, capture=()):
        assert cache is self.cache
        self.rows.append(batch.num_rows)
        seen: dict[int, list[int]] = {}
        for span in batch.spans:
            size = span.stop - span.start
            assert cache.reserved.pop(span.slot) >= size
            assert span.slot not in cache.last, "an earlier forward was neither kept nor dropped"
            for row in range(span.start, span.stop):
                above = int(batch.parent[row])
                assert above == -1 or span.start <= above < row
                context = cache.committed[span.slot] if above < 0 else seen[above]
                assert batch.positions[row] == len(context) < self.info.max_positions
                seen[row] = [*context, int(batch.token_ids[row])]
            parents = batch.parent[span.start : span.stop]
            local = np.where(parents < 0, -1, parents - span.start).tolist()
            tokens = batch.token_ids[span.start : span.stop].tolist()
            cache.last[span.slot] = (tokens, local)
        rows = [self.logits(seen[int(row)]) for row in batch.output_rows]
        stacked = np.stack(rows) if rows else np.zeros((0, self.info.vocab_size), np.float32)
        return TargetOutput(torch.from_numpy(stacked))


@pytest.fixture
def toy_target():
    """The class, to be made with options."""
    return ToyTarget


@pytest.fixture
def make_context():
    """A context with sensible defaults: a prompt of two tokens."""

    def make(tokens, *, rule=Rule.GREEDY, budget=8, depth=4, **options):
        temperature = 0.0 if rule is Rule.GREEDY else options.pop("temperature", 1.0)
        values = {
            "request_id": 0,
            "prompt_length": 2,
            "params": SamplingParams(temperature=temperature, **options.pop("params", {})),
            "noise": NoiseKey(11),
            "round": 0,
            **options,
        }
        return DraftContext(tokens=tokens, rule=rule, budget=budget, depth=depth, **values)

    return make


@pytest.fixture
def given(make_context):
    """A context of a text of a length, with the hidden states of its last rows."""

    def make(size, *, new=None, seed=0, text=None, **options):
        new = size - 1 if new is None else new
        tokens = list(text or np.random.default_rng(seed).integers(0, VOCAB, 400).tolist())[:size]
        rows = make_features(size - 1, seed)
        features = {k: v[size - 1 - new :] for k, v in rows.items()} if new else None
        return make_context(tokens, features=features, request_id=seed, **options)

    return make
