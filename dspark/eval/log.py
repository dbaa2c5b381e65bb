"""The log of finished questions: appended to as they finish, read again to go on.

A JSONL file; each line is {"key", "question": sha256, "configuration", "record"}. The key is a
checksum of every setting that decides a record, so that lines of other runs may stand in the same
file and are never mistaken for this one's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

from dspark.errors import DataError
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
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
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
        self.path = Path(path).expanduser()
        self._found: dict[tuple[str, str], QuestionRecord] = {}
        self._file: IO[bytes] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if is_fresh:
                self.path.unlink(missing_ok=True)
            self._whole, self._size = self._read()
        except OSError as exc:
            raise DataError(f"the log {path} cannot be used: {exc.strerror}.") from exc

    def _read(self) -> tuple[int, int]:
        """Take in what is there; returns the bytes of whole lines, and all bytes."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            row, record = _parsed(line, self.path.name, number)
            self._found[row["key"], row["question"]] = record
        return len(whole), len(data)

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
        try:
            file = self._open()
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            file.flush()
        except OSError as exc:
            raise DataError(f"the log {self.path} cannot be written: {exc.strerror}.") from exc
        self._found[key, question.sha256] = record

    def _open(self) -> IO[bytes]:
        """The file, opened when there is something to write."""
        if self._file is None:
            self._file = self.path.open("ab")
            if self._whole < self._size:
                self._file.truncate(self._whole)
        return self._file

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
