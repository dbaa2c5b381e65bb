"""Hand-made logs: records from a few numbers per round."""

from __future__ import annotations

from dspark.eval.records import QuestionRecord, TurnRecord
from dspark.request import RoundStats


def chain_round(
    accepted: int, depth: int, *, path: int | None = None, survival: tuple[float, ...] = ()
) -> RoundStats:
    """A round of a chain; `path` longer than `accepted` is a path the text ended in."""
    whole = accepted if path is None else path
    is_cut = path is not None
    end = accepted if is_cut else depth
    return RoundStats(
        proposed=depth,
        verified=depth,
        accepted=accepted,
        committed=accepted + (not is_cut),
        depth=depth,
        tried=min(whole + 1, end),
        path=whole,
        survival=survival,
        matched=min(accepted, len(survival)),
    )


def turn_of(
    *rounds: RoundStats, prompt: int = 10, text: str = "t", seconds: float = 1.0
) -> TurnRecord:
    """An answer of these rounds."""
    return TurnRecord(
        text=text,
        prompt_tokens=prompt,
        output_tokens=1 + sum(item.committed for item in rounds),
        finish_reason="stop",
        seconds=seconds,
        first_token_seconds=0.1,
        seed=None,
        rounds=rounds,
    )


def record_of(
    *turns: TurnRecord, question_id: str | int = 1, category: str = "a"
) -> QuestionRecord:
    """A question with these answers."""
    return QuestionRecord(question_id=question_id, category=category, turns=turns)
