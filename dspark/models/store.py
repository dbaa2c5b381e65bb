"""The cache folder: finished models only, each built aside and renamed into place.

    <cache>/models/<name>/              a finished model; `dspark-model.json` lists its files
    <cache>/models/.build.<host>.<pid>.<random>/    work in progress

A folder without a valid list of files, or whose files differ in size from the list, is not a model.
Two processes that build the same model do not clash: each works in its own folder and the first
rename wins. What a dead process left behind is removed by the next build.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dspark.errors import CheckpointError
from dspark.folders import cache_root

__all__ = [
    "MARKER",
    "cache_root",
    "explain_disk_errors",
    "install_model",
    "is_complete",
    "models_folder",
    "remove_model",
]

MARKER = "dspark-model.json"
_SCHEMA = 1
_BUILD_PREFIX = ".build"
_DAY = 86_400  # seconds after which another host's work in progress counts as abandoned
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def models_folder(cache: str | Path | None = None) -> Path:
    """Return the folder that holds the finished models."""
    return cache_root(cache) / "models"


def is_complete(folder: Path) -> bool:
    """Tell whether a folder is a finished model whose files all have the size they were made with.

    Args:
        folder: Folder in the cache.

    Returns:
        False for a folder that is missing, unfinished or damaged.
    """
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = marker["files"] if marker["schema"] == _SCHEMA else {}
        return bool(files) and all((folder / n).stat().st_size == s for n, s in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def install_model(
    name: str,
    build: Callable[[Path, Path], None],
    *,
    source: dict[str, str],
    cache: str | Path | None = None,
) -> Path:
    """Build a model aside and move it into the cache, unless it is there already.

    Args:
        name: Folder name of the model.
        build: Called with (folder to fill, folder for scratch files).
        source: Where the model came from, kept in its list of files.
        cache: Cache folder, None for the user's.

    Returns:
        The folder of the finished model.

    Raises:
        CheckpointError: If the disk is full or the cache folder cannot be written; whatever `build`
            raises is passed on. Nothing half-built remains.
    """
    folder = models_folder(cache)
    final = folder / name
    if is_complete(final):
        return final
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        prefix = f"{_BUILD_PREFIX}.{_host()}.{os.getpid()}."
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        try:
            made, scratch = work / "model", work / "scratch"
            made.mkdir()
            scratch.mkdir()
            build(made, scratch)
            _write_marker(made, source)
            _move_into_place(made, final, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final


def remove_model(folder: Path) -> None:
    """Remove a model from the cache; its marker goes first, so that no half of it is ever used.

    Args:
        folder: Folder of the finished model.

    Raises:
        CheckpointError: If it cannot be removed, or is part of the package.
    """
    if Path(__file__).resolve().parent in folder.resolve().parents:
        raise CheckpointError(f"{folder} is part of the package, so it is not removed.")
    with explain_disk_errors(folder):
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)


@contextlib.contextmanager
def explain_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into one sentence.

    Args:
        folder: The folder that the block writes to.

    Raises:
        CheckpointError: If the block failed for such a reason.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as exc:
        # Writers in Rust (safetensors, tokenizers) raise their own errors around the system's.
        number = exc.errno if isinstance(exc, OSError) else None
        text = str(exc)
        if number in _NO_SPACE or "os error 28" in text or "No space left on device" in text:
            raise _disk_full(folder) from exc
        if number in _NO_ACCESS:
            raise CheckpointError(
                f"the cache folder {folder} cannot be written ({os.strerror(number or 0)}).",
                hint="set XDG_CACHE_HOME to a folder of yours",
            ) from exc
        raise


def _disk_full(folder: Path) -> CheckpointError:
    """Return the error that says that the disk of `folder` is full."""
    return CheckpointError(
        f"there is no space left on the disk that holds {folder}.",
        hint="free some space, or set XDG_CACHE_HOME to a folder on another disk",
    )


def _write_marker(folder: Path, source: dict[str, str]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {"schema": _SCHEMA, "source": source, "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _move_into_place(made: Path, final: Path, work: Path) -> None:
    for _ in range(3):
        try:
            made.rename(final)
        except OSError as exc:
            if exc.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if is_complete(final):  # another process was first
                return
            # A damaged model is in the way; it goes with the work folder.
            with contextlib.suppress(FileNotFoundError):
                final.rename(Path(tempfile.mkdtemp(dir=work)) / "damaged")
        else:
            return
    raise CheckpointError(f"the model folder {final} cannot be replaced.", hint="remove it by hand")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "localhost"


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{_BUILD_PREFIX}.*"):
        # Another process may be removing it as well.
        with contextlib.suppress(FileNotFoundError):
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    if time.time() - path.stat().st_mtime > _DAY:
        return True
    parts = path.name.split(".")
    # Process ids say something on their own host only (the cache may be a shared folder).
    is_ours = len(parts) == 5 and parts[2] == _host() and parts[3].isdigit()
    return is_ours and not _is_alive(int(parts[3]))


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # no harmless signal 0 there: age decides instead
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
