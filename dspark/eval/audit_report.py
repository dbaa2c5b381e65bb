"""What an audit says: one result per check, the report, its JSON and its lines.

A check *passed*, *found* something, or was *inconclusive*: it ran, but what it saw proves nothing
(nothing was drafted, too few samples). Inconclusive is never counted as passed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["ONLY_REJECTIONS", "SCHEMA", "VERSION", "AuditReport", "CheckResult", "Status"]

SCHEMA = "dspark.audit"
VERSION = 1

ONLY_REJECTIONS = "; no draft was accepted, so only rejections were put to the test"
"""What a check's evidence adds where that is so."""


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FOUND = "found"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One check.

    Attributes:
        name: What was checked.
        status: How it ended.
        evidence: One sentence: what was seen.
        power: One sentence: what it would have caught; empty if it has none.
        advice: One sentence: what to do; empty if there is nothing to do.
        seconds: Wall-clock seconds.
        details: Figures, ready for JSON.
    """

    name: str
    status: Status
    evidence: str
    power: str = ""
    advice: str = ""
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The check as a JSON object."""
        return {
            "name": self.name,
            "status": self.status.value,
            "evidence": self.evidence,
            "power": self.power,
            "advice": self.advice,
            "seconds": round(self.seconds, 2),
            "details": _plain(self.details),
        }

    def lines(self) -> list[str]:
        """The check for people: a line, and lines for its power and advice."""
        lines = [f"{self.status.value:<12}  {self.name:<20}  {self.evidence}"]
        if self.power:
            lines.append(f"{'':<12}  {'':<20}  power: {self.power}")
        if self.advice:
            lines.append(f"{'':<12}  {'':<20}  do: {self.advice}")
        return lines


@dataclass(slots=True, kw_only=True)
class AuditReport:
    """All checks of one audit.

    Attributes:
        header: What was audited, on what (`dspark.eval.results.build_header`).
        settings: The audit's own settings, ready for JSON.
        checks: The results so far.
        is_interrupted: True if Ctrl-C ended it early; the results are those of what had run.
        seconds: Wall-clock seconds.
    """

    header: Mapping[str, Any]
    settings: Mapping[str, Any]
    checks: list[CheckResult] = field(default_factory=list)
    is_interrupted: bool = False
    seconds: float = 0.0

    @property
    def status(self) -> Status:
        """Found if any check found something; passed if some passed and drafts were judged."""
        found = [check.status for check in self.checks]
        if Status.FOUND in found:
            return Status.FOUND
        proofs = [c for c in self.checks if c.details.get("judged_nodes", 0) > 0]
        is_proof = any(check.status is Status.PASSED for check in proofs)
        return Status.PASSED if is_proof else Status.INCONCLUSIVE

    @property
    def exit_code(self) -> int:
        """130 if interrupted, 0 if clean, 3 if something was found or nothing was proven."""
        if self.is_interrupted:
            return 130
        return 0 if self.status is Status.PASSED else 3

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "header": dict(self.header),
            "settings": dict(self.settings),
            "status": self.status.value,
            "interrupted": self.is_interrupted,
            "seconds": round(self.seconds, 2),
            "checks": [check.as_json() for check in self.checks],
        }

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [line for check in self.checks for line in check.lines()]
        return [*lines, self._verdict()]

    def _verdict(self) -> str:
        count = {status: sum(c.status is status for c in self.checks) for status in Status}
        tally = ", ".join(f"{n} {status.value}" for status, n in count.items() if n)
        verdict = {
            Status.PASSED: "no loss was found",
            Status.FOUND: "LOSS WAS FOUND",
            Status.INCONCLUSIVE: "nothing was proven: no check judged drafted tokens and passed",
        }[self.status]
        partial = "; interrupted, so this report is partial" if self.is_interrupted else ""
        return f"{verdict} ({tally or 'no check ran'}; {self.seconds:.0f} s{partial})"


def _plain(value: Any) -> Any:
    """Details as JSON knows them: a value gap may be infinite, where a token was cut off."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
