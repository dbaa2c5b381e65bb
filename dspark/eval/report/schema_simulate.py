"""Result files of `dspark simulate` as typed objects."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dspark.eval.report.schema import Header, Part

__all__ = ["SimulateResults", "SimulatedComparison", "SimulatedPoint"]


class SimulatedPoint(Part):
    """One policy at one load."""

    policy: str
    concurrency: int | None = None
    rate: float | None = None
    tokens_per_second: float | None = None
    tokens_per_second_per_user: float | None = None
    tau: float | None = None
    budget: float | None = None
    seconds_per_round: float | None = None


class AtSpeed(Part):
    """Throughput of two policies at a promised per-user speed."""

    speed: float
    policy: float | None = None
    baseline: float | None = None
    ratio: float | None = None


class AtThroughput(Part):
    """Per-user speed of two policies at one throughput."""

    throughput: float
    policy: float | None = None
    baseline: float | None = None
    ratio: float | None = None


class SimulatedComparison(Part):
    """A policy against the baseline."""

    policy: str
    baseline: str
    at_speed: list[AtSpeed] = Field(default_factory=list)
    at_throughput: list[AtThroughput] = Field(default_factory=list)


class SimulateResults(Part):
    """A file of `dspark simulate`."""

    header: Header
    assumptions: list[str] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    interrupted: bool = False
    points: list[SimulatedPoint]
    comparisons: list[SimulatedComparison] = Field(default_factory=list)
