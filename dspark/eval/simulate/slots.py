"""The slots of all replicas: which requests are under way, and letting new ones in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from dspark.errors import ConfigError
from dspark.eval.simulate.pool import NEW, Pool
from dspark.eval.simulate.workload import Workload
from dspark.tree import BoolArray, FloatArray, IntArray

__all__ = ["Finished", "Slots"]


@dataclass(slots=True)
class Finished:
    """Times of finished requests, in seconds; a list of arrays each, one a round."""

    first_token: list[FloatArray] = field(default_factory=list)
    whole: list[FloatArray] = field(default_factory=list)
    waited: list[FloatArray] = field(default_factory=list)
    tokens: list[IntArray] = field(default_factory=list)


class Slots:
    """M replicas with C slots each.

    Args:
        workload: Their requests.
        slots: C.
        runs_prompts: Whether prompts are run here, or requests come with their K/V and first token.
        kv_tokens: Tokens of K/V that fit, prompt and answer reserved when a request is let in; None
            for no limit.
        pool: States of texts; None if nothing is drafted.
        rng: Of the draws of states.

    Attributes:
        clock: float64 [M], seconds.
        next: int64 [M], requests let in so far.
        active: bool [M, C]; the arrays below are [M, C], too, and mean something where it is true.
        prefill: Prompt tokens that are not run yet.
        remaining: Output tokens that are missing.
        context: Committed tokens, prompt included.
        state: State of the text in the pool.

    Raises:
        ConfigError: If a request does not fit by itself.
    """

    def __init__(
        self,
        workload: Workload,
        slots: int,
        *,
        runs_prompts: bool = True,
        kv_tokens: int | None,
        pool: Pool | None,
        rng: np.random.Generator,
    ) -> None:
        replicas, _ = workload.shape
        self._work = workload
        self._runs_prompts = runs_prompts
        self._kv_tokens = kv_tokens
        self._pool = pool
        self._rng = rng
        self.need = workload.prompt + workload.output
        longest = int(self.need.max(initial=0))
        if kv_tokens is not None and longest > kv_tokens:
            raise ConfigError(
                f"a request of {longest} tokens does not fit into a cache of {kv_tokens}."
            )
        shape = (replicas, slots)
        self.clock = np.zeros(replicas)
        self.next = np.zeros(replicas, dtype=np.int64)
        self.active = np.zeros(shape, dtype=np.bool_)
        self.prefill = np.zeros(shape, dtype=np.int64)
        self.remaining = np.zeros(shape, dtype=np.int64)
        self.context = np.zeros(shape, dtype=np.int64)
        self.state = np.zeros(shape, dtype=np.int64)
        self._reserved = np.zeros(shape, dtype=np.int64)
        self._sent = np.zeros(shape)
        self._begun = np.zeros(shape)
        self._first = np.full(shape, np.nan)
        self._output = np.zeros(shape, dtype=np.int64)
        self._counts = np.zeros(shape, dtype=np.bool_)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, C)."""
        return int(self.active.shape[0]), int(self.active.shape[1])

    @property
    def is_over(self) -> BoolArray:
        """Replicas that have nothing left to do, bool [M]."""
        all_in = self.next >= self._work.shape[1]
        return all_in & ~self.active.any(axis=1) if self._work.drains else all_in

    @property
    def is_warm(self) -> BoolArray:
        """Replicas in which rounds count by now, bool [M]."""
        return self.next > self._work.warm_up if self._work.warm_up else self.next >= 0

    def let_in(self) -> BoolArray:
        """Fill empty slots with requests that have come; idle replicas go on to the next arrival.

        Returns:
            bool [M, C], slots that were filled.
        """
        work, count = self._work, self._work.shape[1]
        has_more = self.next < count
        idle = has_more & ~self.active.any(axis=1)
        if idle.any():
            come = work.arrival[idle, self.next[idle]]
            self.clock[idle] = np.maximum(self.clock[idle], come)
        new = np.zeros(self.shape, dtype=np.bool_)
        rows = np.flatnonzero(has_more & ~self.active.all(axis=1))
        if not len(rows):
            return new
        column = self.next[rows, None] + np.arange(self.shape[1])
        inside = column < count
        column = np.minimum(column, count - 1)
        fits = inside & (work.arrival[rows[:, None], column] <= self.clock[rows, None])
        if self._kv_tokens is not None:
            free = self._kv_tokens - self._reserved[rows].sum(axis=1)
            needed = np.cumsum(self.need[rows[:, None], column], axis=1)
            fits &= needed <= free[:, None]
        empty = ~self.active[rows]
        rank = np.cumsum(empty, axis=1) - 1
        new[rows] = empty & (rank < fits.sum(axis=1)[:, None])
        m, c = np.nonzero(new)
        place = np.zeros(self.shape, dtype=np.int64)
        place[rows] = rank
        self._fill(m, c, self.next[m] + place[m, c])
        self.next += new.sum(axis=1)
        return new

    def _fill(self, m: IntArray, c: IntArray, at: IntArray) -> None:
        """Put requests `at` of replicas m into slots c."""
        work = self._work
        self.active[m, c] = True
        # What prefill yields is the first token; without a prompt it is there.
        has_prompt = self._runs_prompts & (work.prompt[m, at] > 0)
        self.prefill[m, c] = np.where(has_prompt, work.prompt[m, at], 0)
        self.remaining[m, c] = work.output[m, at] - ~has_prompt
        self.context[m, c] = work.prompt[m, at] + ~has_prompt
        self._output[m, c] = work.output[m, at]
        self._reserved[m, c] = self.need[m, at]
        self._begun[m, c] = self.clock[m]
        self._sent[m, c] = work.arrival[m, at] if work.is_open else self.clock[m]
        self._first[m, c] = np.where(has_prompt, np.nan, self.clock[m])
        self._counts[m, c] = at >= work.warm_up
        if self._pool is not None:
            start = work.start[m, at]
            self.state[m, c] = np.where(
                start == NEW, self.fresh(len(m)), self._pool.starts[start % len(self._pool.starts)]
            )

    def fresh(self, count: int) -> IntArray:
        """So many states that a text may go on with."""
        if self._pool is None:
            return np.zeros(count, dtype=np.int64)
        starts = self._pool.starts
        return starts[self._rng.integers(len(starts), size=count)]

    def note_first(self, slots: BoolArray) -> None:
        """Say that these slots' first token is there, bool [M, C]."""
        self._first[slots] = np.broadcast_to(self.clock[:, None], self.shape)[slots]

    def retire(self, finished: Finished) -> BoolArray:
        """Empty the slots of requests that have all their tokens; returns these, bool [M, C]."""
        done = self.active & (self.remaining <= 0) & (self.prefill == 0)
        if done.any():
            self.active &= ~done
            self._reserved[done] = 0
            told = done & self._counts
            now = np.broadcast_to(self.clock[:, None], self.shape)[told]
            sent = self._sent[told]
            finished.first_token.append(self._first[told] - sent)
            finished.whole.append(now - sent)
            finished.waited.append(self._begun[told] - sent)
            finished.tokens.append(self._output[told])
        return np.asarray(done, dtype=np.bool_)

    def keep(self, replicas: BoolArray) -> None:
        """Drop the other replicas."""
        work = self._work
        self._work = replace(
            work,
            prompt=work.prompt[replicas],
            output=work.output[replicas],
            start=work.start[replicas],
            arrival=work.arrival[replicas],
        )
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[replicas])
