"""Text and tokens: deterministic, split by name, special tokens only where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark.base_model.chat import encode_messages
from dspark.base_model.chat_codec import load_v4_codec
from dspark.errors import DataError
from dspark.training.pretrain import text
from dspark.training.pretrain.prompts import held_out_prompts
from dspark.training.pretrain.rows import TrainingRows, held_out_rows
from dspark.training.pretrain.text import Document, collect, read_documents
from dspark.training.pretrain.tokenizer import (
    NOISE,
    SPECIAL,
    Tokens,
    save_tokenizer,
    train_tokenizer,
)
from tests.training.pretrain import toys


def write(path: Path, body: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body, encoding=encoding)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of a few files, some of which are to be left out."""
    root = tmp_path / "lib"
    for name in ("abc.py", "json/decoder.py", "encodings/__init__.py", "test/test_abc.py"):
        write(root / name, f"# {name}\nx = 1\n")
    write(root / "encodings/cp037.py", "table\n")
    write(root / "json/tests/one.py", "test\n")
    write(root / "empty.py", "\n")
    write(root / "old.py", "# caf\xe9\n", "latin-1")
    return root


def responses(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gather(tmp_path: Path, library: Path, name: str) -> Path:
    rows = [
        {"prompt": f"question {i % 40}?", "response_ids": [i % 40, 5], "finish": "stop"}
        for i in range(80)
    ]
    file = responses(tmp_path / "answers.jsonl", rows)
    sources = [
        *text.python_sources(library),
        *text.response_documents([file], lambda ids: " ".join(map(str, ids))),
    ]
    folder = tmp_path / name
    collect(folder, sources, holdout=0.3, notes={"library": "made up"})
    return folder


def test_equal_sources_give_equal_bytes(tmp_path, library):
    first, second = gather(tmp_path, library, "one"), gather(tmp_path, library, "two")
    for name in (text.DOCUMENTS, text.MANIFEST):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_tests_tables_and_empty_files_are_left_out(library):
    found = dict(text.python_sources(library))
    names = ["code/abc.py", "code/encodings/__init__.py", "code/json/decoder.py", "code/old.py"]
    assert list(found) == names
    assert found["code/old.py"] == "# caf\xe9\n"


def test_the_library_of_this_python_is_found():
    found = dict(text.python_sources())
    assert "code/json/decoder.py" in found
    assert not any("/test/" in name or "site-packages" in name for name in found)


def test_answers_to_one_prompt_are_on_one_side_of_the_split(tmp_path, library):
    documents = read_documents(gather(tmp_path, library, "text"))
    sides: dict[str, set[str]] = {}
    for document in documents:
        if document.kind == "chat":
            sides.setdefault(document.name.partition(".")[0], set()).add(document.split)
    assert len(sides) == 40
    assert all(len(side) == 1 for side in sides.values())
    assert {"train", "held-out"} == set().union(*sides.values())


def test_the_manifest_counts_and_names_licences(tmp_path, library):
    folder = gather(tmp_path, library, "text")
    manifest = json.loads((folder / text.MANIFEST).read_text())
    assert set(manifest["licences"]) == {"code", "chat"}
    assert manifest["bytes"]["docs"] == 0
    assert sum(item["bytes"] for item in manifest["files"]) == sum(manifest["bytes"].values())
    assert len(manifest["files"]) == len(read_documents(folder)) == 84


def test_chats_are_in_the_encoding_of_v4_and_odd_ones_are_left_out(tmp_path):
    rows = [
        {"prompt": "Why?", "response_ids": [1, 2], "finish": "stop"},
        {"prompt": "Why?", "response_ids": [3], "finish": "length"},
        {"prompt": "Say </think>", "response_ids": [1], "finish": "stop"},
        {"prompt": "Nothing", "response_ids": [], "finish": "stop"},
    ]
    file = responses(tmp_path / "answers.jsonl", rows)
    found = list(text.response_documents([file], lambda ids: " ".join(map(str, ids))))
    bos, eos, _, user, assistant = SPECIAL[:5]
    assert [body for _, body in found] == [
        f"{bos}{user}Why?{assistant}</think>1 2{eos}",
        f"{bos}{user}Why?{assistant}</think>3",
    ]
    assert [name[-2:] for name, _ in found] == [".0", ".1"]
    with pytest.raises(DataError, match="line 1, has no prompt"):
        list(text.response_documents([responses(file, [{"prompt": "a"}])], str))


def test_pages_of_the_documentation_are_found_and_their_absence_is_said(tmp_path):
    write(tmp_path / "library/json.rst.txt", "json\n====\n")
    write(tmp_path / "library/json.html", "no")
    assert list(text.documentation_sources(tmp_path)) == [("docs/library/json.rst", "json\n====\n")]
    with pytest.raises(DataError, match="holds no"):
        list(text.documentation_sources(tmp_path / "none"))


def test_a_used_folder_and_a_name_that_comes_twice_are_refused(tmp_path):
    collect(tmp_path / "a", [("code/a.py", "x")], holdout=0.1, notes={})
    with pytest.raises(DataError, match="not an empty folder"):
        collect(tmp_path / "a", [("code/a.py", "x")], holdout=0.1, notes={})
    with pytest.raises(DataError, match="there twice"):
        collect(tmp_path / "b", [("code/a.py", "x"), ("code/a.py", "y")], holdout=0.1, notes={})
    with pytest.raises(DataError, match="no text"):
        collect(tmp_path / "c", [], holdout=0.1, notes={})


def test_the_tokenizer_gives_every_text_back(tmp_path):
    save_tokenizer(toys.tokenizer(), tmp_path, max_positions=512)
    codec = load_v4_codec(tmp_path)
    assert codec is not None
    for body in (
        "def f(x):\n        return x\n",
        "caf\xe9 \u4f60\u597d \U0001f600\t\r\n",
        "12345 <b>",
    ):
        assert codec.decode(codec.encode(body)) == body
    assert codec.encode_chat([{"role": "user", "content": "x"}])[:2] == [0, 3]
    assert [toys.tokenizer().token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert SPECIAL[15] == NOISE  # recipes name it by its id


def test_equal_texts_give_an_equal_tokenizer():
    texts = [document.text for document in toys.documents()]
    first, second = (train_tokenizer(texts, toys.VOCABULARY).to_str() for _ in range(2))
    assert first == second
    with pytest.raises(DataError, match="tokens, but 5000 are wanted"):
        train_tokenizer(texts, 5000)


def test_special_tokens_are_tokens_in_chats_and_text_in_sources():
    bodies = {"code": "x = '<think>'", "chat": f"{SPECIAL[0]}<think>{SPECIAL[1]}"}
    documents = [Document(f"{k}/1", k, "train", body) for k, body in bodies.items()]
    streams = Tokens.encode(documents, toys.tokenizer()).streams
    code, chat = (streams["train", kind].document(0).tolist() for kind in ("code", "chat"))
    assert (code[0], code[-1]) == (0, 1)
    assert 5 not in code
    assert chat == [0, 5, 1]


def test_tokens_are_read_as_written(tmp_path):
    toys.tokens().save(tmp_path)
    again = Tokens.load(tmp_path)
    assert again.fingerprint() == toys.tokens().fingerprint()
    assert again.count("train") == toys.tokens().count("train")
    with pytest.raises(DataError, match="holds no tokens"):
        Tokens.load(tmp_path / "none")


def test_rows_of_an_epoch_are_the_whole_text_once():
    tokens = toys.tokens()
    rows, length = TrainingRows(tokens, 0), 32
    size = rows.per_epoch(length)
    epoch = rows.at(0, size, length)
    found = np.bincount(epoch[:, :-1].flatten().numpy(), minlength=toys.VOCABULARY)
    whole = sum(
        np.bincount(tokens.streams["train", kind].tokens, minlength=toys.VOCABULARY)
        for kind in tokens.kinds("train")
    )
    assert (found <= whole).all()
    assert whole.sum() - found.sum() <= length
    second = rows.at(size, size, length)
    assert not torch.equal(epoch, second)
    assert torch.equal(TrainingRows(tokens, 0).at(size + 3, 2, length), second[3:5])
    assert not torch.equal(TrainingRows(tokens, 1).at(0, 4, length), epoch[:4])


def test_rows_longer_than_the_text_are_refused_or_left_out():
    tokens = toys.tokens()
    length = tokens.count("train") + 1
    with pytest.raises(DataError, match="but a sequence needs"):
        TrainingRows(tokens, 0).at(0, 1, length)
    assert held_out_rows(tokens, "code", length, 4).shape == (0, length + 1)
    assert held_out_rows(tokens, "code", 16, 4).shape == (4, 17)


def test_prompts_are_held_out_text_that_the_source_goes_on_from():
    pages = [d for d in toys.documents() if d.kind == "code"]
    chat = encode_messages(
        [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "That."}]
    )
    documents = [*pages, Document("chat/1.0", "chat", "held-out", chat)]
    rows = list(held_out_prompts(documents, ["code", "chat"], characters=100))
    held_out = {d.name: d.text for d in documents if d.split == "held-out"}
    assert [row["question_id"] for row in rows] == list(held_out)
    for row in rows[:-1]:
        assert 0 < len(row["prompt"]) <= 100
        before, found, behind = held_out[row["question_id"]].partition(row["prompt"])
        assert found
        assert before.endswith("\n")
        assert behind
    assert rows[-1]["prompt"] == "Which?"
    assert list(held_out_prompts(documents, ["docs"])) == []
