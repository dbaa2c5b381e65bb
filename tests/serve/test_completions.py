"""Completions: texts and token ids in, OpenAI's older form out."""

from __future__ import annotations

from typing import Any

import pytest

import dspark
from tests.serve.toys import Running, toy_engine

PATH = "/v1/completions"


def ask(toy: Running, **fields: Any) -> Any:
    status, answer, _ = toy.ask(PATH, {"model": "toy", "temperature": 0, **fields})
    assert status == 200, answer
    return answer


def test_the_text_is_that_of_the_engine_and_sixteen_tokens_long(toy: Running) -> None:
    (result,) = toy_engine().generate(["ab c"], dspark.SamplingParams(max_tokens=16))
    answer = ask(toy, prompt="ab c")
    assert answer["object"] == "text_completion"
    assert [choice["text"] for choice in answer["choices"]] == [result.text]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


def test_lists_of_prompts_and_token_ids(toy: Running) -> None:
    engine = toy_engine()
    assert engine.codec is not None
    prompts = ["ab c", "Zz", "ab c"]
    params = dspark.SamplingParams(max_tokens=12, temperature=0.7, seed=4, n=2)
    texts = [result.text for result in engine.generate(prompts, params)]
    fields = {"max_tokens": 12, "temperature": 0.7, "seed": 4, "n": 2}
    answer = ask(toy, prompt=prompts, **fields)
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    ids = [engine.codec.encode(prompt) for prompt in prompts]
    assert ask(toy, prompt=ids, **fields)["choices"] == answer["choices"]
    assert answer["usage"]["prompt_tokens"] == sum(len(own) for own in ids)
    alone = ask(toy, prompt=ids[1], max_tokens=12)
    assert alone["choices"][0]["text"] == ask(toy, prompt="Zz", max_tokens=12)["choices"][0]["text"]


def test_a_stream_says_the_same(toy: Running) -> None:
    whole = ask(toy, prompt=["ab c", "Zz"], max_tokens=20)
    texts = ["", ""]
    reasons = [None, None]
    events = toy.events(PATH, {"prompt": ["ab c", "Zz"], "max_tokens": 20, "temperature": 0})
    for event in events:
        assert event["object"] == "text_completion"
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]


def test_logprobs_have_the_older_form(toy: Running) -> None:
    params = dspark.SamplingParams(max_tokens=10, logprobs=2)
    (result,) = toy_engine().generate(["ab c"], params)
    assert result.logprobs is not None
    (choice,) = ask(toy, prompt="ab c", max_tokens=10, logprobs=2)["choices"]
    own = choice["logprobs"]
    assert "".join(own["tokens"]) == choice["text"]
    assert own["text_offset"] == list(range(10))
    values = [item.logprob for item in result.logprobs]
    assert own["token_logprobs"] == pytest.approx(values, abs=1e-5)
    for token, value, tops in zip(
        own["tokens"], own["token_logprobs"], own["top_logprobs"], strict=True
    ):
        assert tops[token] == value
        assert len(tops) == 2


def test_offsets_are_characters(toy: Running) -> None:
    fields = {"prompt": "ab", "max_tokens": 10, "logprobs": 0}
    streamed = [event["choices"][0] for event in toy.events(PATH, {**fields, "temperature": 0})]
    offsets = [n for c in streamed if c["logprobs"] for n in c["logprobs"]["text_offset"]]
    assert offsets == list(range(10))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [1, -5]}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({}, "prompt"),
        ({"prompt": ["a"] * 20}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    toy: Running, fields: dict[str, Any], param: str
) -> None:
    status, answer, _ = toy.ask(PATH, fields)
    assert status == 400
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"


def test_neutral_values_are_no_reason_to_refuse(toy: Running) -> None:
    before = ask(toy, prompt="ab", max_tokens=4)["choices"]
    fields = {"echo": False, "suffix": None, "best_of": 1, "skip_special_tokens": True}
    assert ask(toy, prompt="ab", max_tokens=4, **fields)["choices"] == before
