"""Requests of a simulation: when they come, how long they are, where their texts begin.

Letters: M replicas, N requests of each.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dspark.errors import ConfigError
from dspark.eval.simulate.pool import NEW, Pool
from dspark.tree import FloatArray, IntArray

__all__ = ["Fixed", "Lengths", "Lognormal", "Workload", "closed_loop", "open_loop", "parse_lengths"]

_LONGEST = 1 << 24


class Lengths(Protocol):
    """A law of lengths in tokens."""

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        """So many lengths, int64, >= 1."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """All of one length."""

    tokens: int

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        """The length, so many times."""
        del rng
        return np.full(count, self.tokens, dtype=np.int64)

    def __str__(self) -> str:
        return f"{self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Lengths whose logarithm is normal, rounded, at least 1.

    Attributes:
        median: Tokens.
        sigma: Standard deviation of the natural logarithm.
    """

    median: float
    sigma: float

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        """Drawn lengths."""
        values = np.rint(self.median * np.exp(self.sigma * rng.standard_normal(count)))
        return np.clip(values, 1, _LONGEST).astype(np.int64)

    def __str__(self) -> str:
        return f"lognormal, median {self.median:g} tokens, sigma {self.sigma:g}"


def parse_lengths(option: str, text: str) -> Lengths | None:
    """Read "512", "2K", "lognormal:400:0.6" (median and sigma) or "trace" (None).

    Raises:
        ConfigError: If it is none of these.
    """
    if text == "trace":
        return None
    found = re.fullmatch(r"([0-9]{1,7})(K?)", text.strip().upper())
    if found:
        tokens = int(found[1]) * (1024 if found[2] else 1)
        if 1 <= tokens <= _LONGEST:
            return Fixed(tokens)
    parts = text.split(":")
    if parts[0] == "lognormal" and len(parts) == 3:
        try:
            law = Lognormal(float(parts[1]), float(parts[2]))
        except ValueError:
            law = Lognormal(math.nan, 0.0)
        if 1 <= law.median <= _LONGEST and 0 <= law.sigma <= 5:
            return law
    raise ConfigError(
        f"{option} is {text!r}, but must be a number of tokens, lognormal:MEDIAN:SIGMA or trace."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of every replica, in order of arrival.

    Attributes:
        prompt: int64 [M, N], tokens of the prompt, >= 0; without any, the first token is there.
        output: int64 [M, N], tokens of the answer, >= 1, the one that prefill yields included.
        start: int64 [M, N], place in the pool's `starts` that the text begins with; NEW for any.
        arrival: float64 [M, N], seconds, rising; all 0 if requests wait from the beginning.
        is_open: True if arrivals do not wait for answers.
        drains: Run to the last answer; else end when the last request has been let in.
        warm_up: Requests of a replica that are let in before anything counts.
    """

    prompt: IntArray
    output: IntArray
    start: IntArray
    arrival: FloatArray
    is_open: bool = False
    drains: bool = False
    warm_up: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return int(self.prompt.shape[0]), int(self.prompt.shape[1])


def closed_loop(
    pool: Pool | None,
    lengths: tuple[Lengths | None, Lengths | None],
    *,
    replicas: int,
    requests: int,
    warm_up: int,
    rng: np.random.Generator,
) -> Workload:
    """Requests that all wait from the beginning: with C slots, C are under way at all times.

    Args:
        pool: Where recorded lengths come from, None if none are used.
        lengths: Of prompts and answers; None takes them from the trace.
        replicas: M.
        requests: N.
        warm_up: Of a replica.
        rng: Of the draws.

    Raises:
        ConfigError: If lengths are to come from a trace that has none.
    """
    prompt, output, start = _draw(pool, lengths, (replicas, requests), rng)
    return Workload(
        prompt=prompt,
        output=output,
        start=start,
        arrival=np.zeros((replicas, requests)),
        warm_up=warm_up,
    )


def open_loop(
    pool: Pool | None,
    lengths: tuple[Lengths | None, Lengths | None],
    *,
    rate: float,
    replicas: int,
    requests: int,
    warm_up: int,
    rng: np.random.Generator,
) -> Workload:
    """Requests that come as a Poisson process.

    Args:
        pool: As for `closed_loop`.
        lengths: As for `closed_loop`.
        rate: Requests a second, > 0.
        replicas: M.
        requests: N.
        warm_up: Of a replica.
        rng: Of the draws.

    Raises:
        ConfigError: As for `closed_loop`, or if the rate is out of range.
    """
    if not 0 < rate < math.inf:
        raise ConfigError(f"the arrival rate is {rate}, but must be a finite number above 0.")
    prompt, output, start = _draw(pool, lengths, (replicas, requests), rng)
    gaps = rng.exponential(1 / rate, (replicas, requests))
    return Workload(
        prompt=prompt,
        output=output,
        start=start,
        arrival=np.cumsum(gaps, axis=1),
        is_open=True,
        warm_up=warm_up,
    )


def _draw(
    pool: Pool | None,
    lengths: tuple[Lengths | None, Lengths | None],
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[IntArray, IntArray, IntArray]:
    """Prompt, output and start of every request; recorded ones belong to one recorded text."""
    start = np.full(shape, NEW, dtype=np.int64)
    recorded = None if pool is None else pool.lengths
    if recorded is not None:
        start = rng.integers(len(recorded), size=shape)
    found = []
    for column, law in enumerate(lengths):
        if law is not None:
            found.append(law.draw(shape[0] * shape[1], rng).reshape(shape))
        elif recorded is None:
            raise ConfigError(
                "lengths were to come from a trace, but there is none that has them.",
                hint="give --prompt-tokens and --output-tokens",
            )
        else:
            found.append(recorded[start, column])
    return found[0], np.maximum(found[1], 1), start
