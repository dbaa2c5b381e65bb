"""Read result files of all kinds, and refuse what is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from dspark.errors import DataError
from dspark.eval.report.schema import (
    AuditResults,
    BenchResults,
    EvalResults,
    ProfileResults,
)
from dspark.eval.report.schema_simulate import SimulateResults

__all__ = ["KINDS", "Inputs", "ResultFile", "read_inputs"]

R = TypeVar("R", bound=BaseModel)

KINDS: dict[str, tuple[int, type[BaseModel]]] = {
    "bench": (1, BenchResults),
    "eval": (1, EvalResults),
    "profile": (1, ProfileResults),
    "simulate": (1, SimulateResults),
    "audit": (1, AuditResults),
}
"""Kinds of result files: the newest version that is read, and what it is read as."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFile(Generic[R]):
    """One result file.

    Attributes:
        name: File name without its folder.
        label: A letter, by the order in which the files were given.
        kind: A key of KINDS.
        raw: The file's JSON.
        results: The same, typed.
    """

    name: str
    label: str
    kind: str
    raw: dict[str, Any]
    results: R


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All files of a report, in the order given within each kind.

    Attributes:
        files: All of them.
    """

    files: tuple[ResultFile[Any], ...]

    @property
    def bench(self) -> list[ResultFile[BenchResults]]:
        """Speed."""
        return self.of_kind("bench")

    @property
    def eval(self) -> list[ResultFile[EvalResults]]:
        """Acceptance."""
        return self.of_kind("eval")

    @property
    def profile(self) -> list[ResultFile[ProfileResults]]:
        """Step times."""
        return self.of_kind("profile")

    @property
    def simulate(self) -> list[ResultFile[SimulateResults]]:
        """Simulated serving."""
        return self.of_kind("simulate")

    @property
    def audit(self) -> list[ResultFile[AuditResults]]:
        """Losslessness."""
        return self.of_kind("audit")

    def of_kind(self, kind: str) -> list[ResultFile[Any]]:
        """The files of a kind, in the order given."""
        return [file for file in self.files if file.kind == kind]


def read_inputs(paths: Sequence[str | Path]) -> Inputs:
    """Read the files of a report.

    Args:
        paths: Result files of `dspark eval`, `bench`, `profile`, `simulate` and `audit`, 1 to 26.

    Raises:
        DataError: If there are none or too many, or one cannot be read, is not JSON, is of no
            known schema, of a newer version, or lacks what its schema promises.
    """
    if not 1 <= len(paths) <= len(_LETTERS):
        raise DataError(f"{len(paths)} files were given, but a report takes 1 to {len(_LETTERS)}.")
    return Inputs(files=tuple(_read(path, _LETTERS[at]) for at, path in enumerate(paths)))


def _read(path: str | Path, label: str) -> ResultFile[Any]:
    raw = _read_json(path)
    kind, version = _kind_of(raw)
    if kind not in KINDS:
        known = ", ".join(f"dspark.{name}" for name in KINDS)
        raise DataError(
            f"{path} is no result file of dspark: its schema is {_short(raw)}, but must be one of "
            f"{known}."
        )
    newest, model = KINDS[kind]
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= newest:
        raise DataError(
            f"{path} is version {version!r} of dspark.{kind}, but this dspark reads version 1"
            + (f" to {newest}." if newest > 1 else "."),
            hint="use the dspark that wrote it, or a newer one",
        )
    try:
        results = model.model_validate(raw)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise DataError(
            f"{path} does not hold what dspark.{kind} promises: at {place}, {_lower(first['msg'])}."
        ) from exc
    name = Path(path).name
    return ResultFile(name=name, label=label, kind=kind, raw=raw, results=results)


def _read_json(path: str | Path) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        raw = json.loads(text, parse_constant=refuse)
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc
    except RecursionError as exc:
        raise DataError(f"{path} is no result file of dspark: it is nested too deeply.") from exc
    except ValueError as exc:
        raise DataError(f"{path} is not JSON: {exc}.") from exc
    if not isinstance(raw, dict):
        raise DataError(f"{path} is no result file of dspark: it holds no JSON object.")
    return raw


def _kind_of(raw: dict[str, Any]) -> tuple[str, Any]:
    """The kind and version a file claims to be."""
    schema = raw.get("schema")
    if not isinstance(schema, str) or not schema.startswith("dspark."):
        return "", None
    return schema.removeprefix("dspark."), raw.get("version")


def _short(raw: dict[str, Any]) -> str:
    text = repr(raw.get("schema"))
    return text if len(text) <= 60 else text[:57] + "..."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
