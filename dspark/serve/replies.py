"""What a model wrote, taken apart as it comes: reasoning, content, tool calls.

A whole answer is parsed like a stream that comes in one piece, so both forms say the same. What
does not parse as a call stays content: nothing that the model wrote is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias

__all__ = [
    "BareCalls",
    "Kind",
    "Part",
    "Reply",
    "Stage",
    "TaggedCalls",
    "ThinkStage",
    "WholeCall",
    "read_json_calls",
]

THINK_BEGIN, THINK_END = "<think>", "</think>"


class Kind(Enum):
    """What a part of an answer is."""

    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"
    ARGUMENTS = "arguments"  # more of the arguments of the last call


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer.

    Attributes:
        kind: What it is.
        text: Its text; of a call, its arguments as far as they are known.
        start: Where its text begins in what the model wrote, in characters.
        name: Of a call, the function.
    """

    kind: Kind
    text: str
    start: int = 0
    name: str = ""


class Stage(Protocol):
    """A step of parsing: text in, parts out."""

    def push(self, text: str, *, is_final: bool) -> list[Part]:
        """Take in more text; `is_final` says that it ends with it."""
        ...


def _held(text: str, marker: str) -> int:
    """Characters at the end of a text that could begin a marker."""
    most = min(len(text), len(marker) - 1)
    return next((n for n in range(most, 0, -1) if marker.startswith(text[-n:])), 0)


def _certain(text: str, marker: str) -> int:
    """Where the part of a text ends that is no white space at its end, nor could begin a marker."""
    return len(text[: len(text) - _held(text, marker)].rstrip())


class _Buffer:
    """Text that is not given out yet, and where it stands in all of it."""

    def __init__(self) -> None:
        self.text = ""
        self.start = 0

    def cut(self, count: int) -> str:
        out, self.text = self.text[:count], self.text[count:]
        self.start += count
        return out

    def give(self, kind: Kind, count: int) -> list[Part]:
        """Give out so many characters as one part; none if there are none."""
        start = self.start
        text = self.cut(count)
        return [Part(kind, text, start)] if text else []

    def skip_space(self) -> bool:
        """Drop leading white space; True if something else is left."""
        self.cut(len(self.text) - len(self.text.lstrip()))
        return bool(self.text)


class ThinkStage:
    """Splits off the reasoning that some models begin with.

    Args:
        starts_inside: The prompt has opened the reasoning already.
    """

    def __init__(self, *, starts_inside: bool) -> None:
        self._buffer = _Buffer()
        self._is_new = True  # nothing of the reasoning has come yet
        self._state: Callable[[bool], list[Part]] = self._inside if starts_inside else self._before

    def push(self, text: str, *, is_final: bool) -> list[Part]:
        """See `Stage`."""
        self._buffer.text += text
        parts: list[Part] = []
        state: Callable[[bool], list[Part]] | None = None
        while state != self._state:  # until no step leads on
            state = self._state
            parts += state(is_final)
        return parts

    def _before(self, is_final: bool) -> list[Part]:
        seen = self._buffer.text.lstrip()
        if seen.startswith(THINK_BEGIN):
            self._buffer.skip_space()
            self._buffer.cut(len(THINK_BEGIN))
            self._state = self._inside
        elif is_final or not THINK_BEGIN.startswith(seen):
            self._state = self._through
        return []

    def _inside(self, is_final: bool) -> list[Part]:
        if self._is_new:
            self._is_new = not self._buffer.skip_space()
        at = self._buffer.text.find(THINK_END)
        if at >= 0:
            parts = self._buffer.give(Kind.REASONING, len(self._buffer.text[:at].rstrip()))
            self._buffer.skip_space()
            self._buffer.cut(len(THINK_END))
            self._state = self._after
            return parts
        text = self._buffer.text
        return self._buffer.give(
            Kind.REASONING, len(text.rstrip()) if is_final else _certain(text, THINK_END)
        )

    def _after(self, is_final: bool) -> list[Part]:
        if self._buffer.skip_space() or is_final:
            self._state = self._through
        return []

    def _through(self, is_final: bool) -> list[Part]:
        return self._buffer.give(Kind.CONTENT, len(self._buffer.text))


ReadCalls: TypeAlias = Callable[[str], Sequence[Part] | None]
"""Reads calls from the text between two tags; None if it is none."""


class TaggedCalls:
    """Finds calls between tags.

    Args:
        begin: The tag before.
        end: The tag behind; None where the calls last to the end of the answer.
        read: Reads what is between them.
    """

    def __init__(self, begin: str, end: str | None, read: ReadCalls) -> None:
        self._begin, self._end, self._read = begin, end, read
        self._buffer = _Buffer()
        self._is_inside = False
        self._has_calls = False

    def push(self, text: str, *, is_final: bool) -> list[Part]:
        """See `Stage`."""
        self._buffer.text += text
        parts: list[Part] = []
        while True:
            found = self._call(is_final) if self._is_inside else self._content()
            if found is None:
                break
            parts += found
        if not self._is_inside:
            parts += self._rest(is_final)
        return parts

    def _content(self) -> list[Part] | None:
        """What is before the next tag; None if there is no tag."""
        at = self._buffer.text.find(self._begin)
        if at < 0:
            return None
        self._is_inside = True
        return self._buffer.give(Kind.CONTENT, len(self._buffer.text[:at].rstrip()))

    def _call(self, is_final: bool) -> list[Part] | None:
        text = self._buffer.text
        head = text.index(self._begin) + len(self._begin)
        at = -1 if self._end is None else text.find(self._end, head)
        if at < 0 and not is_final:
            return None
        stop = len(text) if at < 0 else at
        calls = self._read(text[head:stop])
        whole = stop + len(self._end or "") if at >= 0 else stop
        self._is_inside = False
        if calls is None:
            return self._buffer.give(Kind.CONTENT, whole)
        self._buffer.cut(whole)
        self._has_calls = True
        return list(calls)

    def _rest(self, is_final: bool) -> list[Part]:
        text = self._buffer.text
        if is_final and self._has_calls and not text.strip():
            return []
        return self._buffer.give(
            Kind.CONTENT, len(text) if is_final else _certain(text, self._begin)
        )


class BareCalls:
    """Finds calls in an answer that is nothing but calls as JSON objects.

    Args:
        prefix: What such an answer may begin with.
        read: Reads the answer.
    """

    def __init__(self, prefix: str, read: ReadCalls) -> None:
        self._prefix, self._read = prefix, read
        self._buffer = _Buffer()
        self._is_content = False

    def push(self, text: str, *, is_final: bool) -> list[Part]:
        """See `Stage`."""
        self._buffer.text += text
        seen = self._buffer.text.lstrip()
        if not self._is_content:
            may_be = seen.startswith(("{", self._prefix)) or self._prefix.startswith(seen)
            if may_be and not is_final:
                return []
            calls = self._read(seen.removeprefix(self._prefix)) if may_be and seen else None
            if calls is not None:
                return list(calls)
            self._is_content = True
        return self._buffer.give(Kind.CONTENT, len(self._buffer.text))


class WholeCall:
    """An answer that is one call by the grammar it was held to.

    Args:
        name: The function, whose arguments are the answer; None if the answer names it.
        read: Reads an answer that names it.
    """

    def __init__(self, name: str | None, read: ReadCalls) -> None:
        self._name, self._read = name, read
        self._buffer = _Buffer()
        self._has_begun = False

    def push(self, text: str, *, is_final: bool) -> list[Part]:
        """See `Stage`."""
        self._buffer.text += text
        if self._name is None:
            return self._named_inside() if is_final else []
        parts = [] if self._has_begun else [Part(Kind.CALL, "", name=self._name)]
        self._has_begun = True
        return parts + self._buffer.give(Kind.ARGUMENTS, len(self._buffer.text))

    def _named_inside(self) -> list[Part]:
        calls = self._read(self._buffer.text)
        if calls is not None:
            return list(calls)
        return self._buffer.give(Kind.CONTENT, len(self._buffer.text))


class Reply:
    """An answer as it comes.

    Args:
        think: Splits off reasoning, or None.
        calls: Finds calls in the rest, or None.
        most_calls: Calls that are given out; further ones are dropped.
    """

    def __init__(
        self,
        think: ThinkStage | None = None,
        calls: Stage | None = None,
        *,
        most_calls: int | None = None,
    ) -> None:
        self._think, self._calls = think, calls
        self._most_calls = most_calls
        self._length = 0
        self._base: int | None = None  # where the text begins that is no reasoning
        self.num_calls = 0

    def push(self, text: str, *, is_final: bool = False) -> list[Part]:
        """Take in more of the answer.

        Args:
            text: The text.
            is_final: It ends with it.

        Returns:
            What is certain by now, in order.
        """
        start, self._length = self._length, self._length + len(text)
        if self._think is None:
            first = [Part(Kind.CONTENT, text, start)] if text else []
        else:
            first = self._think.push(text, is_final=is_final)
        parts = [part for part in first if part.kind is Kind.REASONING]
        rest = [part for part in first if part.kind is Kind.CONTENT]
        if self._base is None and rest:
            self._base = rest[0].start
        if self._calls is None:
            return parts + rest
        content = "".join(part.text for part in rest)
        for part in self._calls.push(content, is_final=is_final):
            if part.kind is Kind.CONTENT:
                parts.append(Part(part.kind, part.text, (self._base or 0) + part.start))
            elif self._counts(part):
                parts.append(part)
        return parts

    def _counts(self, part: Part) -> bool:
        if part.kind is Kind.CALL:
            self.num_calls += 1
        return self._most_calls is None or self.num_calls <= self._most_calls


def read_json_calls(text: str, *, known: frozenset[str] | None = None) -> list[Part] | None:
    """Read calls as JSON objects with a name and arguments, one after the other.

    Args:
        text: The objects, with white space or semicolons between them.
        known: Functions that may be called; None takes any.

    Returns:
        The calls, None if the text is anything else.
    """
    decoder = json.JSONDecoder()
    calls: list[Part] = []
    rest = text.strip()
    while rest:
        try:
            value, stop = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        call = _call_of(value)
        if call is None or (known is not None and call.name not in known):
            return None
        calls.append(call)
        rest = rest[stop:].lstrip("; \t\r\n")
    return calls or None


def _call_of(value: object) -> Part | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        return None
    return Part(Kind.CALL, arguments, name=value["name"])
