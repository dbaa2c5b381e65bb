"""Making a lookup corpus: the target's own answers, or any texts, as token ids.

A draft without training. What the target said to other questions is the best guess at how it goes
on here, wherever the ending of the text occurred there (dspark/draft/corpus.py).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dspark.errors import DataError
from dspark.text import TextCodec

__all__ = ["read_texts"]


def read_texts(paths: Sequence[Path], codec: TextCodec, *, vocab_size: int) -> list[list[int]]:
    """Token ids of texts.

    Args:
        paths: Answers of `dspark data` (.jsonl or .jsonl.gz), of which the responses are taken, or
            UTF-8 texts.
        codec: Encodes texts.
        vocab_size: V of the target.

    Returns:
        One list a response or text file; empty ones are left out.

    Raises:
        DataError: If a file cannot be read or a line is wrong, or there is nothing in them.
    """
    texts = [text for path in paths for text in _texts(path, codec, vocab_size) if text]
    if not texts:
        raise DataError("there is no token in these files, so there is no corpus to make of them.")
    return texts


def _texts(path: Path, codec: TextCodec, vocab_size: int) -> Iterator[list[int]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text.") from exc
    except (OSError, EOFError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise DataError(f"{path} cannot be read: {reason}.") from exc
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _response(line, f"{path}, line {number}", vocab_size)
    else:
        yield codec.encode_plain(text)


def _response(line: str, where: str, vocab_size: int) -> list[int]:
    try:
        row: Any = json.loads(line)
    except ValueError as exc:
        raise DataError(f"{where} is not JSON: {exc}.") from exc
    tokens = row.get("response_ids") if isinstance(row, dict) else None
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise DataError(f"{where}: there is no response_ids, a list of token ids.")
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise DataError(
            f"{where}: response_ids has ids from {min(tokens)} to {max(tokens)}, but the target "
            f"has {vocab_size} tokens.",
            hint="these answers were made by another model",
        )
    return tokens
