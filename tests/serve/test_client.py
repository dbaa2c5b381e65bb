"""The official openai client, and our own benchmark, find what they expect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

import dspark
from dspark.eval.runners.base import BenchRequest
from dspark.eval.runners.endpoint import Endpoint
from dspark.eval.runners.openai import OpenAIRunner, first_model
from tests.serve.toys import Running, serving, toy_engine

if TYPE_CHECKING:
    import openai  # takes a second, so processes that run no test of this file never import it

MESSAGES = [{"role": "user", "content": "Hello"}]
KEY = "a-key"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with serving(toy_engine(), api_keys=(KEY,), max_queue=64) as running:
        yield running


@pytest.fixture
def client(keyed: Running) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=keyed.url + "/v1", api_key=KEY, max_retries=0) as own:
        yield own


def greedy(tokens: int, **more: object) -> dspark.GenerationResult:
    params = dspark.SamplingParams(max_tokens=tokens, **more)  # type: ignore[arg-type]
    (result,) = toy_engine().generate([MESSAGES], params)
    return result


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "dspark"


def test_a_chat_completion(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="toy", messages=MESSAGES, temperature=0, max_tokens=30, logprobs=True, top_logprobs=2
    )
    result = greedy(30)
    choice = answer.choices[0]
    assert choice.message.content == result.text
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content) == result.text
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens == result.stats.accepted > 0


def test_a_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="toy",
        messages=MESSAGES,
        temperature=0,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": -1, "min_p": 0.0, "dspark": {"depth": 2}},
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == greedy(30).text
    assert usage is not None
    assert usage.completion_tokens == 30


def test_the_clients_own_accumulation_of_a_stream(client: openai.OpenAI) -> None:
    text = greedy(20).text
    with client.chat.completions.stream(
        model="toy", messages=MESSAGES, temperature=0, max_tokens=20, n=2, stop=text[12:15]
    ) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    assert [choice.message.content for choice in answer.choices] == [text[:12]] * 2


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="toy", prompt="ab c", temperature=0, max_tokens=12, logprobs=1, stop=["@@"]
    )
    (result,) = toy_engine().generate(["ab c"], dspark.SamplingParams(max_tokens=12))
    assert answer.choices[0].text == result.text
    assert answer.choices[0].logprobs is not None
    assert "".join(answer.choices[0].logprobs.tokens or []) == result.text


def test_errors_are_the_clients_own(client: openai.OpenAI, keyed: Running) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="toy", messages=MESSAGES, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with (
        openai.OpenAI(base_url=keyed.url + "/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_an_error_in_a_stream_is_raised(client: openai.OpenAI, keyed: Running) -> None:
    import openai

    stream = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    keyed.engine.target.broken.append(RuntimeError("boom"))  # type: ignore[attr-defined]
    with pytest.raises(openai.APIError, match="the server failed"):
        for _ in stream:
            pass


# -- metrics ----------------------------------------------------------------------------------


def counters(running: Running) -> dict[str, float]:
    """The counters of /metrics, without labels but the position."""
    headers = {"Authorization": f"Bearer {KEY}"}
    found: dict[str, float] = {}
    for line in running.ask("/metrics", headers=headers)[1].splitlines():
        name, _, value = line.rpartition(" ")
        head, _, labels = name.partition("{")
        if head.startswith("vllm:") and not head.endswith(("_bucket", "_created")):
            place = labels.partition('position="')[2].partition('"')[0]
            found[head + (f"[{place}]" if place else "")] = float(value)
    return found


def test_metrics_are_the_sums_of_what_the_answers_say(keyed: Running) -> None:
    before = counters(keyed)
    headers = {"Authorization": f"Bearer {KEY}"}
    answers = []
    for n, fields in enumerate([{"temperature": 0}, {"n": 3}, {"dspark": {"draft": False}}]):
        body = {"messages": MESSAGES, "max_tokens": 20 + n, "seed": n, **fields}
        answers.append(keyed.ask("/v1/chat/completions", body, headers=headers)[1])
    grown = {name: value - before.get(name, 0.0) for name, value in counters(keyed).items()}
    spec = [answer["metrics"]["speculative_decoding"] for answer in answers]
    usage = [answer["usage"] for answer in answers]
    head = "vllm:spec_decode_num_"
    assert grown[head + "drafts_total"] == sum(s["num_spec_steps"] for s in spec) > 0
    assert grown[head + "draft_tokens_total"] == sum(s["num_draft_tokens"] for s in spec)
    accepted = sum(s["num_accepted_draft_tokens"] for s in spec)
    assert grown[head + "accepted_tokens_total"] == accepted > 0
    by_place = [v for name, v in grown.items() if name.startswith(head + "accepted_tokens_per_pos")]
    assert sum(by_place) == accepted
    assert by_place == sorted(by_place, reverse=True)
    assert grown["vllm:generation_tokens_total"] == sum(u["completion_tokens"] for u in usage)
    # The prompt of three choices was run for each of them.
    runs = zip(usage, (1, 3, 1), strict=True)
    assert grown["vllm:prompt_tokens_total"] == sum(u["prompt_tokens"] * n for u, n in runs)
    assert grown["vllm:request_success_total"] <= 5
    assert grown["vllm:e2e_request_latency_seconds_count"] == 5
    assert grown["vllm:time_to_first_token_seconds_count"] == 5
    assert grown["vllm:num_requests_running"] == 0


def test_our_own_benchmark_reads_our_server(keyed: Running) -> None:
    endpoint = Endpoint(keyed.url, api_key=KEY, timeout=30.0)
    params = dspark.SamplingParams(max_tokens=24, ignore_eos=True)
    model = first_model(endpoint)
    assert model == "toy"
    codec = toy_engine().codec
    assert codec is not None
    runner = OpenAIRunner(endpoint, params, model=model, codec=codec)
    runner.prepare()
    asked = [
        BenchRequest(question_id=n, category="x", text="ab" * n, token_ids=(1, 2), seed=n)
        for n in range(1, 5)
    ]
    output = runner.run(asked, 2, lambda share: None)
    prompts = [[{"role": "user", "content": own.text}] for own in asked]
    results = toy_engine().generate(prompts, params)
    assert [record.error for record in output.requests] == [None] * 4
    assert [record.output_tokens for record in output.requests] == [24] * 4
    lengths = [len(codec.encode_chat(prompt)) for prompt in prompts]
    assert [record.prompt_tokens for record in output.requests] == lengths
    stats = [result.stats for result in results]
    assert output.rounds == sum(s.verified_at_depth[0] for s in stats)
    assert output.verified == sum(s.verified for s in stats)
    assert output.accepted == sum(s.accepted for s in stats)
    assert output.tau == pytest.approx(1 + sum(s.accepted for s in stats) / output.rounds)
    assert json.dumps(dict(output.counters or {}))
