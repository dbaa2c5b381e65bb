"""Samples: reading, holding out, the order of steps, anchors."""

from __future__ import annotations

import dataclasses
import gzip
import json

import numpy as np
import pytest

from dspark.errors import DataError
from dspark.training.plan import Plan
from dspark.training.recipe import DataSection, RunSection
from dspark.training.samples import anchors_of, frequent_tokens, plan_epoch, read_samples

VOCAB = 50
RUN = RunSection(steps=5, sequences_per_step=4, anchors=0.5)


def line(prompt, response, **more) -> str:
    return json.dumps({"prompt_ids": prompt, "response_ids": response, **more})


def shard(path, lines):
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.fixture
def many(tmp_path):
    """40 prompts, each with two answers."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(40):
        prompt = [number, *rng.integers(0, VOCAB, 5).tolist()]
        lines += [line(prompt, rng.integers(0, VOCAB, 12).tolist()) for _ in range(2)]
    path = shard(tmp_path / "many.jsonl.gz", lines)
    section = DataSection(shards=(str(path),), validation_share=0.25)
    return read_samples(section, vocab_size=VOCAB)


def test_plain_and_packed_files_are_read_in_order(tmp_path):
    shard(tmp_path / "b.jsonl.gz", [line([1, 2], [3, 4, 5], source="b")])
    shard(tmp_path / "a.jsonl", [line([6], [7, 8], source="a"), "", line([9], [1])])
    section = DataSection(shards=(str(tmp_path / "*.jsonl*"),), validation_share=0)
    samples = read_samples(section, vocab_size=VOCAB)
    assert [s.source for s in samples.train] == ["a", "b"]  # one token is no answer to learn from
    assert [s.index for s in samples.train] == [0, 2]
    assert samples.train[1].tokens.tolist() == [1, 2, 3, 4, 5]
    assert samples.train[1].start == 2
    whole = dataclasses.replace(section, loss_on="all")
    assert read_samples(whole, vocab_size=VOCAB).train[1].start == 1
    short = dataclasses.replace(section, max_tokens=4)
    assert read_samples(short, vocab_size=VOCAB).train[1].tokens.tolist() == [1, 2, 3, 4]


def test_all_answers_to_a_prompt_are_held_out_together(many):
    prompts = [{tuple(s.tokens[:6]) for s in part} for part in (many.train, many.validation)]
    assert not prompts[0] & prompts[1]
    assert 5 <= len(prompts[1]) <= 16
    assert len(many.train) + len(many.validation) == 80


def test_every_epoch_sees_every_sample_once_in_its_own_order(many):
    orders = []
    for epoch in range(2):
        steps = plan_epoch(many.train, RUN, epoch)
        orders.append([sample.index for step in steps for sample in step])
        assert {len(step) for step in steps[:-1]} == {4}
        assert sorted(orders[-1]) == sorted(s.index for s in many.train)
    assert orders[0] != orders[1]
    again = plan_epoch(many.train, RUN, 1)
    assert orders[1] == [sample.index for step in again for sample in step]
    other = plan_epoch(many.train, dataclasses.replace(RUN, seed=1), 1)
    assert orders[1] != [sample.index for step in other for sample in step]


def test_steps_may_be_counted_in_tokens(many):
    run = dataclasses.replace(RUN, sequences_per_step=None, tokens_per_step=60)
    for step in plan_epoch(many.train, run, 0)[:-1]:
        tokens = [sample.length for sample in step]
        assert sum(tokens) >= 60 > sum(tokens[:-1])


def test_a_plan_counts_steps_and_finds_them(many):
    run = dataclasses.replace(RUN, steps=None, epochs=2.5)
    plan = Plan(many.train, run)
    one = len(plan.steps_of(0))
    assert plan.total == 2 * one + round(0.5 * one)
    assert plan.locate(0) == (0, 0)
    assert plan.locate(one) == (1, 0)
    assert plan.locate(2 * one + 3) == (2, 3)
    assert plan.locate(one - 1) == (0, one - 1)
    assert plan.epochs_at(one) == 1.0


def test_anchors_have_a_label_and_a_teacher(many):
    sample = many.train[0]
    every = anchors_of(sample, dataclasses.replace(RUN, anchors=1.0), 0)
    assert every.tolist() == list(range(sample.start, sample.length - 1))
    half = anchors_of(sample, RUN, 0)
    assert len(half) == round(0.5 * len(every))
    assert half.tolist() == sorted(set(half.tolist()))
    assert anchors_of(sample, RUN, 0).tolist() == half.tolist()
    others = [anchors_of(sample, RUN, epoch).tolist() for epoch in (1, 2, 3, None)]
    assert half.tolist() not in others
    assert len(anchors_of(sample, dataclasses.replace(RUN, anchors=3), 0)) == 3
    assert len(anchors_of(sample, dataclasses.replace(RUN, anchors=300), 0)) == len(every)


def test_the_vocabulary_counts_tokens_with_a_loss(tmp_path):
    lines = [line([40, 40, 40, 40], [7, 7, 7, 9, 9, 3]), line([40, 41], [9, 9, 2])]
    path = shard(tmp_path / "v.jsonl", lines)
    section = DataSection(shards=(str(path),), validation_share=0)
    samples = read_samples(section, vocab_size=VOCAB).train
    assert frequent_tokens(samples, vocab_size=VOCAB, count=2).tolist() == [7, 9]
    assert frequent_tokens(samples, vocab_size=VOCAB, count=5).tolist() == [0, 2, 3, 7, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"prompt_ids": [1]}', "line 2: response_ids must be a list"),
        (line([1], [True]), "response_ids must be a list of token ids"),
        (line([1], [2, VOCAB]), r"ids from 2 to 50, but the target has 50"),
        (line([-1], [2]), "ids from -1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, message):
    path = shard(tmp_path / "x.jsonl", [line([1], [2, 3]), text])
    with pytest.raises(DataError, match=message):
        read_samples(DataSection(shards=(str(path),)), vocab_size=VOCAB)


def test_a_folder_stands_for_its_shards(tmp_path):
    """And not for the questions below it, nor for a journal that a killed run left."""
    (tmp_path / "questions").mkdir()
    for name in ("questions/00000.jsonl", ".00002.partial.jsonl"):
        shard(tmp_path / name, [line([1], [2])])
    first = shard(tmp_path / "00000.jsonl", [line([1], [2, 3, 4]), line([5], [6, 7, 8])])
    rest = gzip.compress(line([9], [8, 7, 6]).encode())
    (tmp_path / "00001.jsonl.gz").write_bytes(rest)
    found, named = (
        read_samples(DataSection(shards=shards), vocab_size=VOCAB)
        for shards in ((str(tmp_path),), (str(first), str(tmp_path / "00001.jsonl.gz")))
    )
    assert found.sha256 == named.sha256
    assert len(found.train) + len(found.validation) == 3


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        read_samples(DataSection(shards=(str(tmp_path / "*.jsonl"),)), vocab_size=VOCAB)
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        read_samples(DataSection(shards=(str(tmp_path / "none.jsonl"),)), vocab_size=VOCAB)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*empty holds no shard"):
        read_samples(DataSection(shards=(str(tmp_path / "empty"),)), vocab_size=VOCAB)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(line([1], [2, 3]).encode() * 50)[:-12])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz"):
        read_samples(DataSection(shards=(str(cut),)), vocab_size=VOCAB)
    lone = shard(tmp_path / "lone.jsonl", [line([1], [2])])
    with pytest.raises(DataError, match="no sample to train on"):
        read_samples(DataSection(shards=(str(lone),)), vocab_size=VOCAB)
