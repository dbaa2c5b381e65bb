"""The prose of the DeepSeek-V4 chat encoding, read from the checkpoint and never run.

A checkpoint brings its encoder as a Python file, `encoding/encoding_dsv4.py`. What it says to the
model about tools, response formats and reasoning effort is data of that checkpoint, so it is not
repeated here: the file is parsed, its string literals are folded, and the wanted ones are known by
their SHA-256 or, with a warning, by their shape. No line of the file is executed.

Source: deepseek-v4-facts 7 (hashes of the tools template and both effort texts).
"""

from __future__ import annotations

import ast
import hashlib
import logging
import re
import string
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from dspark.errors import CapabilityError, CheckpointError, ConfigError

__all__ = ["ENCODER_FILE", "ChatProse", "Effort", "EffortTable", "parse_prose", "read_prose"]

ENCODER_FILE = Path("encoding") / "encoding_dsv4.py"
"""Where a checkpoint's folder holds its encoder."""

_LARGEST_FILE = 1 << 20  # bytes
_LONGEST_TEXT = 1 << 14  # characters of a folded literal; the longest known one has 1075

_TOOLS_SHA256 = "09b7269daaddbeaf11a3ed55c07b1846c35162b841d8b4301bbe0449879d1fd8"
_FORMAT_SHA256 = "012f31fcc1338bdfe25b132eaf56ab020ee75ab8e649f37b30b8e5f544fb17a5"
_EFFORT_A_SHA256 = "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7"
_EFFORT_B_SHA256 = "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c"
_KNOWN = {  # length -> hash: only a literal of such a length is hashed
    1075: _TOOLS_SHA256,
    88: _FORMAT_SHA256,
    476: _EFFORT_A_SHA256,
    526: _EFFORT_B_SHA256,
}

_SCHEMAS = "tool_schemas"
_TOOLS_FIELDS = frozenset({_SCHEMAS, "dsml_token", "thinking_start_token", "thinking_end_token"})
_FORMAT_FIELDS = frozenset({"schema"})

_HINT = f"put the checkpoint's own {ENCODER_FILE.as_posix()} into the model folder"

_log = logging.getLogger(__name__)


class Effort(StrEnum):
    """How hard a thinking model is asked to think."""

    LOW = "low"
    HIGH = "high"
    MAX = "max"


class EffortTable(StrEnum):
    """Which efforts a checkpoint knows."""

    PREVIEW = "preview"  # none and high add nothing, max adds a text
    RELEASE_0731 = "0731"  # low is the default and adds nothing, high and max add a text


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatProse:
    """The literal blocks of a checkpoint's chat encoding; None where it has none.

    Attributes:
        tools: Template of the tools block, with the field `{tool_schemas}` and, where wanted,
            `{dsml_token}`, `{thinking_start_token}` and `{thinking_end_token}`.
        response_format: Template of the response-format block, with the field `{schema}`.
        effort_high: What effort high puts before the first message (not in the preview).
        effort_max: What effort max puts before the first message.
        table: Which efforts the checkpoint knows; None if that is unknown.

    Raises:
        ConfigError: If a template has not the fields it needs.
    """

    tools: str | None = None
    response_format: str | None = None
    effort_high: str | None = None
    effort_max: str | None = None
    table: EffortTable | None = None

    def __post_init__(self) -> None:
        if self.tools is not None and not _is_tools_template(self.tools):
            raise ConfigError(
                f"the tools template has the fields {_fields(self.tools)}, but must have "
                f"{_SCHEMAS} and no others than {sorted(_TOOLS_FIELDS)}."
            )
        if self.response_format is not None and not _is_format_template(self.response_format):
            raise ConfigError(
                f"the response-format template has the fields {_fields(self.response_format)}, "
                f"but must have {sorted(_FORMAT_FIELDS)}."
            )

    def render_tools(self, schemas: str, tokens: Mapping[str, str]) -> str:
        """Fill in the tools template.

        Args:
            schemas: One JSON schema per line.
            tokens: The value of each other field of the template.

        Raises:
            CapabilityError: If there is no template.
        """
        if self.tools is None:
            raise CapabilityError("this checkpoint has no tools template.", hint=_HINT)
        return self.tools.format(**{**tokens, _SCHEMAS: schemas})

    def render_format(self, schema: str) -> str:
        """Fill in the response-format template with a JSON schema.

        Raises:
            CapabilityError: If there is no template.
        """
        if self.response_format is None:
            raise CapabilityError("this checkpoint has no response-format template.", hint=_HINT)
        return self.response_format.format(schema=schema)

    def effort_prefix(self, effort: Effort | None) -> str:
        """What an effort puts before the first message; empty for efforts that add nothing.

        Raises:
            CapabilityError: If the checkpoint does not know the effort, or its text is missing.
        """
        if effort is None:
            return ""
        if self.table is EffortTable.PREVIEW:
            if effort is Effort.LOW:
                raise CapabilityError(
                    "effort low was asked for, but this checkpoint knows only high and max."
                )
            if effort is Effort.HIGH:
                return ""
        if effort is Effort.LOW:
            return ""
        text = self.effort_high if effort is Effort.HIGH else self.effort_max
        if text is None:
            raise CapabilityError(f"this checkpoint has no text for effort {effort}.", hint=_HINT)
        return text


def read_prose(folder: Path) -> ChatProse:
    """Read the prose of a model folder; an empty `ChatProse` if it has no encoder file.

    Raises:
        CheckpointError: If the encoder file is too large, unreadable or not Python.
    """
    path = folder / ENCODER_FILE
    if not path.is_file():
        return ChatProse()
    try:
        with path.open("rb") as file:
            source = file.read(_LARGEST_FILE + 1)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    return parse_prose(source, name=str(path))


def parse_prose(source: bytes, *, name: str) -> ChatProse:
    """Find the prose among the string literals of an encoder's source, without running it.

    Args:
        source: Python source, at most 1 MB.
        name: What errors and warnings call the source.

    Raises:
        CheckpointError: If the source is too large or not Python.
    """
    if len(source) > _LARGEST_FILE:
        raise CheckpointError(f"{name} is larger than 1 MB, which no encoder is.", hint=_HINT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a literal of theirs is not our concern
            tree = ast.parse(source)
        literals = _Literals(tree)
        return _choose(literals, name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        raise CheckpointError(f"{name} cannot be read as Python: {exc}", hint=_HINT) from exc


class _Literals:
    """The string literals of a module.

    Only plain top-level assignments give a literal its name. A name that is assigned anywhere else
    at the top level (in a branch, in a loop, by `+=`) has no certain value and is dropped.

    Args:
        tree: The module.
    """

    def __init__(self, tree: ast.Module) -> None:
        self._values: dict[str, dict[str, str]] = {}  # name -> what `_entries` found
        for statement in tree.body:
            self._read(statement)
        self.named = {  # NAME or, for an entry of a dict, NAME.key
            name + suffix: text
            for name, entries in self._values.items()
            for suffix, text in entries.items()
        }
        self.known = {
            digest: text
            for text in self._all_texts(tree)
            if (digest := _sha256(text)) == _KNOWN.get(len(text))
        }
        self.has_low_default = any(_has_low_default(node) for node in ast.walk(tree))

    def _read(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return
        value: ast.expr | None = None
        names: list[str] = []
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            value = statement.value
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        entries = {} if value is None else self._entries(value)  # before its names are unbound
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._values.pop(node.id, None)
        self._values.update(dict.fromkeys(names, entries))

    def _entries(self, value: ast.expr) -> dict[str, str]:
        """The strings of a value: {"": text}, or {".key": text} for a dict."""
        if not isinstance(value, ast.Dict):
            text = self._fold(value)
            return {} if text is None else {"": text}
        entries = {}
        for key, item in zip(value.keys, value.values, strict=True):
            name = None if key is None else self._fold(key)
            text = self._fold(item)
            if name is not None and text is not None:
                entries["." + name] = text
        return entries

    def _fold(self, node: ast.expr) -> str | None:
        """The text of an expression, or None: f-strings, calls and numbers have none."""
        text: str | None = None
        if isinstance(node, ast.Constant):
            text = node.value if isinstance(node.value, str) and _is_unicode(node.value) else None
        elif isinstance(node, ast.Name):
            text = self._values.get(node.id, {}).get("")
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            key = self._fold(node.slice)
            text = None if key is None else self._values.get(node.value.id, {}).get("." + key)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._fold(node.left), self._fold(node.right)
            text = None if left is None or right is None else left + right
        # A wanted text is short; and names that double each other must not fill the memory.
        return text if text is not None and len(text) <= _LONGEST_TEXT else None

    def _all_texts(self, tree: ast.Module) -> Iterator[str]:
        """Every text of the module, named or not, except the pieces of f-strings."""
        todo: list[ast.AST] = [tree]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.JoinedStr):
                continue
            if isinstance(node, ast.Constant | ast.BinOp):
                text = self._fold(node)
                if text is not None:
                    yield text
            todo.extend(ast.iter_child_nodes(node))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sha256(text: str) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest() if len(text) in _KNOWN else None


def _has_low_default(node: ast.AST) -> bool:
    """True for a function of which an argument named like "effort" is "low" by default."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    given = [*node.args.posonlyargs, *node.args.args]
    pairs: list[tuple[ast.arg, ast.expr | None]] = []
    if node.args.defaults:
        pairs += zip(given[-len(node.args.defaults) :], node.args.defaults, strict=True)
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return any(
        "effort" in argument.arg.lower()
        and isinstance(default, ast.Constant)
        and default.value == Effort.LOW
        for argument, default in pairs
    )


_EFFORT_LABEL = re.compile(r"effort\w*[._](low|high|max)", re.IGNORECASE)


def _choose(literals: _Literals, name: str) -> ChatProse:
    """Pick the wanted blocks: by hash, else by name and shape."""
    levels: dict[str, str] = {}
    has_low = literals.has_low_default or _EFFORT_B_SHA256 in literals.known
    for label, text in literals.named.items():
        if found := _EFFORT_LABEL.search(label):
            levels.setdefault(found[1].lower(), text)
        has_low = has_low or ("effort" in label.lower() and text == Effort.LOW)
    has_low = has_low or Effort.LOW in levels
    by_hash = literals.known.get

    def shaped_effort(level: Effort) -> str | None:
        text = levels.get(level)
        return _warned(text, f"text for effort {level}", name) if _is_effort(text) else None

    effort_high = None
    effort_max = by_hash(_EFFORT_B_SHA256 if has_low else _EFFORT_A_SHA256)
    if has_low:
        effort_high = by_hash(_EFFORT_A_SHA256) or shaped_effort(Effort.HIGH)
    tools = by_hash(_TOOLS_SHA256)
    if tools is None:
        shaped = _longest(filter(_is_tools_template, literals.named.values()))
        tools = _warned(shaped, "tools template", name)
    response_format = by_hash(_FORMAT_SHA256)
    if response_format is None:
        shaped = _longest(filter(_is_format_template, literals.named.values()))
        response_format = _warned(shaped, "response-format template", name)
    return ChatProse(
        tools=tools,
        response_format=response_format,
        effort_high=effort_high,
        effort_max=effort_max or shaped_effort(Effort.MAX),
        table=EffortTable.RELEASE_0731 if has_low else EffortTable.PREVIEW,
    )


def _longest(texts: Iterable[str]) -> str | None:
    """The whole template: a shorter one is a piece that it is put together from."""
    return max(texts, key=len, default=None)


def _warned(text: str | None, what: str, name: str) -> str | None:
    if text is not None:
        digest = hashlib.sha256(text.encode()).hexdigest()
        _log.warning("the %s in %s is used, but its sha256 %s is unknown", what, name, digest)
    return text


def _is_effort(text: str | None) -> bool:
    return text is not None and bool(text.strip()) and text.endswith("\n\n")


def _is_tools_template(text: str) -> bool:
    found = _fields(text)
    return found is not None and _SCHEMAS in found and _TOOLS_FIELDS.issuperset(found)


def _is_format_template(text: str) -> bool:
    return _fields(text) == sorted(_FORMAT_FIELDS)


def _fields(text: str) -> list[str] | None:
    """Names of a template's fields; None if it is no template of plain fields."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError:
        return None
    if any(spec or conversion for _, _, spec, conversion in pieces):
        return None
    return sorted({field for _, field, _, _ in pieces if field is not None})
