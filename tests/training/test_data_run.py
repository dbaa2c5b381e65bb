"""Making a data set with our own engine: rows, shards, resuming, the manifest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark.errors import ConfigError, DataError
from dspark.request import SamplingParams
from dspark.training.data_answers import AnswerPlan
from dspark.training.data_engine import EngineAnswerer
from dspark.training.data_filters import FilterLimits
from dspark.training.data_manifest import read_manifest
from dspark.training.data_run import Watcher
from dspark.training.data_shards import read_rows
from dspark.training.data_spec import SelfPlan
from tests.training.data_toys import (
    EOS,
    TURNS,
    all_rows,
    chat_codec,
    engine,
    make_run,
    make_spec,
    prompt_set,
    shard_bytes,
)

KEYS = ["source", "temperature", "top_p", "seed", "prompt", "prompt_ids", "response_ids", "finish"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that was made in one go."""
    folder = tmp_path_factory.mktemp("data") / "whole"
    make_run(folder).run()
    return folder


class Stopper(Watcher):
    """Interrupts the run in the middle of the answers, after so many of them."""

    def __init__(self, answers: float) -> None:
        self._answers = answers
        self._is_on = False

    def stage(self, name: str, total: int, done: int) -> None:
        self._is_on = name == "answers"

    def advance(self, done: float, tokens: int) -> None:
        if self._is_on and done >= self._answers:
            raise KeyboardInterrupt


def test_rows_have_the_documented_keys_and_are_the_engines_answers(whole: Path) -> None:
    rows = all_rows(whole)
    assert all(list(row) == KEYS for row in rows)
    assert len(rows) == 12  # five prompts, one of two turns, at two temperatures
    first = rows[0]
    messages = [{"role": "user", "content": TURNS[0][0]}]
    (plain,) = engine().generate([messages], SamplingParams(max_tokens=8))
    assert first["response_ids"] == plain.token_ids
    assert first["prompt_ids"] == chat_codec().encode_chat(messages)
    assert (first["prompt"], first["source"]) == (TURNS[0][0], "tiny")
    assert (first["temperature"], first["top_p"], first["seed"]) == (0.0, 1.0, None)
    sampled = rows[1]
    assert (sampled["temperature"], sampled["top_p"]) == (1.0, 0.95)
    params = SamplingParams(max_tokens=8, temperature=1.0, top_p=0.95, seed=sampled["seed"])
    (again,) = engine().generate([messages], params)
    assert sampled["response_ids"] == again.token_ids
    assert (sampled["finish"] == "stop") == (sampled["response_ids"][-1] == EOS)


def test_a_later_turn_follows_the_targets_own_answer(whole: Path) -> None:
    later = [row for row in all_rows(whole) if isinstance(row["prompt"], list)]
    assert len(later) == 2
    for row in later:
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant", "user"]
        assert [row["prompt"][i]["content"] for i in (0, 2)] == list(TURNS[1])
        assert row["prompt_ids"] == chat_codec().encode_chat(row["prompt"])
        before = [r for r in all_rows(whole) if r["prompt"] == TURNS[1][0]]
        said = {chat_codec().decode(r["response_ids"]) for r in before}
        assert row["prompt"][1]["content"] in said


@pytest.mark.parametrize(("batch", "draft"), [(1, "none"), (8, "lookup")])
def test_shards_do_not_depend_on_batch_and_draft(
    whole: Path, tmp_path: Path, batch: int, draft: str
) -> None:
    answerer = EngineAnswerer(lambda: engine(draft), batch=batch)
    make_run(tmp_path / "other", answerer=answerer).run()
    assert shard_bytes(tmp_path / "other") == shard_bytes(whole)


def test_another_seed_changes_sampled_answers_only(whole: Path, tmp_path: Path) -> None:
    plan = AnswerPlan(temperatures=(0.0, 1.0), max_tokens=8, seed=6)
    make_run(tmp_path / "other", make_spec(plan=plan)).run()
    pairs = list(zip(all_rows(whole), all_rows(tmp_path / "other"), strict=True))
    for mine, other in pairs:
        if isinstance(mine["prompt"], str):
            assert (mine == other) == (mine["temperature"] == 0)


def test_several_responses_differ_and_greedy_has_one(tmp_path: Path) -> None:
    plan = AnswerPlan(temperatures=(0.0, 1.0), max_tokens=8, responses=3)
    spec = make_spec(plan=plan, sets=(prompt_set(TURNS[:1]),))
    make_run(tmp_path / "set", spec).run()
    rows = all_rows(tmp_path / "set")
    assert [row["temperature"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert len({row["seed"] for row in rows[1:]}) == 3
    assert len({tuple(row["response_ids"]) for row in rows[1:]}) == 3


# 3.5 stops in the first shard, as the test of a torn line does.
@pytest.mark.parametrize("answers", [pytest.param(3.5, marks=pytest.mark.slow), 7.5])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, answers: float
) -> None:
    folder = tmp_path / "set"
    run = make_run(folder, watcher=Stopper(answers))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert 0 < run.finished < run.planned == 10
    assert not read_manifest(folder)["is_complete"]
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.gz")}
    again = make_run(folder)
    again.run()
    assert shard_bytes(folder) == shard_bytes(whole)
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())
    rows = [
        row for p in whole.glob("*.gz") if folder / p.name not in before for row in read_rows(p)
    ]
    assert 0 < again.tokens < sum(len(row["response_ids"]) for row in rows)  # of open shards


def test_a_torn_line_of_the_journal_is_made_again(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        make_run(folder, watcher=Stopper(3.7)).run()
    (journal,) = folder.glob(".*.partial.jsonl")
    data = journal.read_bytes()
    assert data.count(b"\n") >= 2
    journal.write_bytes(data[:-20])
    make_run(folder).run()
    assert shard_bytes(folder) == shard_bytes(whole)


def test_without_exact_mode_an_unfinished_shard_starts_again(tmp_path: Path) -> None:
    def run(folder: Path, watcher: Watcher | None = None) -> None:
        answerer = EngineAnswerer(lambda: engine("lookup", exact=False), batch=3)
        make_run(folder, answerer=answerer, watcher=watcher).run()

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "set", Stopper(5.5))
    assert not list((tmp_path / "set").glob(".*.partial.jsonl"))
    run(tmp_path / "set")
    assert shard_bytes(tmp_path / "set") == shard_bytes(tmp_path / "whole")
    assert read_manifest(tmp_path / "set")["engine"]["draft"] == "lookup"


def test_a_finished_set_loads_no_engine(whole: Path) -> None:
    before = shard_bytes(whole)
    answerer = EngineAnswerer(lambda: pytest.fail("the engine was loaded"), batch=3)
    run = make_run(whole, answerer=answerer)
    manifest = run.run()
    assert manifest["is_complete"]
    assert (run.finished, run.tokens) == (10, 0)
    assert shard_bytes(whole) == before


def test_a_shard_that_is_gone_is_made_again_and_a_changed_one_refused(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    (folder / "00001.jsonl.gz").unlink()
    make_run(folder).run()
    assert shard_bytes(folder) == shard_bytes(whole)
    data = bytearray((folder / "00001.jsonl.gz").read_bytes())
    data[40] ^= 1
    (folder / "00001.jsonl.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"00001\.jsonl\.gz is not what was written"):
        make_run(folder).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": AnswerPlan(temperatures=(0.0, 1.0), max_tokens=9, seed=5)}, "--max-tokens 8"),
        ({"plan": AnswerPlan(temperatures=(0.0, 1.0), max_tokens=8, seed=4)}, "--seed 5"),
        (
            {"plan": AnswerPlan(temperatures=(0.0,), max_tokens=8, seed=5)},
            "--temperature 0.0, 1.0",
        ),
        ({"shard_rows": 5}, "--shard-rows 4, but now it is 5"),
        ({"sets": (prompt_set(TURNS[:3]),)}, r"--prompts tiny \(.{8}\), but now it is tiny"),
        ({"excluded": (prompt_set(TURNS[:1]),)}, "--exclude not given, but now it is tiny"),
        ({"limits": FilterLimits(min_tokens=5)}, "--min-tokens 2, but now it is 5"),
        ({"own": SelfPlan(count=3)}, "--self 0, but now it is 3"),
        ({"target": {"id": "toy", "fingerprint": "e" * 64}}, r"the target toy \(f{8}\)"),
        ({"server": {"url": "http://x/v1", "url_model": "m"}}, "--server not given"),
    ],
)
def test_other_settings_are_refused_and_named(
    whole: Path, changes: dict[str, Any], message: str
) -> None:
    before = shard_bytes(whole)
    with pytest.raises(ConfigError, match=message) as caught:
        make_run(whole, make_spec(**changes)).run()
    assert "\n" not in caught.value.message
    assert shard_bytes(whole) == before


def test_another_engine_is_refused_once_it_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        make_run(folder, watcher=Stopper(3.7)).run()
    answerer = EngineAnswerer(lambda: engine(exact=False), batch=3)
    with pytest.raises(ConfigError, match=r"--(batch not given|exact True)"):
        make_run(folder, answerer=answerer).run()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        make_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_one_sentence_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "set"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="no space left on the device") as caught:
        make_run(folder).run()
    assert "\n" not in caught.value.message
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".00000.partial.jsonl", "manifest.json"]
    monkeypatch.undo()
    make_run(folder).run()
    assert shard_bytes(folder) == shard_bytes(whole)


def test_the_manifest_tells_what_there_is(whole: Path) -> None:
    manifest = read_manifest(whole)
    assert (manifest["schema"], manifest["version"]) == ("dspark.data", 1)
    rows = all_rows(whole)
    for entry in manifest["shards"]:
        data = (whole / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["rows"] == len(list(read_rows(whole / entry["file"])))
        assert len(entry["code"]) == 16
    answers = manifest["counts"]["answers"]
    assert answers["rows"] == len(rows)
    assert answers["response_tokens"] == sum(len(row["response_ids"]) for row in rows)
    assert answers["prompt_tokens"] == sum(len(row["prompt_ids"]) for row in rows)
    assert sum(kind["rows"] for kind in answers["kinds"]) == len(rows)
    assert {(k["source"], k["temperature"]) for k in answers["kinds"]} == {
        ("tiny", 0.0),
        ("tiny", 1.0),
    }
    assert manifest["target"]["id"] == "toy"
    assert len(manifest["template"]) == len(manifest["tokenizer"]) == 64
    assert manifest["settings"]["seed"] == 5
    assert manifest["engine"]["exact"] is True
    assert manifest["counts"]["prompts"]["by_source"] == {"tiny": 5}


def test_what_the_filters_drop_is_counted_by_reason(tmp_path: Path) -> None:
    turns = (
        ("Why is the sky blue at noon?",),
        ("why is the SKY blue at noon",),
        ("Why is the sky so blue at noon?", "And in the evening light, why is it red?"),
        ("hm",),
        ("x" * 2000,),
        ("go on " * 20,),
        ("An excluded question of some length, is it not?",),
        ("What do bees do in winter?",),
    )
    spec = make_spec(
        sets=(prompt_set(turns),),
        excluded=(prompt_set((("Hello?", "an EXCLUDED question - of some length is it not"),)),),
        limits=FilterLimits(max_similarity=0.4, min_tokens=7, max_answer_repetition=0.6),
    )
    make_run(tmp_path / "set", spec).run()
    counts = read_manifest(tmp_path / "set")["counts"]
    assert counts["prompts"]["kept"] == 3
    assert counts["prompts"]["dropped"]["tiny"] == {
        "duplicate": 1,
        "excluded": 1,
        "repetitive": 1,
        "too_long": 1,
        "too_short": 1,
    }
    rows = all_rows(tmp_path / "set")
    assert all(len(row["response_ids"]) >= 7 for row in rows)
    dropped = counts["answers"]["dropped"]
    assert len(rows) + sum(dropped.values()) == 8  # four turns at two temperatures


def test_a_set_that_is_filtered_away_is_an_error_and_may_begin_anew(
    tmp_path: Path, whole: Path
) -> None:
    spec = make_spec(limits=FilterLimits(min_prompt_tokens=500))
    with pytest.raises(DataError, match=r"no prompt passes the filters \(too_short 5\)"):
        make_run(tmp_path / "one", spec).run()
    make_run(tmp_path / "one").run()
    assert shard_bytes(tmp_path / "one") == shard_bytes(whole)
    spec = make_spec(sets=(prompt_set(TURNS[2:4]),), limits=FilterLimits(min_tokens=9))
    with pytest.raises(DataError, match=r"no answer passes the filters \(answer_too_short 4\)"):
        make_run(tmp_path / "two", spec).run()


def test_a_prompt_that_the_engine_refuses_is_dropped_and_the_others_go_on(tmp_path: Path) -> None:
    notes: list[str] = []

    class Noter(Watcher):
        def note(self, text: str) -> None:
            notes.append(text)

    spec = make_spec(
        sets=(prompt_set((("q" * 2100,), TURNS[0])),), limits=FilterLimits(max_prompt_tokens=4000)
    )
    make_run(tmp_path / "set", spec, watcher=Noter()).run()
    assert len(all_rows(tmp_path / "set")) == 2
    assert read_manifest(tmp_path / "set")["counts"]["answers"]["dropped"] == {"failed": 2}
    assert len(notes) == 2
    assert "the prompt has" in notes[0]


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_spec(sets=()), "nothing to answer"),
        (lambda: make_spec(shard_rows=0), "shard_rows is 0"),
        (lambda: AnswerPlan(temperatures=(0.5, 0.5)), "temperature 0.5 was given twice"),
        (lambda: AnswerPlan(temperatures=(-1.0,)), "temperature is -1"),
        (lambda: AnswerPlan(responses=0), "responses is 0"),
        (lambda: AnswerPlan(top_p=0.0), "top_p is 0"),
        (lambda: SelfPlan(count=-1), "self is -1"),
        (lambda: SelfPlan(count=2, temperature=0.0), "self_temperature is 0"),
        (lambda: EngineAnswerer(engine, batch=0), "batch is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_damaged_manifest_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": "dspark.eval", "version": 1}))
    with pytest.raises(DataError, match=r"has schema 'dspark.eval'"):
        make_run(tmp_path)
