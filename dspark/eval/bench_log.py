"""The log of finished runs of a benchmark: appended to as they finish, read again to go on.

A JSONL file; each line is {"key", "run"}. The key is a checksum of every setting that decides what
is measured, so that lines of other benchmarks may stand in the same file and are never mistaken for
this one's. Runs in which a request failed are not in it: they are tried again.
"""

from __future__ import annotations

import json
from pathlib import Path

from dspark.errors import DataError
from dspark.eval.bench_records import RunRecord
from dspark.eval.line_log import LineLog

__all__ = ["BenchLog", "RunName"]

RunName = tuple[str, int, int]
"""Configuration, concurrency, repeat."""


class BenchLog:
    """A log file: what it held, and appending to it.

    What a dead process left of a line at the end is cut off.

    Args:
        path: The file; made if it is not there.
        key: Checksum of the benchmark's settings.
        is_fresh: Forget what it holds.

    Raises:
        DataError: If it cannot be read or written, or an earlier line is malformed.
    """

    def __init__(self, path: str | Path, key: str, *, is_fresh: bool = False) -> None:
        self._log = LineLog(path, is_fresh=is_fresh)
        self._key = key
        self._found: dict[RunName, RunRecord] = {}
        for number, line in enumerate(self._log.lines, start=1):
            self._take(line, number)

    @property
    def path(self) -> Path:
        """The file."""
        return self._log.path

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            if row["key"] == self._key:
                run = RunRecord.from_json(row["run"])
                self._found[run.configuration, run.concurrency, run.repeat] = run
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise DataError(
                f"{self.path.name}, line {number}: not a line of a dspark bench log.",
                hint="name another file, or start afresh with --fresh",
            ) from exc

    @property
    def count(self) -> int:
        """Finished runs of this benchmark in it."""
        return len(self._found)

    def find(self, name: RunName) -> RunRecord | None:
        """A run that finished under the same settings, or None."""
        return self._found.get(name)

    def append(self, run: RunRecord) -> None:
        """Keep a finished run.

        Raises:
            DataError: If the file cannot be written.
        """
        self._log.append({"key": self._key, "run": run.to_json()})
        self._found[run.configuration, run.concurrency, run.repeat] = run

    def close(self) -> None:
        """Close the file."""
        self._log.close()
