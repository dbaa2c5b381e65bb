"""dspark's own engine as a runner."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dspark.active import ActiveRequest, Phase
from dspark.cache import Cache
from dspark.engine import Engine
from dspark.eval.bench_records import RequestRecord, RunOutput, count_rounds
from dspark.eval.runners.base import Arrivals, BenchRequest, Progress, token_progress
from dspark.request import RequestStats, SamplingParams
from dspark.target import ExactnessReport, Target, TargetInfo, TargetOutput, TokenBatch

__all__ = ["OwnRunner"]


class _WatchedTarget:
    """A target that remembers the cache it made, so that a run can look at it and empty it.

    Args:
        target: What does the work.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self.cache: Cache | None = None

    @property
    def info(self) -> TargetInfo:
        return self._target.info

    @property
    def exactness(self) -> ExactnessReport:
        return self._target.exactness

    def new_cache(self, *, memory_limit: int | None = None) -> Cache:
        self.cache = self._target.new_cache(memory_limit=memory_limit)
        return self.cache

    def forward(
        self, batch: TokenBatch, cache: Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        return self._target.forward(batch, cache, capture=capture)


@dataclass(slots=True)
class _Flight:
    """A request under way."""

    asked: BenchRequest
    request: ActiveRequest
    arrivals: Arrivals

    def take(self, now: float) -> int:
        """Note the tokens of the last round; returns how many there are."""
        count = len(self.request.fresh)
        self.arrivals.add(count, now)
        self.request.fresh.clear()
        self.request.pieces.clear()
        return count

    def record(self) -> RequestRecord:
        result = self.request.result()
        record = self.arrivals.record(
            self.asked, token_ids=result.token_ids, error=self.request.error
        )
        return replace(record, rounds=result.stats.rounds, committed=result.stats.committed)


@dataclass(slots=True)
class _Run:
    """One run under way.

    Attributes:
        engine: The engine.
        cache: Its cache.
        params: Sampling parameters.
        active: Requests under way.
        records: Finished ones by question.
        came: Told how many tokens a request got.
        stats: Statistics of the finished ones.
        most_cache: Most bytes of K/V seen.
    """

    engine: Engine
    cache: Cache
    params: SamplingParams
    came: Callable[[int], None]
    active: list[_Flight] = field(default_factory=list)
    records: dict[str | int, RequestRecord] = field(default_factory=dict)
    stats: list[RequestStats] = field(default_factory=list)
    most_cache: int = 0

    def submit(self, asked: BenchRequest) -> None:
        arrivals = Arrivals()
        params = replace(self.params, seed=asked.seed, n=1)
        (request,) = self.engine.submit(list(asked.token_ids), params)
        self.active.append(_Flight(asked, request, arrivals))

    def step(self) -> None:
        """Run a round, and keep what has finished."""
        self.engine.step()
        now = time.perf_counter()
        self.most_cache = max(self.most_cache, self.cache.usage().bytes)
        for flight in self.active:
            self.came(flight.take(now))
        for flight in [f for f in self.active if f.request.phase is Phase.DONE]:
            self.active.remove(flight)
            self.records[flight.asked.question_id] = flight.record()
            if flight.request.error is None:
                self.stats.append(flight.request.stats)

    def cancel(self) -> None:
        for flight in self.active:
            self.engine.cancel(flight.request)


class OwnRunner:
    """dspark with one draft.

    An engine per concurrency is kept for all runs, as a server would keep it: it knows what its
    forwards cost. What a run left in the cache is not there for the next one.

    Args:
        engine: The target with the draft.
        params: Sampling parameters; the seed is each prompt's own.
        auto_off: Let drafting switch itself off while it loses.
        note: What a reader must know, or None.
    """

    library: Mapping[str, str] | None = None
    is_local = True

    def __init__(
        self, engine: Engine, params: SamplingParams, *, auto_off: bool, note: str | None = None
    ) -> None:
        self._engine = engine
        self._params = params
        self._auto_off = auto_off
        self._engines: dict[int, tuple[Engine, _WatchedTarget]] = {}
        self.notes: Sequence[str] = () if note is None else (note,)

    def refuses(self, concurrency: int) -> str | None:
        """Nothing: it batches."""
        return None

    def prepare(self) -> None:
        """Nothing to do: the engine is loaded."""

    def close(self) -> None:
        """Let go of the engines and their caches."""
        self._engines.clear()

    def run(
        self, requests: Sequence[BenchRequest], concurrency: int, on_progress: Progress
    ) -> RunOutput:
        """Answer all prompts; a request that ends makes room for the next one at once."""
        engine, target = self._engine_for(concurrency)
        if target.cache is None:
            raise RuntimeError("the engine has no cache")
        target.cache.forget_kept()
        came = token_progress(len(requests) * self._params.max_tokens, on_progress)
        run = _Run(engine, target.cache, self._params, came)
        waiting = deque(requests)
        start = time.perf_counter()
        try:
            while waiting or run.active:
                while waiting and len(run.active) < concurrency:
                    run.submit(waiting.popleft())
                run.step()
        finally:
            run.cancel()
        seconds = time.perf_counter() - start
        return count_rounds(
            RunOutput(
                seconds=seconds,
                requests=tuple(run.records[request.question_id] for request in requests),
                proposed=sum(stats.proposed for stats in run.stats),
                verified=sum(stats.verified for stats in run.stats),
                accepted=sum(stats.accepted for stats in run.stats),
                stages=_stages(run.stats, seconds),
                cache_bytes=run.most_cache or None,
            )
        )

    def _engine_for(self, concurrency: int) -> tuple[Engine, _WatchedTarget]:
        if concurrency not in self._engines:
            target = _WatchedTarget(self._engine.target)
            engine = Engine(
                target,
                drafter=self._engine.drafter,
                codec=self._engine.codec,
                config=replace(self._engine.config, max_batch=concurrency, auto_off=self._auto_off),
            )
            self._engines[concurrency] = engine, target
        return self._engines[concurrency]


def _stages(stats: Sequence[RequestStats], seconds: float) -> dict[str, float]:
    found = {
        "prefill": sum(item.seconds_prefill for item in stats),
        "draft": sum(item.seconds_draft for item in stats),
        "verify": sum(item.seconds_verify for item in stats),
    }
    return {**found, "rest": max(0.0, seconds - sum(found.values()))}
