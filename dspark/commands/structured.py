"""What an answer must conform to, from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dspark.commands import console as ui
from dspark.errors import ConfigError

if TYPE_CHECKING:
    from dspark.grammar import Grammar
    from dspark.text import TextCodec

__all__ = ["AskedGrammar", "asked_grammar", "compiled"]


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """A grammar that was asked for, to be compiled when the tokenizer is there.

    Attributes:
        kind: What `source` is.
        source: The schema, the expression or the grammar.
        whitespace: Between the parts of a JSON text.
    """

    kind: Literal["json schema", "regex", "lark"]
    source: str
    whitespace: str


def asked_grammar(
    json_schema: str | None, regex: str | None, lark: str | None, *, whitespace: str
) -> AskedGrammar | None:
    """The grammar that the options ask for, None if they ask for none.

    Args:
        json_schema: A schema, or the name of a file that holds one.
        regex: A regular expression.
        lark: The name of a file with a Lark grammar.
        whitespace: A value of `dspark.grammar.Whitespace`.

    Raises:
        ConfigError: If several are given, a file cannot be read, or the whitespace is unknown.
    """
    from dspark.grammar import Whitespace

    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": lark}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} were given, but an answer has one grammar.")
    if whitespace not in list(Whitespace):
        allowed = ", ".join(Whitespace)
        raise ConfigError(f"--json-whitespace is {whitespace!r}, but must be one of {allowed}.")
    if json_schema is not None:
        is_text = json_schema.lstrip().startswith("{")
        source = json_schema if is_text else ui.read_text(json_schema)
        return AskedGrammar("json schema", source, whitespace)
    if regex is not None:
        return AskedGrammar("regex", regex, whitespace)
    return None if lark is None else AskedGrammar("lark", ui.read_text(lark), whitespace)


def compiled(asked: AskedGrammar | None, codec: TextCodec | None) -> Grammar | None:
    """The grammar that was asked for, None if none was.

    Args:
        asked: From `asked_grammar`.
        codec: The target's codec.

    Raises:
        ConfigError: If it is no grammar, or uses what is not supported.
        CapabilityError: If the model has no tokenizer that can be used.
    """
    if asked is None:
        return None
    from dspark.grammar import Grammar

    if asked.kind == "regex":
        return Grammar.regex(asked.source, codec)
    if asked.kind == "lark":
        return Grammar.lark(asked.source, codec)
    return Grammar.json_schema(asked.source, codec, whitespace=asked.whitespace)
