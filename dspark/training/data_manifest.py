"""The manifest of a data set, and the folder it describes.

    {"schema": "dspark.data", "version": 1, "is_complete": true, "target": {...}, ...,
     "shards": [{"file", "sha256", "rows", ...}]}

A shard is entered before it gets its name, so a shard with its name is always in the manifest, and
a run that dies in between makes it again. docs/data.md lists every key.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark._version import __version__
from dspark.errors import ConfigError, DataError
from dspark.eval.results import code_fingerprint, read_results, write_results
from dspark.training.data_shards import (
    Journal,
    Row,
    disk_error,
    hash_shard,
    pack_rows,
    read_rows,
    shard_name,
    write_bytes,
)

__all__ = [
    "MANIFEST",
    "QUESTIONS",
    "SCHEMA",
    "SHARDS",
    "VERSION",
    "DataFolder",
    "read_manifest",
    "shard_facts",
]

SCHEMA = "dspark.data"
VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards"
QUESTIONS = "questions"

_JOURNAL = ".partial.jsonl"
_SETTINGS = ("target", "tokenizer", "template", "settings", "prompts", "exclude", "server")
_WORDS = {
    "target": "the target",
    "tokenizer": "the target's vocabulary",
    "template": "the target's chat template",
    "prompts": "--prompts",
    "exclude": "--exclude",
}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of a data set.

    Raises:
        DataError: If there is none that can be read.
    """
    return read_results(Path(folder).expanduser() / MANIFEST, SCHEMA, VERSION)


class DataFolder:
    """The folder of a data set: its manifest, shards, questions and the journal of the run.

    Args:
        path: The folder; made if it is not there.
        begun: What is known before the first answer: the sections that must be the same in every
            run that goes on with it.

    Attributes:
        manifest: The manifest as it is on disk after `save`.

    Raises:
        ConfigError: If the folder holds something else, or was begun with other settings.
        DataError: If it cannot be read or written.
    """

    def __init__(self, path: str | Path, begun: Mapping[str, Any]) -> None:
        self.path = Path(path).expanduser()
        empty: dict[str, Any] = {"engine": None, "counts": {}, QUESTIONS: [], SHARDS: []}
        head = {"schema": SCHEMA, "version": VERSION, "is_complete": False}
        self.manifest: dict[str, Any] = {**head, "dspark": __version__, **begun, **empty}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            there = sorted(item.name for item in self.path.iterdir())
        except OSError as exc:
            raise disk_error(self.path, exc) from exc
        if MANIFEST in there:
            found = read_manifest(self.path)
            # Where nothing was made yet, nothing speaks against other settings.
            if found.get(SHARDS) or found.get(QUESTIONS) or any(map(_is_journal, there)):
                _compare(self.path, found, self.manifest)
                for key in ("engine", "counts", QUESTIONS, SHARDS, "is_complete"):
                    self.manifest[key] = found.get(key, self.manifest[key])
            self._remove_leftovers()
        elif any(not name.startswith(".") for name in there):
            raise ConfigError(
                f"{path} holds other files ({there[0]}, ...), but no manifest of a data set.",
                hint="name a new folder",
            )

    def _remove_leftovers(self) -> None:
        """Remove what a dead process left half-written."""
        for folder in (self.path, self.path / QUESTIONS):
            for item in folder.glob(".*.tmp"):
                with contextlib.suppress(OSError):
                    item.unlink()

    def save(self) -> None:
        """Write the manifest at once.

        Raises:
            DataError: If it cannot be written.
        """
        write_results(self.path / MANIFEST, self.manifest)

    def settle_engine(self, facts: Mapping[str, Any]) -> None:
        """Enter what the answers come from, once it is loaded.

        Raises:
            ConfigError: If earlier answers came from something else.
        """
        before = self.manifest["engine"]
        if before is not None:
            for key in sorted({*before, *facts}):
                _refuse_change(self.path, f"--{key}", before.get(key), facts.get(key))
        self.manifest["engine"] = dict(facts)

    # -- shards -------------------------------------------------------------------------------

    def file(self, kind: str, index: int) -> Path:
        """Where a shard of answers or questions is."""
        folder = self.path if kind == SHARDS else self.path / QUESTIONS
        return folder / shard_name(index)

    def entry(self, kind: str, index: int) -> dict[str, Any] | None:
        """The entry of a finished shard, None if it is still to be made.

        Raises:
            DataError: If its bytes are not those that were written.
        """
        path = self.file(kind, index)
        name = path.relative_to(self.path).as_posix()
        entry = next((e for e in self.manifest[kind] if e["file"] == name), None)
        found = hash_shard(path)
        if entry is None or found is None:
            return None
        if found != entry["sha256"]:
            raise DataError(
                f"{path} is not what was written: its SHA-256 differs from the manifest's.",
                hint="remove the file to have it made again",
            )
        return dict(entry)

    def rows(self, kind: str, index: int) -> list[Row]:
        """The rows of a finished shard."""
        return list(read_rows(self.file(kind, index)))

    def install(self, kind: str, index: int, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
        """Write a shard and enter it.

        Args:
            kind: SHARDS or QUESTIONS.
            index: Its number.
            rows: Its rows.
            facts: What its entry says besides file, checksum, rows and code.

        Raises:
            DataError: If it cannot be written.
        """
        path, data = self.file(kind, index), pack_rows(rows)
        name = path.relative_to(self.path).as_posix()
        entry = {
            "file": name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "rows": len(rows),
            **facts,
            "code": code_fingerprint(),
        }
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as exc:
            raise disk_error(path.parent, exc) from exc
        with write_bytes(path, data):
            others = [e for e in self.manifest[kind] if e["file"] != name]
            self.manifest[kind] = sorted([*others, entry], key=lambda e: str(e["file"]))
            self._count()
            self.save()

    def journal(self, index: int) -> Journal:
        """The journal of a shard under way."""
        return Journal(self.path / f".{index:05d}{_JOURNAL}")

    # -- counts -------------------------------------------------------------------------------

    def finish(self) -> None:
        """Mark the data set complete and write the manifest."""
        self.manifest["is_complete"] = True
        self._count()
        self.save()

    def _count(self) -> None:
        """Sum the shards' entries up into the manifest's counts."""
        shards = self.manifest[SHARDS]
        kinds: Counter[tuple[str, float, str]] = Counter()
        dropped: Counter[str] = Counter()
        for entry in shards:
            dropped.update(entry["dropped"])
            for kind in entry["kinds"]:
                kinds[kind["source"], kind["temperature"], kind["finish"]] += kind["rows"]
        self.manifest["counts"]["answers"] = {
            "rows": sum(entry["rows"] for entry in shards),
            "prompt_tokens": sum(entry["prompt_tokens"] for entry in shards),
            "response_tokens": sum(entry["response_tokens"] for entry in shards),
            "dropped": dict(sorted(dropped.items())),
            "kinds": _kinds(kinds),
        }


def shard_facts(rows: Iterable[Row], dropped: Mapping[str, int]) -> dict[str, Any]:
    """What the entry of a shard of answers says of its rows."""
    rows = list(rows)
    kinds = Counter((row["source"], row["temperature"], row["finish"]) for row in rows)
    return {
        "prompt_tokens": sum(len(row["prompt_ids"]) for row in rows),
        "response_tokens": sum(len(row["response_ids"]) for row in rows),
        "kinds": _kinds(kinds),
        "dropped": dict(sorted(dropped.items())),
    }


def _kinds(counts: Mapping[tuple[str, float, str], int]) -> list[dict[str, Any]]:
    return [
        {"source": source, "temperature": temperature, "finish": finish, "rows": rows}
        for (source, temperature, finish), rows in sorted(counts.items())
    ]


def _is_journal(name: str) -> bool:
    return name.endswith(_JOURNAL)


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a data set of other settings, and name the first difference."""
    for section in _SETTINGS:
        before, now = found.get(section), wanted.get(section)
        if section in ("settings", "server") and before and now:
            for key in sorted({*before, *now}):
                name = "--" + key.replace("_", "-")
                _refuse_change(path, name, before.get(key), now.get(key))
        else:
            _refuse_change(path, _WORDS.get(section, f"--{section}"), before, now)


def _refuse_change(path: Path, name: str, before: object, now: object) -> None:
    if before != now:
        raise ConfigError(
            f"{path} was begun with {name} {_shown(before)}, but now it is {_shown(now)}.",
            hint="give the options of the first run again, or name another folder",
        )


def _shown(value: object) -> str:
    """A setting in few words: sets and models by name and checksum."""
    if value is None or value == []:
        return "not given"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    if isinstance(value, dict):
        name = value.get("name", value.get("id", "another"))
        mark = value.get("sha256") or value.get("fingerprint")
        return f"{name} ({str(mark)[:8]})" if mark else str(name)
    text = str(value)
    return text if len(text) <= 40 else f"{text[:8]}..."
