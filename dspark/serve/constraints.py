"""What an answer is held to by a grammar: a response format, a forced call, vLLM's extras."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.errors import DsparkError
from dspark.serve.failures import bad_request, scrub
from dspark.serve.fields import FormatFields, StructuredFields, ToolFields
from dspark.text import TextCodec

__all__ = ["Constraint", "Grammars", "call_constraint", "format_constraint"]

_KEPT = 64
"""Compiled grammars that are kept for requests that ask for the same again."""

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must match.

    Attributes:
        kind: "json_schema", "json_object", "regex" or "lark".
        source: The schema as JSON text, the pattern or the grammar; empty for "json_object".
        param: The field it comes from.
    """

    kind: str
    source: str
    param: str


def _schema(value: Mapping[str, Any], param: str) -> Constraint:
    return Constraint("json_schema", json.dumps(value), param)


def format_constraint(
    response_format: FormatFields | None, structured: StructuredFields | None
) -> Constraint | None:
    """What `response_format` or `structured_outputs` asks for, None for free text.

    Raises:
        ApiError: With status 400, if they are incomplete or several.
    """
    found: list[Constraint] = []
    if response_format is not None and response_format.type == "json_object":
        found.append(Constraint("json_object", "", "response_format"))
    elif response_format is not None and response_format.type == "json_schema":
        if response_format.json_schema is None:
            name = "response_format.json_schema"
            raise bad_request(f"the field {name} is missing.", name, "missing_required_parameter")
        found.append(_schema(response_format.json_schema.schema_, "response_format.json_schema"))
    if structured is not None:
        found += _structured(structured)
    if len(found) > 1:
        raise bad_request("an answer can be held to one grammar only.", found[-1].param)
    return found[0] if found else None


def _structured(fields: StructuredFields) -> list[Constraint]:
    name = "structured_outputs"
    found = []
    if fields.json_schema is not None:
        found.append(_schema(fields.json_schema, f"{name}.json"))
    if fields.json_object:
        found.append(Constraint("json_object", "", f"{name}.json_object"))
    if fields.regex is not None:
        found.append(Constraint("regex", fields.regex, f"{name}.regex"))
    if fields.choice is not None:
        texts = " | ".join(json.dumps(text) for text in fields.choice)
        found.append(Constraint("lark", f"start: {texts}\n", f"{name}.choice"))
    if fields.grammar is not None:
        found.append(Constraint("lark", fields.grammar, f"{name}.grammar"))
    return found


def call_constraint(tools: Sequence[ToolFields], name: str | None) -> Constraint:
    """What an answer must match that is one call.

    Args:
        tools: The functions.
        name: The one to call, whose arguments are the answer; None for an answer
            {"name": ..., "arguments": ...} of any of them.
    """
    if name is not None:
        tool = next(tool for tool in tools if tool.function.name == name)
        return _schema(tool.function.parameters or _ANY_OBJECT, "tools")
    shapes = []
    defined: dict[str, Any] = {}
    for tool in tools:
        own = tool.function.name
        defined[own] = _moved(tool.function.parameters or _ANY_OBJECT, f"#/$defs/{own}")
        shapes.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": own},
                    "arguments": {"$ref": f"#/$defs/{own}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    whole = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    return _schema({**whole, "$defs": defined}, "tools")


def _moved(value: Any, root: str) -> Any:
    """A schema whose references to its own root lead to where it stands now."""
    if isinstance(value, list):
        return [_moved(item, root) for item in value]
    if not isinstance(value, Mapping):
        return value
    out = {}
    for key, item in value.items():
        if key == "$ref" and isinstance(item, str) and item.startswith("#"):
            out[key] = root + item.removeprefix("#")
        else:
            out[key] = _moved(item, root)
    return out


class Grammars:
    """Compiles constraints, and keeps some. For one thread.

    Args:
        codec: The target's codec.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._kept: OrderedDict[Constraint, Any] = OrderedDict()

    def compile(self, constraint: Constraint) -> Any:
        """Compile a constraint.

        Raises:
            ApiError: With status 400, if it is no grammar, or one that cannot be kept to.
        """
        if constraint in self._kept:
            self._kept.move_to_end(constraint)
            return self._kept[constraint]
        try:
            grammar = self._build(constraint)
        except DsparkError as exc:
            raise bad_request(scrub(exc.message), constraint.param, "invalid_grammar") from exc
        except RecursionError as exc:
            raise bad_request(
                "the schema is nested too deeply.", constraint.param, "invalid_grammar"
            ) from exc
        self._kept[constraint] = grammar
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return grammar

    def _build(self, constraint: Constraint) -> Any:
        from dspark.grammar import Grammar

        if constraint.kind == "json_object":
            return Grammar.json_object(self._codec)
        if constraint.kind == "regex":
            return Grammar.regex(constraint.source, self._codec)
        if constraint.kind == "lark":
            return Grammar.lark(constraint.source, self._codec)
        return Grammar.json_schema(json.loads(constraint.source), self._codec)
