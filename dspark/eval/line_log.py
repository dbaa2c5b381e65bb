"""A JSONL file that finished work is appended to, line by line, and read again to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from dspark.errors import DataError

__all__ = ["LineLog", "whole_lines"]


def whole_lines(data: bytes) -> list[bytes]:
    """The lines of a file without what a dead process left of one at its end."""
    return data[: data.rfind(b"\n") + 1].splitlines()


class LineLog:
    """A log file: the lines it held, and appending to it.

    The file is written to only when there is something to append; what a dead process left of a
    line at the end is cut off then.

    Args:
        path: The file; its folder is made if it is not there.
        is_fresh: Forget what it holds.

    Attributes:
        path: The file.
        lines: What it held when it was opened, whole lines only.

    Raises:
        DataError: If it cannot be read, or its folder cannot be made.
    """

    def __init__(self, path: str | Path, *, is_fresh: bool = False) -> None:
        self.path = Path(path).expanduser()
        self._file: IO[bytes] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if is_fresh:
                self.path.unlink(missing_ok=True)
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as exc:
            raise DataError(f"the log {path} cannot be used: {exc.strerror}.") from exc
        self.lines = whole_lines(data)
        self._whole = data.rfind(b"\n") + 1
        self._is_torn = self._whole < len(data)

    def append(self, row: dict[str, Any]) -> None:
        """Write a line, and have it on its way to the disk.

        Args:
            row: JSON values.

        Raises:
            DataError: If the file cannot be written.
        """
        try:
            if self._file is None:
                self._file = self.path.open("ab")
                if self._is_torn:
                    self._file.truncate(self._whole)
            self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()
        except OSError as exc:
            raise DataError(f"the log {self.path} cannot be written: {exc.strerror}.") from exc

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
