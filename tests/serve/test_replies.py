"""Reasoning and calls are found wherever a stream is cut, and nothing that was written is lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.serve.layout import CallForm, Layout
from dspark.serve.replies import (
    BareCalls,
    Kind,
    Part,
    Reply,
    Stage,
    TaggedCalls,
    ThinkStage,
    WholeCall,
    read_json_calls,
)
from tests.conftest import examples
from tests.serve.toys import Running, script_engine, serving

CHAT = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "look", "arguments": {"q": "a<b"}}\n</tool_call>'
KNOWN = frozenset({"look"})


def tagged() -> Stage:
    return TaggedCalls("<tool_call>", "</tool_call>", read_json_calls)


def bare() -> Stage:
    return BareCalls("<|python_tag|>", lambda text: read_json_calls(text, known=KNOWN))


def read(make: Callable[[], Reply], pieces: Sequence[str]) -> dict[str, Any]:
    """What an answer in pieces says: texts, calls, and where the texts stood."""
    reply = make()
    parts: list[Part] = []
    for index, piece in enumerate(pieces):
        parts += reply.push(piece, is_final=index == len(pieces) - 1)
    whole = "".join(pieces)
    for part in parts:
        if part.kind in (Kind.CONTENT, Kind.REASONING):
            assert whole[part.start : part.start + len(part.text)] == part.text
    calls: list[list[str]] = []
    for part in parts:
        if part.kind is Kind.CALL:
            calls.append([part.name, part.text])
        elif part.kind is Kind.ARGUMENTS:
            calls[-1][1] += part.text
    texts = {
        kind: "".join(part.text for part in parts if part.kind is kind)
        for kind in (Kind.CONTENT, Kind.REASONING)
    }
    return {"text": texts[Kind.CONTENT], "why": texts[Kind.REASONING], "calls": calls}


CASES: list[tuple[str, Callable[[], Reply], str, dict[str, Any]]] = [
    (
        "reasoning",
        lambda: Reply(ThinkStage(starts_inside=False)),
        "<think>\nWell, 1 < 2.\n</think>\n\nYes.\n",
        {"text": "Yes.\n", "why": "Well, 1 < 2.", "calls": []},
    ),
    (
        "reasoning that the prompt opened",
        lambda: Reply(ThinkStage(starts_inside=True)),
        "Well.</think>Yes",
        {"text": "Yes", "why": "Well.", "calls": []},
    ),
    (
        "reasoning that never ends",
        lambda: Reply(ThinkStage(starts_inside=False)),
        "<think>Well, </thin",
        {"text": "", "why": "Well, </thin", "calls": []},
    ),
    (
        "no reasoning",
        lambda: Reply(ThinkStage(starts_inside=False)),
        "  <thin air>",
        {"text": "  <thin air>", "why": "", "calls": []},
    ),
    (
        "reasoning and calls",
        lambda: Reply(ThinkStage(starts_inside=False), tagged()),
        f"<think>Hm</think>\n\nI look.\n{CALL}\n{CALL}",
        {"text": "I look.", "why": "Hm", "calls": [["look", '{"q": "a<b"}']] * 2},
    ),
    (
        "one call of two",
        lambda: Reply(None, tagged(), most_calls=1),
        f"{CALL}\n{CALL}",
        {"text": "", "why": "", "calls": [["look", '{"q": "a<b"}']]},
    ),
    (
        "a call that is no JSON",
        lambda: Reply(None, tagged()),
        "See <tool_call>{oops</tool_call> there",
        {"text": "See <tool_call>{oops</tool_call> there", "why": "", "calls": []},
    ),
    (
        "a call without its end",
        lambda: Reply(None, tagged()),
        '<tool_call>{"name": "look", "arguments": {}}',
        {"text": "", "why": "", "calls": [["look", "{}"]]},
    ),
    (
        "a call that was cut off",
        lambda: Reply(None, tagged()),
        '<tool_call>{"name": "lo',
        {"text": '<tool_call>{"name": "lo', "why": "", "calls": []},
    ),
    (
        "no call",
        lambda: Reply(None, tagged()),
        "a < b, <tool_cal",
        {"text": "a < b, <tool_cal", "why": "", "calls": []},
    ),
    (
        "bare calls",
        lambda: Reply(None, bare()),
        '<|python_tag|>{"name": "look", "parameters": {"q": 1}}; {"name": "look"}',
        {"text": "", "why": "", "calls": [["look", '{"q": 1}'], ["look", "{}"]]},
    ),
    (
        "JSON that calls nothing",
        lambda: Reply(None, bare()),
        '{"name": "Bob", "age": 5}',
        {"text": '{"name": "Bob", "age": 5}', "why": "", "calls": []},
    ),
    (
        "text where bare calls could be",
        lambda: Reply(None, bare()),
        "Look: {}",
        {"text": "Look: {}", "why": "", "calls": []},
    ),
    (
        "a named call",
        lambda: Reply(None, WholeCall("look", read_json_calls)),
        '{"q": 1}',
        {"text": "", "why": "", "calls": [["look", '{"q": 1}']]},
    ),
    (
        "a forced call",
        lambda: Reply(None, WholeCall(None, read_json_calls)),
        '{"name": "look", "arguments": {"q": 1}}',
        {"text": "", "why": "", "calls": [["look", '{"q": 1}']]},
    ),
    (
        "a forced call that was cut off",
        lambda: Reply(None, WholeCall(None, read_json_calls)),
        '{"name": "lo',
        {"text": '{"name": "lo', "why": "", "calls": []},
    ),
    (
        "an empty answer",
        lambda: Reply(ThinkStage(starts_inside=False), tagged()),
        "",
        {"text": "", "why": "", "calls": []},
    ),
]


@pytest.mark.parametrize(
    ("make", "text", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
@examples(10, 100)
@given(data=st.data())
def test_an_answer_is_read_alike_however_it_is_cut(
    make: Callable[[], Reply], text: str, expected: dict[str, Any], data: st.DataObject
) -> None:
    assert read(make, [text]) == expected
    assert read(make, [*text, ""]) == expected
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert read(make, pieces) == expected


@given(
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "{", "x", " "]),
        max_size=12,
    )
)
def test_without_calls_all_that_is_no_tag_comes_out(text: list[str]) -> None:
    found = read(lambda: Reply(ThinkStage(starts_inside=False), tagged()), [*text, ""])
    kept = "".join("".join(text).split()).replace("<think>", "", 1).replace("</think>", "", 1)
    shown = "".join((found["why"] + found["text"]).split())
    if "".join(text).strip().startswith("<think>"):
        assert shown == kept
    else:
        assert shown == "".join("".join(text).split())


def test_reasoning_is_given_out_as_it_comes() -> None:
    reply = Reply(ThinkStage(starts_inside=False), tagged())
    shown = [reply.push(piece) for piece in ("<think>", "One ", "two", "</think>", "Yes", ".")]
    texts = ["".join(part.text for part in parts) for parts in shown]
    assert texts == ["", "One", " two", "", "Yes", "."]


# -- through a server -------------------------------------------------------------------------

THINKING = (  # the script of such an engine begins after <s>
    "{% if tools %}{{ tools | length }}<tool_call>{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{{ bos_token }}"
)
PIECES = ["<think>", "Hm", "</think>", "\n\n", "Yes", "<tool_call>"]
PIECES += ['{"name": "look", "arguments": ', '{"q": 1}', "}", "</tool_call>"]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": ""}], "temperature": 0}


@pytest.mark.parametrize("special", [(), ("<think>", "</think>", "<tool_call>", "</tool_call>")])
def test_reasoning_and_calls_of_a_qwen_like_model(special: tuple[str, ...]) -> None:
    engine = script_engine(PIECES, template=THINKING, special=special)
    layout = Layout(engine.codec)
    assert layout.form is CallForm.TAGGED
    assert layout.knows_tools
    with serving(engine) as running:
        (choice,) = running.ask(CHAT, {**ASKED, "tools": TOOLS})[1]["choices"]
        message = choice["message"]
        assert message["reasoning_content"] == "Hm"
        assert message["content"] == "Yes"
        (call,) = message["tool_calls"]
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        assert call["function"] == {"name": "look", "arguments": '{"q": 1}'}
        assert choice["finish_reason"] == "tool_calls"
        _check_stream(running, message)
        # Without tools, or with none to choose from, what it writes is text.
        for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            (choice,) = running.ask(CHAT, {**ASKED, **more})[1]["choices"]
            assert choice["message"]["content"] == "".join(PIECES[4:])
            assert choice["finish_reason"] == "stop"


def _check_stream(running: Running, message: dict[str, Any]) -> None:
    pieces = {"dspark": {"pieces": True}}
    events = running.events(CHAT, {**ASKED, "tools": TOOLS, **pieces})
    deltas = [event["choices"][0]["delta"] for event in events]
    for name in ("reasoning_content", "content"):
        own = [delta for delta in deltas if delta.get(name)]
        assert "".join(delta[name] for delta in own) == message[name]
        for delta in own:
            spelt = "".join(text for text, _ in delta["dspark"]["pieces"])
            assert spelt == delta[name]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0]
    assert json.loads(calls[0]["function"]["arguments"]) == {"q": 1}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_stop_strings_and_logprobs_count_tags_that_are_kept() -> None:
    special = ("<think>", "</think>")
    engine = script_engine(PIECES[:5], template=THINKING, special=special)
    with serving(engine) as running:
        fields = {**ASKED, "logprobs": True}
        (choice,) = running.ask(CHAT, fields)[1]["choices"]
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert tokens == PIECES[:5]
        (choice,) = running.ask(CHAT, {**ASKED, "stop": "</think>"})[1]["choices"]
        assert choice["message"]["content"] == ""
        assert choice["message"]["reasoning_content"] == "Hm"
        assert choice["finish_reason"] == "stop"


def test_a_switch_for_thinking_reaches_the_template() -> None:
    engine = script_engine(["<think>", "</think>", *PIECES[4:5]], template=THINKING)
    with serving(engine) as running:
        on, off = (
            running.ask(CHAT, {**ASKED, "chat_template_kwargs": {"enable_thinking": wish}})[1]
            for wish in (True, False)
        )
        assert on["usage"]["prompt_tokens"] < off["usage"]["prompt_tokens"]
        none = running.ask(CHAT, {**ASKED, "reasoning_effort": "none"})[1]
        assert none["usage"]["prompt_tokens"] == off["usage"]["prompt_tokens"]


def test_a_user_cannot_open_the_reasoning() -> None:
    template = "{{ messages[0]['content'] }}{{ bos_token }}"
    engine = script_engine(["<think>", "Hm", "</think>", "Yes"], template=template)
    asked = {**ASKED, "messages": [{"role": "user", "content": "Hm<think>"}]}
    with serving(engine) as running:
        (choice,) = running.ask(CHAT, {**asked, "stop": "</think>"})[1]["choices"]
        assert choice["message"]["reasoning_content"] == "Hm"
        layout = Layout(engine.codec)
        codec = engine.codec
        assert not layout.opens_reasoning(codec.encode_chat(asked["messages"]))


def test_reasoning_that_the_template_opens_is_reasoning() -> None:
    engine = script_engine(["<think>", "Hm", "</think>", "Yes"], template="{{ bos_token }}<think>")
    with serving(engine) as running:
        (choice,) = running.ask(CHAT, {**ASKED})[1]["choices"]
        assert choice["message"]["reasoning_content"] == "Hm"
        assert choice["message"]["content"] == "Yes"


LLAMA = '{# {"name": ..., "parameters": ...} #}{{ tools }}{{ bos_token }}'


def test_calls_of_a_llama_like_model() -> None:
    pieces = ["<|python_tag|>", '{"name": "look", ', '"parameters": ', '{"q": 1}', "}"]
    engine = script_engine(pieces, template=LLAMA, special=pieces[:1])
    assert Layout(engine.codec).form is CallForm.BARE
    with serving(engine) as running:
        (choice,) = running.ask(CHAT, {**ASKED, "tools": TOOLS})[1]["choices"]
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "look", "arguments": '{"q": 1}'}
