"""Measuring a server: what is sent, what is counted, and what happens when it misbehaves."""

from __future__ import annotations

import socket

import pytest

from dspark.errors import ConfigError, DataError
from dspark.eval.bench_records import RunOutput
from dspark.eval.runners.base import BenchRequest
from dspark.eval.runners.counters import parse_metrics
from dspark.eval.runners.endpoint import Endpoint, ServerError
from dspark.eval.runners.openai import OpenAIRunner, first_model
from dspark.request import SamplingParams
from dspark.text import TextCodec
from tests.eval.fake_server import FakeServer, serving
from tests.test_engine import make_codec

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def asked(*texts: str) -> list[BenchRequest]:
    return [
        BenchRequest(question_id=k, category="one", text=text, token_ids=(1, 2), seed=2**40 + k)
        for k, text in enumerate(texts)
    ]


def ask(
    fake: FakeServer,
    *texts: str,
    params: SamplingParams = PARAMS,
    concurrency: int = 1,
    timeout: float = 5.0,
    key: str | None = None,
    codec: TextCodec | None = None,
    **more: bool,
) -> RunOutput:
    endpoint = Endpoint(fake.url, api_key=key, timeout=timeout)
    runner = OpenAIRunner(endpoint, params, model=first_model(endpoint), codec=codec, **more)
    runner.prepare()
    shares: list[float] = []
    output = runner.run(asked(*texts), concurrency, shares.append)
    assert shares[-1] == 1
    assert shares == sorted(shares)
    return output


def test_an_answer_is_timed_chunk_by_chunk() -> None:
    with serving(pause=0.05, metrics=None) as fake:
        (record,) = ask(fake, "hello").requests
    assert record.error is None
    assert (record.prompt_tokens, record.output_tokens) == (9, 6)
    assert record.ttft >= 0.05
    assert record.seconds >= 0.15
    assert record.ttft < record.seconds - 0.05  # not held back until the end
    assert len(record.gaps) == 2
    assert record.ttft + sum(gap for gap, _ in record.gaps) == pytest.approx(record.seconds)
    assert record.digest is None  # it does not tell its token ids


def test_what_is_sent_is_what_was_asked() -> None:
    with serving(metrics=None) as fake:
        ask(fake, "hello", key="secret")
    (body,) = fake.bodies
    assert fake.headers == ["Bearer secret"]
    assert fake.paths == ["/v1/chat/completions"]
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("the-model", 6, 0)
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert 0 <= body["seed"] < 2**31
    assert "top_k" not in body  # no part of OpenAI's own API
    assert "chat_template_kwargs" not in body

    params = SamplingParams(max_tokens=6, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1)
    with serving() as fake:  # metrics like vLLM's
        ask(fake, "hello", params=params, is_raw=True)
        ask(fake, "hello", think=False)
    raw, chat = fake.bodies
    assert fake.paths[0] == "/v1/completions"
    assert (raw["prompt"], raw["top_k"], raw["min_p"], raw["top_p"]) == ("hello", 7, 0.1, 0.9)
    assert "ignore_eos" not in raw
    assert raw["stream_options"]["continuous_usage_stats"] is True
    assert chat["top_k"] == -1  # the model's own default must not slip in
    assert chat["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"has_chunk_usage": True}, [1, 3]),  # as the server says
        ({}, [1, 3]),  # by the tokenizer, one token a character
        ({"chunks": (("ab", 1), ("c", 1), ("def", 1))}, [1, 1]),  # one token an event
        ({"chunks": (("ab", 4), ("c", 2), ("def", 6))}, [2, 6]),  # scaled to what the server says
        ({"has_usage": False}, [1, 3]),
    ],
)
def test_chunks_have_as_many_tokens_as_is_known(
    settings: dict[str, object], expected: list[int]
) -> None:
    with serving(**settings) as fake:
        (record,) = ask(fake, "hello", codec=make_codec()).requests
    assert [tokens for _, tokens in record.gaps] == expected
    first = record.output_tokens - sum(expected)
    assert record.output_tokens == sum(n for _, n in fake.chunks)
    assert first > 0


def test_as_many_requests_are_under_way_as_asked_for() -> None:
    with serving(pause=0.05, metrics=None) as fake:
        output = ask(fake, *["hello"] * 6, concurrency=3)
    assert fake.most_at_once == 3
    assert [record.question_id for record in output.requests] == list(range(6))
    assert output.output_tokens == 36
    assert 0.3 <= output.seconds < sum(record.seconds for record in output.requests)
    with serving(metrics=None) as fake:
        output = ask(fake, *["hello"] * 3)
    assert output.seconds >= sum(record.seconds for record in output.requests)


def test_speculation_is_read_from_the_counters() -> None:
    """3 drafts of 4 tokens an answer, 2 of each accepted; what went before does not count."""
    with serving() as fake:
        fake.drafts = 50
        output = ask(fake, "one", "two")
    assert (output.rounds, output.proposed, output.accepted) == (6, 24, 12)
    assert output.tau == pytest.approx(3)
    assert output.counters["vllm:spec_decode_num_drafts_total"] == 6


def test_metrics_of_other_forms_are_read() -> None:
    text = """
# HELP sglang:spec_verify_calls_total calls
# TYPE sglang:spec_verify_calls_total counter
sglang:spec_verify_calls_total{model_name="a {b} c",dp_rank="0"} 4.0
sglang:spec_verify_calls_total{model_name="a {b} c",dp_rank="1"} 6
# TYPE sglang:spec_accept_length gauge
sglang:spec_accept_length{model_name="m"} 2.5
sglang:spec_accept_rate NaN
vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0",engine="0"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 3.0
vllm:spec_decode_num_drafts_created{engine="0"} 1.7e+09
vllm:num_requests_running 3
this is no metric
"""
    found = parse_metrics(text)
    assert found.counters == {
        "sglang:spec_verify_calls_total": 10,
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"}': 5,
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="1"}': 3,
    }
    assert found.gauges == {"sglang:spec_accept_length": 2.5}
    assert "vllm:num_requests_running" in found.names
    grown = parse_metrics(text.replace("4.0", "9.0")).since(found)
    assert grown["sglang:spec_verify_calls_total"] == 5
    assert grown["sglang:spec_accept_length"] == 2.5


def test_verification_calls_give_a_tau() -> None:
    lines = "sglang:spec_verify_calls_total 0"
    with serving(metrics=lines) as fake:
        fake.page = lambda: f"sglang:spec_verify_calls_total {7 + 5 * fake.drafts}\n"
        output = ask(fake, "one", "two")
    assert (output.rounds, output.tau) == (10, pytest.approx((12 - 2) / 10))


@pytest.mark.parametrize(
    ("word", "message", "tokens"),
    [
        ("hang", "no answer for 0.2 seconds.", 0),
        ("silence", "no answer for 0.2 seconds.", 2),
        ("die", "the server broke off the connection.", 0),
        ("refuse", "HTTP 500: no room.", 0),
        ("cut", "the stream ended in the answer, after 1 events.", 2),
        ("error", "the server reported: out of memory.", 2),
        ("odd", "an event could not be read (AttributeError: 'int' object has no attribute", 2),
    ],
)
def test_a_request_that_fails_is_one_sentence_and_the_others_go_on(
    word: str, message: str, tokens: int
) -> None:
    with serving(metrics=None) as fake:
        before, failed, after = ask(
            fake, "fine", word, "fine", timeout=0.2, codec=make_codec()
        ).requests
    assert before.error is after.error is None
    assert failed.error.startswith(message)
    assert failed.output_tokens == tokens


def test_a_dead_server_is_not_asked_for_ever() -> None:
    """Three time-outs in a row, and the rest of the run is not asked; an answer starts anew."""
    with serving(metrics=None) as fake:
        records = ask(fake, *["hang"] * 6, timeout=0.1).requests
        assert len(fake.bodies) == 3
    assert "not asked, since 3 requests" in records[-1].error
    with serving(metrics=None) as fake:
        texts = ["hang", "hang", "fine", "hang", "hang", "refuse", "refuse", "refuse", "fine"]
        records = ask(fake, *texts, timeout=0.15).requests
    assert records[-1].error is None


def test_a_server_that_is_not_there_is_refused_at_the_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        endpoint = Endpoint(url, timeout=2)
        with pytest.raises(
            DataError, match="does not tell its models: the server refuses"
        ) as caught:
            first_model(endpoint)
    assert "--url-model" in caught.value.hint
    with serving() as fake, pytest.raises(ServerError, match="HTTP 404"):
        Endpoint(fake.url, timeout=2).get_json("/nothing")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/v1", "must be one of http or https"),
        ("localhost:8000", "must be one of http or https"),
        ("http://user:secret@host/v1", "holds a user name or password"),
        ("http://host:99999/v1", "no valid port"),
    ],
)
def test_a_url_that_is_none_is_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Endpoint(url, timeout=1)
    assert "secret" not in caught.value.message


def test_a_url_may_lack_its_path_or_have_one_before_it() -> None:
    assert Endpoint("http://host:1", timeout=1).url == "http://host:1/v1"
    assert Endpoint("https://host/a/v1/", timeout=1).url == "https://host/a/v1"
