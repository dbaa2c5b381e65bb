"""Spec-Bench answer files, as its `speed.py` and `equal.py` read them.

Its conventions: answers without blanks around them; `accept_lengths` of all turns in one list, one
entry a step, closing token included, the last step counted as if the text had not ended in it;
`decoding_steps`, `new_tokens` and `wall_time` one entry a turn. A question that failed is left out,
since its row would have no time. Rows are sorted as its `reorg_answer_file` sorts them.

**Source:** hemingkx/Spec-Bench, `evaluation/eval.py: get_model_answers`, `reorg_answer_file`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark.errors import DataError
from dspark.eval.records import QuestionRecord

__all__ = ["answer_row", "write_answers"]

_LEAST_SECONDS = 1e-6  # speed.py divides by it


def answer_row(record: QuestionRecord, model_id: str) -> dict[str, Any]:
    """One row of an answer file."""
    turns = record.turns
    choice = {
        "index": 0,
        "turns": [turn.text.strip() for turn in turns],
        "decoding_steps": [len(turn.rounds) for turn in turns],
        "new_tokens": [turn.output_tokens for turn in turns],
        "wall_time": [max(turn.seconds, _LEAST_SECONDS) for turn in turns],
        "accept_lengths": [item.path + 1 for turn in turns for item in turn.rounds],
    }
    return {
        "question_id": record.question_id,
        "category": record.category,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "choices": [choice],
        "tstamp": time.time(),
    }


def write_answers(folder: str | Path, model_id: str, records: Sequence[QuestionRecord]) -> Path:
    """Write the answers of one configuration to FOLDER/MODEL_ID.jsonl.

    Returns:
        The file.

    Raises:
        DataError: If it cannot be written.
    """
    path = Path(folder).expanduser() / f"{model_id}.jsonl"
    fine = [record for record in records if record.error is None]
    fine.sort(key=lambda record: (isinstance(record.question_id, str), record.question_id))
    lines = [json.dumps(answer_row(record, model_id), ensure_ascii=False) for record in fine]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    except OSError as exc:
        raise DataError(f"{path} cannot be written: {exc.strerror}.") from exc
    return path
