"""A lookup corpus as a file: token ids of texts, and what they were made for.

    corpus.safetensors
        tokens   uint16, or int32 where ids need it [T]: all texts, one after another
        lengths  int32 [N]: tokens of each text
        metadata "dspark_corpus": JSON with version, target (id, source, fingerprint), vocabulary
                 (checksum of the tokenizer's), texts, tokens

Two bytes a token: a million tokens of a model's answers are 2 MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dspark.draft.corpus import Corpus
from dspark.errors import CheckpointError, ConfigError, DataError

__all__ = ["SUFFIX", "corpus_facts", "read_corpus", "write_corpus"]

SUFFIX = ".safetensors"
VERSION = 1
_KEY = "dspark_corpus"


def write_corpus(
    path: Path, texts: Sequence[Sequence[int]], *, target: Mapping[str, Any], vocabulary: str
) -> dict[str, Any]:
    """Write texts as a corpus file, at once: a reader sees the old one or the new one.

    Args:
        path: The file.
        texts: Token ids of each text, none of them empty.
        target: Whose texts they are (`dspark.eval.results.describe_model`).
        vocabulary: Checksum of its vocabulary.

    Returns:
        What the file says of itself.

    Raises:
        DataError: If it cannot be written.
    """
    tokens = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
    narrow = np.uint16 if tokens.max() <= np.iinfo(np.uint16).max else np.int32
    facts = {
        "version": VERSION,
        "target": {key: target.get(key) for key in ("id", "source", "fingerprint")},
        "vocabulary": vocabulary,
        "texts": len(texts),
        "tokens": len(tokens),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        data = save(
            {
                "tokens": tokens.astype(narrow),
                "lengths": np.array([len(text) for text in texts], dtype=np.int32),
            },
            metadata={_KEY: json.dumps(facts, sort_keys=True)},
        )
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise DataError(f"the corpus {path} cannot be written: {exc.strerror}.") from exc
    return facts


def corpus_facts(path: Path) -> dict[str, Any] | None:
    """What a corpus file says of itself, None if it is no readable corpus."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata[_KEY])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def read_corpus(path: Path, *, vocab_size: int, vocabulary: str | None) -> Corpus:
    """Read a corpus file and sort it.

    Args:
        path: The file.
        vocab_size: V of the target that it is for.
        vocabulary: Checksum of the target's vocabulary, None if it has no tokenizer.

    Returns:
        The corpus.

    Raises:
        CheckpointError: If it cannot be read or is damaged.
        ConfigError: If it was made with another vocabulary.
    """
    facts = corpus_facts(path)
    if facts is None:
        raise CheckpointError(
            f"{path} is no lookup corpus of dspark.",
            hint="make one with dspark corpus, or name a text file",
        )
    if facts.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is version {facts.get('version')!r} of a corpus, but this dspark reads "
            f"{VERSION}."
        )
    if vocabulary is not None and facts.get("vocabulary") != vocabulary:
        made_for = (facts.get("target") or {}).get("id")
        raise ConfigError(
            f"the corpus {path} was made with another vocabulary (for {made_for}) than the "
            "target has.",
            hint="make one for this target with dspark corpus",
        )
    try:
        with safe_open(path, framework="numpy") as file:
            tokens = file.get_tensor("tokens").astype(np.int64)
            lengths = file.get_tensor("lengths").astype(np.int64)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"the corpus {path} cannot be read: {exc}.") from exc
    is_whole = len(lengths) > 0 and lengths.min() > 0 and lengths.sum() == len(tokens)
    if not is_whole or tokens.max() >= vocab_size or tokens.min() < 0:
        raise CheckpointError(
            f"the corpus {path} is damaged: its texts and their lengths do not fit, or it has ids "
            f"outside the vocabulary of {vocab_size} tokens."
        )
    return Corpus(np.split(tokens, np.cumsum(lengths)[:-1]))
