"""Measuring SPS: steps of a target (profile_steps.py), timed over row counts in interleaved order.

Row counts take turns: each pass over them has an order of its own, so that a machine that slows
down for a while spoils a few samples of each and not all of one. The first pass is the warm-up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspark.errors import ConfigError
from dspark.eval.profile import ExpertCount, Profile, ProfilePoint
from dspark.eval.profile_steps import MOST_ROWS, StepBench, sample_texts, split_rows
from dspark.eval.profile_store import describe_target, key_of
from dspark.expert_reuse import TellsExperts
from dspark.target import Target

if TYPE_CHECKING:
    from dspark.text import TextCodec

__all__ = [
    "CONTEXTS",
    "QUICK_CONTEXT",
    "ROWS",
    "ProfileConfig",
    "measure_profile",
    "quick_profile",
]

CONTEXTS = (128, 512, 2048)
"""Contexts measured by default, as far as the target has room for them."""

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Row counts measured by default."""

QUICK_CONTEXT = 64
"""Context of a quick profile."""

_QUICK_ROWS = (1, 16, 4, 32, 8, 12, 2, 24)  # in order of their worth
_QUICK_LEAST = 2  # row counts that are measured however slow the target is
_MARGIN = 1.5  # a pass may take so much longer than the one before

Progress = Callable[[float, float], None]
"""Called with the work done and the whole work, in arbitrary units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """What to measure.

    Attributes:
        contexts: Contexts in tokens, rising; None takes those of CONTEXTS that fit the target.
        rows: Row counts, rising.
        rows_per_request: Rows of one request at the most, 1 to 32; more rows are more requests.
        repeats: Timed steps a point.
        seed: Of the order of row counts, and of random tokens.

    Raises:
        ConfigError: If a value is out of range.
    """

    contexts: tuple[int, ...] | None = None
    rows: tuple[int, ...] = ROWS
    rows_per_request: int = 16
    repeats: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values in (("rows", self.rows), ("contexts", self.contexts)):
            if values is None:
                continue
            steps = zip((0, *values), values, strict=False)
            if not values or any(low >= high for low, high in steps):
                raise ConfigError(f"{name} are {list(values)}, but must be rising and >= 1.")
        if not 1 <= self.rows_per_request <= MOST_ROWS:
            raise ConfigError(
                f"rows_per_request is {self.rows_per_request}, but must be from 1 to {MOST_ROWS}."
            )
        if self.repeats < 1:
            raise ConfigError(f"repeats is {self.repeats}, but must be >= 1.")

    def fitting(self, max_positions: int) -> tuple[int, ...]:
        """The contexts that leave room for a tree.

        Raises:
            ConfigError: If one that was asked for does not.
        """
        room = max_positions - self.rows_per_request
        if self.contexts is None:
            return tuple(c for c in CONTEXTS if c <= room) or (max(1, room),)
        if self.contexts[-1] > room:
            raise ConfigError(
                f"context {self.contexts[-1]} with {self.rows_per_request} rows behind it does "
                f"not fit the target's {max_positions} positions."
            )
        return self.contexts


class _Samples:
    """Timed steps by context and rows, and the experts that they woke."""

    def __init__(self, most_per_request: int) -> None:
        self._most = most_per_request
        self.seconds: dict[tuple[int, int], list[float]] = {}
        self._woken: dict[int, list[int]] = {}

    def shares(self, rows: int) -> list[int]:
        return split_rows(rows, self._most)

    def add(self, context: int, rows: int, seconds: float) -> None:
        self.seconds.setdefault((context, rows), []).append(seconds)

    def watch(self, target: Target, rows: int) -> AbstractContextManager[None]:
        if not isinstance(target, TellsExperts):
            return nullcontext()

        def note(layer: int, chosen: torch.Tensor) -> None:
            self._woken.setdefault(rows, []).append(len(torch.unique(chosen)))

        return target.watch_experts(note)

    def points(self) -> tuple[ProfilePoint, ...]:
        points = []
        for (context, rows), seconds in self.seconds.items():
            low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
            points.append(
                ProfilePoint(
                    context=context,
                    rows=rows,
                    requests=len(self.shares(rows)),
                    median=median,
                    low=low,
                    high=high,
                    repeats=len(seconds),
                )
            )
        return tuple(points)

    def experts(self) -> tuple[ExpertCount, ...] | None:
        counts = [
            ExpertCount(rows=rows, distinct_experts=sum(found) / len(found))
            for rows, found in sorted(self._woken.items())
        ]
        return tuple(counts) or None


def measure_profile(
    target: Target,
    config: ProfileConfig | None = None,
    *,
    codec: TextCodec | None = None,
    expert_memory: int | None = None,
    on_progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Measure a target's curve.

    Args:
        target: The target; nothing else should keep the machine busy.
        config: What to measure.
        codec: The target's text codec, for contexts of text; None takes random tokens.
        expert_memory: What the target's experts are held to, in bytes; part of the key.
        on_progress: Called after every step.
        clock: Seconds of now.

    Returns:
        The curve; what there is of it after Ctrl-C.

    Raises:
        ConfigError: If a context does not fit the target.
        KeyboardInterrupt: After Ctrl-C before the first timed step.
    """
    config = ProfileConfig() if config is None else config
    contexts = config.fitting(target.info.max_positions)
    header = describe_target(target)
    samples = _Samples(config.rows_per_request)
    requests = len(samples.shares(config.rows[-1]))
    texts = sample_texts(target, codec, requests, contexts[-1], config.seed)
    bench = StepBench(target, texts, clock)
    rng = np.random.default_rng(config.seed)
    is_interrupted = False
    try:
        work = _Work(config, contexts, requests, on_progress)
        for context in contexts:
            bench.extend(context, work.prefilled)
            for turn in range(config.repeats + 1):
                for rows in rng.permutation(config.rows).tolist():
                    if turn == 0:
                        with samples.watch(target, rows):
                            bench.step(samples.shares(rows))
                    else:
                        samples.add(context, rows, bench.step(samples.shares(rows)))
                    work.stepped(rows)
    except KeyboardInterrupt:
        if not samples.seconds:
            raise
        is_interrupted = True
    bench.close()
    settings: dict[str, Any] = {
        "rows_per_request": config.rows_per_request,
        "repeats": config.repeats,
        "warm_ups": 1,
        "seed": config.seed,
        "tokens": "random" if codec is None else "text",
    }
    return Profile(
        key=key_of(target, header=header, expert_memory=expert_memory),
        points=samples.points(),
        experts=samples.experts(),
        settings=settings,
        header={**header, "warm_ups": 1, "repeats": config.repeats},
        is_interrupted=is_interrupted,
    )


class _Work:
    """How much is done, in units of about a plain step."""

    def __init__(
        self,
        config: ProfileConfig,
        contexts: Sequence[int],
        requests: int,
        on_progress: Progress | None,
    ) -> None:
        passes = len(contexts) * (config.repeats + 1)
        steps = passes * sum(self._cost(rows) for rows in config.rows)
        self._total = steps + requests * contexts[-1] / 16
        self._done = 0.0
        self._report = on_progress

    @staticmethod
    def _cost(rows: int) -> float:
        return 1 + rows / 16

    def prefilled(self, rows: int) -> None:
        self._add(rows / 16)

    def stepped(self, rows: int) -> None:
        self._add(self._cost(rows))

    def _add(self, units: float) -> None:
        self._done += units
        if self._report is not None:
            self._report(self._done, self._total)


def quick_profile(
    target: Target,
    *,
    codec: TextCodec | None = None,
    context: int = QUICK_CONTEXT,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Measure a few points at one context in a few seconds.

    Row counts come in order of their worth (1, 16, 4, 32, ...) as long as there is time, the rest
    of which goes to repeats. A target so slow that this is not enough still runs one row and
    sixteen, each once to warm up and once timed.

    Args:
        target: The target.
        codec: Its text codec; None takes random tokens.
        context: Committed tokens of the request, cut to what the target has room for.
        seconds: Time to take.
        clock: Seconds of now.

    Returns:
        The curve, not kept anywhere; its header is empty.
    """
    start = clock()
    key = key_of(target)
    context = min(context, max(1, target.info.max_positions - MOST_ROWS))
    samples = _Samples(MOST_ROWS)
    bench = StepBench(target, sample_texts(target, codec, 1, context), clock)
    bench.extend(context)
    used: list[int] = []
    for rows in _QUICK_ROWS:
        with samples.watch(target, rows):
            took = bench.step([rows])
        if len(used) >= _QUICK_LEAST and clock() - start + took > seconds:
            break
        samples.add(context, rows, bench.step([rows]))
        used.append(rows)
    rng = np.random.default_rng(0)
    one_pass = sum(samples.seconds[context, rows][0] for rows in used)
    while one_pass > 0 and clock() - start + _MARGIN * one_pass < seconds:
        begin = clock()
        for rows in rng.permutation(used).tolist():
            samples.add(context, rows, bench.step([rows]))
        one_pass = clock() - begin
    bench.close()
    return Profile(
        key=key,
        points=samples.points(),
        experts=samples.experts(),
        settings={"rows_per_request": MOST_ROWS, "quick": True},
    )
