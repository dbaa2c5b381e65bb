"""From a request's fields to sampling parameters.

What a request leaves out is taken from the model's own defaults (generation_config.json), then from
OpenAI's: temperature 1, top_p 1. A request that says temperature 0 gets greedy decoding and none of
the model's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.errors import DsparkError
from dspark.request import SamplingParams
from dspark.serve.failures import bad_request, scrub
from dspark.serve.fields import ChatFields, CompletionFields, DsparkFields, SharedFields
from dspark.serve.settings import ServeConfig

__all__ = ["check_counts", "sampling_params", "wanted_tokens"]

_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; chat has none but the limit."""

_DRAFT_FIELDS = ("rule", "tree_budget", "depth", "width")


def check_counts(fields: SharedFields, config: ServeConfig, prompts: int) -> None:
    """Refuse a request that asks for more choices or tokens than the server gives.

    Raises:
        ApiError: With status 400.
    """
    choices = prompts * (fields.n or 1)
    if choices > config.max_choices:
        raise bad_request(
            f"the request asks for {choices} choices, but this server gives at most "
            f"{config.max_choices}.",
            "n" if (fields.n or 1) > 1 else "prompt",
        )
    asked, name = wanted_tokens(fields)
    if asked is not None and config.max_tokens is not None and asked > config.max_tokens:
        raise bad_request(
            f"{name} is {asked}, but this server gives at most {config.max_tokens}.", name
        )
    if fields.stream_options is not None and not fields.stream:
        raise bad_request("stream_options is for requests with stream: true.", "stream_options")


def wanted_tokens(fields: SharedFields) -> tuple[int | None, str]:
    """How many tokens a request asks for, None if it does not say, and by which field."""
    longer = getattr(fields, "max_completion_tokens", None)
    if longer is not None:
        return longer, "max_completion_tokens"
    return fields.max_tokens, "max_tokens"


def sampling_params(
    fields: SharedFields,
    config: ServeConfig,
    *,
    defaults: Mapping[str, float],
    room: int,
    grammar: Any = None,
) -> SamplingParams:
    """Sampling parameters of a request.

    Args:
        fields: Its fields.
        config: The server's limits.
        defaults: The model's own sampling defaults.
        room: Tokens that the model's context leaves for the answer, >= 1.
        grammar: What the answer must match, or None.

    Raises:
        ApiError: With status 400, if fields contradict each other.
    """
    asked, _ = wanted_tokens(fields)
    if asked is None:
        limit = room if config.max_tokens is None else config.max_tokens
        asked = _COMPLETION_TOKENS if isinstance(fields, CompletionFields) else limit
    values: dict[str, Any] = {
        **_law(fields, defaults),
        "max_tokens": max(1, min(asked, room)),
        "seed": None if fields.seed is None else fields.seed % 2**64,
        "stop": tuple(fields.stop or ()),
        "n": fields.n or 1,
        "logprobs": _logprobs(fields),
        "ignore_eos": bool(fields.ignore_eos),
        "presence_penalty": fields.presence_penalty or 0.0,
        "frequency_penalty": fields.frequency_penalty or 0.0,
        "logit_bias": fields.logit_bias or None,
        "bad_words": tuple(fields.bad_words or ()),
        **_drafting(fields.dspark),
    }
    if grammar is not None:
        values["grammar"] = grammar
    try:
        params = SamplingParams(**values)
        _ = params.resolved_rule
    except DsparkError as exc:
        raise bad_request(scrub(exc.message)) from exc
    return params


def _law(fields: SharedFields, defaults: Mapping[str, float]) -> dict[str, Any]:
    own = {} if fields.temperature == 0 else dict(defaults)
    standard: dict[str, float] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    given = {name: getattr(fields, name) for name in standard}
    law: dict[str, Any] = {
        **standard,
        **{name: value for name, value in own.items() if name in standard},
        **{name: value for name, value in given.items() if value is not None},
    }
    law["top_k"] = max(0, int(law["top_k"]))  # vLLM's clients say -1 for all
    return law


def _logprobs(fields: SharedFields) -> int | None:
    if isinstance(fields, CompletionFields):
        return fields.logprobs
    if not isinstance(fields, ChatFields):
        return None
    if fields.top_logprobs and not fields.logprobs:
        raise bad_request("top_logprobs is for requests with logprobs: true.", "top_logprobs")
    return (fields.top_logprobs or 0) if fields.logprobs else None


def _drafting(own: DsparkFields | None) -> dict[str, Any]:
    if own is None:
        return {}
    values = {name: getattr(own, name) for name in _DRAFT_FIELDS}
    values["draft"] = own.draft
    return {name: value for name, value in values.items() if value is not None}
