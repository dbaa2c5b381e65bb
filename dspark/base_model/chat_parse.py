"""Parse what a DeepSeek-V4 model answered: reasoning, content and tool calls.

The text of a completion begins where the prompt's `<think>` or `</think>` ended. Parsing is strict:
what the encoder could not have written is an error that names the place.

Source: deepseek-v4-facts 7.4. Three things are stricter than the official parser: the value of a
parameter with string="false" must be JSON, a block of calls must hold one, and no special token of
the chat layout may be in content or reasoning (they go back into the next prompt).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from dspark.base_model.chat import (
    ASSISTANT,
    BOS,
    CALLS_BEGIN,
    CALLS_END,
    DSML,
    EOS,
    INVOKE_BEGIN,
    INVOKE_END,
    PARAMETER_BEGIN,
    PARAMETER_END,
    REMINDER,
    THINK_BEGIN,
    THINK_END,
    USER,
    ReasoningMode,
    Task,
)
from dspark.errors import DataError

__all__ = ["Completion", "ToolCall", "parse_completion"]

_BLOCK = "\n\n" + CALLS_BEGIN.removesuffix(">")
_TURNS = (USER, ASSISTANT, REMINDER, *(task.token for task in Task))
_SPECIAL = (BOS, EOS, THINK_BEGIN, THINK_END, DSML, *_TURNS)
_TAG = re.compile(f"</?{DSML}")
_NAME = re.compile(r'\s*name="(.*?)">\n\n?', re.DOTALL)
_PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">(.*)', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: The tool.
        arguments: JSON text of an object.
    """

    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """The call in OpenAI's shape."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An assistant message that a model wrote.

    Attributes:
        content: What it said.
        reasoning: What it thought before; empty in chat mode.
        tool_calls: The calls it asks for, in order.
        role: Always "assistant".
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    role: str = "assistant"

    def to_dict(self) -> dict[str, Any]:
        """The message as `encode_messages` takes it."""
        return {
            "role": self.role,
            "content": self.content,
            "reasoning_content": self.reasoning,
            "tool_calls": [call.to_dict() for call in self.tool_calls],
        }


def parse_completion(text: str, *, mode: ReasoningMode | str) -> Completion:
    """Parse the text of a completion.

    Args:
        text: What the model wrote after the prompt, with its end token (which may be missing only
            after tool calls).
        mode: The mode of the prompt: in thinking mode the text begins with the reasoning.

    Raises:
        DataError: If the text is malformed; the message names the character, counted from 0.
    """
    reader = _Reader(text)
    reasoning = ""
    if mode == ReasoningMode.THINKING:
        reasoning = reader.plain(THINK_END, before=_BLOCK)
    end, stop = reader.first(EOS, _BLOCK)
    if stop is None:
        reader.fail(len(text), f"{EOS} is missing")
    content = reader.plain(stop)
    calls: tuple[ToolCall, ...] = ()
    if stop == _BLOCK:
        reader.expect(">\n")
        calls = _parse_calls(reader)
        if not calls:
            reader.fail(end, "the block of tool calls holds no call")
        if not reader.is_at_end:
            reader.expect(EOS)
    if not reader.is_at_end:
        reader.fail(reader.at, "the text goes on after its end")
    return Completion(content=content, reasoning=reasoning, tool_calls=calls)


class _Reader:
    """A place in a text.

    Args:
        text: The text.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.at = 0

    @property
    def is_at_end(self) -> bool:
        return self.at == len(self._text)

    def fail(self, at: int, what: str) -> NoReturn:
        raise DataError(f"the completion cannot be parsed at character {at}: {what}.")

    def first(self, *stops: str) -> tuple[int, str | None]:
        """Where the first of some strings begins and which it is; (end, None) if there is none."""
        found = [(at, stop) for stop in stops if (at := self._text.find(stop, self.at)) >= 0]
        return min(found, default=(len(self._text), None))

    def until(self, *stops: str) -> tuple[str, str]:
        """Read up to the first of some strings, and over it; return what was before, and it."""
        at, stop = self.first(*stops)
        if stop is None:
            self.fail(len(self._text), f"{' or '.join(stops)} is missing")
        before = self._text[self.at : at]
        self.at = at + len(stop)
        return before, stop

    def plain(self, stop: str, *, before: str | None = None) -> str:
        """Read up to a string, and over it, where no special token and no `before` may come."""
        start = self.at
        text, _ = self.until(stop)
        if before is not None and before in text:
            self.fail(start + text.index(before), f"tool calls come before {stop}")
        for token in _SPECIAL:
            if (at := text.find(token)) >= 0:
                self.fail(start + at, f"the special token {token} is inside the text")
        return text

    def expect(self, wanted: str) -> None:
        """Read over a string that must be here."""
        if not self._text.startswith(wanted, self.at):
            got = self._text[self.at : self.at + len(wanted)]
            self.fail(self.at, f"{wanted!r} must be here, not {got!r}")
        self.at += len(wanted)


def _parse_calls(reader: _Reader) -> tuple[ToolCall, ...]:
    """Parse calls up to the end of their block, and over it."""
    calls: list[ToolCall] = []
    while True:
        start = reader.at
        before, tag = reader.until(INVOKE_BEGIN, CALLS_END)
        if before:
            reader.fail(start, f"{INVOKE_BEGIN} or {CALLS_END} must be here, not {before[:40]!r}")
        if tag == CALLS_END:
            return tuple(calls)
        calls.append(_parse_call(reader))


def _parse_call(reader: _Reader) -> ToolCall:
    """Parse a call from behind its opening tag to behind the newline after its closing tag."""
    start = reader.at
    head, tag = reader.until(PARAMETER_BEGIN, INVOKE_END)
    name = _NAME.fullmatch(head)
    if name is None or _TAG.search(head):
        reader.fail(start, f'a call must have name="..." and a newline, not {head[:40]!r}')
    arguments: dict[str, str] = {}
    while tag == PARAMETER_BEGIN:
        start = reader.at
        key, value = _parse_parameter(reader)
        if key in arguments:
            reader.fail(start, f"the parameter {key!r} is given twice")
        arguments[key] = value
        reader.expect("\n")
        start = reader.at
        before, tag = reader.until(PARAMETER_BEGIN, INVOKE_END)
        if before:
            reader.fail(start, f"a parameter or {INVOKE_END} must be here, not {before[:40]!r}")
    reader.expect("\n")
    pairs = (f"{json.dumps(key, ensure_ascii=False)}: {text}" for key, text in arguments.items())
    return ToolCall(name=name[1], arguments="{" + ", ".join(pairs) + "}")


def _parse_parameter(reader: _Reader) -> tuple[str, str]:
    """Parse a parameter from behind its opening tag; return its name and its value as JSON."""
    start = reader.at
    inside, _ = reader.until(PARAMETER_END)
    found = _PARAMETER.fullmatch(inside)
    if found is None or _TAG.search(inside):  # with a tag inside, where it ends is a guess
        reader.fail(start, f'a parameter must have name and string="true|false": {inside[:40]!r}')
    key, is_string, value = found.groups()
    if is_string == "true":
        return key, json.dumps(value, ensure_ascii=False)
    if not _is_json(value):
        reader.fail(start + found.start(3), f"the value of {key!r} is not JSON: {value[:40]!r}")
    return key, value


def _is_json(text: str) -> bool:
    """True for strict JSON; numbers keep their spelling, so none is too long."""
    try:
        json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
