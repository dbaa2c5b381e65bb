"""Prompt sets: what is read, and what a bad file is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.eval.prompts import OWN, PromptSet, Question, load_prompts

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "prompts" / "eval"


def write(folder: Path, *lines: object) -> str:
    path = folder / "set.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


def test_our_own_set_has_ten_prompts_in_each_of_six_categories() -> None:
    found = load_prompts(OWN)
    counts: dict[str, int] = {}
    for question in found.questions:
        counts[question.category] = counts.get(question.category, 0) + 1
    assert list(counts) == ["writing", "code", "reasoning", "summary", "retrieval", "editing"]
    assert set(counts.values()) == {10}
    assert len({question.turns for question in found.questions}) == 60
    assert any(len(question.turns) > 1 for question in found.questions)
    assert found.name == OWN


def test_a_small_part_of_a_set_has_every_category() -> None:
    found = load_prompts(OWN)
    part = found.select(6)
    assert len({question.category for question in part.questions}) == 6
    assert [q for q in found.questions if q in part.questions] == list(part.questions)
    assert set(part.questions) < set(found.select(7).questions)
    assert found.select(1000) == found
    with pytest.raises(ConfigError, match="limit is 0"):
        found.select(0)


def test_first_turn_keeps_one_turn_and_changes_the_checksum() -> None:
    found = load_prompts(OWN)
    first = found.select(first_turn=True)
    assert first.num_turns == 60 < found.num_turns
    assert first.sha256 != found.sha256


def test_a_file_gives_ids_categories_and_turns(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["x"]},
        "",
        {"turns": ["c"]},
        {"prompt": "d", "id": "own"},
    )
    found = load_prompts(path)
    assert found.name == "set"
    assert found.questions == (
        Question(question_id=81, category="writing", turns=("a", "b")),
        Question(question_id=3, category="set", turns=("c",)),
        Question(question_id="own", category="set", turns=("d",)),
    )


def test_the_checksum_follows_the_text_and_not_the_layout(tmp_path: Path) -> None:
    row = {"question_id": 1, "category": "c", "turns": ["a"]}
    one = load_prompts(write(tmp_path, row)).sha256
    assert load_prompts(write(tmp_path, "", json.dumps(row, indent=None) + "  ")).sha256 == one
    assert load_prompts(write(tmp_path, {**row, "turns": ["b"]})).sha256 != one


@pytest.mark.parametrize(
    ("lines", "where", "what"),
    [
        ([""], "line 1", "no prompt"),
        ([{"turns": ["a"]}, "{oops"], "line 2", "not JSON"),
        ([[1, 2]], "line 1", "must be an object"),
        ([{"category": "x"}], "line 1", "there are none"),
        ([{"turns": []}], "line 1", "non-empty"),
        ([{"turns": ["a", " "]}], "line 1", "non-empty"),
        ([{"turns": "a"}], "line 1", "non-empty"),
        ([{"turns": ["a"], "category": 3}], "line 1", "category"),
        ([{"turns": ["a"], "question_id": 1.5}], "line 1", "question_id"),
        ([{"id": 1, "turns": ["a"]}, {"id": 1, "turns": ["b"]}], "line 2", "that of line 1"),
    ],
)
def test_a_bad_file_is_told_its_name_and_line(
    tmp_path: Path, lines: list[object], where: str, what: str
) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert caught.value.message.startswith(f"{path}, {where}: ")
    assert what in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(str(tmp_path / "gone.jsonl"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_prompts(str(tmp_path / "bytes.jsonl"))


def test_a_hub_dataset_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CapabilityError, match="datasets is not installed") as caught:
        load_prompts("hub:org/name")
    assert caught.value.hint == "pip install 'dspark[train]'"


def fake_datasets(monkeypatch: pytest.MonkeyPatch, found: object) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def load_dataset(repo: str, revision: str | None, split: str | None) -> object:
        calls.append((repo, revision, split))
        if isinstance(found, Exception):
            raise found
        return found if split is None else found[split]  # type: ignore[index]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_hub_dataset_gives_its_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": [{"question": "no"}], "test": [{"question": "a"}, {"question": "b"}]}
    calls = fake_datasets(monkeypatch, splits)
    found = load_prompts("hub:org/name@abc")
    assert [question.turns for question in found.questions] == [("a",), ("b",)]
    assert {question.category for question in found.questions} == {"name"}
    assert (found.name, found.revision) == ("hub:org/name", "abc")
    assert load_prompts("hub:org/name:train").questions[0].turns == ("no",)
    assert calls == [("org/name", "abc", None), ("org/name", None, "train")]


def test_a_hub_dataset_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, ValueError("no such split.\nmore"))
    with pytest.raises(DataError, match=r"org/name cannot be loaded: no such split\.$"):
        load_prompts("hub:org/name")


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared prompt sets are not beside this checkout"
)
def test_the_shared_sets_are_read() -> None:
    sets: list[PromptSet] = [load_prompts(str(path)) for path in sorted(SHARED.glob("*.jsonl"))]
    assert sum(len(found.questions) for found in sets) > 500
