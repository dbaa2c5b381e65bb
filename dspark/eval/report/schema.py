"""Result files as typed objects: what a report reads of them.

A file may hold more keys than these; keys may be added within a version (docs/eval.md). Wherever a
figure may be missing it is None here. Seconds, bytes and tokens are what they say.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AuditCheck",
    "AuditResults",
    "BenchConfiguration",
    "BenchFigures",
    "BenchResults",
    "Calibration",
    "EvalConfiguration",
    "EvalResults",
    "Header",
    "Part",
    "ProfilePoint",
    "ProfileResults",
    "Spread",
]


class Part(BaseModel):
    """A part of a result file."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Model(Part):
    """A target or a draft."""

    id: str
    revision: str | None = None
    source: dict[str, Any] | None = None
    fingerprint: str | None = None
    family: str | None = None
    dtype: str | None = None
    quant: str = "none"
    vocab_size: int | None = None
    num_layers: int | None = None


class PromptSetFacts(Part):
    """A prompt set."""

    name: str
    revision: str | None = None
    count: int | None = None
    turns: int | None = None
    sha256: str | None = None
    categories: dict[str, int] = Field(default_factory=dict)


class Exact(Part):
    """Exact mode."""

    enabled: bool | None = None
    reason: str | None = None
    backend: str | None = None


class Header(Part):
    """What was run, on what, and how (`dspark.eval.results.build_header`)."""

    created: str | None = None
    command: str | None = None
    dspark: str | None = None
    code: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    libraries: dict[str, str] = Field(default_factory=dict)
    python: str | None = None
    platform: str | None = None
    processor: str | None = None
    device: str | None = None
    threads: int | None = None
    target: Model
    drafts: list[Model] = Field(default_factory=list)
    sampling: list[dict[str, Any]] = Field(default_factory=list)
    prompts: list[PromptSetFacts] = Field(default_factory=list)
    exact: Exact = Field(default_factory=Exact)
    template: str | None = None
    think: bool | None = None
    effort: str | None = None
    seed: int | None = None
    batch: int | None = None
    concurrencies: list[int] = Field(default_factory=list)
    warm_ups: int | None = None
    repeats: int | None = None


class Failure(Part):
    """A question that failed."""

    question_id: str | int
    error: str | None = None


# -- dspark.eval ------------------------------------------------------------------------------


class MeansFacts(Part):
    """One quantity of rounds, averaged in three ways."""

    per_round: float | None = None
    per_token: float | None = None
    per_request: float | None = None


class PositionFacts(Part):
    """Acceptance at one depth."""

    position: int
    accepted: int
    reached: int
    offered: int
    unconditional: float | None = None
    conditional: float | None = None
    of_offered: float | None = None


class Acceptance(Part):
    """Acceptance of a set of questions."""

    prompts: int
    requests: int
    output_tokens: int
    rounds: int
    rounds_drafted: int
    proposed: int
    verified: int
    accepted: int
    committed: int
    tau: float | None = None
    tau_ci95: tuple[float, float] | None = None
    tau_means: MeansFacts
    accept_len_means: MeansFacts
    accept_len_histogram: list[int] = Field(default_factory=list)
    full_acceptance: float | None = None
    acceptance_rate: float | None = None
    verify_rate: float | None = None
    wasted_per_token: float | None = None
    per_position: list[PositionFacts] = Field(default_factory=list)


class ContextFacts(Part):
    """Rounds that started from a context of such a length."""

    from_: int = Field(alias="from")
    to: int | None = None
    prompts: int
    rounds: int
    tau: float | None = None
    accept_len: float | None = None


class Bin(Part):
    """A bin of a reliability curve."""

    count: int
    predicted: float
    observed: float


class Calibration(Part):
    """How far a set of predictions can be trusted."""

    count: int
    predicted: float | None = None
    observed: float | None = None
    ece: float | None = None
    auroc: float | None = None
    brier: float | None = None
    reliability: list[Bin] = Field(default_factory=list)


class PositionConfidence(Part):
    """Confidence at one depth."""

    position: int
    prefix: Calibration
    step: Calibration


class Confidence(Part):
    """Confidence of one configuration."""

    rule: str | None = None
    temperature: float | None = None
    bins: int
    prefix: Calibration
    step: Calibration
    per_position: list[PositionConfidence] = Field(default_factory=list)


class EvalConfiguration(Part):
    """One cell of an evaluation."""

    name: str
    draft: Model
    prompts: PromptSetFacts
    sampling: dict[str, Any]
    failed: list[Failure] = Field(default_factory=list)
    acceptance: Acceptance
    by_category: dict[str, Acceptance] = Field(default_factory=dict)
    by_context: list[ContextFacts] = Field(default_factory=list)
    confidence: Confidence | None = None
    definitions: dict[str, dict[str, Any]] = Field(default_factory=dict)


class EvalResults(Part):
    """A file of `dspark eval`."""

    header: Header
    configurations: list[EvalConfiguration] = Field(min_length=1)


# -- dspark.bench -----------------------------------------------------------------------------


class Spread(Part):
    """A median, its interval, and the extremes of the repeats.

    The interval is the 95 % one of a bench, and the quartiles of a profile.
    """

    median: float | None = None
    low: float | None = None
    high: float | None = None
    min: float | None = None
    max: float | None = None


class Speedup(Spread):
    """A speed over another configuration's."""

    over: str


class Percentiles(Part):
    """Percentiles, in seconds."""

    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


class Memory(Part):
    """Largest memory in use, in bytes."""

    peak_rss: int | None = None
    cache: int | None = None
    device: int | None = None


class CategoryFacts(Part):
    """One category's speed."""

    tokens_per_second: float | None = None
    speedup: float | None = None
    tau: float | None = None


class SameText(Part):
    """Answers equal to the baseline's."""

    equal: int
    of: int


class BenchFigures(Part):
    """One configuration at one concurrency."""

    configuration: str
    concurrency: int
    repeats: int | None = None
    tokens_per_second: Spread
    tokens_per_second_per_user: Spread = Field(default_factory=Spread)
    speedup: Speedup | None = None
    ttft: Percentiles = Field(default_factory=Percentiles)
    inter_token: Percentiles = Field(default_factory=Percentiles)
    inter_chunk: Percentiles = Field(default_factory=Percentiles)
    tau: float | None = None
    stage_share: dict[str, float | None] | None = None
    memory: Memory | None = None
    by_category: dict[str, CategoryFacts] = Field(default_factory=dict)
    same_text: SameText | None = None
    ended_early: int | None = None
    failed: list[Failure] = Field(default_factory=list)


class Skipped(Part):
    """A configuration that was not run at a concurrency."""

    configuration: str
    concurrency: int
    reason: str


class Library(Part):
    """The library or server that ran a configuration."""

    name: str | None = None
    version: str | None = None


class BenchConfiguration(Part):
    """What was timed."""

    name: str
    runner: str | None = None
    draft: str | None = None
    mode: str | None = None
    url: str | None = None
    sampling: dict[str, Any] = Field(default_factory=dict)
    library: Library | None = None
    is_exact: bool | None = None
    note: str | None = None


class BenchResults(Part):
    """A file of `dspark bench`."""

    header: Header
    baseline: str | None = None
    configurations: list[BenchConfiguration] = Field(min_length=1)
    figures: list[BenchFigures] = Field(min_length=1)
    skipped: list[Skipped] = Field(default_factory=list)
    runs: list[dict[str, Any]] = Field(default_factory=list)


# -- dspark.profile ---------------------------------------------------------------------------


class ProfilePoint(Part):
    """Seconds of a verification step of so many rows after so much context."""

    context: int
    rows: int
    seconds: Spread
    repeats: int | None = None


class ExpertsFacts(Part):
    """Experts that a step of so many rows wakes."""

    rows: int
    distinct_experts: float


class ProfileResults(Part):
    """A file of `dspark profile`."""

    header: Header
    key: dict[str, Any] = Field(default_factory=dict)
    interrupted: bool = False
    points: list[ProfilePoint] = Field(min_length=1)
    experts: list[ExpertsFacts] | None = None


# -- audit ------------------------------------------------------------------------------------


class AuditCheck(Part):
    """One check."""

    name: str
    status: str
    evidence: str = ""
    power: str = ""
    advice: str = ""
    seconds: float = 0.0


class AuditResults(Part):
    """A file of `dspark audit`."""

    header: Header
    settings: dict[str, Any] = Field(default_factory=dict)
    status: str
    interrupted: bool = False
    seconds: float = 0.0
    checks: list[AuditCheck]
