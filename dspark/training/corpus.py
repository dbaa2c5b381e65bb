"""Making a lookup corpus: the target's own answers, or any texts, as token ids.

A draft without training. What the target said to other questions is the best guess at how it goes
on here, wherever the ending of the text occurred there (dspark/draft/corpus.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dspark.errors import DataError
from dspark.text import TextCodec
from dspark.training.samples import read_answers

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
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for _, response, _ in read_answers(path, vocab_size=vocab_size):
            yield response
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text.") from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc
    yield codec.encode_plain(text)
