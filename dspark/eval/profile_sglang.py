"""SGLang's two forms of an SPS table, read; the plain one written.

Plain: `{"sample_batch_tokens": [8, 16], "sample_steps_per_sec": [20.0, 18.5], "max_batch_tokens":
16}`. Batch tokens are rows, rising; SGLang reads the nearest measured row count at or below the one
asked for, where `dspark.eval.profile.seconds_for` draws a line between neighbours. One measured row
count is its placeholder for "nothing measured".

Additive: `{"bias_seconds", "bs_probes", "alpha_seconds", "m_probes", "theta_seconds"}`. A step of R
requests and M rows takes

    bias_seconds + alpha(R) + theta(M)

alpha and theta being linear between their probes (bs_probes, m_probes, rising) and constant beyond
them. It becomes a curve once R is given; beyond its last row count, where SGLang's stays constant,
ours goes on along its slope.

Neither form says at which context it was measured, or on what: an imported curve has context 0 and
names no target. A file with any other field is refused, since what it means is not known.

**Source:** SGLang 0.5.23, `speculative/dspark_components/dspark_sps.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import dspark
from dspark.errors import ConfigError, DataError
from dspark.eval.profile import Profile, ProfileKey, ProfilePoint
from dspark.eval.results import write_results

__all__ = ["from_sglang", "rising_steps", "to_sglang", "write_sglang"]

_PLAIN = ("sample_batch_tokens", "sample_steps_per_sec", "max_batch_tokens")
_ADDITIVE = ("bias_seconds", "bs_probes", "alpha_seconds", "m_probes", "theta_seconds")
_RISE = 1.1  # SGLang's own profiler warns where SPS rises by more than this


def to_sglang(profile: Profile, context: int | None = None) -> dict[str, Any]:
    """The plain form of one context's curve.

    Args:
        profile: The profile.
        context: A measured context; None takes the longest, which is the careful choice: more rows
            than pay are worse than fewer.

    Returns:
        What the file holds; jagged curves stay jagged.

    Raises:
        ConfigError: If the context was not measured.
    """
    chosen = profile.contexts[-1] if context is None else context
    points = profile.curve(chosen)
    if not points:
        known = ", ".join(map(str, profile.contexts))
        raise ConfigError(f"context {chosen} was not measured; contexts that were: {known}.")
    return {
        "sample_batch_tokens": [point.rows for point in points],
        "sample_steps_per_sec": [1 / point.median for point in points],
        "max_batch_tokens": points[-1].rows,
    }


def write_sglang(path: str | Path, profile: Profile, context: int | None = None) -> None:
    """Write `to_sglang` to a file.

    Raises:
        ConfigError: If the context was not measured.
        DataError: If the file cannot be written.
    """
    write_results(path, to_sglang(profile, context))


def rising_steps(table: Mapping[str, Any]) -> list[int]:
    """Row counts at which steps per second rise by over 10 % from the one before.

    More rows are never really faster, and SGLang uses such a value up to the next row count, so it
    is worth measuring again.

    Args:
        table: From `to_sglang`.
    """
    pairs = pairwise(table["sample_steps_per_sec"])
    rows = table["sample_batch_tokens"][1:]
    return [row for row, (low, high) in zip(rows, pairs, strict=True) if high > _RISE * low]


def from_sglang(path: str | Path, *, requests: int = 1) -> Profile:
    """Read either form.

    Args:
        path: The file.
        requests: R of the additive form, >= 1.

    Returns:
        A curve at context 0, one point for every row count of the file.

    Raises:
        DataError: If the file cannot be read, is of neither form, or holds no measurement.
        ConfigError: If requests is out of range.
    """
    if requests < 1:
        raise ConfigError(f"requests is {requests}, but must be >= 1.")
    try:
        data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc
    except ValueError as exc:
        raise DataError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise DataError(f"{path} does not hold a JSON object.")
    names = _ADDITIVE if "bias_seconds" in data else _PLAIN
    _check_names(data, names, path)
    seconds = _additive(data, requests, path) if names is _ADDITIVE else _plain(data, path)
    points = tuple(
        ProfilePoint(
            context=0,
            rows=rows,
            requests=requests if names is _ADDITIVE else 1,
            median=value,
            low=value,
            high=value,
            repeats=1,
        )
        for rows, value in seconds.items()
    )
    return Profile(
        key=ProfileKey(
            target="unknown",
            device="unknown",
            processor="",
            dtype="unknown",
            threads=0,
            exact=False,
        ),
        points=points,
        settings={"imported": "sglang", "form": "additive" if names is _ADDITIVE else "plain"},
        header={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "dspark": dspark.__version__,
        },
    )


def _check_names(data: Mapping[str, Any], names: tuple[str, ...], path: str | Path) -> None:
    missing = [name for name in names if name not in data]
    if missing:
        raise DataError(f"{path} is no SPS table of SGLang: it has no {missing[0]}.")
    strange = sorted(set(data) - set(names))
    if strange:
        raise DataError(
            f"{path} has the field {strange[0]}, whose meaning in an SPS table is not known.",
            hint=f"known fields: {', '.join(names)}",
        )


def _plain(data: Mapping[str, Any], path: str | Path) -> dict[int, float]:
    """Seconds by rows."""
    rows = _probes(data, "sample_batch_tokens", path)
    speeds = _numbers(data, "sample_steps_per_sec", path)
    most = data["max_batch_tokens"]
    _check_lengths(rows, speeds, "sample_batch_tokens", "sample_steps_per_sec", path)
    if type(most) is not int or most < rows[-1]:
        raise DataError(f"{path}: max_batch_tokens is {most!r}, but must be >= {rows[-1]}.")
    if min(speeds) <= 0:
        raise DataError(f"{path}: sample_steps_per_sec has {min(speeds)}, but must be > 0.")
    if len(rows) == 1:
        raise DataError(
            f"{path} holds one row count, which is SGLang's placeholder for a table that was "
            "never measured."
        )
    return {row: 1 / speed for row, speed in zip(rows, speeds, strict=True)}


def _additive(data: Mapping[str, Any], requests: int, path: str | Path) -> dict[int, float]:
    """Seconds by rows at so many requests."""
    bias = data["bias_seconds"]
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not 0 < bias < math.inf:
        raise DataError(f"{path}: bias_seconds is {bias!r}, but must be a number > 0.")
    counts, rows = _probes(data, "bs_probes", path), _probes(data, "m_probes", path)
    alpha, theta = _numbers(data, "alpha_seconds", path), _numbers(data, "theta_seconds", path)
    _check_lengths(counts, alpha, "bs_probes", "alpha_seconds", path)
    _check_lengths(rows, theta, "m_probes", "theta_seconds", path)
    wanted = sorted({requests, *(row for row in rows if row >= requests)})
    share = float(np.interp(requests, counts, alpha))
    found = {row: bias + share + float(np.interp(row, rows, theta)) for row in wanted}
    if min(found.values()) <= 0:
        raise DataError(f"{path}: a step of {requests} requests takes no time by this table.")
    return found


def _probes(data: Mapping[str, Any], name: str, path: str | Path) -> list[int]:
    values = data[name]
    is_list = isinstance(values, list) and len(values) > 0
    if not is_list or any(type(value) is not int or value < 1 for value in values):
        raise DataError(f"{path}: {name} must be a list of integers >= 1.")
    if any(low >= high for low, high in pairwise(values)):
        raise DataError(f"{path}: {name} is {values}, but must be rising.")
    return list(values)


def _numbers(data: Mapping[str, Any], name: str, path: str | Path) -> list[float]:
    values = data[name]
    if not isinstance(values, list) or any(
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        for value in values
    ):
        raise DataError(f"{path}: {name} must be a list of numbers.")
    return [float(value) for value in values]


def _check_lengths(
    probes: list[int], values: list[float], first: str, second: str, path: str | Path
) -> None:
    if len(probes) != len(values):
        raise DataError(
            f"{path}: {first} has {len(probes)} entries and {second} {len(values)}, but they must "
            "have as many."
        )
