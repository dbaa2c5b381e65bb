"""The text a small V4 is trained on: Python's standard library, its documentation, chat answers.

`collect` writes one file of documents and a manifest that names every source with size, hash and
licence. The same sources give the same bytes. Documents are held out by the hash of their names,
so that a later collection with more sources keeps the split.

    <folder>/documents.jsonl.gz   {"name", "kind", "split", "text"} a line
    <folder>/manifest.json        what went in
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark.base_model.chat import encode_messages
from dspark.errors import DataError

__all__ = [
    "DOCUMENTS",
    "KINDS",
    "MANIFEST",
    "Document",
    "collect",
    "find_documentation",
    "python_sources",
    "read_documents",
    "response_documents",
]

DOCUMENTS = "documents.jsonl.gz"
MANIFEST = "manifest.json"
KINDS = ("code", "docs", "chat")
"""Kinds of documents: Python sources, reStructuredText, chats."""

_LICENCES = {
    "code": "Python Software Foundation License 2 (standard library of CPython)",
    "docs": "Python Software Foundation License 2; its code examples also Zero-Clause BSD",
    "chat": "answers of the model that the response files name, under that model's licence",
}
# Tests are as much text as all the rest, and odder; tables of codecs are numbers.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_LARGEST = 600_000  # bytes of a file; longer ones are tables
_MANUAL_SUFFIX = ".rst.txt"
_MANUAL_PLACES = ("share/doc/python{v}/html/_sources", "share/doc/python{v}-doc/html/_sources")
_SPECIAL = ("<｜", "｜>", "<think>", "</think>", "｜DSML｜")


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        name: "code/json/decoder.py", "docs/library/json.rst", "chat/<hash>.0".
        kind: One of KINDS.
        split: "train" or "held-out".
        text: The text; of a chat, its encoding with special tokens.
    """

    name: str
    kind: str
    split: str
    text: str


def python_sources(folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Names and texts of the standard library's modules, without tests and tables.

    Args:
        folder: The library; None for that of the running Python.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        is_table = parts[0] == "encodings" and path.name not in ("__init__.py", "aliases.py")
        if _LEFT_OUT & set(parts) or is_table or path.stat().st_size > _LARGEST:
            continue
        text = _read(path)
        if text.strip():
            yield "code/" + "/".join(parts), text


def find_documentation() -> Path | None:
    """The folder of the installed documentation's sources, None if there is none.

    Debian's package `python3.11-doc` brings them.
    """
    version = ".".join(platform.python_version_tuple()[:2])
    for prefix in ("/usr", "/usr/local"):
        for place in _MANUAL_PLACES:
            folder = Path(prefix) / place.format(v=version)
            if folder.is_dir():
                return folder
    return None


def documentation_sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of the documentation's pages.

    Raises:
        DataError: If the folder holds none.
    """
    paths = sorted(folder.rglob(f"*{_MANUAL_SUFFIX}"))
    if not paths:
        raise DataError(f"{folder} holds no *{_MANUAL_SUFFIX} file.")
    for path in paths:
        text = _read(path)
        if text.strip() and path.stat().st_size <= _LARGEST:
            name = path.relative_to(folder).as_posix().removesuffix(".txt")
            yield f"docs/{name}", text


def response_documents(
    files: Sequence[Path], decode: Callable[[list[int]], str]
) -> Iterator[tuple[str, str]]:
    """Chats of response files (`dspark data`): a prompt and an answer each, in V4's own encoding.

    Args:
        files: JSON lines, plain or gzipped, with `prompt`, `response_ids` and `finish`.
        decode: Text of token ids, by the tokenizer that made them.

    Raises:
        DataError: If a line has not these fields.
    """
    seen: dict[str, int] = {}
    for path in files:
        for number, row in enumerate(_lines(path), start=1):
            try:
                prompt, ids = str(row["prompt"]), [int(i) for i in row["response_ids"]]
                is_whole = row["finish"] == "stop"
            except (KeyError, TypeError, ValueError) as exc:
                raise DataError(f"{path}, line {number}, has no prompt and response_ids.") from exc
            answer = decode(ids).strip()
            if not answer or any(mark in prompt + answer for mark in _SPECIAL):
                continue  # what looks like a special token would be taken for one
            key = hashlib.sha256(prompt.encode()).hexdigest()[:16]
            seen[key] = seen.get(key, -1) + 1
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer, "wo_eos": not is_whole},
            ]
            yield f"chat/{key}.{seen[key]}", encode_messages(messages)


def collect(
    folder: Path, sources: Iterable[tuple[str, str]], *, holdout: float, notes: dict[str, str]
) -> dict[str, Any]:
    """Write documents and manifest.

    Args:
        folder: Where to; must not exist, or be empty.
        sources: Names and texts; the part of a name before the first slash is its kind.
        holdout: Share of the documents to hold out.
        notes: Kept in the manifest: where things came from.

    Returns:
        The manifest.

    Raises:
        DataError: If the folder is used, there is nothing to write, or a name comes twice.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} exists and is not an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Any]] = []
    names: set[str] = set()
    path = folder / DOCUMENTS
    # Without a name and a time in its header, equal texts give an equal file.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        for name, text in sources:
            if name in names:
                raise DataError(f"{name} is there twice.")
            names.add(name)
            document = Document(name, name.partition("/")[0], _split(name, holdout), text)
            line = json.dumps(asdict(document), ensure_ascii=False) + "\n"
            packed.write(line.encode())
            body = text.encode()
            files.append(
                {
                    "name": name,
                    "split": document.split,
                    "bytes": len(body),
                    "sha256": hashlib.sha256(body).hexdigest(),
                }
            )
    if not files:
        raise DataError("there is no text to collect.")
    manifest = {
        "schema": 1,
        "python": platform.python_version(),
        "holdout": holdout,
        "notes": notes,
        "licences": {kind: _LICENCES[kind] for kind in KINDS if _bytes(files, kind)},
        "bytes": {kind: _bytes(files, kind) for kind in KINDS},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def read_documents(folder: Path) -> list[Document]:
    """The documents of a collection.

    Raises:
        DataError: If the file is missing or damaged.
    """
    try:
        return [Document(**row) for row in _lines(folder / DOCUMENTS)]
    except TypeError as exc:
        raise DataError(f"{folder / DOCUMENTS} holds no documents.") from exc


def _split(name: str, holdout: float) -> str:
    """By the name, without the number of an answer: answers to one prompt stay together."""
    stem = name.partition(".")[0] if name.startswith("chat/") else name
    place = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:4], "big") / 2**32
    return "held-out" if place < holdout else "train"


def _bytes(files: list[dict[str, Any]], kind: str) -> int:
    return sum(item["bytes"] for item in files if item["name"].startswith(kind + "/"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        is_packed = path.suffix == ".gz"
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if is_packed
            else path.open(encoding="utf-8") as handle
        ):
            for line in handle:
                if line.strip():
                    yield json.loads(line)
    except (OSError, EOFError, ValueError) as exc:
        raise DataError(f"{path} cannot be read as JSON lines: {exc}.") from exc


def _read(path: Path) -> str:
    """UTF-8, or Latin-1 where a file says so."""
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
