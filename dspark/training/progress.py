"""What a run tells whoever watches, and the log it always keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from dspark.training.metrics import Figures

__all__ = ["Reporter", "RunLog", "SilentReporter", "StepReport", "ValidationReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step.

    Attributes:
        step: Its number, from 1.
        total: Steps of the run.
        epoch: From 0.
        figures: What its blocks showed.
        rate: Learning rate.
        gradient: Length of the gradient before clipping.
        is_skipped: Loss or gradient was not finite, so nothing was changed.
        tokens: Tokens of its sequences.
        responses: Tokens with a loss.
        seconds: How long it took.
        target_seconds: Of these, in the target or reading its features.
    """

    step: int
    total: int
    epoch: int
    figures: Figures
    rate: float
    gradient: float
    is_skipped: bool
    tokens: int
    responses: int
    seconds: float
    target_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """A look at the held-out sequences.

    Attributes:
        step: Steps done.
        figures: What their blocks showed.
        is_best: No validation before was better.
        seconds: How long it took.
    """

    step: int
    figures: Figures
    is_best: bool
    seconds: float


class Reporter(Protocol):
    """Someone who watches."""

    def step(self, report: StepReport) -> None:
        """A step was done."""
        ...

    def validation(self, report: ValidationReport) -> None:
        """A validation was done."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line happened."""
        ...


class SilentReporter:
    """Nobody watches."""

    def step(self, report: StepReport) -> None:
        """Ignore it."""

    def validation(self, report: ValidationReport) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


class RunLog:
    """The log of a run, one JSON object a line.

    Args:
        path: The file; lines of steps after `step`, which a killed run left, are dropped.
        step: Steps done so far.
    """

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            kept = [line for line in _lines(path) if line["step"] <= step]
            part = path.with_name(path.name + ".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(part, path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def step(self, report: StepReport) -> None:
        """Log a step."""
        self._write("step", asdict(report))

    def validation(self, report: ValidationReport) -> None:
        """Log a validation."""
        self._write("validation", asdict(report))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        figures = values["figures"]
        rest = {name: value for name, value in values.items() if name != "figures"}
        self._file.write(json.dumps({"kind": kind, **rest, **_rounded(figures)}) + "\n")
        self._file.flush()


def _rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as they are; JSON has no NaN, which becomes null."""
    clean = {}
    for name, value in figures.items():
        if isinstance(value, float) and value - value != 0:
            value = None
        clean[name] = value
    return clean


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a killed run may leave half a line
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found
