"""The two forms of an answer: chat completions and completions."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from dspark.serve.choices import Choice, Step
from dspark.serve.logprobs import Entry, chat_logprobs, completion_logprobs
from dspark.serve.replies import Kind, Part
from dspark.serve.spelling import Spelling

__all__ = ["AnswerForm", "ChatForm", "TextForm"]


class AnswerForm(Protocol):
    """How choices are written.

    Attributes:
        prefix: Of the answer's id.
        name: `object` of a whole answer.
        chunk_name: `object` of a chunk.
    """

    prefix: str
    name: str
    chunk_name: str

    def begin(self, choice: Choice) -> list[dict[str, Any]]:
        """What a choice begins with in a stream."""
        ...

    def chunks(self, choice: Choice, step: Step) -> list[dict[str, Any]]:
        """What a choice gained, in a stream."""
        ...

    def whole(self, choice: Choice, steps: Sequence[Step]) -> dict[str, Any]:
        """A whole choice."""
        ...


class ChatForm:
    """/v1/chat/completions.

    Args:
        spelling: Spells tokens, if log-probabilities are asked for.
        top: Alternatives per token.
        has_pieces: Tell which parts of the text were drafted.
        is_named: The request named the function to call, and OpenAI then says "stop".
    """

    prefix = "chatcmpl-"
    name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self,
        spelling: Spelling | None = None,
        *,
        top: int = 0,
        has_pieces: bool = False,
        is_named: bool = False,
    ) -> None:
        self._spelling = spelling
        self._top = top
        self._has_pieces = has_pieces
        self._is_named = is_named
        self._calls: dict[int, int] = {}  # of every choice

    def begin(self, choice: Choice) -> list[dict[str, Any]]:
        """The role."""
        return [_chunk(choice, {"role": "assistant", "content": ""})]

    def chunks(self, choice: Choice, step: Step) -> list[dict[str, Any]]:
        """Deltas, and the reason of the end."""
        found = [self._delta(choice, part) for part in step.parts]
        if step.is_last:
            found.append(_chunk(choice, {}, self._reason(choice)))
        if step.entries and self._spelling is not None:
            carrier = found[0] if found else _chunk(choice, {"content": ""})
            carrier["logprobs"] = self._logprobs(step.entries)
            found = found or [carrier]
        return found

    def _delta(self, choice: Choice, part: Part) -> dict[str, Any]:
        if part.kind is Kind.CALL:
            number = self._calls.get(choice.index, 0)
            self._calls[choice.index] = number + 1
            call = {"index": number, **_call(part.name, part.text)}
            return _chunk(choice, {"tool_calls": [call]})
        if part.kind is Kind.ARGUMENTS:
            number = self._calls[choice.index] - 1
            more = {"index": number, "function": {"arguments": part.text}}
            return _chunk(choice, {"tool_calls": [more]})
        key = "reasoning_content" if part.kind is Kind.REASONING else "content"
        delta: dict[str, Any] = {key: part.text}
        if self._has_pieces:
            delta["dspark"] = {"pieces": choice.pieces_of(part)}
        return _chunk(choice, delta)

    def whole(self, choice: Choice, steps: Sequence[Step]) -> dict[str, Any]:
        """The message, and the reason of the end."""
        parts = [part for step in steps for part in step.parts]
        message: dict[str, Any] = {"role": "assistant"}
        content = [part for part in parts if part.kind is Kind.CONTENT]
        calls = _joined_calls(parts)
        message["content"] = "".join(part.text for part in content) or (None if calls else "")
        message["refusal"] = None
        reasoning = "".join(part.text for part in parts if part.kind is Kind.REASONING)
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        self._calls[choice.index] = len(calls)
        if self._has_pieces:
            pieces = [piece for part in content for piece in choice.pieces_of(part)]
            message["dspark"] = {"pieces": pieces}
        entries = [entry for step in steps for entry in step.entries]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None if self._spelling is None else self._logprobs(entries),
            "finish_reason": self._reason(choice),
        }

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        return None if self._spelling is None else chat_logprobs(entries, self._spelling, self._top)

    def _reason(self, choice: Choice) -> str:
        has_calls = self._calls.get(choice.index, 0) > 0 and not self._is_named
        reason = choice.finish_reason
        return "tool_calls" if has_calls and reason == "stop" else reason


def _chunk(choice: Choice, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _joined_calls(parts: Sequence[Part]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for part in parts:
        if part.kind is Kind.CALL:
            calls.append(_call(part.name, part.text))
        elif part.kind is Kind.ARGUMENTS:
            calls[-1]["function"]["arguments"] += part.text
    return calls


class TextForm:
    """/v1/completions.

    Args:
        spelling: Spells tokens, if log-probabilities are asked for.
        top: Alternatives per token.
        has_pieces: Tell which parts of the text were drafted.
    """

    prefix = "cmpl-"
    name = "text_completion"
    chunk_name = "text_completion"

    def __init__(
        self, spelling: Spelling | None = None, *, top: int = 0, has_pieces: bool = False
    ) -> None:
        self._spelling = spelling
        self._top = top
        self._has_pieces = has_pieces

    def begin(self, choice: Choice) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def chunks(self, choice: Choice, step: Step) -> list[dict[str, Any]]:
        """The new text, and the reason of the end in a chunk of its own."""
        found = [self._chunk(choice, [part]) for part in step.parts]
        if step.entries and not found:
            found = [self._chunk(choice, [])]
        if found:
            found[0]["logprobs"] = self._logprobs(step.entries)
        if step.is_last:
            found.append({**self._chunk(choice, []), "finish_reason": choice.finish_reason})
        return found

    def whole(self, choice: Choice, steps: Sequence[Step]) -> dict[str, Any]:
        """The text, and the reason of the end."""
        out = self._chunk(choice, [part for step in steps for part in step.parts])
        entries = [entry for step in steps for entry in step.entries]
        out["logprobs"] = self._logprobs(entries)
        out["finish_reason"] = choice.finish_reason
        return out

    def _chunk(self, choice: Choice, parts: Sequence[Part]) -> dict[str, Any]:
        out: dict[str, Any] = {
            "index": choice.index,
            "text": "".join(part.text for part in parts),
            "logprobs": None,
            "finish_reason": None,
        }
        if self._has_pieces and parts:
            pieces = [piece for part in parts for piece in choice.pieces_of(part)]
            out["dspark"] = {"pieces": pieces}
        return out

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        if self._spelling is None:
            return None
        return completion_logprobs(entries, self._spelling, self._top)
