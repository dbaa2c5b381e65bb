"""Compiled grammars: JSON schemas, regular expressions and context-free grammars.

llguidance does the parsing: it follows the text byte by byte and tells which tokens may come next.
A grammar is compiled once, for one tokenizer, and shared; every request follows a copy of its own.

Which tokens are allowed is llguidance's to say, and it is stricter than the text: where the text
that follows is certain it allows the one token that the tokenizer itself would write there, so
that a model is not led into spellings it has never seen. These places are what makes forced tokens
(`dspark.verify.constraint.PathMasks.forced`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from dspark.errors import ConfigError
from dspark.grammar.after import AfterToken
from dspark.grammar.matcher import MatcherState
from dspark.grammar.tokens import TokenTable, require_llguidance, table_of

if TYPE_CHECKING:
    from dspark.text import TextCodec

__all__ = ["Grammar", "Whitespace"]


class Whitespace(StrEnum):
    """Whitespace between the parts of a JSON text; within strings all is free."""

    FREE = "free"  # at most a line break and 32 blanks in one place
    SPACED = "spaced"  # one blank after a comma and a colon, as Python's json.dumps writes
    COMPACT = "compact"  # none


_JSON_OPTIONS: dict[Whitespace, dict[str, object]] = {
    # Without a bound a model may emit blanks until its tokens are used up.
    Whitespace.FREE: {"whitespace_pattern": r"(\r?\n)?[ \t]{0,32}"},
    Whitespace.SPACED: {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
    },
    Whitespace.COMPACT: {"whitespace_flexible": False},
}
_LONGEST_REASON = 200


class Grammar:
    """What a text must conform to; a `dspark.verify.constraint.Constraint`.

    Made by one of the four functions below. It fits one tokenizer, may be shared by any number of
    requests, engines and threads, and never changes.

    Args:
        source: The grammar as llguidance takes it.
        table: The tokens of a tokenizer.
        kind: What it was made from, for messages.

    Raises:
        ConfigError: If llguidance cannot use it.
    """

    def __init__(self, source: str, table: TokenTable, *, kind: str) -> None:
        library = require_llguidance()
        self._table = table
        self._kind = kind
        self._lock = threading.Lock()
        limits = library.LLParserLimits(verbose_errors=False)  # no texts in messages
        self._matcher = library.LLMatcher(table.tokenizer, source, log_level=0, limits=limits)
        if self._matcher.is_error():
            raise _refusal(kind, self._matcher.get_error())

    @staticmethod
    def json_schema(
        schema: Mapping[str, Any] | str,
        codec: TextCodec | None,
        *,
        whitespace: Whitespace | str = Whitespace.FREE,
    ) -> Grammar:
        """Texts that are JSON and fit a schema, properties in the schema's order.

        Args:
            schema: A JSON schema (llguidance's subset of Draft 2020-12), as a mapping or as text.
            codec: The target's text codec.
            whitespace: Between the parts of the text.

        Returns:
            The grammar.

        Raises:
            ConfigError: If the schema is not JSON, or uses what is not supported.
            CapabilityError: If the codec has no tokenizer that can be used.
        """
        style = _whitespace(whitespace)
        text = schema if isinstance(schema, str) else _as_text(schema)
        matcher = require_llguidance().LLMatcher
        try:
            source = matcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS[style])
        except ValueError as exc:
            raise _refusal("JSON schema", str(exc)) from exc
        return Grammar(source, table_of(codec), kind="JSON schema")

    @staticmethod
    def json_object(
        codec: TextCodec | None, *, whitespace: Whitespace | str = Whitespace.FREE
    ) -> Grammar:
        """Texts that are one JSON object, whatever is in it; arguments as in `json_schema`."""
        return Grammar.json_schema({"type": "object"}, codec, whitespace=whitespace)

    @staticmethod
    def regex(pattern: str, codec: TextCodec | None) -> Grammar:
        r"""Texts that a regular expression matches from beginning to end.

        Args:
            pattern: The expression, in Rust's syntax: no look-around, no back references; `\d`,
                `\w` and `\s` are Unicode.
            codec: The target's text codec.

        Returns:
            The grammar.

        Raises:
            ConfigError: If the expression is not valid.
            CapabilityError: If the codec has no tokenizer that can be used.
        """
        source = require_llguidance().LLMatcher.grammar_from_regex(pattern)
        return Grammar(source, table_of(codec), kind="regular expression")

    @staticmethod
    def lark(text: str, codec: TextCodec | None) -> Grammar:
        """Texts of a context-free grammar in llguidance's dialect of Lark.

        Args:
            text: The grammar; its first rule is `start`.
            codec: The target's text codec.

        Returns:
            The grammar.

        Raises:
            ConfigError: If the grammar is not valid.
            CapabilityError: If the codec has no tokenizer that can be used.
        """
        source = require_llguidance().LLMatcher.grammar_from_lark(text)
        return Grammar(source, table_of(codec), kind="Lark grammar")

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self._table.vocab_size

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokenizer's own end tokens."""
        return self._table.end_tokens

    def start(self) -> MatcherState:
        """A state before any text, for one request."""
        return MatcherState(self._copy, self._table)

    def after(self, marker: str) -> AfterToken:
        """The same behind the reasoning of a model that thinks before it answers.

        Args:
            marker: The token that ends the reasoning, "</think>" for most models. Whatever comes
                before it is free, except that the text cannot end there.

        Returns:
            A constraint for `SamplingParams.grammar`.

        Raises:
            ConfigError: If the tokenizer has no such token.
        """
        token = self._table.ids.get(marker)
        if token is None:
            raise ConfigError(
                f"a grammar was to begin after {marker!r}, but the tokenizer has no such token."
            )
        return AfterToken(self, token)

    def _copy(self) -> Any:
        with self._lock:
            return self._matcher.deep_copy()

    def __deepcopy__(self, memo: dict[int, object]) -> Grammar:
        """Itself, since it never changes (sampling parameters are copied now and then)."""
        return self

    def __repr__(self) -> str:
        return f"<Grammar from a {self._kind}>"


def _whitespace(value: Whitespace | str) -> Whitespace:
    try:
        return Whitespace(value)
    except ValueError as exc:
        allowed = ", ".join(Whitespace)
        raise ConfigError(f"whitespace is {value!r}, but must be one of {allowed}.") from exc


def _as_text(schema: object) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError) as exc:
        raise _refusal("JSON schema", f"it holds what JSON cannot: {exc}") from exc


def _refusal(kind: str, reason: str) -> ConfigError:
    """One sentence from the library's message, which may come with excerpts on further lines."""
    lines = [line.strip() for line in reason.split("<state>")[0].splitlines()]
    lines = [line for line in lines if line and set(line) != {"^"}]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    first = lines[0] if lines else "no reason was given"
    shown = f"{first} {errors[0]}" if errors else first
    if len(shown) > _LONGEST_REASON:
        shown = shown[: _LONGEST_REASON - 3] + "..."
    return ConfigError(
        f"this {kind} cannot be used: {shown.rstrip('.')}.",
        hint="docs/structured.md lists what is supported",
    )
