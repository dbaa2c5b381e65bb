"""The raw log: what every round of every question did. All figures are made from it alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.request import FinishReason, GenerationResult, RoundStats

__all__ = ["ROUND_COLUMNS", "QuestionRecord", "TurnRecord", "all_rounds", "all_turns"]

ROUND_COLUMNS = (
    "proposed",
    "verified",
    "accepted",
    "committed",
    "depth",
    "tried",
    "path",
    "matched",
    "survival",
    "nodes",
)
"""What the entries of a round mean in JSON, in order (fields of `RoundStats`)."""

_FIRST_COLUMNS = 9  # of logs that were written before `nodes` was kept


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """One answer, which is one request.

    Attributes:
        text: The answer.
        prompt_tokens: Tokens of its prompt, earlier turns and template included.
        output_tokens: Tokens generated.
        finish_reason: stop, length or error.
        seconds: Wall-clock seconds from submission to the end, prefill included.
        first_token_seconds: The part of it up to the first token.
        seed: Seed of its noise, None at temperature 0.
        rounds: Its rounds.
        error: One sentence if it failed, else None.
    """

    text: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    seconds: float
    first_token_seconds: float
    seed: int | None
    rounds: tuple[RoundStats, ...]
    error: str | None = None

    @staticmethod
    def of(result: GenerationResult) -> TurnRecord:
        """The record of a finished sample whose engine kept its rounds."""
        stats = result.stats
        return TurnRecord(
            text=result.text,
            prompt_tokens=stats.prompt_tokens,
            output_tokens=stats.output_tokens,
            finish_reason=result.finish_reason.value,
            seconds=stats.seconds_total,
            first_token_seconds=stats.time_to_first_token,
            seed=result.seed,
            rounds=tuple(stats.round_log),
            error=result.error,
        )

    @property
    def committed(self) -> int:
        """Tokens its rounds committed."""
        return sum(item.committed for item in self.rounds)

    @property
    def contexts(self) -> Iterator[int]:
        """Tokens of context at the start of each round, the anchor included."""
        length = self.prompt_tokens + 1
        for item in self.rounds:
            yield length
            length += item.committed

    def to_json(self) -> dict[str, Any]:
        """As JSON; the columns of a round are ROUND_COLUMNS."""
        rounds = [[getattr(item, name) for name in ROUND_COLUMNS] for item in self.rounds]
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "rounds"}
        return {**fields, "rounds": rounds}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> TurnRecord:
        """What `to_json` made."""
        fields = dict(row)
        rounds = []
        for values in fields.pop("rounds"):
            rounds.append(_round(values))
        return TurnRecord(**fields, rounds=tuple(rounds))


def _round(values: Sequence[Any]) -> RoundStats:
    """A round from its columns; logs of before `nodes` have one less."""
    if not _FIRST_COLUMNS <= len(values) <= len(ROUND_COLUMNS):
        raise ValueError(f"a round has {len(values)} columns")
    named = dict(zip(ROUND_COLUMNS, values, strict=False))
    named["survival"] = tuple(named["survival"])
    nodes = named.get("nodes", ())
    named["nodes"] = tuple((int(up), float(share), bool(hit)) for up, share, hit in nodes)
    return RoundStats(**named)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionRecord:
    """The answers to one question.

    Attributes:
        question_id: As in the prompt set.
        category: As in the prompt set.
        turns: One per user turn; fewer if one failed.
    """

    question_id: str | int
    category: str
    turns: tuple[TurnRecord, ...]

    @property
    def error(self) -> str | None:
        """What went wrong, or None."""
        return next((turn.error for turn in self.turns if turn.error is not None), None)

    @property
    def is_whole(self) -> bool:
        """False if an answer was cancelled."""
        return all(turn.finish_reason != FinishReason.CANCELLED.value for turn in self.turns)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        turns = [turn.to_json() for turn in self.turns]
        return {"question_id": self.question_id, "category": self.category, "turns": turns}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> QuestionRecord:
        """What `to_json` made."""
        return QuestionRecord(
            question_id=row["question_id"],
            category=row["category"],
            turns=tuple(TurnRecord.from_json(turn) for turn in row["turns"]),
        )


def all_turns(records: Iterable[QuestionRecord]) -> list[TurnRecord]:
    """Answers of all questions that did not fail, in order."""
    return [turn for record in records for turn in record.turns if turn.error is None]


def all_rounds(records: Sequence[QuestionRecord]) -> list[RoundStats]:
    """Rounds of all answers, in order."""
    return [item for turn in all_turns(records) for item in turn.rounds]
