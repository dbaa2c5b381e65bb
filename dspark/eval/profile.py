"""SPS: how long a verification step takes, by rows in the batch and by context. Data and reading.

A step is one forward of the target over one flattened batch; rows are the anchors and drafted nodes
of all requests together. Steps per second are 1 / median seconds. The curve is kept as it was
measured, jagged where the machine makes it jagged: cliffs are what a scheduler must see.

Measuring is in profile_measure.py, keeping and finding in profile_store.py.

**Source:** DSpark, arXiv 2607.05147, section 3.2.2 (SPS(B), profiled once and looked up).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dspark.errors import ConfigError, DataError
from dspark.eval.results import read_results

__all__ = [
    "SCHEMA",
    "VERSION",
    "ExpertCount",
    "Profile",
    "ProfileKey",
    "ProfilePoint",
    "is_measured",
    "read_profile",
    "seconds_for",
    "steps_per_second",
]

SCHEMA = "dspark.profile"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What a profile holds for.

    Attributes:
        target: Fingerprint of the target's files; its name where there are no files.
        device: Device as text.
        processor: The CPU's name.
        dtype: Weight dtype.
        threads: CPU threads.
        exact: Exact mode was on.
        torch: Version of torch, "" where it is not known.
        expert_memory: Bytes that routed experts were held to, None for no limit.
        backend: Kernel of the linear layers, which decides what rows cost.
    """

    target: str
    device: str
    processor: str
    dtype: str
    threads: int
    exact: bool
    torch: str = ""
    expert_memory: int | None = None
    backend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePoint:
    """One measured point.

    Attributes:
        context: Committed tokens of every request.
        rows: Rows of the step, over all requests.
        requests: Requests they belonged to.
        median: Seconds of a step, the median of the repeats.
        low: Lower quartile.
        high: Upper quartile.
        repeats: Timed steps.
    """

    context: int
    rows: int
    requests: int
    median: float
    low: float
    high: float
    repeats: int

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "context": self.context,
            "rows": self.rows,
            "requests": self.requests,
            "seconds": {"median": self.median, "low": self.low, "high": self.high},
            "repeats": self.repeats,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCount:
    """Experts that the rows of a step wake.

    Attributes:
        rows: Rows of the step.
        distinct_experts: Distinct routed experts per layer, the mean over layers and contexts.
    """

    rows: int
    distinct_experts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curve:
    """Seconds by rows at one context."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: float) -> float:
        return _line(self.rows, self.seconds, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A measured curve.

    Attributes:
        key: What it holds for.
        points: Measured points, by context and rows.
        experts: Experts woken by row count; None for targets without experts, or that cannot tell.
        settings: How it was measured: rows_per_request, tokens, ...
        header: As in result files; empty if it was never written.
        is_interrupted: True if Ctrl-C ended the measuring early.

    Raises:
        ConfigError: If there is no point, or one is given twice or makes no sense.
    """

    key: ProfileKey
    points: tuple[ProfilePoint, ...]
    experts: tuple[ExpertCount, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    header: Mapping[str, Any] = field(default_factory=dict)
    is_interrupted: bool = False
    _curves: dict[int, _Curve] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.points:
            raise ConfigError("a profile has no point, but at least one is needed.")
        points = sorted(self.points, key=lambda point: (point.context, point.rows))
        seen = {(point.context, point.rows) for point in points}
        if len(seen) < len(points):
            raise ConfigError("a profile has a point twice, but needs each context and rows once.")
        for point in points:
            if point.rows < 1 or point.context < 0 or not 0 < point.median < math.inf:
                raise ConfigError(
                    f"a profile's point at context {point.context} and {point.rows} rows takes "
                    f"{point.median} s, but contexts must be >= 0, rows >= 1 and seconds > 0."
                )
        curves = {}
        for context in dict.fromkeys(point.context for point in points):
            own = [point for point in points if point.context == context]
            curves[context] = _Curve(
                rows=tuple(p.rows for p in own), seconds=tuple(p.median for p in own)
            )
        object.__setattr__(self, "points", tuple(points))
        object.__setattr__(self, "_curves", curves)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Measured contexts, rising."""
        return tuple(self._curves)

    @property
    def rows(self) -> tuple[int, ...]:
        """Row counts measured at any context, rising."""
        return tuple(sorted({point.rows for point in self.points}))

    def curve(self, context: int) -> tuple[ProfilePoint, ...]:
        """Points of one measured context, by rows; empty for another context."""
        return tuple(point for point in self.points if point.context == context)

    def to_json(self) -> dict[str, Any]:
        """As a result file holds it (schema dspark.profile)."""
        experts = None if self.experts is None else [asdict(count) for count in self.experts]
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "header": dict(self.header),
            "key": asdict(self.key),
            "settings": dict(self.settings),
            "interrupted": self.is_interrupted,
            "contexts": list(self.contexts),
            "rows": list(self.rows),
            "points": [point.to_json() for point in self.points],
            "experts": experts,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str) -> Profile:
        """Read what `to_json` made.

        Args:
            data: The object.
            where: What messages call it.

        Raises:
            DataError: If a field is missing or has another type or range.
        """
        try:
            points = tuple(
                ProfilePoint(
                    context=int(row["context"]),
                    rows=int(row["rows"]),
                    requests=int(row.get("requests", 1)),
                    repeats=int(row["repeats"]),
                    **{name: float(row["seconds"][name]) for name in ("median", "low", "high")},
                )
                for row in data["points"]
            )
            found = data.get("experts")
            experts = None if found is None else tuple(ExpertCount(**row) for row in found)
            return Profile(
                key=ProfileKey(**data["key"]),
                points=points,
                experts=experts,
                settings=dict(data.get("settings", {})),
                header=dict(data.get("header", {})),
                is_interrupted=bool(data.get("interrupted", False)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise DataError(f"{where} is not a whole profile: {exc!r}.") from exc
        except ConfigError as exc:
            raise DataError(f"{where} is not a profile: {exc.message}") from exc


def read_profile(path: str | Path) -> Profile:
    """Read a profile from a file.

    Raises:
        DataError: If it cannot be read, or is no profile.
    """
    return Profile.from_json(read_results(path, SCHEMA, VERSION), str(path))


def seconds_for(profile: Profile, rows: float, context: float) -> float:
    """Seconds of a step, read off the curve.

    Between measured points the reading is linear, in rows and in context; at a measured point it
    is that point's median. Beyond the last point it goes on linearly, with the slope between the
    last point and the one nearest half of it, never falling: a scheduler must be able to price any
    batch. Before the first point it is that point's. `is_measured` tells which of these was done.

    Args:
        profile: The curve.
        rows: Rows of the step, >= 1; a mean over steps need not be whole.
        context: Committed tokens of a request, >= 0.

    Raises:
        ConfigError: If rows or context is out of range.
    """
    if not 1 <= rows < math.inf or not 0 <= context < math.inf:
        raise ConfigError(f"a step of {rows} rows at context {context} has no cost.")
    contexts = profile.contexts
    values = [profile._curves[known].at(rows) for known in _around(contexts, context)]
    return _line(tuple(_around(contexts, context)), tuple(values), context)


def steps_per_second(profile: Profile, rows: float, context: float) -> float:
    """SPS: 1 / `seconds_for`, with the same arguments and errors."""
    return 1 / seconds_for(profile, rows, context)


def is_measured(profile: Profile, rows: float, context: float) -> bool:
    """Whether `seconds_for` reads between measured points here, and guesses nothing."""
    contexts = profile.contexts
    if not contexts[0] <= context <= contexts[-1]:
        return False
    curves = [profile._curves[known] for known in _around(contexts, context)]
    if context in contexts:
        curves = [profile._curves[int(context)]]
    return all(curve.rows[0] <= rows <= curve.rows[-1] for curve in curves)


def _around(xs: tuple[int, ...], x: float) -> tuple[int, ...]:
    """The values that a reading at x needs: its neighbours; beyond the last, what gives a slope."""
    if len(xs) == 1 or x <= xs[0]:
        return xs[:1]
    if x > xs[-1]:
        return (xs[_half(xs)], xs[-1])
    high = bisect_left(xs, x)
    return xs[high : high + 1] if xs[high] == x else xs[high - 1 : high + 1]


def _half(xs: Sequence[int]) -> int:
    """Index of the value nearest half of the last one, the last one excluded."""
    return min(range(len(xs) - 1), key=lambda i: (abs(xs[i] - xs[-1] / 2), -i))


def _line(xs: tuple[int, ...], ys: tuple[float, ...], x: float) -> float:
    """Piecewise linear through (xs, ys), going on beyond the last with a slope >= 0."""
    if len(xs) == 1 or x <= xs[0]:
        return ys[0]
    if x > xs[-1]:
        half = _half(xs)
        slope = max(0.0, (ys[-1] - ys[half]) / (xs[-1] - xs[half]))
        return ys[-1] + slope * (x - xs[-1])
    high = bisect_left(xs, x)
    if xs[high] == x:
        return ys[high]
    share = (x - xs[high - 1]) / (xs[high] - xs[high - 1])
    return ys[high - 1] + share * (ys[high] - ys[high - 1])
