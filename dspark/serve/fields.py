"""What requests may hold: the fields of both endpoints, their types and ranges.

A field that is null counts as not given. A field that is not here is ignored if it cannot change
the answer, and refused otherwise: an answer that silently leaves out what was asked for is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from dspark.serve.failures import ApiError, bad_request

__all__ = [
    "ChatFields",
    "CompletionFields",
    "DsparkFields",
    "MessageFields",
    "SharedFields",
    "ToolFields",
    "parse_fields",
]

IGNORED = frozenset(
    {
        "client_metadata",
        "metadata",
        "prediction",  # guesses of the client's; they decide about speed at the most
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields of OpenAI's and their clients that change nothing in the answer."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True, False),
    "best_of": (1,),
    "echo": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
"""Fields that are refused unless they say what happens anyway."""

_REASONS = {
    "audio": "this model makes text only",
    "best_of": "ask for n choices and choose yourself",
    "echo": "the prompt is never part of the answer",
    "functions": "give the functions as tools",
    "function_call": "use tool_choice",
    "modalities": 'this model makes text only: leave it out, or send ["text"]',
    "suffix": "this server does not fill in the middle of a text",
    "web_search_options": "this server searches nothing",
}

_MOST_STOPS = 16
_LONGEST_STOP = 1024
_MOST_TOP = 20


def _fail(kind: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{message}", {"message": message})


def _stops(value: Any) -> Any:
    if value is None:
        return None
    items = [value] if isinstance(value, str) else value
    is_list = isinstance(items, list) and len(items) <= _MOST_STOPS
    if not is_list or not all(isinstance(s, str) and 0 < len(s) <= _LONGEST_STOP for s in items):
        raise _fail(
            "stop",
            f"must be a string or a list of at most {_MOST_STOPS} strings, none of them empty "
            f"or longer than {_LONGEST_STOP} characters",
        )
    return items


def _bias(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _fail("logit_bias", "must be an object of token ids and numbers")
    out: dict[int, float] = {}
    for key, bias in value.items():
        is_id = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 9
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not is_id or not is_number or not -100 <= bias <= 100:
            raise _fail("logit_bias", "must map token ids to numbers from -100 to 100")
        out[int(key)] = float(bias)
    return out


def _text_content(value: Any) -> Any:
    """The text of a message: a string, or its text parts with line breaks between them."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _fail("content", "must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(str(kind)) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise _fail("content", "may only hold parts of type text: this model reads text only")
        texts.append(text)
    return "\n".join(texts)


Stops: TypeAlias = Annotated[list[str] | None, BeforeValidator(_stops)]
Bias: TypeAlias = Annotated[dict[int, float] | None, BeforeValidator(_bias)]
Content: TypeAlias = Annotated[str | None, BeforeValidator(_text_content)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=1 << 31)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class _Strict(BaseModel):
    """An object whose unknown keys are errors."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Open(BaseModel):
    """An object whose unknown keys are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamFields(_Open):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class DsparkFields(_Strict):
    """`dspark`: how to draft for this request, and what to tell about it."""

    draft: bool | None = None
    rule: Literal["auto", "greedy", "coupled", "sample-match", "rejection", "block"] | None = None
    tree_budget: Annotated[int, Field(ge=0, le=4096)] | None = None
    depth: Annotated[int, Field(ge=1, le=4096)] | None = None
    width: Annotated[int, Field(ge=1, le=4096)] | None = None
    pieces: bool | None = None


class StructuredFields(_Strict):
    """`structured_outputs`, vLLM's name for grammars; one of them may be given."""

    json_schema: dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None


class SharedFields(_Strict):
    """Fields of both endpoints."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Stops = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamFields | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    logit_bias: Bias = None
    ignore_eos: bool | None = None
    bad_words: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)] | None = (
        None
    )
    structured_outputs: StructuredFields | None = None
    dspark: DsparkFields | None = None


class CallFields(_Open):
    """The function of a call in an assistant message."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str | dict[str, Any] | None = None


class CallItem(_Open):
    """A call in an assistant message."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CallFields


class MessageFields(_Open):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[CallItem] | None = None
    reasoning_content: str | None = None


class FunctionFields(_Open):
    """The function of a tool."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolFields(_Open):
    """A tool."""

    type: Literal["function"]
    function: FunctionFields


class SchemaFields(_Open):
    """The `json_schema` of a response format."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class FormatFields(_Open):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFields | None = None


class TemplateFields(_Strict):
    """`chat_template_kwargs`: the switch that templates of thinking models have."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class ChatFields(SharedFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[MessageFields], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None
    tools: Annotated[list[ToolFields], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: FormatFields | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateFields | None = None


def _prompts(value: Any) -> Any:
    """The prompts of a request: a list of texts and of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _fail("prompt", "must be a string, a list of strings, or a list of token ids")
    if all(_is_id(item) for item in value):
        return [value]
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and all(_is_id(token) for token in item) for item in value):
        return value
    raise _fail("prompt", "must hold strings only, token ids only, or lists of token ids only")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


class CompletionFields(SharedFields):
    """The body of /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None
    response_format: FormatFields | None = None


FieldsT = TypeVar("FieldsT", bound=SharedFields)


def parse_fields(kind: type[FieldsT], body: dict[str, Any]) -> FieldsT:
    """Check the body of a request.

    Args:
        kind: The fields of the endpoint.
        body: The body.

    Raises:
        ApiError: With status 400, if a field is unknown, of the wrong type or out of range.
    """
    known = kind.model_fields
    given: dict[str, Any] = {}
    for name, value in body.items():
        if name in known:
            given[name] = value
        elif value is not None and name not in IGNORED:
            _check_neutral(name, value)
    try:
        return kind.model_validate(given)
    except ValidationError as exc:
        raise _as_api_error(exc) from exc


def _check_neutral(name: str, value: Any) -> None:
    if any(type(value) is type(same) and value == same for same in _NEUTRAL.get(name, ())):
        return
    shown = name if len(name) <= 64 else name[:61] + "..."
    reason = _REASONS.get(name, "leave it out")
    raise bad_request(
        f"this server cannot honour the field {shown!r}: {reason}.", shown, "unsupported_parameter"
    )


def _as_api_error(exc: ValidationError) -> ApiError:
    """The first fault that was found, as a sentence about its field."""
    first = exc.errors(include_url=False, include_input=False)[0]
    place = first["loc"]
    param = ""
    for index, part in enumerate(place):
        if isinstance(part, int):
            param += f"[{part}]"
        elif index == len(place) - 1 and _is_type_name(part):
            break  # the member of a union, not a field
        else:
            param += f".{part}" if param else str(part)
    if first["type"] == "missing":
        return bad_request(f"the field {param} is missing.", param, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return bad_request(f"the field {param} is unknown.", param, "unknown_parameter")
    said = first["msg"].rstrip(".")
    said = said[:1].lower() + said[1:]
    said = said.replace("input should be", "must be").replace("input should", "must")
    is_type = first["type"].endswith("_type")
    return bad_request(f"{param}: {said}.", param, "invalid_type" if is_type else "invalid_value")


_UNION_MEMBERS = ("str", "dict[str,any]", "dict[str,Any]")


def _is_type_name(part: str) -> bool:
    return part in _UNION_MEMBERS or "[" in part
