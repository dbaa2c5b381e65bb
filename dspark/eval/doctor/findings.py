"""What the doctor says: findings, one result per check, the report, its JSON and its lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["SCHEMA", "VERSION", "CheckResult", "DoctorReport", "Finding", "Severity"]

SCHEMA = "dspark.doctor"
VERSION = 1


class Severity(StrEnum):
    """How bad a finding is."""

    PROBLEM = "problem"  # the pair does not work as it should, or drafting cannot pay
    WARNING = "warning"  # it works, and something costs speed or may
    NOTE = "note"  # worth knowing


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: How bad it is.
        what: One sentence: what is the matter.
        evidence: One sentence: the figures it rests on.
        advice: One sentence: what to do.
    """

    severity: Severity
    what: str
    evidence: str
    advice: str

    def to_json(self) -> dict[str, str]:
        """As JSON."""
        return {
            "severity": self.severity.value,
            "what": self.what,
            "evidence": self.evidence,
            "advice": self.advice,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One check.

    Attributes:
        name: What was checked.
        findings: What was found; none if it is fine.
        seen: One sentence: what was seen, or why it was not checked.
        is_skipped: True if it was not checked.
        figures: Figures, ready for JSON.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    seen: str = ""
    is_skipped: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The worst finding's severity, else "fine" or "not checked"."""
        found = [finding.severity for finding in self.findings]
        for severity in Severity:
            if severity in found:
                return severity.value
        return "not checked" if self.is_skipped else "fine"

    @staticmethod
    def skipped(name: str, why: str) -> CheckResult:
        """A check that does not apply."""
        return CheckResult(name=name, seen=why, is_skipped=True)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name,
            "status": self.status,
            "seen": self.seen,
            "findings": [finding.to_json() for finding in self.findings],
            "figures": dict(self.figures),
        }


@dataclass(slots=True, kw_only=True)
class DoctorReport:
    """All checks of one visit.

    Attributes:
        header: What was looked at, as in result files.
        checks: The results so far.
        acceptance: Acceptance figures of the replayed rounds (docs/eval.md), as a tree and as a
            chain.
        cost: The cost model's table; None if it was not made.
        is_interrupted: True if Ctrl-C ended it early; the results are those of what had run.
        seconds: Wall-clock seconds.
    """

    header: Mapping[str, Any]
    checks: list[CheckResult] = field(default_factory=list)
    acceptance: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] | None = None
    is_interrupted: bool = False
    seconds: float = 0.0

    def found(self, severity: Severity) -> list[tuple[str, Finding]]:
        """Findings of one severity, each with its check's name."""
        return [
            (check.name, finding)
            for check in self.checks
            for finding in check.findings
            if finding.severity is severity
        ]

    @property
    def status(self) -> str:
        """The worst severity found, else "fine"."""
        return next((s.value for s in Severity if self.found(s)), "fine")

    @property
    def exit_code(self) -> int:
        """130 if interrupted, 3 if a problem was found, else 0."""
        if self.is_interrupted:
            return 130
        return 3 if self.found(Severity.PROBLEM) else 0

    def to_json(self) -> dict[str, Any]:
        """As a result file holds it (schema dspark.doctor)."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "header": dict(self.header),
            "status": self.status,
            "interrupted": self.is_interrupted,
            "seconds": round(self.seconds, 2),
            "checks": [check.to_json() for check in self.checks],
            "acceptance": dict(self.acceptance),
            "cost": None if self.cost is None else dict(self.cost),
        }

    def by_status(self, status: str) -> Iterator[CheckResult]:
        """Checks that ended so."""
        return (check for check in self.checks if check.status == status)

    def verdict(self) -> str:
        """The last line for people."""
        counts = {severity: len(self.found(severity)) for severity in Severity}
        parts = [
            f"{count} {severity.value}{'s' if count > 1 else ''}"
            for severity, count in counts.items()
            if count
        ]
        partial = "; interrupted, so this is a part" if self.is_interrupted else ""
        return f"{', '.join(parts) or 'nothing found'} ({self.seconds:.0f} s{partial})"
