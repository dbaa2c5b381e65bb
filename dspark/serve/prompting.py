"""From a chat request to the tokens of its prompt: messages, tools, the switch for thinking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dspark.errors import DsparkError
from dspark.serve.failures import bad_request, scrub
from dspark.serve.fields import ChatFields, MessageFields, ToolFields
from dspark.serve.layout import CallForm, Layout
from dspark.text import TextCodec

__all__ = ["encode_chat", "wanted_thinking"]

_TOOL_PROSE = (
    "You can call these functions, given as JSON schemas:\n{tools}\n\n"
    "To call one, answer with nothing but:\n"
    '<tool_call>\n{{"name": "the function", "arguments": {{...}}}}\n</tool_call>'
)
"""What models are told whose template has no place for tools."""


def wanted_thinking(fields: ChatFields) -> tuple[bool | None, str | None]:
    """Whether a request wants thinking, None if it does not say, and how much of it."""
    own = fields.chat_template_kwargs
    wish = None if own is None else own.enable_thinking
    if own is not None and wish is None:
        wish = own.thinking
    effort = fields.reasoning_effort
    if effort == "none":
        return False, None
    return wish, effort


def encode_chat(
    codec: TextCodec,
    layout: Layout,
    fields: ChatFields,
    *,
    tools: Sequence[ToolFields],
    think: bool | None,
    effort: str | None,
) -> list[int]:
    """Encode a chat request.

    Args:
        codec: The target's codec.
        layout: The layout of its answers.
        fields: The request.
        tools: Tools that the model is told of.
        think: Ask for thinking, or for none; None leaves it to the model.
        effort: How much of it.

    Raises:
        ApiError: With status 400, if the model or its template cannot take the request.
    """
    messages = [_message(message, layout) for message in fields.messages]
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    if described and not layout.knows_tools:
        messages = _with_prose(messages, described)
        described = []
    try:
        own = codec if think is None and effort is None else codec.with_reasoning(think, effort)
        return own.encode_chat(messages, tools=described or None)
    except DsparkError as exc:
        is_switch = think is not None or effort is not None
        if is_switch and "template has no such switch" in exc.message:
            name = "reasoning_effort" if effort is not None else "chat_template_kwargs"
            raise bad_request(
                f"this model has no such switch for thinking: leave out {name}.", name
            ) from exc
        raise bad_request(scrub(exc.message), "messages") from exc


def _message(message: MessageFields, layout: Layout) -> dict[str, Any]:
    """A message as templates take it."""
    role: str = message.role
    if role == "developer" and layout.form is not CallForm.DSML:
        role = "system"  # what it is called in the templates
    out: dict[str, Any] = {"role": role, "content": message.content or ""}
    if not layout.knows_tools and (message.role == "tool" or message.tool_calls):
        return _spelt_out(message)
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            out[name] = value
    if message.tool_calls:
        out["tool_calls"] = [_call(call) for call in message.tool_calls]
    return out


def _call(call: Any) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates print."""
    arguments = _arguments(call.function.arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": "function", "function": function}


def _arguments(value: str | dict[str, Any] | None) -> Any:
    if not isinstance(value, str):
        return value or {}
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict) else value


def _spelt_out(message: MessageFields) -> dict[str, Any]:
    """A call or a result as text, for templates that know neither."""
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    lines = [message.content] if message.content else []
    for call in message.tool_calls or ():
        value = {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
        lines.append(f"<tool_call>\n{json.dumps(value, ensure_ascii=False)}\n</tool_call>")
    return {"role": "assistant", "content": "\n".join(lines)}


def _with_prose(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Tell the model of its tools in the system message."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    prose = _TOOL_PROSE.format(tools=lines)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": prose}, *messages]
    first = {**messages[0], "content": f"{messages[0]['content']}\n\n{prose}"}
    return [first, *messages[1:]]
