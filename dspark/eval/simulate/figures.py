"""Figures of simulated points, and what compares policies.

A point is one policy at one load. A frontier is a policy's points over all loads: throughput
against per-user speed, as figure 7 of the DSpark paper has it; the verification budget against load
is its figure 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from dspark.eval.simulate.run import Outcome
from dspark.tree import FloatArray

__all__ = ["compare_frontiers", "frontier", "point_figures", "speed_at", "throughput_at"]

PointFigures: TypeAlias = dict[str, Any]


def point_figures(outcome: Outcome) -> PointFigures:
    """The figures of one point; docs/simulate.md defines them.

    Args:
        outcome: Of its replicas.

    Returns:
        JSON values; None where nothing counts.
    """
    used = outcome.seconds > 0
    seconds = float(outcome.seconds.sum())
    if not seconds:
        return {"seconds": 0.0, "tokens_per_second": None, "tokens_per_second_per_user": None}
    each = outcome.tokens[used] / outcome.seconds[used]
    request_rounds = float(outcome.request_rounds.sum())
    rounds = float(outcome.rounds.sum())
    return {
        "seconds": seconds,
        "replicas": int(used.sum()),
        "requests": int(sum(len(part) for part in outcome.finished.whole)),
        "tokens": int(outcome.tokens.sum()),
        "tokens_per_second": float(outcome.tokens.sum()) / seconds,
        "standard_error": _standard_error(each),
        "tokens_per_second_per_user": _ratio(outcome.committed, outcome.decode_seconds),
        "tau": _ratio(outcome.committed, outcome.request_rounds),
        "budget": _ratio(outcome.nodes, outcome.request_rounds),
        "acceptance_rate": _ratio(outcome.accepted, outcome.nodes),
        "asked_share": _ratio(outcome.asked, outcome.request_rounds),
        "rounds": int(rounds),
        "seconds_per_round": seconds / rounds if rounds else None,
        "requests_per_round": request_rounds / rounds if rounds else None,
        "mean_under_way": float(outcome.request_seconds.sum()) / seconds,
        "first_token": _percentiles(outcome.finished.first_token),
        "whole": _percentiles(outcome.finished.whole),
        "waited": _percentiles(outcome.finished.waited),
    }


def _ratio(upper: FloatArray, lower: FloatArray) -> float | None:
    total = float(lower.sum())
    return float(upper.sum()) / total if total else None


def _standard_error(values: FloatArray) -> float | None:
    """Of the mean over replicas; None for one."""
    if len(values) < 2:
        return None
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _percentiles(parts: Sequence[FloatArray]) -> dict[str, float | None]:
    values = np.concatenate(parts) if parts else np.zeros(0)
    if not len(values):
        return {"mean": None, "p50": None, "p95": None, "p99": None}
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p95": p95, "p99": p99}


def frontier(points: Sequence[PointFigures]) -> FloatArray:
    """What can be had: points that no other point beats in both speeds.

    Args:
        points: Of one policy.

    Returns:
        float64 [P, 2], per-user speed (rising) and throughput (falling).
    """
    found = [
        (p["tokens_per_second_per_user"], p["tokens_per_second"])
        for p in points
        if p["tokens_per_second_per_user"] is not None and p["tokens_per_second"] is not None
    ]
    kept: list[tuple[float, float]] = []
    for user, whole in sorted(found, reverse=True):
        if not kept or whole > kept[-1][1]:
            kept.append((user, whole))
    return np.array(kept[::-1], dtype=np.float64).reshape(-1, 2)


def throughput_at(line: FloatArray, user: float) -> float | None:
    """The highest throughput at which every user has at least this speed.

    Args:
        line: A frontier.
        user: Tokens a second.

    Returns:
        Between points linear in the logarithm of throughput, which halves and doubles from point to
        point; below the slowest point, that point's; None beyond the fastest.
    """
    if not len(line) or user > line[-1, 0]:
        return None
    return float(np.exp(np.interp(user, line[:, 0], np.log(line[:, 1]))))


def speed_at(line: FloatArray, whole: float) -> float | None:
    """The highest per-user speed at which throughput is at least this.

    Returns:
        Between points as `throughput_at`; below the least throughput, that point's; None beyond the
        largest.
    """
    if not len(line) or whole > line[0, 1]:
        return None
    return float(np.interp(np.log(whole), np.log(line[::-1, 1]), line[::-1, 0]))


def compare_frontiers(
    policy: FloatArray, baseline: FloatArray, speeds: Sequence[float]
) -> dict[str, Any]:
    """A policy against a baseline.

    Args:
        policy: Its frontier.
        baseline: The other's.
        speeds: Per-user speeds that are promised.

    Returns:
        JSON values: `at_speed`, throughput of both at each promised speed and their ratio; and
        `at_throughput`, per-user speed of both at the throughputs of the baseline's points. None
        where one of the two cannot do it.
    """
    at_speed = []
    for speed in speeds:
        pair = throughput_at(policy, speed), throughput_at(baseline, speed)
        at_speed.append({"speed": speed, **_pair(*pair)})
    at_throughput = []
    for whole in baseline[:, 1].tolist():
        pair = speed_at(policy, whole), speed_at(baseline, whole)
        at_throughput.append({"throughput": whole, **_pair(*pair)})
    return {"at_speed": at_speed, "at_throughput": at_throughput}


def _pair(policy: float | None, baseline: float | None) -> dict[str, float | None]:
    ratio = policy / baseline if policy is not None and baseline else None
    return {"policy": policy, "baseline": baseline, "ratio": ratio}
