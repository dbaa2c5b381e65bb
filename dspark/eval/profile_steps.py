"""Steps of a target to be timed: requests with contexts, trees behind them, nothing of the engine.

Every request has a committed context of its own; the rows of a step are trees behind these, as in
a round (`profile_tree`). After a step its rows are dropped, so that every step starts from the same
state. Only the forward is timed, with the wait for the device, as the engine's own clock does
(dspark/payoff.py).

Contexts and rows are text where there is a tokenizer, since the experts that rows wake depend on
their tokens; else random tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dspark.cache import Cache
from dspark.draft.grow import drawn_shape
from dspark.eval.prompts import OWN, load_prompts
from dspark.target import BatchPart, Target, TokenBatch

if TYPE_CHECKING:
    from dspark.text import TextCodec

__all__ = [
    "MOST_ROWS",
    "StepBench",
    "profile_tree",
    "sample_texts",
    "split_rows",
]

MOST_ROWS = 32
"""Rows of one request at the most."""

_CHUNK = 512  # rows of a prefill forward
_DEPTH = 8  # of a request's tree
_WIDTH = 4  # children of a node
_APART = 7  # tokens of the text between a node's children


def profile_tree(rows: int) -> tuple[list[int], list[int]]:
    """The tree that a request adds to a measured step: an anchor and rows - 1 nodes.

    The shape is the one that the rejection rule fixes beforehand (`dspark.draft.grow.drawn_shape`),
    at most 8 deep and 4 wide.

    Args:
        rows: Rows, >= 1.

    Returns:
        Parent of each row within the request (-1 for the anchor), and its depth (0 for the anchor).
    """
    tree = drawn_shape(rows - 1, _DEPTH, _WIDTH)
    return [-1, *(tree.parent + 1).tolist()], [0, *tree.depth.tolist()]


def split_rows(rows: int, most: int) -> list[int]:
    """Share rows among as few requests as may have them, evenly.

    Args:
        rows: Rows of a step.
        most: Rows of a request at the most.
    """
    count = math.ceil(rows / most)
    return [rows // count + (i < rows % count) for i in range(count)]


class StepBench:
    """Requests with committed contexts, and steps over them.

    Args:
        target: The target.
        texts: Tokens of each request.
        clock: Seconds of now.
    """

    def __init__(
        self,
        target: Target,
        texts: Sequence[Sequence[int]],
        clock: Callable[[], float],
    ) -> None:
        self._target = target
        self._texts = texts
        self._clock = clock
        self._cache: Cache = target.new_cache()
        # No tokens are named, so that no two requests share pages.
        self._slots = [self._cache.open([])[0] for _ in texts]

    def extend(self, context: int, on_rows: Callable[[int], None] | None = None) -> None:
        """Commit tokens until every request has so many.

        Args:
            context: How many.
            on_rows: Told the tokens of every forward.
        """
        for slot, text in zip(self._slots, self._texts, strict=True):
            while (done := self._cache.length(slot)) < context:
                tokens = text[done : min(done + _CHUNK, context)]
                self._cache.reserve(slot, len(tokens))
                part = BatchPart.chain(slot, tokens, done, want_last=False)
                self._target.forward(TokenBatch.build([part]), self._cache)
                self._cache.commit(slot, range(len(tokens)))
                if on_rows is not None:
                    on_rows(len(tokens))

    def step(self, shares: Sequence[int]) -> float:
        """Seconds of a step with so many rows of the first requests; the rows are dropped."""
        parts = []
        for slot, text, rows in zip(self._slots, self._texts, shares, strict=False):
            start = self._cache.length(slot)
            parents, depths = profile_tree(rows)
            # The first child of a node continues the text; its siblings hold other tokens of it.
            tokens = [
                text[start + depth + _APART * _rank(parents, i)] for i, depth in enumerate(depths)
            ]
            positions = [start + depth for depth in depths]
            self._cache.reserve(slot, rows)
            parts.append(BatchPart(slot, tokens, positions, parents, range(rows)))
        batch = TokenBatch.build(parts)
        begin = self._clock()
        logits = self._target.forward(batch, self._cache).logits
        if logits.device.type != "cpu":
            torch.accelerator.synchronize(logits.device)
        seconds = self._clock() - begin
        for part in parts:
            self._cache.commit(part.slot, [])
        return seconds

    def close(self) -> None:
        """Give the memory back."""
        for slot in self._slots:
            self._cache.release(slot)


def _rank(parents: Sequence[int], row: int) -> int:
    """How many earlier siblings a row has."""
    return sum(parent == parents[row] for parent in parents[1:row]) if row else 0


def sample_texts(
    target: Target, codec: TextCodec | None, count: int, context: int, seed: int = 0
) -> list[list[int]]:
    """Texts to measure with, no two alike, long enough for trees behind a context.

    Args:
        target: The target.
        codec: Its text codec; None takes random tokens.
        count: How many.
        context: Longest context.
        seed: Of random tokens.
    """
    vocab, length = target.info.vocab_size, context + _DEPTH + _APART * _WIDTH
    if codec is None:
        rng = np.random.default_rng(seed)
        return [rng.integers(0, vocab, length).tolist() for _ in range(count)]
    questions = load_prompts(OWN).questions
    tokens = codec.encode_plain("\n\n".join(turn for q in questions for turn in q.turns))
    tokens = [token for token in tokens if token < vocab] or [0]
    whole = tokens * (2 + (length + len(tokens) * count) // len(tokens))
    starts = [len(tokens) * i // count for i in range(count)]
    return [whole[start : start + length] for start in starts]
