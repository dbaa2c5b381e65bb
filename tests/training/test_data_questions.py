"""Questions that the target writes itself, with our own engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dspark.request import SamplingParams
from dspark.training import data_engine
from dspark.training.data_answers import QuestionJob
from dspark.training.data_engine import EngineAnswerer
from dspark.training.data_filters import Drop
from dspark.training.data_manifest import read_manifest
from dspark.training.data_run import Watcher
from dspark.training.data_shards import read_rows
from dspark.training.data_spec import SelfPlan
from dspark.training.data_turns import TurnMarks
from tests.training.data_toys import (
    EOS,
    all_rows,
    chat_codec,
    engine,
    make_run,
    make_spec,
    shard_bytes,
)

pytestmark = pytest.mark.slow  # a model writes questions


def self_spec(count: int = 3, **changes: Any) -> Any:
    own = SelfPlan(count=count, max_tokens=32)
    return make_spec(sets=(), own=own, shard_rows=5, **changes)


def test_the_target_writes_questions_and_answers_them(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    make_run(folder, self_spec()).run()
    rows = all_rows(folder)
    assert len({row["prompt"] for row in rows}) == 3
    assert {row["source"] for row in rows} == {"self"}
    counts = read_manifest(folder)["counts"]["prompts"]
    assert counts["by_source"] == {"self": 3}
    assert counts["dropped"]["self"]["unfinished"] > 0
    blocks = sorted((folder / "questions").iterdir())
    written = [row for block in blocks for row in read_rows(block)]
    assert [row["index"] for row in written] == list(range(len(written)))
    passed = [row["text"] for row in written if row["drop"] is None]
    assert [row["prompt"] for row in rows[::2]] == passed[:3]
    # A question is what follows the template's user prefix, up to the end of the turn.
    prefix = chat_codec().encode_chat([{"role": "user", "content": ""}])[:-3]
    first = next(row for row in written if row["drop"] is None)
    params = SamplingParams(max_tokens=32, temperature=1.0, top_p=0.95, seed=first["seed"])
    (alone,) = engine().generate([prefix], params)
    assert alone.token_ids[-1] == EOS
    assert alone.text.strip() == first["text"]


def test_questions_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "whole", self_spec()).run()
    folder = tmp_path / "set"

    class StopAtAnswers(Watcher):
        def stage(self, name: str, total: int, done: int) -> None:
            if name == "answers":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_run(folder, self_spec(), watcher=StopAtAnswers()).run()
    assert list((folder / "questions").iterdir())
    monkeypatch.setattr(
        data_engine.EngineAnswerer,
        "write_questions",
        lambda *_: pytest.fail("questions were written again"),
    )
    make_run(folder, self_spec()).run()
    assert shard_bytes(folder) == shard_bytes(tmp_path / "whole")


def test_a_question_stops_at_the_end_of_the_turn_even_if_that_ends_no_text(
    tmp_path: Path,
) -> None:
    """Llama's models end a text by another token than DeepSeek's turns, for instance."""
    marks = TurnMarks(prefix=(23, 68), end_token=40, end_text="L")
    params = [SamplingParams(max_tokens=40, temperature=1.0, seed=i) for i in range(10)]
    jobs = [QuestionJob(index=i, params=own) for i, own in enumerate(params)]
    written = EngineAnswerer(engine, batch=5).write_questions(jobs, marks, lambda *_: None)
    alone = engine().generate([list(marks.prefix)] * 10, params)
    ended = 0
    for question, result in zip(written, alone, strict=True):
        if 40 in result.token_ids:
            ended += 1
            cut = result.token_ids[: result.token_ids.index(40)]
            assert question.text == chat_codec().decode(cut).strip()
            is_odd = bool({0, 1}.intersection(cut))  # other special tokens inside
            assert question.drop is (Drop.MALFORMED if is_odd else None)
    assert ended > 2


def test_a_turn_that_ends_in_ordinary_text_is_cut_there() -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=2)
    (alone,) = engine().generate([[23, 68]], params)
    end = alone.text[6]
    marks = TurnMarks(prefix=(23, 68), end_token=None, end_text=end)
    job = QuestionJob(index=0, params=params)
    (question,) = EngineAnswerer(engine, batch=1).write_questions([job], marks, lambda *_: None)
    assert question.drop is None
    assert question.text == alone.text[: alone.text.index(end)].strip()


def test_questions_that_never_pass_end_the_search_with_a_note(tmp_path: Path) -> None:
    notes: list[str] = []

    class Noter(Watcher):
        def note(self, text: str) -> None:
            notes.append(text)

    spec = make_spec(own=SelfPlan(count=2, max_tokens=1), shard_rows=50)
    make_run(tmp_path / "set", spec, watcher=Noter()).run()
    (note,) = notes
    assert "0 of 2 questions passed the filters in" in note
    assert read_manifest(tmp_path / "set")["counts"]["prompts"]["by_source"] == {"tiny": 5}
