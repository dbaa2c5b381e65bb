"""Bodies of requests: read within a limit, and as strict JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from dspark.serve.failures import ApiError, bad_request

__all__ = ["read_object"]

_READ_SECONDS = 60.0
"""How long a body may take to arrive."""


async def read_object(request: Request, limit: int) -> dict[str, Any]:
    """Read a body that is one JSON object.

    Args:
        request: The request.
        limit: Bytes at the most.

    Raises:
        ApiError: 413 for a body over the limit, 415 for another media type, 408 for one that does
            not arrive, 400 for one that is not a JSON object.
        ClientDisconnect: If the client went away.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        # Also a guard: a web page of somebody else's may send other types without being asked.
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json.")
    try:
        async with asyncio.timeout(_READ_SECONDS):
            data = await _read(request, limit)
    except TimeoutError as exc:
        raise ApiError(408, f"the body did not arrive within {_READ_SECONDS:g} seconds.") from exc
    return _parse(data)


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    chunks, size = [], 0
    is_over = declared.isdigit() and int(declared) > limit
    async for chunk in request.stream():
        size += len(chunk)
        is_over = is_over or size > limit
        if not is_over:
            chunks.append(chunk)
        # A client reads no answer while it still sends, so some more is taken in and thrown away.
        elif size > 2 * limit:
            break
    if is_over:
        raise ApiError(
            413,
            f"the body is larger than {limit} bytes, which is what this server takes.",
            code="body_too_large",
            headers={"connection": "close"},
        )
    return b"".join(chunks)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        # Escapes can spell half a character, which no tokenizer takes.
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as exc:
        raise bad_request("the body is not valid Unicode text.", code="invalid_json") from exc
    except (ValueError, RecursionError) as exc:
        raise bad_request("the body is not valid JSON.", code="invalid_json") from exc
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object.", code="invalid_json")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)
