"""Prompt sets: our own, files in Spec-Bench's form, datasets of the hub.

One JSON object a line, `{"question_id", "category", "turns": [user turn, ...]}`; only `turns` is
needed, and a `prompt` string stands for one turn.

**Source:** Spec-Bench's `data/spec_bench/question.jsonl`; DeepSpec's `eval_datasets/*.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from dspark.errors import CapabilityError, ConfigError, DataError

__all__ = ["HUB", "OWN", "PromptSet", "Question", "load_prompts"]

OWN = "dspark"
"""Name of the project's own set."""

HUB = "hub:"
"""Before a dataset's id: hub:ORG/NAME, with @REVISION and :SPLIT if wanted."""

_TEXT_COLUMNS = ("prompt", "question", "instruction", "problem", "text")
_ID_COLUMNS = ("question_id", "id", "task_id")
_SPLITS = ("test", "validation", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One entry of a prompt set.

    Attributes:
        question_id: As the file has it, or the line number (from 1); unique in its set.
        category: What figures are grouped by.
        turns: User turns; each but the first follows the model's own answer.
    """

    question_id: str | int
    category: str
    turns: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Checksum of id, category and turns."""
        return _digest([self.question_id, self.category, list(self.turns)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Questions and where they came from.

    Attributes:
        name: What reports call it; never a path.
        questions: In the file's order.
        revision: Revision of a hub dataset, else None.
    """

    name: str
    questions: tuple[Question, ...]
    revision: str | None = None

    @property
    def sha256(self) -> str:
        """Checksum of what is asked, whatever the file's layout."""
        return _digest([[q.question_id, q.category, list(q.turns)] for q in self.questions])

    @property
    def num_turns(self) -> int:
        """User turns of all questions."""
        return sum(len(question.turns) for question in self.questions)

    def select(self, limit: int | None = None, *, first_turn: bool = False) -> PromptSet:
        """Take a part of the set.

        Args:
            limit: Questions to keep at the most, the categories in turn, each in its own order, so
                that every category is in a small part too; None keeps all.
            first_turn: Keep only the first turn of each question.

        Raises:
            ConfigError: If the limit is below 1.
        """
        questions = self.questions
        if limit is not None:
            if limit < 1:
                raise ConfigError(f"limit is {limit}, but must be >= 1.")
            seen: dict[str, int] = {}
            ranks = []
            for index, question in enumerate(questions):
                rank = seen[question.category] = seen.get(question.category, -1) + 1
                ranks.append((rank, index))
            kept = sorted(index for _, index in sorted(ranks)[:limit])
            questions = tuple(questions[index] for index in kept)
        if first_turn:
            questions = tuple(replace(question, turns=question.turns[:1]) for question in questions)
        return replace(self, questions=questions)


def _digest(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def load_prompts(spec: str) -> PromptSet:
    """Load a prompt set by name.

    Args:
        spec: "dspark" for our own 60 prompts, a .jsonl file, or "hub:ORG/NAME[@REVISION][:SPLIT]".

    Returns:
        The set, with at least one question.

    Raises:
        DataError: If it cannot be read, is empty, or a line is malformed (named in the message).
        CapabilityError: If a hub dataset was asked for and `datasets` is not installed.
    """
    if spec == OWN:
        text = resources.files("dspark.eval").joinpath("data/prompts.jsonl").read_text("utf-8")
        return _parse_lines(text, source="the built-in prompt set", name=OWN)
    if spec.startswith(HUB):
        return _from_hub(spec.removeprefix(HUB))
    path = Path(spec).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(f"the prompt file {spec} is not UTF-8 text.") from exc
    except OSError as exc:
        raise DataError(
            f"the prompt file {spec} cannot be read: {exc.strerror}.",
            hint=f"name a .jsonl file, '{OWN}' for the built-in set, or {HUB}ORG/NAME",
        ) from exc
    return _parse_lines(text, source=spec, name=path.stem)


def _parse_lines(text: str, *, source: str, name: str) -> PromptSet:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as exc:
            reason = exc.msg if isinstance(exc, json.JSONDecodeError) else str(exc)
            raise DataError(f"{source}, line {number}: not JSON ({reason}).") from exc
        if not isinstance(row, dict):
            raise DataError(
                f"{source}, line {number}: a line must be an object, not {type(row).__name__}."
            )
        rows.append((number, row))
    return PromptSet(name=name, questions=_questions(rows, source=source, category=name))


def _questions(
    rows: Iterable[tuple[int, Mapping[str, Any]]], *, source: str, category: str
) -> tuple[Question, ...]:
    lines: dict[str | int, int] = {}
    questions = []
    for number, row in rows:
        question = _question(row, number, f"{source}, line {number}", category)
        first = lines.setdefault(question.question_id, number)
        if first != number:
            raise DataError(
                f"{source}, line {number}: question_id {question.question_id!r} is that of line "
                f"{first}, but ids must differ."
            )
        questions.append(question)
    if not questions:
        raise DataError(
            f"{source}, line 1: there is no prompt in it.",
            hint='a line is {"question_id": 1, "category": "math", "turns": ["..."]}',
        )
    return tuple(questions)


def _question(row: Mapping[str, Any], number: int, where: str, category: str) -> Question:
    turns = row.get("turns")
    if turns is None:
        turns = [row[key] for key in _TEXT_COLUMNS if isinstance(row.get(key), str)][:1]
    is_list = isinstance(turns, list | tuple) and len(turns) > 0
    if not is_list or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        what = f"not {_short(row['turns'])}" if "turns" in row else "but there are none"
        raise DataError(f"{where}: turns must be a list of non-empty strings, {what}.")
    found: object = next((row[key] for key in _ID_COLUMNS if row.get(key) is not None), number)
    own = row.get("category")
    if not isinstance(found, str | int) or isinstance(found, bool):
        raise DataError(f"{where}: question_id must be a string or an integer, not {found!r}.")
    if own is not None and not isinstance(own, str):
        raise DataError(f"{where}: category must be a string, not {_short(own)}.")
    return Question(question_id=found, category=own or category, turns=tuple(turns))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _from_hub(spec: str) -> PromptSet:
    try:
        import datasets
    except ImportError as exc:
        raise CapabilityError(
            f"{HUB}{spec} is a dataset of the hub, but the package datasets is not installed.",
            hint="pip install 'dspark[train]'",
        ) from exc
    name, _, split = spec.partition(":")
    repo, _, revision = name.partition("@")
    try:
        found = datasets.load_dataset(repo, revision=revision or None, split=split or None)
    except (OSError, ValueError, LookupError, RuntimeError) as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".")
        raise DataError(f"the dataset {spec} cannot be loaded: {reason}.") from exc
    if isinstance(found, Mapping):
        chosen = next((key for key in _SPLITS if key in found), next(iter(found), None))
        if chosen is None:
            raise DataError(f"the dataset {spec} has no split.")
        found = found[chosen]
    rows = enumerate(found, start=1)
    questions = _questions(rows, source=f"{HUB}{spec}", category=repo.rpartition("/")[2])
    return PromptSet(name=f"{HUB}{repo}", questions=questions, revision=revision or None)
