"""Training samples: reading shards, splitting off the held-out ones, the order of an epoch.

A shard is a file of JSON lines, plain or gzipped, each with `prompt_ids` and `response_ids` (what
`dspark data` writes). Everything random is a pure function of the seed and of what it is for, so a
resumed run sees the same samples.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dspark.errors import DataError
from dspark.training.recipe import DataSection, RunSection

__all__ = [
    "Sample",
    "Samples",
    "anchors_of",
    "frequent_tokens",
    "plan_epoch",
    "read_answers",
    "read_samples",
]

IntArray: TypeAlias = NDArray[np.int64]

_VALIDATION_EPOCH = 2**31 - 1  # an epoch of its own for the anchors of validation
_LEAST_RESPONSE = 2  # tokens: an anchor and what follows it


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One answer.

    Attributes:
        index: Its number among all samples, in the order of the files.
        tokens: int64 [T], prompt and response.
        start: First position with a loss.
        source: Where it comes from, as the shard says.
    """

    index: int
    tokens: IntArray
    start: int
    source: str

    @property
    def length(self) -> int:
        """T."""
        return int(self.tokens.shape[0])

    @property
    def key(self) -> str:
        """Checksum of the tokens and of where the response starts."""
        whole = self.start.to_bytes(8, "little") + self.tokens.tobytes()
        return hashlib.sha256(whole).hexdigest()[:32]


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """What a run trains on.

    Attributes:
        train: Samples to train on.
        validation: Samples held out, in the order of their prompts' hashes.
        sha256: Checksum of all tokens in order.
    """

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    sha256: str

    def by_index(self) -> dict[int, Sample]:
        """Every sample by its number."""
        return {sample.index: sample for sample in (*self.train, *self.validation)}


def read_samples(section: DataSection, *, vocab_size: int) -> Samples:
    """Read the shards of a recipe.

    Args:
        section: Files, longest sequence, held-out share.
        vocab_size: V of the target; larger ids are refused.

    Returns:
        The samples; those whose response is cut down to less than two tokens are left out.

    Raises:
        DataError: If a file is missing, a line is wrong, or nothing is left to train on.
    """
    digest = hashlib.sha256()
    train: list[Sample] = []
    validation: list[tuple[float, Sample]] = []
    index = 0
    for path in _files(section.shards):
        for prompt, response, source in read_answers(path, vocab_size=vocab_size):
            tokens = np.array([*prompt, *response], dtype=np.int64)[: section.max_tokens]
            digest.update(len(prompt).to_bytes(4, "little") + tokens.tobytes())
            start = len(prompt) if section.loss_on == "response" else 1
            if tokens.shape[0] - start >= _LEAST_RESPONSE and prompt:
                share = _share_of(prompt)
                sample = Sample(index, tokens, start, source)
                if share < section.validation_share:
                    validation.append((share, sample))
                else:
                    train.append(sample)
            index += 1
    if not train:
        raise DataError(
            f"{', '.join(section.shards)} hold no sample to train on: {index} lines, "
            f"{len(validation)} of them held out."
        )
    validation.sort(key=lambda item: (item[0], item[1].index))
    held_out = tuple(sample for _, sample in validation)
    return Samples(tuple(train), held_out, digest.hexdigest())


def read_answers(path: Path, *, vocab_size: int) -> Iterator[tuple[list[int], list[int], str]]:
    """Read the answers of a shard, .jsonl or .jsonl.gz.

    Args:
        path: The file.
        vocab_size: V of the target; larger ids are refused.

    Yields:
        Prompt ids, response ids, source.

    Raises:
        DataError: If it cannot be read or a line is wrong.
    """
    for number, line in _lines(path):
        yield _parse(line, f"{path}, line {number}", vocab_size)


def _files(patterns: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        folder = Path(pattern)
        if folder.is_dir():
            paths = [*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]
            names = sorted(str(path) for path in paths if not path.name.startswith("."))
        else:
            names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not names:
            what = "the folder {} holds no shard." if folder.is_dir() else "no file matches {}."
            raise DataError(what.format(pattern))
        found.extend(Path(name) for name in names)
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text.") from exc
    except (OSError, EOFError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise DataError(f"the shard {path} cannot be read: {reason}.") from exc


def _parse(line: str, where: str, vocab_size: int) -> tuple[list[int], list[int], str]:
    try:
        record = json.loads(line)
    except ValueError as exc:
        raise DataError(f"{where} is not JSON: {exc}.") from exc
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object.")
    lists = []
    for name in ("prompt_ids", "response_ids"):
        ids = record.get(name)
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise DataError(f"{where}: {name} must be a list of token ids.")
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise DataError(
                f"{where}: {name} has ids from {min(ids)} to {max(ids)}, but the target has "
                f"{vocab_size} tokens.",
                hint="these answers were made by another model",
            )
        lists.append(ids)
    return lists[0], lists[1], str(record.get("source", ""))


def _share_of(prompt: Sequence[int]) -> float:
    """A number from 0 to 1 that depends on the prompt alone."""
    digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def frequent_tokens(samples: Sequence[Sample], *, vocab_size: int, count: int) -> IntArray:
    """The tokens with a loss that occur most often, ascending; ties go to the lower id.

    Args:
        samples: Training samples.
        vocab_size: V.
        count: Tokens wanted, at most V.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for sample in samples:
        counts += np.bincount(sample.tokens[sample.start :], minlength=vocab_size)
    order = np.lexsort((np.arange(vocab_size), -counts))
    return np.sort(order[:count])


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def plan_epoch(samples: Sequence[Sample], run: RunSection, epoch: int) -> list[list[Sample]]:
    """The steps of an epoch: every sample once, in an order of its own.

    Args:
        samples: Training samples.
        run: Seed and size of a step.
        epoch: Its number, from 0.

    Returns:
        Samples of each step; the last step may be smaller.
    """
    order = _generator(run.seed, 1, epoch).permutation(len(samples))
    if run.tokens_per_step is None:
        size = run.sequences_per_step or 16
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        return [[samples[i] for i in part] for part in parts]
    steps: list[list[Sample]] = [[]]
    tokens = 0
    for i in order:
        if tokens >= run.tokens_per_step:
            steps.append([])
            tokens = 0
        steps[-1].append(samples[i])
        tokens += samples[i].length
    return steps


def anchors_of(sample: Sample, run: RunSection, epoch: int | None) -> IntArray:
    """Positions of a sample that blocks start at.

    An anchor is a position with a loss whose next token has one too.

    Args:
        sample: The sample.
        run: Seed and number or share of anchors.
        epoch: The epoch, None for validation.

    Returns:
        int64 [A], ascending.
    """
    places = np.arange(sample.start, sample.length - 1)
    wanted = run.anchors * len(places) if run.anchors <= 1 else run.anchors
    count = min(len(places), max(1, round(wanted)))
    number = _VALIDATION_EPOCH if epoch is None else epoch
    generator = _generator(run.seed, 2, number, sample.index)
    return np.sort(generator.choice(places, size=count, replace=False))
