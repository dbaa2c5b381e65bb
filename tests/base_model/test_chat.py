"""The DeepSeek-V4 chat encoding is the official one, byte for byte, and what it writes is read."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from dspark.base_model.chat import ChatSettings, encode_messages
from dspark.base_model.chat_codec import V4Codec, load_v4_codec, with_tools
from dspark.base_model.chat_parse import Completion, parse_completion
from dspark.base_model.chat_prose import (
    ENCODER_FILE,
    ChatProse,
    Effort,
    EffortTable,
    parse_prose,
    read_prose,
)
from dspark.errors import CapabilityError, CheckpointError, ConfigError, DataError
from tests.conftest import CHARACTERS

SHARED = Path(__file__).parents[2].parent / "shared"
VECTORS = SHARED / "data" / "deepseek-v4-encoding"

needs_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(), reason=f"the official vectors are not in {VECTORS}"
)

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
CHAT = ChatSettings()
THINKING = ChatSettings(mode="thinking")

# A prose of our own, with the fields of the official one.
TOOLS = "TOOLS <{dsml_token}> {thinking_start_token}{thinking_end_token} [{tool_schemas}]\n"
PROSE = ChatProse(
    tools=TOOLS,
    response_format="FORMAT {schema}",
    effort_max="try hard\n\n",
    table=EffortTable.PREVIEW,
)
TOOL = {"type": "function", "function": {"name": "f", "z": "é", "a": [None, True]}}


def user(text: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: Any = "ok", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def official(number: int) -> tuple[list[dict[str, Any]], str]:
    data = json.loads((VECTORS / f"test_input_{number}.json").read_text("utf-8"))
    if isinstance(data, dict):
        data["messages"][0]["tools"] = data["tools"]
        data = data["messages"]
    with (VECTORS / f"test_output_{number}.txt").open(encoding="utf-8", newline="") as file:
        return data, file.read()


def official_tools_template() -> str:
    """The tools template, taken out of the expected output of official test 1."""
    messages, text = official(1)
    block = text[text.index("## Tools") : text.index("<｜User｜>")]
    schemas = "\n".join(
        json.dumps(tool["function"], ensure_ascii=False) for tool in messages[0]["tools"]
    )
    assert block.count(schemas) == 1
    empty = block.replace(schemas, "")
    assert len(empty) == 953
    assert hashlib.sha256(empty.encode()).hexdigest().startswith("c7d3159308f7d076")
    template = block.replace(schemas, "{tool_schemas}").replace("｜DSML｜", "{dsml_token}")
    template = template.replace("<think>", "{thinking_start_token}")
    return template.replace("</think>", "{thinking_end_token}")


def encoder(folder: Path, source: str) -> Path:
    path = folder / ENCODER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, "utf-8")
    return folder


@needs_vectors
def test_the_tools_template_is_the_one_whose_hash_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = official_tools_template()
    assert len(template) == 1075
    assert hashlib.sha256(template.encode()).hexdigest().startswith("09b7269daaddbeaf")
    # Under any name, even inside a function, and without a warning.
    prose = read_prose(encoder(tmp_path, f"def f():\n    return {template!r}\n"))
    assert prose.tools == template
    assert caplog.records == []


@needs_vectors
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_official_vectors_are_met_byte_for_byte(number: int, tmp_path: Path) -> None:
    messages, text = official(number)
    prose = read_prose(encoder(tmp_path, f"TOOLS_TEMPLATE = {official_tools_template()!r}\n"))
    settings = ChatSettings(mode="chat" if number == 4 else "thinking")
    assert encode_messages(messages, settings, prose).encode() == text.encode()
    assert prose.table is EffortTable.PREVIEW


@needs_vectors
def test_answers_of_the_official_vectors_are_parsed() -> None:
    messages, text = official(1)
    answers = text.split("<think>")[-2:]
    first = parse_completion(answers[0].partition(EOS)[0] + EOS, mode="thinking").to_dict()
    assert first["reasoning_content"] == messages[2]["reasoning_content"]
    assert first["tool_calls"][0]["function"] == messages[2]["tool_calls"][0]["function"]
    second = parse_completion(answers[1], mode="thinking")
    assert (second.content, second.tool_calls) == (messages[4]["content"], ())


@pytest.mark.parametrize(("settings", "tag"), [(CHAT, "</think>"), (THINKING, "<think>")])
def test_one_question(settings: ChatSettings, tag: str) -> None:
    assert encode_messages([user()], settings) == f"{BOS}<｜User｜>hi<｜Assistant｜>{tag}"


def test_reasoning_of_earlier_turns_is_dropped_unless_asked_for_or_tools_are_defined() -> None:
    talk = [user("a"), assistant("b", reasoning_content="r"), user("c")]
    assert "<｜Assistant｜></think>b" in encode_messages(talk, THINKING)
    kept = "<｜Assistant｜><think>r</think>b"
    assert kept in encode_messages(talk, ChatSettings(mode="thinking", drop_thinking=False))
    assert kept in encode_messages(with_tools(talk, tools=[TOOL]), THINKING, PROSE)
    assert "<｜Assistant｜></think>b" in encode_messages(talk, CHAT)


def test_calls_and_results_without_declared_tools() -> None:
    talk = [
        user("a"),
        assistant("b", tool_calls=[call("f", '{"x":"s","n":5,"o":[1,true]}')]),
        {"role": "tool", "content": "R"},
        user("next"),
    ]
    assert encode_messages(talk, THINKING) == (
        f"{BOS}<｜User｜>a<｜Assistant｜></think>b\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="x" string="true">s</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">5</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="o" string="false">[1, true]</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}"
        "<｜User｜><tool_result>R</tool_result>\n\nnext<｜Assistant｜><think>"
    )


BLOCK = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="x" string="true">s</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">5</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def test_a_completion_with_a_call() -> None:
    message = parse_completion(f"think.</think>ok{BLOCK}{EOS}", mode="thinking").to_dict()
    assert message == {
        "role": "assistant",
        "content": "ok",
        "reasoning_content": "think.",
        "tool_calls": [call("f", '{"x": "s", "n": 5}')],
    }


@pytest.mark.parametrize(
    ("settings", "task", "tail"),
    [
        (CHAT, "action", "<｜Assistant｜></think><｜action｜>Search"),
        (THINKING, "action", "<｜Assistant｜><think><｜action｜>Search"),
        (THINKING, "title", "<｜title｜>Search"),
        (CHAT, "read_url", "<｜read_url｜>Search"),
    ],
)
def test_a_task_has_its_token_and_an_answer_without_thinking(
    settings: ChatSettings, task: str, tail: str
) -> None:
    talk = [user("Q", task=task), assistant("Search")]
    assert encode_messages(talk, settings) == f"{BOS}<｜User｜>Q{tail}{EOS}"


def test_users_merge_until_one_has_a_task() -> None:
    talk = [user("a"), user("b", task="title"), user("c")]
    assert encode_messages(talk) == f"{BOS}<｜User｜>a\n\nb<｜User｜>c<｜Assistant｜></think>"
    assert encode_messages(talk[:2]) == f"{BOS}<｜User｜>a\n\nb<｜title｜>"


def test_results_stand_in_the_order_of_their_calls() -> None:
    calls = [call("f", "{}", id="1"), call("g", "{}", id="2")]
    talk = [
        user(),
        assistant(None, tool_calls=calls),
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "image_url"}]},
        user("between"),
        {"role": "tool", "tool_call_id": "1", "content": "one"},
    ]
    text = encode_messages(talk)
    assert text.endswith(
        "<｜User｜><tool_result>one</tool_result>\n\nbetween\n\n"
        "<tool_result>[Unsupported image_url]</tool_result><｜Assistant｜></think>"
    )
    assert '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n<｜DSML｜invoke name="g">' in text


def test_tools_and_response_format_follow_the_content() -> None:
    system = {"role": "system", "content": "S"}
    talk = with_tools([system, user()], tools=[TOOL, TOOL], response_format={"b": 1, "a": "é"})
    line = '{"name": "f", "z": "é", "a": [null, true]}'
    assert encode_messages(talk, CHAT, PROSE) == (
        f"{BOS}S\n\nTOOLS <｜DSML｜> <think></think> [{line}\n{line}]\n\n\n"
        'FORMAT {"b": 1, "a": "é"}<｜User｜>hi<｜Assistant｜></think>'
    )
    assert encode_messages(with_tools([user()], response_format={"a": 1}), CHAT, PROSE) == (
        f'{BOS}\n\nFORMAT {{"a": 1}}<｜User｜>hi<｜Assistant｜></think>'
    )
    assert with_tools([user()]) == [user()]


def test_developers_before_the_last_question_are_dropped_with_the_reasoning() -> None:
    talk = [{"role": "developer", "content": "D"}, assistant("b"), user("c")]
    assert encode_messages(talk, CHAT).startswith(f"{BOS}<｜User｜>D<｜Assistant｜></think>b")
    assert encode_messages(talk, THINKING).startswith(f"{BOS}b{EOS}<｜User｜>c")


def test_unusual_but_valid_messages() -> None:
    assert encode_messages([{"role": "system", "content": "S"}]) == f"{BOS}S"
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert "<｜User｜>a\n\n[Unsupported image]\n\nb<" in encode_messages([user(parts)])
    assert encode_messages([user(), assistant("", wo_eos=True)]).endswith("</think>")
    reminded = [{"role": "latest_reminder", "content": "now"}, user()]
    assert encode_messages(reminded).startswith(f"{BOS}<｜latest_reminder｜>now<｜User｜>hi")


@pytest.mark.parametrize("arguments", ["no JSON", "[1]", "", '{"a": NaN}', "[" * 100_000])
def test_arguments_that_are_no_object_are_one_string(arguments: str) -> None:
    text = encode_messages([user(), assistant(tool_calls=[call("f", arguments)])])
    assert f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜' in text


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "the messages are empty"),
        (["hi"], "message 0 is of type str"),
        ([user(), {"role": "robot", "content": ""}], "message 1 has role 'robot'"),
        ([{"content": "hi"}], "message 0 has role None"),
        ([user(), {"role": ["user"]}], "message 1 has role"),
        ([{"role": "user"}], "message 0 has content None"),
        ([user(5)], "message 0 has content 5"),
        ([user(["a"])], "message 0 has the part 'a'"),
        ([user([{"type": "text"}])], "message 0 has a part of type text with None"),
        ([user(), assistant(None)], "message 1 has content None"),
        ([user(), assistant(reasoning_content=1)], "message 1 has reasoning_content 1"),
        ([{"role": "developer", "content": ""}], "message 0 is an empty developer message"),
        ([user(), {"role": "tool", "content": "R"}], "message 1 is a tool's result"),
        ([user(task="sing")], "message 0 has task 'sing'"),
        ([user(tools=[TOOL])], "message 0 has tools, but is of role user"),
        ([{"role": "system", "content": "", "tools": [{}]}], r"message 0 has \{\} in tools"),
        ([{"role": "system", "content": "", "tools": "f"}], "message 0 has tools of type str"),
        ([user(), assistant(tool_calls=[call("f", None)])], "message 1 calls f with"),
        ([user(), assistant(tool_calls=[call("f", {"a": {1}})])], "message 1 has arguments"),
        ([user("ok"), user("\ud800")], "message 1 is not valid Unicode"),
        ([user(), assistant(tool_calls=[call("f", r'{"a":"\ud800"}')])], "message 1 is not valid"),
    ],
)
def test_malformed_messages_are_named(messages: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        encode_messages(messages)


def test_a_result_must_name_a_call() -> None:
    talk = [user(), assistant(None, tool_calls=[call("f", "{}", id="1")])]
    with pytest.raises(DataError, match=r"message 2 has tool_call_id '9', .* one of \['1'\]"):
        encode_messages([*talk, {"role": "tool", "tool_call_id": "9", "content": "R"}])


def test_efforts_add_their_text_before_message_0_in_thinking_mode_only() -> None:
    def text(effort: str | None, prose: ChatProse, mode: str = "thinking") -> str:
        settings = ChatSettings(mode=mode, effort=effort)
        return encode_messages([user()], settings, prose).removeprefix(BOS).partition("<")[0]

    assert [text(e, PROSE) for e in (None, "high", "max")] == ["", "", "try hard\n\n"]
    assert text("max", PROSE, "chat") == ""
    with pytest.raises(CapabilityError, match="effort low"):
        text("low", PROSE)
    later = ChatProse(effort_high="A\n\n", effort_max="B\n\n", table=EffortTable.RELEASE_0731)
    assert [text(e, later) for e in (None, "low", "high", "max")] == ["", "", "A\n\n", "B\n\n"]
    assert [text(e, ChatProse()) for e in (None, "low")] == ["", ""]
    for effort in ("high", "max"):
        with pytest.raises(CapabilityError, match=f"no text for effort {effort}"):
            text(effort, ChatProse())


@pytest.mark.parametrize("field", [{"mode": "dream"}, {"effort": "medium"}, {"mode": None}])
def test_unknown_settings_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        ChatSettings(**field)


def test_without_prose_only_what_needs_it_is_refused(tmp_path: Path) -> None:
    prose = read_prose(tmp_path)
    assert prose == ChatProse()
    for extra in ({"tools": [TOOL]}, {"response_format": {"a": 1}}):
        with pytest.raises(CapabilityError, match="this checkpoint has no") as caught:
            encode_messages(with_tools([user()], **extra), CHAT, prose)
        assert "encoding/encoding_dsv4.py" in str(caught.value.hint)


# Prose in every form that is folded: joined, added, renamed, in a dict.
SOURCE = """
from torch import nonsense
raise SystemExit("this file is never run")
HEAD = "TOOLS <{dsml_token}> "
TAIL = (
    "{thinking_start_token}{thinking_end_token} "
    "[{tool_schemas}]\\n"
)
TEMPLATE: str = HEAD + TAIL
response_format_template = f"{1}" + "{schema}"
FORMATS = {"json": "FORMAT {schema}", 3: f"x{HEAD}", **{}}
REASONING_EFFORT_PROMPTS: dict = {"low": "", "high": "A" "\\n\\n", "max": "B\\n\\n"}
pattern = "\\d"
"""


def test_prose_is_folded_from_literals_and_never_run(caplog: pytest.LogCaptureFixture) -> None:
    prose = parse_prose(SOURCE.encode(), name="encoder")
    assert prose == ChatProse(
        tools=TOOLS,
        response_format="FORMAT {schema}",
        effort_high="A\n\n",
        effort_max="B\n\n",
        table=EffortTable.RELEASE_0731,
    )
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 4
    assert all("sha256" in message and "is unknown" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("source", "table"),
    [
        ('REASONING_EFFORT_MAX = "M\\n\\n"', EffortTable.PREVIEW),
        ('REASONING_EFFORT_MAX = "M\\n\\n"\nDEFAULT_EFFORT = "low"', EffortTable.RELEASE_0731),
        (
            'REASONING_EFFORT_MAX = "M\\n\\n"\ndef f(a, effort="low"): pass',
            EffortTable.RELEASE_0731,
        ),
        (
            'REASONING_EFFORT_MAX = "M\\n\\n"\ndef f(*, effort="low"): pass',
            EffortTable.RELEASE_0731,
        ),
    ],
)
def test_a_low_default_tells_the_later_table(source: str, table: EffortTable) -> None:
    prose = parse_prose(source.encode(), name="encoder")
    assert (prose.table, prose.effort_max) == (table, "M\n\n")


@pytest.mark.parametrize(
    "source",
    [
        'T = f"{{tool_schemas}}"',
        'T = "%s{tool_schemas}" % 1',
        'T = "{tool_schemas}"\nT += "x"',
        'T = "{tool_schemas}"\nif 1:\n    T = "y"',
        'T = "{tool_schemas.__class__}"',
        'T = "{tool_schemas!r}"',
        'T = "{tool_schemas:>9}"',
        'T = "{tool_schemas} {other}"',
        'T = "{tool_schemas} {"',
        'T = "{tool_schemas}\\ud800"',
        # Doubled 40 times, it would not fit into memory.
        "A = '{tool_schemas}'\n" + "A = A + A\n" * 40,
    ],
)
def test_what_is_no_certain_template_is_not_taken(source: str) -> None:
    assert parse_prose(source.encode(), name="encoder").tools is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"x = (", "cannot be read as Python"),
        (b"\0", "cannot be read as Python"),
        (b"\xff", "cannot be read as Python"),
        (b"x = " + b"-" * 200_000 + b"1", "cannot be read as Python"),
        (b"#" * (2**20 + 1), "larger than 1 MB"),
    ],
)
def test_an_encoder_file_that_is_none_is_one_sentence(
    source: bytes, reason: str, tmp_path: Path
) -> None:
    encoder(tmp_path, "")
    (tmp_path / ENCODER_FILE).write_bytes(source)
    with pytest.raises(CheckpointError, match=reason):
        read_prose(tmp_path)


def test_a_prose_with_other_fields_is_refused() -> None:
    with pytest.raises(ConfigError, match="tools template"):
        ChatProse(tools="none")
    with pytest.raises(ConfigError, match="response-format template"):
        ChatProse(response_format="{schema} {more}")


CALLS_HEAD = "\n\n<｜DSML｜tool_calls>\n"
PARAMETER = '<｜DSML｜parameter name="n" string="false">5</｜DSML｜parameter>\n'
AT_NAME, AT_X, AT_N = (BLOCK.index(f' name="{name}"') for name in "fxn")
AT_5 = BLOCK.index("5<")


@pytest.mark.parametrize(
    ("text", "at", "reason"),
    [
        ("no end", 6, f"{EOS} is missing"),
        ("", 0, f"{EOS} is missing"),
        (f"a{EOS}b", 1 + len(EOS), "goes on after its end"),
        (f"ab<think>{EOS}", 2, "special token <think>"),
        (f"ab｜DSML｜{EOS}", 2, "special token ｜DSML｜"),
        (f"ab<｜User｜>x{EOS}", 2, "special token <｜User｜>"),
        (f"{BLOCK}x{EOS}", len(BLOCK), "must be here, not 'x"),
        (f"{BLOCK}{EOS}x", len(BLOCK) + len(EOS), "goes on after its end"),
        (BLOCK.replace("tool_calls>\n", "tool_calls>", 1), 19, "must be here"),
        (BLOCK.replace('"f">\n', '"f">'), AT_NAME, "a call must have name"),
        (BLOCK.replace('string="true"', 'string="yes"'), AT_X, "a parameter must have name"),
        (BLOCK.replace(">5<", ">five<"), AT_5, "the value of 'n' is not JSON"),
        (BLOCK.replace(">5<", ">NaN<"), AT_5, "the value of 'n' is not JSON"),
        (BLOCK.replace(">5<", f">{'[' * 100_000}<"), AT_5, "the value of 'n' is not JSON"),
        (BLOCK.replace("s</｜DSML｜parameter>", "s"), AT_X, "a parameter must have name"),
        (
            BLOCK.replace(PARAMETER, PARAMETER * 2),
            AT_N + len(PARAMETER),
            "the parameter 'n' is given twice",
        ),
        (BLOCK.replace("\n</｜DSML｜invoke>", "x</｜DSML｜invoke>"), 0, "must be here, not 'x'"),
        (BLOCK.removesuffix("</｜DSML｜tool_calls>"), 0, "</｜DSML｜tool_calls> is missing"),
        (f"{CALLS_HEAD}</｜DSML｜tool_calls>{EOS}", 0, "holds no call"),
    ],
)
def test_a_malformed_completion_is_refused_where_it_goes_wrong(
    text: str, at: int, reason: str
) -> None:
    with pytest.raises(DataError, match="cannot be parsed at character") as caught:
        parse_completion(text, mode="chat")
    assert reason in caught.value.message
    if at:
        assert f"at character {at}:" in caught.value.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"ok{EOS}", "</think> is missing"),
        (f"r{BLOCK}</think>{EOS}", "tool calls come before </think>"),
        (f"<think>r</think>ok{EOS}", "special token <think>"),
    ],
)
def test_thinking_must_end_before_anything_else(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_completion(text, mode="thinking")


def test_the_end_may_be_missing_after_calls_only() -> None:
    assert parse_completion(f"ok{BLOCK}", mode="chat").content == "ok"
    assert parse_completion(f"ok{EOS}", mode="chat") == Completion(content="ok")


TEXTS = st.text(
    st.one_of(st.sampled_from('ab"<>/=\\\n {}｜'), CHARACTERS),
    max_size=20,
).filter(lambda text: not any(token in text for token in SPECIAL))  # hypothesis knows "<think>"
NAMES = TEXTS.filter(lambda text: '"' not in text and "\n" not in text)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from(["1", "null", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(TEXTS, VALUES, max_size=4)), max_size=3)


@given(TEXTS, TEXTS, CALLS, st.booleans())
@example(" a\n", "", [], False)
@example("", "\n b ", [("f", {"x": "1", "y": [None, {"z": "é"}], "w": ' <a> "'})], True)
def test_what_is_encoded_is_parsed_back(
    content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]], thinks: bool
) -> None:
    settings = THINKING if thinks else CHAT
    texts = [json.dumps(arguments, ensure_ascii=False) for _, arguments in calls]
    message = assistant(
        content,
        reasoning_content=reasoning if thinks else "",
        tool_calls=[call(name, text) for (name, _), text in zip(calls, texts, strict=True)],
    )
    prompt = encode_messages([user()], settings)
    whole = encode_messages([user(), message], settings)
    assert whole.startswith(prompt)
    assert parse_completion(whole.removeprefix(prompt), mode=settings.mode).to_dict() == message


SPECIAL = [BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜"]


def tokenizer(special: list[str]) -> Any:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(["hi"], trainer)
    names = {"bos_token": BOS, "eos_token": EOS}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


def test_a_folder_gives_its_codec(tmp_path: Path) -> None:
    assert load_v4_codec(tmp_path) is None
    tokenizer(SPECIAL).save_pretrained(tmp_path)
    codec = load_v4_codec(encoder(tmp_path, SOURCE), ChatSettings(mode="thinking", effort="max"))
    assert codec is not None
    assert codec.has_chat_template
    assert codec.eos_token_ids == (1,)
    ids = codec.encode_chat([user()])
    assert ids[0] == 0
    assert ids.count(0) == 1
    names = codec.tokenizer.convert_ids_to_tokens(ids)
    assert names == [BOS, "B", "Ċ", "Ċ", "<｜User｜>", "hi", "<｜Assistant｜>", "<think>"]
    plain = codec.with_settings(CHAT)
    assert plain.tokenizer.decode(plain.encode_chat([user()])) == plain.chat_text([user()])
    assert plain.prose is codec.prose
    assert plain.settings.effort is None
    assert plain.parse(f"ok{EOS}").content == "ok"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "S"}],
        [user(), assistant("done")],
        [user(), {"role": "latest_reminder", "content": "now"}],
    ],
)
def test_a_prompt_must_leave_something_to_answer(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=f"message {len(messages) - 1}, the last, is of role"):
        V4Codec(tokenizer(SPECIAL)).encode_chat(messages)


def test_an_unfinished_answer_or_a_task_can_be_answered() -> None:
    codec = V4Codec(tokenizer(SPECIAL))
    assert codec.chat_text([user(), assistant("so", wo_eos=True)]).endswith("</think>so")
    assert codec.chat_text([user(), assistant("so", task="title")]).endswith("<｜title｜>")


def test_a_tokenizer_without_the_layout_is_refused() -> None:
    codec = V4Codec(tokenizer([BOS, EOS]))
    with pytest.raises(CheckpointError, match=r"no token <｜User｜>"):
        codec.encode_chat([user()])


@pytest.mark.parametrize(
    ("settings", "positions", "warns"),
    [
        (ChatSettings(mode="thinking", effort=Effort.MAX), 384 * 1024 - 1, True),
        (ChatSettings(mode="thinking", effort=Effort.MAX), 384 * 1024, False),
        (ChatSettings(mode="thinking", effort=Effort.HIGH), 1024, False),
        (ChatSettings(mode="chat", effort=Effort.MAX), 1024, False),
    ],
)
def test_effort_max_wants_a_long_context(
    settings: ChatSettings, positions: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    V4Codec(None, settings).check_context(positions)
    assert ("effort max wants" in caplog.text) is warns
