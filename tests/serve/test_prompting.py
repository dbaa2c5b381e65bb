"""What a chat request becomes for the model: messages, tools, the switch for thinking."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers

from dspark.base_model.chat import BOS, CALLS_BEGIN, DSML, EOS
from dspark.base_model.chat_codec import V4Codec
from dspark.base_model.chat_prose import ChatProse
from dspark.serve.failures import ApiError, scrub
from dspark.serve.fields import ChatFields, parse_fields
from dspark.serve.layout import CallForm, Layout
from dspark.serve.prompting import encode_chat, wanted_thinking
from dspark.serve.replies import Kind, Reply
from dspark.serve.spelling import Spelling
from dspark.serve.tools import plan_tools
from dspark.text import TextCodec

TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"q": {}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": "x"}'}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "There."},
]


def backend(special: list[str]) -> Any:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(["hi"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=special[0], eos_token=special[1]
    )


def template_codec(template: str) -> TextCodec:
    tokenizer = backend(["<s>", "</s>"])
    tokenizer.chat_template = template
    return TextCodec(tokenizer)


def v4_codec() -> V4Codec:
    layout = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", DSML]
    return V4Codec(backend([BOS, EOS, *layout]), prose=ChatProse(tools="TOOLS {tool_schemas}"))


def prompt_of(codec: TextCodec, **body: Any) -> str:
    """The prompt of a request as text."""
    fields = parse_fields(ChatFields, body)
    think, effort = wanted_thinking(fields)
    told = plan_tools(fields).told
    ids = encode_chat(codec, Layout(codec), fields, tools=told, think=think, effort=effort)
    return str(codec.tokenizer.decode(ids))


DUMP = "{{ messages | tojson }}|{{ tools | tojson }}"


def test_a_template_that_knows_tools_gets_them_with_calls_as_objects() -> None:
    text = prompt_of(template_codec(DUMP), messages=TALK, tools=[TOOL])
    messages, tools = (json.loads(part) for part in text.split("|"))
    assert tools == [TOOL]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert messages[2]["content"] == ""
    assert messages[2]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"q": "x"}}
    assert messages[3]["tool_call_id"] == "c1"


def test_tools_that_may_not_be_used_are_not_told() -> None:
    text = prompt_of(template_codec(DUMP), messages=TALK, tools=[TOOL], tool_choice="none")
    assert text.endswith("|null")


def test_a_template_without_tools_is_told_in_words() -> None:
    codec = template_codec("{{ messages | tojson }}")
    messages = json.loads(prompt_of(codec, messages=TALK, tools=[TOOL]))
    assert messages[0]["content"].startswith("Be brief.\n\n")
    assert json.dumps(TOOL["function"]) in messages[0]["content"]
    spelt = messages[2]["content"]
    assert spelt.startswith("<tool_call>")
    assert json.loads(spelt[len("<tool_call>") : -len("</tool_call>")])["name"] == "look"
    assert messages[3] == {
        "role": "user",
        "content": "<tool_response>\nThere.\n</tool_response>",
    }
    alone = json.loads(prompt_of(codec, messages=TALK[1:2], tools=[TOOL]))
    assert [message["role"] for message in alone] == ["system", "user"]


def test_deepseek_v4_is_told_in_its_own_way_and_read_in_its_own_way() -> None:
    codec = v4_codec()
    text = prompt_of(codec, messages=TALK, tools=[TOOL])
    assert "TOOLS" in text
    assert "<tool_result>There.</tool_result>" in text
    assert f'<{DSML}invoke name="look">' in text
    layout = Layout(codec)
    assert layout.form is CallForm.DSML
    assert layout.codec is not None
    answer = (
        f'So.\n\n{CALLS_BEGIN}\n<{DSML}invoke name="look">\n<{DSML}parameter name="q" '
        f'string="true">x</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>'
    )
    ids = codec.tokenizer.encode(answer, add_special_tokens=False)
    kept = layout.codec.decode([*ids, codec.eos_token_ids[0]])
    assert kept == answer  # the end token is hidden, the tags are not
    prompt = codec.encode_chat([{"role": "user", "content": "hi"}])
    for step in (1, 7, len(answer)):
        reply = Reply(layout.think_stage(prompt), layout.call_stage(frozenset({"look"})))
        parts = []
        for start in range(0, len(answer), step):
            parts += reply.push(answer[start : start + step])
        parts += reply.push("", is_final=True)
        content = "".join(part.text for part in parts if part.kind is Kind.CONTENT)
        (call,) = (part for part in parts if part.kind is Kind.CALL)
        assert (content, call.name, call.text) == ("So.", "look", '{"q": "x"}')


@pytest.mark.parametrize(
    ("wish", "end"),
    [
        ({}, "</think>"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "<think>"),
        ({"chat_template_kwargs": {"thinking": True}}, "<think>"),
        ({"reasoning_effort": "none"}, "</think>"),
    ],
)
def test_deepseek_v4_thinks_if_asked(wish: dict[str, Any], end: str) -> None:
    codec = v4_codec()
    text = prompt_of(codec, messages=TALK[:2], **wish)
    assert text.endswith(end)
    ids = codec.tokenizer.encode(text, add_special_tokens=False)
    assert Layout(codec).opens_reasoning(ids) is (end == "<think>")


def test_a_wish_the_model_does_not_know_names_its_field() -> None:
    for wish in ("reasoning_effort", "chat_template_kwargs"):
        value = "high" if wish == "reasoning_effort" else {"enable_thinking": False}
        with pytest.raises(ApiError) as caught:
            prompt_of(template_codec(DUMP), messages=TALK, **{wish: value})
        assert caught.value.param == wish
    with pytest.raises(ApiError) as caught:
        prompt_of(v4_codec(), messages=TALK[:2], reasoning_effort="medium")
    assert "medium" in caught.value.message


def test_a_template_may_refuse() -> None:
    refusing = template_codec("{{ raise_exception('no ' + messages[0]['role'] + ' here') }}")
    with pytest.raises(ApiError, match="no system here") as caught:
        prompt_of(refusing, messages=TALK)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "message",
    [
        "cannot read /home/me/models/x/config.json there.",
        r"cannot read C:\Users\me\model.bin there.",
        "cannot read ~/models/x there.",
        "cannot read\n/a/b\nthere.",
    ],
)
def test_paths_are_kept_from_strangers(message: str) -> None:
    assert scrub(message) == "cannot read (a path) there."


def test_what_is_no_path_stays() -> None:
    for message in ("1/2 of application/json", "and/or", "a / b / c"):
        assert scrub(message) == message
    assert scrub("my/model is odd", {"my/model": "m"}) == "m is odd"


def test_tokens_are_spelled_as_bytes() -> None:
    codec = template_codec("")
    spelling = Spelling(codec)
    text = "Hé 😀\n"
    ids = codec.encode_plain(text)
    assert b"".join(spelling.of(token) for token in ids) == text.encode()
    assert spelling.text(codec.encode_plain("é")[0]) == "\ufffd"
    assert spelling.is_special(0)
    assert spelling.of(0) == b"<s>"


def test_tokens_of_a_sentencepiece_like_tokenizer() -> None:
    vocab = {"<unk>": 0, "\u2581Hi": 1, "<0xC3>": 2, "<0xA9>": 3, "x": 4}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence(steps)
    spelling = Spelling(TextCodec(transformers.PreTrainedTokenizerFast(tokenizer_object=model)))
    assert [spelling.of(token) for token in (1, 2, 3, 4)] == [b" Hi", b"\xc3", b"\xa9", b"x"]
