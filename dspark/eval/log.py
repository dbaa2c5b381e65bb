"""The log of finished questions: appended to as they finish, read again to go on.

A JSONL file; each line is {"key", "question": sha256, "configuration", "record"}. The key is a
checksum of every setting that decides a record, so that lines of other runs may stand in the same
file and are never mistaken for this one's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dspark.errors import DataError
from dspark.eval.line_log import LineLog, whole_lines
from dspark.eval.prompts import Question
from dspark.eval.records import QuestionRecord

__all__ = ["RunLog", "read_log", "settings_key"]


def settings_key(settings: dict[str, Any]) -> str:
    """Checksum of JSON settings."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_log(path: str | Path) -> dict[str, list[QuestionRecord]]:
    """What a log holds of each configuration: of its latest run, each question once.

    Args:
        path: The file; it is left as it is.

    Returns:
        Records by the configuration's name, in the order of the file.

    Raises:
        DataError: If it cannot be read, or is no log.
    """
    file = Path(path).expanduser()
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise DataError(f"the log {path} cannot be read: {exc.strerror}.") from exc
    found: dict[str, tuple[str, dict[str, QuestionRecord]]] = {}
    for number, line in enumerate(whole_lines(data), start=1):
        row, record = _parsed(line, file.name, number)
        name, key = str(row.get("configuration", "")), row["key"]
        if name not in found or found[name][0] != key:
            found[name] = key, {}
        found[name][1][row["question"]] = record
    return {name: list(records.values()) for name, (_, records) in found.items()}


def _parsed(line: bytes, name: str, number: int) -> tuple[dict[str, Any], QuestionRecord]:
    """A line of a log."""
    try:
        row = json.loads(line)
        record = QuestionRecord.from_json(row["record"])
        _ = row["key"], row["question"]
    except (ValueError, KeyError, TypeError) as exc:
        raise DataError(
            f"{name}, line {number}: not a line of a dspark eval log.",
            hint="name another file, or start afresh with --fresh",
        ) from exc
    return row, record


class RunLog:
    """A log file: what it held, and appending to it.

    What a dead process left of a line at the end is cut off.

    Args:
        path: The file; made if it is not there.
        is_fresh: Forget what it holds.

    Raises:
        DataError: If it cannot be read or written, or an earlier line is malformed.
    """

    def __init__(self, path: str | Path, *, is_fresh: bool = False) -> None:
        self._log = LineLog(path, is_fresh=is_fresh)
        self._found: dict[tuple[str, str], QuestionRecord] = {}
        for number, line in enumerate(self._log.lines, start=1):
            row, record = _parsed(line, self.path.name, number)
            self._found[row["key"], row["question"]] = record

    @property
    def path(self) -> Path:
        """The file."""
        return self._log.path

    @property
    def count(self) -> int:
        """Finished questions in it, of all runs."""
        return len(self._found)

    def find(self, key: str, question: Question) -> QuestionRecord | None:
        """The record of a question that finished under the same settings, or None."""
        return self._found.get((key, question.sha256))

    def append(
        self, key: str, question: Question, record: QuestionRecord, *, configuration: str
    ) -> None:
        """Keep a finished question.

        Raises:
            DataError: If the file cannot be written.
        """
        row = {
            "key": key,
            "question": question.sha256,
            "configuration": configuration,
            "record": record.to_json(),
        }
        self._log.append(row)
        self._found[key, question.sha256] = record

    def close(self) -> None:
        """Close the file."""
        self._log.close()
