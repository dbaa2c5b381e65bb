"""Whatever a client sends, it gets an answer or one sentence in OpenAI's shape; never a 500."""

from __future__ import annotations

import http.client
import json
import re
import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import CHARACTERS
from tests.serve.toys import Running, serving, toy_engine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def check_error(answer: Any, param: str | None = None) -> str:
    """An error must have OpenAI's shape, be one line, and tell nothing of the machine."""
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param, error
    message = error["message"]
    assert isinstance(message, str)
    assert message
    assert "\n" not in message
    for word in ("Traceback", "/secret", "site-packages", "File ", ".py", "pydantic"):
        assert word not in message
    return message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}, 5]}, "messages[1]"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"500": 1}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"dspark": {"depth": 0}}, "dspark.depth"),
        ({"dspark": {"speed": 9}}, "dspark.speed"),
        ({"dspark": {"rule": "luck"}}, "dspark.rule"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"made_up": 1}, "made_up"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "code"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format.json_schema",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ({"temperature": 0.5, "dspark": {"rule": "greedy"}}, None),
    ],
)
def test_a_fault_is_named_by_its_field(
    toy: Running, fields: dict[str, Any], param: str | None
) -> None:
    status, answer, _ = toy.ask(CHAT, {"model": "toy", "messages": MESSAGES, **fields})
    assert status == 400, answer
    check_error(answer, param)


def test_another_model_is_not_here(toy: Running) -> None:
    status, answer, _ = toy.ask(CHAT, {"model": "gpt-4", "messages": MESSAGES})
    assert status == 404
    assert answer["error"]["code"] == "model_not_found"
    assert "'toy'" in check_error(answer, "model")
    assert toy.ask("/v1/models/gpt-4")[0] == 404
    assert toy.ask("/v1/models/toy")[1]["id"] == "toy"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"a":' * 5000,
        b"[" * 200_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"seed": ' + b"1" * 10_000 + b"}",
        b'{"temperature": 1e999, "messages": []}',
    ],
    ids=range(11),
)
def test_a_body_that_is_no_json_object_is_refused(toy: Running, body: bytes) -> None:
    status, answer, _ = toy.ask(CHAT, body)
    assert status == 400
    check_error(answer)


def test_a_body_must_be_declared_as_json(toy: Running) -> None:
    body = json.dumps({"messages": MESSAGES}).encode()
    for media in ("text/plain", "application/x-www-form-urlencoded"):
        status, answer, _ = toy.ask(CHAT, body, headers={"Content-Type": media})
        assert status == 415
        check_error(answer)


def test_addresses_and_methods_that_are_not_there(toy: Running) -> None:
    for path, method, status in [
        ("/v1/nothing", "GET", 404),
        ("/v1/chat/completions/", "POST", 404),
        (CHAT, "GET", 405),
        ("/health", "POST", 405),
        ("/../../etc/passwd", "GET", 404),
    ]:
        got, answer, _ = toy.ask(path, b"{}" if method == "POST" else None, method=method)
        assert got == status
        check_error(answer)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_is_refused_and_the_next_request_answered(is_chunked: bool) -> None:
    with serving(toy_engine(), max_body=10_000) as running:
        link = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        body = json.dumps({"messages": MESSAGES, "user": "x" * 12_000}).encode()
        parts: Any = iter([body[:6000], body[6000:]]) if is_chunked else body
        link.request(
            "POST",
            CHAT,
            parts,
            {"Content-Type": "application/json"},
            encode_chunked=is_chunked,
        )
        reply = link.getresponse()
        assert reply.status == 413
        check_error(json.loads(reply.read()))
        link.close()
        assert running.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2})[0] == 200


def test_limits_of_prompts_tokens_and_choices() -> None:
    limits = {"max_prompt_tokens": 12, "max_tokens": 5, "max_choices": 2}
    with serving(toy_engine(), **limits) as running:
        long = [{"role": "user", "content": "x" * 30}]
        status, answer, _ = running.ask(CHAT, {"messages": long})
        assert status == 400
        assert answer["error"]["code"] == "context_length_exceeded"
        check_error(answer, "messages")
        status, answer, _ = running.ask(CHAT, {"messages": MESSAGES, "max_tokens": 6})
        assert status == 400
        check_error(answer, "max_tokens")
        status, answer, _ = running.ask(CHAT, {"messages": MESSAGES, "n": 3})
        assert status == 400
        check_error(answer, "n")
        fields = {"messages": MESSAGES, "ignore_eos": True}
        assert running.ask(CHAT, fields)[1]["usage"]["completion_tokens"] == 5


def test_a_prompt_as_long_as_the_context_is_refused(toy: Running) -> None:
    status, answer, _ = toy.ask(COMPLETIONS, {"prompt": "x" * 512})
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"
    assert toy.ask(COMPLETIONS, {"prompt": "x" * 511, "max_tokens": 99})[0] == 200


KEYS = {"api_keys": ("good-key", "other-key")}


def test_a_key_is_asked_for_everywhere_but_at_the_door() -> None:
    with serving(toy_engine(), **KEYS) as running:
        for path in ("/v1/models", "/v1/models/toy", "/metrics", "/version", "/v1/nothing"):
            status, answer, headers = running.ask(path)
            assert status == 401
            assert headers["www-authenticate"] == "Bearer"
            check_error(answer)
        assert running.ask("/health")[0] == 200
        assert running.ask("/")[0] == 200
        bad = ("Bearer bad", "Basic good-key", "Bearer", "good-key", "Bearer good-key2", "Bearer é")
        for value in bad:
            found = {"Authorization": value.encode("utf-8").decode("latin-1")}
            status, answer, _ = running.ask(CHAT, {"messages": MESSAGES}, headers=found)
            assert status == 401
            check_error(answer)
        for key in KEYS["api_keys"]:
            headers = {"Authorization": f"Bearer {key}"}
            assert running.ask("/v1/models", headers=headers)[0] == 200
            assert running.ask("/metrics", headers=headers)[0] == 200


def test_metrics_can_be_shown_without_a_key() -> None:
    with serving(toy_engine(), is_metrics_open=True, **KEYS) as running:
        assert running.ask("/metrics")[0] == 200
        assert running.ask("/v1/models")[0] == 401


def test_other_host_names_are_refused_if_told() -> None:
    with serving(toy_engine(), hosts=("localhost", "127.0.0.1")) as running:
        assert running.ask("/health")[0] == 200
        assert running.ask("/health", headers={"Host": "LOCALHOST:99"})[0] == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1]"):
            status, answer, _ = running.ask("/v1/models", headers={"Host": host})
            assert status == 403
            check_error(answer)


def test_pages_of_other_origins_are_let_in_only_if_told(toy: Running) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in toy.ask("/health", headers=asked)[2]
    with serving(toy_engine(), cors_origins=("https://a.example",), **KEYS) as running:
        status, _, headers = running.ask(CHAT, method="OPTIONS", headers=asked)
        assert status == 200
        assert headers["access-control-allow-origin"] == "https://a.example"
        status, _, headers = running.ask("/v1/models", headers=asked)
        assert status == 401  # and the page may read why
        assert headers["access-control-allow-origin"] == "https://a.example"
        other = {**asked, "Origin": "https://b.example"}
        assert "access-control-allow-origin" not in running.ask("/health", headers=other)[2]


def test_no_header_names_the_software(toy: Running) -> None:
    assert "server" not in toy.ask("/health")[2]


def test_the_page_loads_nothing_and_allows_nothing(toy: Running) -> None:
    status, text, headers = toy.ask("/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|https?://", text)
    assert " style=" not in text  # the policy would drop it
    assert not re.findall(r"\son[a-z]+=", text)


def test_bytes_that_are_no_http_do_no_harm(toy: Running) -> None:
    for junk in (b"\x00\x01\x02\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000):
        with socket.create_connection(("127.0.0.1", toy.port), timeout=20) as link:
            link.sendall(junk)
            link.shutdown(socket.SHUT_WR)
            while link.recv(4096):
                pass
    assert toy.ask("/health")[0] == 200


INNER_NAMES = (
    "type role content function name parameters json regex schema json_schema draft rule depth 5 "
    "text properties"
)
NAMES = (
    "messages prompt model temperature top_p top_k min_p seed stop n stream stream_options "
    "presence_penalty frequency_penalty repetition_penalty logit_bias ignore_eos bad_words "
    "structured_outputs dspark logprobs top_logprobs tools tool_choice parallel_tool_calls "
    "response_format user reasoning_effort chat_template_kwargs max_completion_tokens echo audio"
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(CHARACTERS, max_size=8)
    | st.sampled_from(["auto", "required", "text", "json_object", "user", "f", "object", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(INNER_NAMES.split()) | st.text(CHARACTERS, max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from(NAMES.split()), VALUES, max_size=5)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=BODIES, is_chat=st.booleans())
def test_no_request_makes_an_internal_error(
    toy: Running, body: dict[str, Any], is_chat: bool
) -> None:
    base = {"messages": MESSAGES} if is_chat else {"prompt": "Hi"}
    fields = {**base, "max_tokens": 2, **body}
    status, answer, _ = toy.ask(CHAT if is_chat else COMPLETIONS, fields)
    assert status in (200, 400, 404), answer
    if status != 200:
        check_error(answer)
    elif isinstance(answer, str):
        assert '"error"' not in answer
        assert answer.endswith("data: [DONE]\n\n")
