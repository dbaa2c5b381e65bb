"""Shards of a data set: gzipped JSON lines, the same bytes for the same rows, written at once.

A row is one answer, `{"source", "temperature", "top_p", "seed", "prompt", "prompt_ids",
"response_ids", "finish"}`. While a shard is being made, its answers are kept in a journal beside
it, so that an interrupted run goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from dspark.errors import DataError

__all__ = [
    "Journal",
    "Row",
    "disk_error",
    "hash_shard",
    "pack_rows",
    "read_rows",
    "shard_name",
    "write_bytes",
]

Row: TypeAlias = dict[str, Any]

_LEVEL = 6  # of gzip; another level gives other bytes


def shard_name(index: int) -> str:
    """File name of a shard, numbered from 0."""
    return f"{index:05d}.jsonl.gz"


def pack_rows(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as the bytes of a shard; equal rows give equal bytes."""
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    return gzip.compress("".join(lines).encode(), compresslevel=_LEVEL, mtime=0)


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a shard.

    Raises:
        DataError: If it cannot be read, or is damaged (named with the line).
    """
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as exc:
        raise DataError(f"the shard {path} is damaged: {exc}.") from exc
    except OSError as exc:
        raise disk_error(path, exc, "read") from exc
    # Not splitlines: it parts lines at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line:
            try:
                yield json.loads(line)
            except ValueError as exc:
                raise DataError(f"the shard {path}, line {number}: not JSON.") from exc


def hash_shard(path: Path) -> str | None:
    """SHA-256 of a shard's bytes, None if it is not there.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise disk_error(path, exc, "read") from exc


@contextlib.contextmanager
def write_bytes(path: Path, data: bytes) -> Iterator[None]:
    """Write a file in two steps: the data beside it first, then, after the block, its name.

    A reader, or a run that dies at any time, sees the whole file or none.

    Args:
        path: The file.
        data: What it will hold.

    Yields:
        Once the data is safely on disk, before the file has its name.

    Raises:
        DataError: If it cannot be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise disk_error(path, exc) from exc
        yield
        try:
            temporary.replace(path)
        except OSError as exc:
            raise disk_error(path, exc) from exc
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def disk_error(path: Path, exc: OSError, verb: str = "written") -> DataError:
    """One sentence about a file that cannot be read or written."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{path} cannot be written: no space left on the device.",
            hint="make room and run the same command again; what is finished is kept",
        )
    return DataError(f"{path} cannot be {verb}: {exc.strerror}.")


class Journal:
    """The answers of the shard under way, one JSON line each: {"job", "rows", "dropped"}.

    What a dead process left of a line at the end is cut off.

    Args:
        path: The file; made when there is something to write.

    Attributes:
        found: Lines of an earlier run, by number of the job.

    Raises:
        DataError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[int, Row] = {}
        self._file: IO[bytes] | None = None
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as exc:
            raise disk_error(path, exc, "read") from exc
        self._whole = self._read(data)

    def _read(self, data: bytes) -> int:
        """Take in whole lines up to the first bad one; returns their bytes."""
        whole = 0
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                row = json.loads(line)
                self.found[row["job"]] = {"rows": row["rows"], "dropped": row["dropped"]}
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
        return whole

    def append(self, job: int, rows: Sequence[Row], dropped: Mapping[str, int]) -> None:
        """Keep the outcome of a job.

        Raises:
            DataError: If the file cannot be written.
        """
        line = {"job": job, "rows": list(rows), "dropped": dict(dropped)}
        text = json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
        try:
            if self._file is None:
                self._file = self.path.open("ab")
                self._file.truncate(self._whole)
            self._file.write(text.encode())
            self._file.flush()
        except OSError as exc:
            raise disk_error(self.path, exc) from exc

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk was reported by the write
                self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
