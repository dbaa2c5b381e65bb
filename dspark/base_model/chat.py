"""The DeepSeek-V4 chat encoding: messages as the text that the model was trained on.

There is no Jinja template. Messages are OpenAI-style dicts with these further keys: `tools` and
`response_format` (system, developer), `reasoning_content` and `wo_eos` (assistant), `task`. Results
of tools become part of the user's turn. Content is passed on as it is: who lets strangers write
messages must keep special tokens out of them.

Source: deepseek-v4-facts 7.1 to 7.3. Where the official encoder forgets the task of a user message
that merges into the turn before it, it is kept here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NoReturn

from dspark.base_model.chat_prose import ChatProse, Effort
from dspark.errors import ConfigError, DataError
from dspark.request import Message

__all__ = ["ChatSettings", "ReasoningMode", "Task", "encode_messages"]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK_BEGIN = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
CALLS_BEGIN, CALLS_END = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
INVOKE_BEGIN, INVOKE_END = f"<{DSML}invoke", f"</{DSML}invoke>"
PARAMETER_BEGIN, PARAMETER_END = f"<{DSML}parameter", f"</{DSML}parameter>"

_TEMPLATE_TOKENS = {
    "dsml_token": DSML,
    "thinking_start_token": THINK_BEGIN,
    "thinking_end_token": THINK_END,
}


class ReasoningMode(StrEnum):
    """Whether the model thinks before it answers."""

    CHAT = "chat"
    THINKING = "thinking"


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    DEVELOPER = "developer"
    ASSISTANT = "assistant"
    TOOL = "tool"
    LATEST_REMINDER = "latest_reminder"


SETTING_ROLES = (Role.SYSTEM, Role.DEVELOPER)
"""Roles whose messages may have tools and a response format."""


class Task(StrEnum):
    """A short task that the model is asked to do instead of answering."""

    ACTION = "action"
    QUERY = "query"
    AUTHORITY = "authority"
    DOMAIN = "domain"
    TITLE = "title"
    READ_URL = "read_url"

    @property
    def token(self) -> str:
        """The special token that asks for it."""
        return f"<｜{self.value}｜>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """How messages are encoded.

    Attributes:
        mode: chat (the model answers at once) or thinking.
        effort: How hard to think: low, high, max or None, the checkpoint's default. Without effect
            in chat mode. Which efforts there are is the checkpoint's (`EffortTable`).
        drop_thinking: Leave out the reasoning of earlier turns, unless tools are defined.

    Raises:
        ConfigError: If a mode or effort is unknown.
    """

    mode: ReasoningMode = ReasoningMode.CHAT
    effort: Effort | None = None
    drop_thinking: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("mode", ReasoningMode), ("effort", Effort)):
            value = getattr(self, name)
            if value is None and name == "effort":
                continue
            if value not in list(kind):
                allowed = ", ".join(kind)
                raise ConfigError(f"{name} is {value!r}, but must be one of {allowed}.")
            object.__setattr__(self, name, kind(value))  # a plain string is welcome too


def encode_messages(
    messages: Sequence[Message],
    settings: ChatSettings | None = None,
    prose: ChatProse | None = None,
) -> str:
    """Encode messages as the text of a prompt, BOS included.

    Args:
        messages: OpenAI-style messages. Content is a string or a list of parts.
        settings: Mode, effort and dropping of old reasoning.
        prose: The checkpoint's own texts, for tools, response formats and efforts.

    Raises:
        DataError: If a message is malformed; the message names its index, from 0.
        CapabilityError: If the checkpoint's prose lacks what the messages or settings need.
    """
    settings = settings or ChatSettings()
    prose = prose or ChatProse()
    if not messages:
        raise DataError("the messages are empty.", hint="give at least one message")
    reader = _Reader(prose)
    for index, message in enumerate(messages):
        reader.read(index, message)
    turns = reader.turns
    is_thinking = settings.mode is ReasoningMode.THINKING
    is_dropping = is_thinking and settings.drop_thinking and not any(t.has_tools for t in turns)
    if is_dropping:
        last = _last_user(turns)
        turns = [t for i, t in enumerate(turns) if i >= last or t.role is not Role.DEVELOPER]
    # Turns from here on think: the last question and what follows it, or all.
    first = (_last_user(turns) if is_dropping else 0) if is_thinking else len(turns)
    parts = [BOS, prose.effort_prefix(settings.effort) if is_thinking else ""]
    for i, turn in enumerate(turns):
        follows_task = i > 0 and turns[i - 1].task is not None
        parts.append(turn.render(with_reasoning=i >= first and not follows_task))
        next_role = turns[i + 1].role if i + 1 < len(turns) else Role.ASSISTANT
        if next_role in (Role.ASSISTANT, Role.LATEST_REMINDER):
            parts.append(turn.transition(is_thinking=is_thinking, will_think=i >= first))
    return "".join(parts)


_USER_ROLES = (Role.USER, Role.DEVELOPER)
_PREFIX = {Role.USER: USER, Role.DEVELOPER: USER, Role.LATEST_REMINDER: REMINDER}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A part of a turn: its text, and for a tool's result the place of its call (from 0)."""

    text: str
    order: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """A message as it is rendered; a user's turn may stem from several messages."""

    role: Role
    blocks: tuple[_Block, ...]
    reasoning: str = ""
    calls: str = ""
    end: str = ""
    task: Task | None = None
    has_tools: bool = False

    def render(self, *, with_reasoning: bool) -> str:
        """The turn without the transition to the next."""
        results = sorted(
            (block for block in self.blocks if block.order is not None),
            key=lambda block: block.order or 0,
        )
        # Results take the places of results; other blocks stay where they are.
        in_order = iter(results)
        texts = [(b if b.order is None else next(in_order)).text for b in self.blocks]
        text = _PREFIX.get(self.role, "") + "\n\n".join(texts)
        if self.role is not Role.ASSISTANT:
            return text
        thought = self.reasoning + THINK_END if with_reasoning else ""
        return thought + text + self.calls + self.end

    def transition(self, *, is_thinking: bool, will_think: bool) -> str:
        """What leads over to the assistant, if this turn does."""
        if self.task is Task.ACTION:
            return ASSISTANT + (THINK_BEGIN if is_thinking else THINK_END) + self.task.token
        if self.task is not None:
            return self.task.token
        if self.role not in _USER_ROLES:
            return ""
        return ASSISTANT + (THINK_BEGIN if will_think else THINK_END)


def _last_user(turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in _USER_ROLES), default=-1)


class _Reader:
    """Checks messages one after the other and makes turns of them.

    Args:
        prose: The checkpoint's own texts.
    """

    def __init__(self, prose: ChatProse) -> None:
        self.turns: list[_Turn] = []
        self._prose = prose
        self._has_calls = False  # of the last assistant message
        self._order: dict[str, int] = {}  # id of a call -> its place

    def read(self, index: int, message: Message) -> None:
        """Add a message."""
        if not isinstance(message, Mapping):
            _fail(index, f"is of type {type(message).__name__}, but must be a dict")
        name = message.get("role")
        if name not in list(Role):
            _fail(index, f"has role {name!r}, but must have one of {', '.join(Role)}")
        role = Role(str(name))
        for key in ("tools", "response_format"):
            if message.get(key) and role not in SETTING_ROLES:
                _fail(index, f"has {key}, but is of role {role}: a system message may have them")
        if role is Role.ASSISTANT:
            turn = self._assistant(index, message)
        elif role is Role.TOOL:
            turn = _Turn(role=Role.USER, blocks=(self._result(index, message),))
        else:
            turn = self._other(index, message, role)
        _check_unicode(index, turn)
        last = self.turns[-1] if self.turns else None
        merges = role is Role.TOOL or (last is not None and last.task is None)
        if last is not None and last.role is turn.role is Role.USER and merges:
            blocks = last.blocks + turn.blocks
            self.turns[-1] = replace(last, blocks=blocks, task=last.task or turn.task)
        else:
            self.turns.append(turn)

    def _other(self, index: int, message: Message, role: Role) -> _Turn:
        """A system, user or developer message, or a reminder."""
        texts = [_content(index, message)]
        if role is Role.DEVELOPER and not texts[0]:
            _fail(index, "is an empty developer message, but it must have content")
        schemas = [
            _to_json(index, tool["function"], "tools") for tool in _items(index, message, "tools")
        ]
        if schemas:
            texts.append(self._prose.render_tools("\n".join(schemas), _TEMPLATE_TOKENS))
        if response_format := message.get("response_format"):
            schema = _to_json(index, response_format, "response_format")
            texts.append(self._prose.render_format(schema))
        return _Turn(
            role=role,
            blocks=tuple(_Block(text=text) for text in texts),
            task=_task(index, message),
            has_tools=bool(schemas),
        )

    def _assistant(self, index: int, message: Message) -> _Turn:
        items = _items(index, message, "tool_calls")
        calls = [_call(index, item) for item in items]
        ids = [item.get("id") or item["function"].get("id") for item in items]
        self._has_calls = bool(calls)
        self._order = {str(name): i for i, name in enumerate(ids) if name}
        reasoning = message.get("reasoning_content")
        if not isinstance(reasoning, str | None):
            _fail(index, f"has reasoning_content {reasoning!r}, but it must be a string")
        # Only a message that asks for calls may say nothing.
        is_silent = bool(calls) and message.get("content") is None
        text = "" if is_silent else _content(index, message)
        return _Turn(
            role=Role.ASSISTANT,
            blocks=(_Block(text=text),),
            reasoning=reasoning or "",
            calls=_render_calls(calls),
            end="" if message.get("wo_eos") else EOS,
            task=_task(index, message),
        )

    def _result(self, index: int, message: Message) -> _Block:
        """A tool's result."""
        if not self._has_calls:
            _fail(index, "is a tool's result, but the last assistant message calls no tool")
        name = message.get("tool_call_id")
        if name and self._order and str(name) not in self._order:
            _fail(index, f"has tool_call_id {name!r}, but must have one of {list(self._order)}")
        text = f"<tool_result>{_content(index, message)}</tool_result>"
        return _Block(text=text, order=self._order.get(str(name), 0))


def _fail(index: int, what: str) -> NoReturn:
    raise DataError(f"message {index} {what}.")


def _check_unicode(index: int, turn: _Turn) -> None:
    texts = [block.text for block in turn.blocks]
    try:
        "".join([*texts, turn.reasoning, turn.calls]).encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"message {index} is not valid Unicode text.") from exc


def _content(index: int, message: Message) -> str:
    """The text of a message: a string, or the text parts of a list with a blank line between."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        _fail(index, f"has content {content!r}, but it must be a string or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            _fail(index, f"has the part {part!r}, but a part must be a dict with a type")
        text = part.get("text") if kind == "text" else f"[Unsupported {kind}]"
        if not isinstance(text, str):
            _fail(index, f"has a part of type text with {text!r}, but text must be a string")
        texts.append(text)
    return "\n\n".join(texts)


def _task(index: int, message: Message) -> Task | None:
    task = message.get("task")
    if task is None:
        return None
    if task not in list(Task):
        _fail(index, f"has task {task!r}, but must have one of {', '.join(Task)}")
    return Task(str(task))


def _items(index: int, message: Message, key: str) -> list[Mapping[str, Any]]:
    """The functions of `tools` or the calls of `tool_calls`; none if the key is absent."""
    items = message.get(key) or []
    if not isinstance(items, list | tuple):
        _fail(index, f"has {key} of type {type(items).__name__}, but it must be a list")
    for item in items:
        function = item.get("function") if isinstance(item, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _fail(index, f"has {item!r} in {key}, but it must be a dict with a named function")
    return list(items)


def _to_json(index: int, value: object, key: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise DataError(f"message {index} has {key} that JSON cannot hold: {exc}.") from exc


def _call(index: int, call: Mapping[str, Any]) -> tuple[str, str]:
    """A call's name and arguments; arguments that are a dict already become JSON text."""
    name, arguments = call["function"]["name"], call["function"].get("arguments")
    if isinstance(arguments, Mapping):
        arguments = _to_json(index, arguments, "arguments")
    if not isinstance(arguments, str):
        _fail(index, f"calls {name} with arguments {arguments!r}, but they must be JSON text")
    return name, arguments


def _render_calls(calls: Sequence[tuple[str, str]]) -> str:
    if not calls:
        return ""
    lines = ["\n", CALLS_BEGIN]
    for name, arguments in calls:
        parameters = [
            f'{PARAMETER_BEGIN} name="{key}" string="{is_string}">{value}{PARAMETER_END}'
            for key, is_string, value in _parameters(arguments)
        ]
        lines += [f'{INVOKE_BEGIN} name="{name}">', "\n".join(parameters), INVOKE_END]
    return "\n".join([*lines, CALLS_END])


def _parameters(arguments: str) -> list[tuple[str, str, str]]:
    """(name, "true" for a string or "false" for JSON, value) of each argument.

    What is not the JSON text of an object is one string named "arguments".
    """
    try:
        values = json.loads(arguments)
        if isinstance(values, dict):
            return [
                (key, "true", value)
                if isinstance(value, str)
                else (key, "false", json.dumps(value, ensure_ascii=False, allow_nan=False))
                for key, value in values.items()
            ]
    except (ValueError, RecursionError):
        pass
    return [("arguments", "true", arguments)]
