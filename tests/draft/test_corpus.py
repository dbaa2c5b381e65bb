"""The corpus against brute force, its file, and the command that makes it."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dspark.cli import main
from dspark.draft.corpus import MOST, Corpus
from dspark.draft.corpus_file import corpus_facts, read_corpus, write_corpus
from dspark.errors import CheckpointError, ConfigError, DataError
from dspark.loading import find_corpus
from dspark.models.store import MARKER
from tests.training.data_toys import save_chat_model

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=5)
TARGET = {"id": "toy", "source": {"alias": "toy"}, "fingerprint": "ab", "revision": None}


def followed_by(texts, part):
    """What follows a string of tokens inside the texts, and how often."""
    n = len(part)
    return Counter(
        text[i + n] for text in texts for i in range(len(text) - n) if text[i : i + n] == part
    )


def occurs(texts, part):
    """True if a string of tokens is in one of the texts."""
    n = len(part)
    return any(text[i : i + n] == part for text in texts for i in range(len(text) - n + 1))


@given(TEXTS, st.lists(st.integers(0, 3), max_size=12))
def test_endings_and_followers_are_those_of_the_texts(texts, probe):
    corpus = Corpus(texts)
    places = ()
    for stop in range(1, len(probe) + 1):
        seen = probe[:stop]
        expected = [n for n in range(min(MOST, stop), 0, -1) if occurs(texts, seen[-n:])]
        places = corpus.follow(places, seen[-1])
        assert [place[2] for place in places] == expected
        assert places == corpus.endings(seen)
        for place in places:
            found = corpus.followers(place, 99)
            assert dict(found) == followed_by(texts, seen[-place[2] :])
            counts = [count for _, count in found]
            assert counts == sorted(counts, reverse=True)


def test_followers_of_many_occurrences_are_sampled_evenly():
    generator = np.random.default_rng(0)
    follows = generator.choice(4, size=50_000, p=[0.6, 0.3, 0.08, 0.02])
    corpus = Corpus([[9, 10 + int(token)] for token in follows])
    (place,) = corpus.endings([9])
    found = dict(corpus.followers(place, 8))
    true = Counter(10 + int(token) for token in follows)
    assert sum(found.values()) == pytest.approx(50_000, rel=0.01)
    for token, count in true.items():
        assert found[token] == pytest.approx(count, abs=2 * 50_000 / 1000)
    assert corpus.followers(place, 2) == corpus.followers(place, 8)[:2]


def test_a_token_that_no_text_has_is_followed_by_nothing():
    corpus = Corpus([[1, 2, 3]])
    for token in (-1, 7, 1 << 21, 1 << 40):
        assert corpus.follow(corpus.endings([1, 2]), token) == ()
    assert Corpus().endings([1, 2]) == ()
    (place, *_) = corpus.endings([2, 3])
    assert corpus.followers(place, 8) == ()  # the text ends there


@pytest.mark.parametrize("token", [-1, 1 << 21])
def test_ids_out_of_range_are_refused(token):
    with pytest.raises(ConfigError, match=f"token {token}"):
        Corpus([[1, 2], [token]])


@pytest.mark.parametrize("largest", [9, 1 << 17])
def test_a_file_gives_the_same_corpus(tmp_path, largest):
    texts = [[1, 2, largest, 1, 2], [2], [1, 2, 3]]
    path = tmp_path / "c.safetensors"
    facts = write_corpus(path, texts, target=TARGET, vocabulary="v")
    assert (facts["texts"], facts["tokens"]) == (3, 9)
    assert corpus_facts(path) == facts
    assert "revision" not in facts["target"]
    corpus = read_corpus(path, vocab_size=largest + 1, vocabulary="v")
    places = corpus.endings([1, 2])
    assert corpus.size == 9
    assert places == Corpus(texts).endings([1, 2])
    assert dict(corpus.followers(places[0], 9)) == {largest: 1, 3: 1}
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    write_corpus(path, [[1, 2, 3]], target=TARGET, vocabulary="v")
    with pytest.raises(ConfigError, match=r"another vocabulary \(for toy\)"):
        read_corpus(path, vocab_size=9, vocabulary="other")
    assert read_corpus(path, vocab_size=9, vocabulary=None).size == 3
    with pytest.raises(CheckpointError, match="outside the vocabulary of 3 tokens"):
        read_corpus(path, vocab_size=3, vocabulary="v")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        read_corpus(path, vocab_size=9, vocabulary="v")
    path.write_bytes(b"\x00" * 99)
    with pytest.raises(CheckpointError, match="no lookup corpus"):
        read_corpus(path, vocab_size=9, vocabulary="v")
    save_file({"tokens": np.array([1, 2])}, path)
    with pytest.raises(CheckpointError, match="no lookup corpus"):
        read_corpus(path, vocab_size=9, vocabulary="v")
    with pytest.raises(DataError, match="cannot be written"):
        write_corpus(tmp_path / "no" / "c", [[1]], target=TARGET, vocabulary="v")


def test_a_newer_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    facts = write_corpus(path, [[1, 2, 3]], target=TARGET, vocabulary="v")
    tensors = {"tokens": np.array([1, 2, 3], np.uint16), "lengths": np.array([2], np.int32)}
    save_file(tensors, path, metadata={"dspark_corpus": json.dumps(facts)})
    with pytest.raises(CheckpointError, match="damaged"):
        read_corpus(path, vocab_size=9, vocabulary="v")
    save_file(tensors, path, metadata={"dspark_corpus": json.dumps({**facts, "version": 2})})
    with pytest.raises(CheckpointError, match="version 2"):
        read_corpus(path, vocab_size=9, vocabulary="v")


def test_the_package_s_corpus_is_found_by_the_model_s_source(tmp_path):
    shipped = tmp_path / "shipped" / "toy"
    shipped.mkdir(parents=True)
    write_corpus(shipped / "corpus.safetensors", [[1, 2]], target=TARGET, vocabulary="v")
    model = tmp_path / "model"
    model.mkdir()
    assert find_corpus(model, shipped=shipped.parent) is None
    (model / MARKER).write_text(json.dumps({"source": {"alias": "toy"}}))
    assert find_corpus(model, shipped=shipped.parent) == shipped / "corpus.safetensors"
    (model / MARKER).write_text(json.dumps({"source": {"alias": "other"}}))
    assert find_corpus(model, shipped=shipped.parent) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny chat model."""
    return save_chat_model(tmp_path_factory.mktemp("models") / "words")


@pytest.fixture
def run(monkeypatch):
    """Run the command line; gives its exit status."""

    def invoke(*arguments):
        monkeypatch.setattr("sys.argv", ["dspark", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            return ended.code or 0
        return 0

    return invoke


def test_the_command_takes_answers_and_texts(run, model, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl.gz"
    rows = [{"prompt_ids": [1], "response_ids": own} for own in ([1, 2, 3], [], [3, 1])]
    answers.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    text = tmp_path / "text.txt"
    text.write_text("the lighthouse")
    out = tmp_path / "c.safetensors"
    assert run("corpus", answers, text, "--out", out, "--target", model) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out)
    assert "3 texts" in printed.err
    assert corpus_facts(out)["texts"] == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt_ids": [], "response_ids": [1, "2"]}', "line 1: response_ids must be a list"),
        ('{"prompt_ids": [], "response_ids": [999999]}', "made by another model"),
        ("[", "line 1 is not JSON"),
        ('{"prompt_ids": [], "response_ids": []}', "no token"),
    ],
)
def test_bad_answers_are_named_by_file_and_line(run, model, tmp_path, capsys, line, words):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(line + "\n")
    assert run("corpus", answers, "--out", tmp_path / "c.safetensors", "--target", model) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "c.safetensors").exists()


def test_bad_files_are_refused(run, model, tmp_path, capsys):
    missing = tmp_path / "none.jsonl"
    assert run("corpus", missing, "--out", tmp_path / "c.safetensors", "--target", model) == 2
    assert "cannot be read" in capsys.readouterr().err
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"\xff\xfe\xff")
    assert run("corpus", latin, "--out", tmp_path / "c.safetensors", "--target", model) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert run("corpus", latin, "--out", tmp_path / "c.bin", "--target", model) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
