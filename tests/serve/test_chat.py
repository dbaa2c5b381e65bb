"""Chat completions say what the engine says, whole and streamed, in OpenAI's form."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import dspark
from dspark.request import GenerationResult
from tests.serve.toys import Running, serving, toy_engine

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
MOST = 20
BODY: dict[str, Any] = {"model": "toy", "messages": MESSAGES, "max_tokens": MOST}
PLAIN = {"temperature": 0}
SAMPLED = {"temperature": 0.8, "seed": 7, "top_p": 0.9, "top_k": 30, "min_p": 0.01}
OTHER = {
    "temperature": 0.5,
    "seed": 3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.1,
    "logit_bias": {"40": 5, "41": -100},
}


@functools.cache
def _engine() -> dspark.Engine:
    return toy_engine()


def expected(fields: dict[str, Any], **more: Any) -> list[GenerationResult]:
    """What an engine of its own generates."""
    own = {k: v for k, v in fields.items() if k not in ("model", "messages", "stream")}
    bias = own.pop("logit_bias", None)
    if bias is not None:
        own["logit_bias"] = {int(token): value for token, value in bias.items()}
    params = dspark.SamplingParams(**{"max_tokens": MOST, **own, **more})
    return _engine().generate([MESSAGES], params)


@pytest.mark.parametrize("fields", [PLAIN, SAMPLED, OTHER], ids=["greedy", "sampled", "penalties"])
def test_the_text_is_that_of_the_engine(toy: Running, fields: dict[str, Any]) -> None:
    (result,) = expected(fields)
    answer = toy.chat(max_tokens=MOST, **fields)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": result.text, "refusal": None}
    assert choice["finish_reason"] == result.finish_reason.value
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "toy"
    assert answer["id"].startswith("chatcmpl-")


@pytest.mark.parametrize("fields", [PLAIN, SAMPLED], ids=["greedy", "sampled"])
def test_a_stream_says_the_same_in_openais_order(toy: Running, fields: dict[str, Any]) -> None:
    events = toy.events(CHAT, {**BODY, **fields})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    (result,) = expected(fields)
    assert reasons == [None] * (len(events) - 1) + [result.finish_reason.value]
    assert "".join(delta.get("content", "") for delta in deltas) == result.text
    assert not any("usage" in event for event in events)


def test_usage_comes_last_and_counts_what_speculation_did(toy: Running) -> None:
    options = {"stream_options": {"include_usage": True}}
    *before, last = toy.events(CHAT, {**BODY, **PLAIN, **options})
    assert all(event["usage"] is None for event in before)
    assert last["choices"] == []
    (result,) = expected(PLAIN)
    stats, usage = result.stats, last["usage"]
    assert usage["prompt_tokens"] == stats.prompt_tokens
    assert usage["completion_tokens"] == stats.output_tokens == MOST
    assert usage["total_tokens"] == stats.prompt_tokens + MOST
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": stats.accepted,
        "rejected_prediction_tokens": stats.verified - stats.accepted,
    }
    spec = last["metrics"]["speculative_decoding"]
    assert stats.accepted > 0
    assert spec["num_spec_steps"] == stats.verified_at_depth[0] > 0
    assert spec["num_accepted_draft_tokens"] == stats.accepted
    assert spec["num_draft_tokens"] == stats.verified
    assert spec["mean_acceptance_length"] == pytest.approx(
        1 + stats.accepted / stats.verified_at_depth[0]
    )
    assert spec["draft_acceptance_rate"] == pytest.approx(stats.accepted / stats.verified)
    histogram = spec["acceptance_histogram"]
    assert sum(histogram) == spec["num_spec_steps"]
    assert sum(k * count for k, count in enumerate(histogram)) == stats.accepted
    assert last["metrics"]["dspark"]["tau"] == pytest.approx(stats.accepted_length)


def test_chunks_carry_growing_usage_if_asked(toy: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = toy.events(CHAT, {**BODY, **PLAIN, "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == MOST
    assert len(set(counts)) > 5


def test_several_choices_are_the_engines_samples(toy: Running) -> None:
    results = expected(SAMPLED, n=3)
    answer = toy.chat(max_tokens=MOST, n=3, **SAMPLED)
    assert [c["message"]["content"] for c in answer["choices"]] == [r.text for r in results]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == results[0].stats.prompt_tokens
    assert answer["usage"]["completion_tokens"] == sum(len(r.token_ids) for r in results)
    texts = {0: "", 1: "", 2: ""}
    order = []
    for event in toy.events(CHAT, {**BODY, **SAMPLED, "n": 3}):
        for choice in event["choices"]:
            order.append(choice["index"])
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert list(texts.values()) == [result.text for result in results]
    assert order != sorted(order)  # interleaved


def _content(entries: list[dict[str, Any]]) -> bytes:
    return b"".join(bytes(entry["bytes"]) for entry in entries)


def test_logprobs_spell_the_text_and_are_the_engines(toy: Running) -> None:
    (result,) = expected(SAMPLED, logprobs=3)
    assert result.logprobs is not None
    (choice,) = toy.chat(max_tokens=MOST, logprobs=True, top_logprobs=3, **SAMPLED)["choices"]
    entries = choice["logprobs"]["content"]
    assert _content(entries).decode() == result.text
    values = [item.logprob for item in result.logprobs][: len(entries)]
    assert [entry["logprob"] for entry in entries] == pytest.approx(values, abs=1e-5)
    for entry, item in zip(entries, result.logprobs, strict=False):
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert tops == pytest.approx([value for _, value in item.top], abs=1e-5)
        assert entry["token"] == bytes(entry["bytes"]).decode()
    fields = {**BODY, **SAMPLED, "logprobs": True, "top_logprobs": 3}
    chunks = [event["choices"][0] for event in toy.events(CHAT, fields)]
    streamed = [e for c in chunks if c["logprobs"] for e in c["logprobs"]["content"]]
    assert [e["bytes"] for e in streamed] == [e["bytes"] for e in entries]


def test_logprobs_without_alternatives(toy: Running) -> None:
    (choice,) = toy.chat(max_tokens=5, logprobs=True, **PLAIN)["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[]] * 5
    (choice,) = toy.chat(max_tokens=5, **PLAIN)["choices"]
    assert choice["logprobs"] is None


@pytest.mark.parametrize("is_list", [True, False])
def test_a_stop_string_ends_the_text_and_is_not_in_it(toy: Running, is_list: bool) -> None:
    (whole,) = expected(PLAIN)
    stop = whole.text[10:13]
    fields = {**PLAIN, "max_tokens": MOST, "stop": ["@@@@", stop] if is_list else stop}
    (choice,) = toy.chat(logprobs=True, **fields)["choices"]
    shown = whole.text[: whole.text.index(stop)]
    assert choice["message"]["content"] == shown
    assert choice["finish_reason"] == "stop"
    assert _content(choice["logprobs"]["content"]).decode() == shown
    events = toy.events(CHAT, {**BODY, **fields, "logprobs": True})
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == shown


def test_what_was_drafted_is_told_if_asked(toy: Running) -> None:
    fields = {**BODY, **PLAIN, "dspark": {"pieces": True}}
    events = toy.events(CHAT, fields)
    deltas = [event["choices"][0]["delta"] for event in events]
    pieces = [piece for d in deltas if "dspark" in d for piece in d["dspark"]["pieces"]]
    (result,) = expected(PLAIN)
    assert "".join(text for text, _ in pieces) == result.text
    assert sum(is_drafted for _, is_drafted in pieces) == result.stats.accepted
    for delta in deltas:
        if delta.get("content"):
            own = "".join(text for text, _ in delta["dspark"]["pieces"])
            assert own == delta["content"]
    (choice,) = toy.chat(max_tokens=MOST, dspark={"pieces": True}, **PLAIN)["choices"]
    assert choice["message"]["dspark"]["pieces"] == pieces


def test_drafting_can_be_switched_off_and_shaped(toy: Running) -> None:
    drafted = toy.chat(max_tokens=MOST, **PLAIN)
    plain = toy.chat(max_tokens=MOST, dspark={"draft": False}, **PLAIN)
    assert plain["choices"] == drafted["choices"]
    assert plain["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
    shape = {"rule": "rejection", "tree_budget": 2, "depth": 2, "width": 1}
    chain = toy.chat(max_tokens=MOST, dspark=shape, **SAMPLED)
    (result,) = expected(SAMPLED, rule="rejection", tree_budget=2, depth=2, width=1)
    assert chain["choices"][0]["message"]["content"] == result.text
    assert chain["metrics"]["speculative_decoding"]["num_spec_tokens"] == 2


def test_defaults_are_the_models_then_openais() -> None:
    own = {"temperature": 0.3, "top_p": 0.7, "top_k": 9}
    with serving(toy_engine(sampling=own)) as running:
        said = running.chat(max_tokens=MOST, seed=5)["choices"][0]["message"]["content"]
        greedy = running.chat(max_tokens=MOST, temperature=0)["choices"][0]["message"]["content"]
        hot = running.chat(max_tokens=MOST, seed=5, temperature=1.0, top_k=-1, top_p=1)
    params = [
        dspark.SamplingParams(max_tokens=MOST, seed=5, **own),
        dspark.SamplingParams(max_tokens=MOST),
        dspark.SamplingParams(max_tokens=MOST, seed=5, temperature=1.0),
    ]
    texts = [result.text for result in _engine().generate([MESSAGES] * 3, params)]
    assert [said, greedy, hot["choices"][0]["message"]["content"]] == texts


def test_openais_default_temperature_is_one(toy: Running) -> None:
    (result,) = expected({"temperature": 1.0, "seed": 2})
    assert toy.chat(max_tokens=MOST, seed=2)["choices"][0]["message"]["content"] == result.text


def test_max_completion_tokens_counts_and_the_default_is_the_context() -> None:
    with serving(toy_engine(max_positions=60)) as running:
        assert running.chat(max_completion_tokens=6, **PLAIN)["usage"]["completion_tokens"] == 6
        ended = running.chat(**PLAIN, stop=["\x00"], ignore_eos=True)["usage"]
        assert ended["total_tokens"] == running.desk.max_positions == 60


def test_fields_that_change_nothing_are_taken(toy: Running) -> None:
    before = toy.chat(max_tokens=9, **PLAIN)["choices"]
    noise = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    nulls = {"audio": None, "functions": None, "stop": None, "temperature": 0, "tools": None}
    assert toy.chat(max_tokens=9, **noise, **nulls)["choices"] == before


def test_parts_of_text_and_other_roles_are_read(toy: Running) -> None:
    content = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    parts = toy.chat(max_tokens=9, messages=[{"role": "user", "content": content}], **PLAIN)
    joined = toy.chat(max_tokens=9, messages=[{"role": "user", "content": "Hel\nlo"}], **PLAIN)
    assert parts["choices"] == joined["choices"]
    talk = [{"role": "developer", "content": "Be"}, {"role": "user", "content": "x"}]
    as_system = [{"role": "system", "content": "Be"}, {"role": "user", "content": "x"}]
    first = toy.chat(max_tokens=9, messages=talk, **PLAIN)
    assert first["choices"] == toy.chat(max_tokens=9, messages=as_system, **PLAIN)["choices"]
