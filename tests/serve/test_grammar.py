"""Answers that a grammar holds: response formats, forced calls, vLLM's structured outputs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serve.toys import Running, serving, toy_engine

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
POINT = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/number"}, "up": {"type": "boolean"}},
    "required": ["at", "up"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer", "minimum": 0, "maximum": 9}},
}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("describe", PERSON), tool("point", POINT)]


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def check_person(value: Any) -> None:
    assert set(value) == {"name", "age", "kind"}
    assert re.fullmatch("[a-z]{1,6}", value["name"])
    assert 0 <= value["age"] <= 150
    assert value["kind"] in ("cat", "dog")


def check_point(value: Any) -> None:
    assert set(value) == {"at", "up"}
    assert value["at"] in range(10)
    assert isinstance(value["up"], bool)


@pytest.fixture(scope="module")
def wide() -> Iterator[Running]:
    with serving(toy_engine(max_positions=1024), max_queue=2000) as running:
        yield running


def answers_to_schema(running: Running, count: int) -> int:
    """Ask for so many answers in several ways; returns how many came to their end, all valid."""
    rng = random.Random(5)
    bodies = []
    for number in range(count):
        draft = {"draft": number % 5 > 0, "rule": rng.choice(["coupled", "rejection"])}
        temperature = rng.choice([0.0, 0.7, 1.0])
        bodies.append(
            {
                "messages": [{"role": "user", "content": f"Number {number}"}],
                "response_format": schema_format(PERSON),
                "temperature": temperature,
                "seed": number,
                "max_tokens": 300,
                "dspark": draft if temperature else {"draft": draft["draft"]},
            }
        )

    def ask(body: dict[str, Any]) -> bool:
        (choice,) = running.chat(**body)["choices"]
        if choice["finish_reason"] != "stop":
            return False
        check_person(json.loads(choice["message"]["content"]))
        return True

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(ask, bodies))


def test_six_answers_fit_their_schema(wide: Running) -> None:
    assert answers_to_schema(wide, 6) == 6


@pytest.mark.slow
def test_a_thousand_answers_fit_their_schema(wide: Running) -> None:
    assert answers_to_schema(wide, 1000) == 1000


def test_json_objects_and_streams(wide: Running) -> None:
    fields = {"messages": MESSAGES, "response_format": schema_format(POINT), "seed": 3}
    whole = wide.chat(**fields)["choices"][0]["message"]["content"]
    check_point(json.loads(whole))
    events = wide.events(CHAT, fields)
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == whole
    for seed in range(2):  # a free object of a random model seldom comes to its end
        free = {"response_format": {"type": "json_object"}, "seed": seed, "max_tokens": 40}
        (choice,) = wide.chat(**free)["choices"]
        assert choice["message"]["content"].lstrip().startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    ("wish", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-c]+z"}, "[0-9]{3}-[a-c]+z"),
        ({"choice": ["yes", 'no "way"']}, 'yes|no "way"'),
        ({"grammar": 'start: "a" num\nnum: /[0-9]{2}/\n'}, "a[0-9]{2}"),
    ],
)
def test_structured_outputs(wide: Running, wish: dict[str, Any], pattern: str) -> None:
    for seed in range(2):
        (choice,) = wide.chat(structured_outputs=wish, seed=seed, max_tokens=200)["choices"]
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["message"]["content"])
    status, answer, _ = wide.ask(
        "/v1/completions", {"prompt": "a", "structured_outputs": wish, "max_tokens": 200}
    )
    assert status == 200
    assert re.fullmatch(pattern, answer["choices"][0]["text"])


def test_a_named_function_is_called(wide: Running) -> None:
    choice_of = {"type": "function", "function": {"name": "point"}}
    fields = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice_of, "seed": 1}
    (choice,) = wide.chat(**fields)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "stop"  # as OpenAI says for a function that was named
    assert call["function"]["name"] == "point"
    check_point(json.loads(call["function"]["arguments"]))
    deltas = [event["choices"][0]["delta"] for event in wide.events(CHAT, fields)]
    first, *more = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert first["function"]["name"] == "point"
    assert len(more) > 1  # the arguments come as they grow
    assert all("id" not in piece for piece in more)
    pieces = [piece["function"]["arguments"] for piece in (first, *more)]
    assert "".join(pieces) == call["function"]["arguments"]


def test_some_function_is_called_where_one_is_required(wide: Running) -> None:
    checks = {"describe": check_person, "point": check_point}
    names = set()
    for seed in range(8):
        fields = {"tools": TOOLS, "tool_choice": "required", "seed": seed, "max_tokens": 300}
        (choice,) = wide.chat(**fields)["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        name = call["function"]["name"]
        checks[name](json.loads(call["function"]["arguments"]))
        names.add(name)
        if len(names) == 2:
            break
    assert names == {"describe", "point"}


def test_the_official_client_parses_tools_and_schemas(wide: Running) -> None:
    with openai.OpenAI(base_url=wide.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="toy", messages=MESSAGES, seed=2, response_format=schema_format(PERSON)
        )
        check_person(json.loads(answer.choices[0].message.content or ""))
        stream = client.chat.completions.stream(
            model="toy", messages=MESSAGES, seed=2, tools=TOOLS, tool_choice="required"
        )
        with stream as events:
            for _ in events:
                pass
            final = events.get_final_completion()
        (call,) = final.choices[0].message.tool_calls or []
        assert call.function.name in ("describe", "point")
        assert json.loads(call.function.arguments)


def test_an_answer_held_to_a_format_is_no_call_even_if_it_looks_like_one() -> None:
    engine = toy_engine(max_positions=1024)
    assert engine.codec is not None
    engine.codec.tokenizer.chat_template += '{# "parameters" #}'  # as Llama 3 calls
    empty = {"type": "object", "additionalProperties": False}
    shape = {
        "type": "object",
        "properties": {"name": {"const": "point"}, "parameters": empty},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    with serving(engine) as running:
        fields = {"tools": TOOLS, "response_format": schema_format(shape), "seed": 4}
        (choice,) = running.chat(**fields)["choices"]
        assert choice["finish_reason"] == "stop"
        assert json.loads(choice["message"]["content"]) == {"name": "point", "parameters": {}}


def test_a_call_that_was_cut_off_says_so(wide: Running) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 9}
    (choice,) = wide.chat(**fields)["choices"]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": schema_format({"type": "strange"})}, "response_format.json_schema"),
        ({"structured_outputs": {"grammar": "no grammar"}}, "structured_outputs.grammar"),
        (
            {"tools": [tool("f", {"$ref": "#/nowhere"})], "tool_choice": "required"},
            "tools",
        ),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": schema_format(POINT)},
            "response_format",
        ),
        (
            {"response_format": schema_format(POINT), "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
        ),
        ({"response_format": schema_format(POINT), "ignore_eos": True}, None),
    ],
)
def test_grammars_that_cannot_be_kept_to_are_refused(
    wide: Running, fields: dict[str, Any], param: str | None
) -> None:
    status, answer, _ = wide.ask(CHAT, {"messages": MESSAGES, **fields})
    assert status == 400
    assert answer["error"]["param"] == param
    assert "\n" not in answer["error"]["message"]
