"""JSON as it goes over the wire."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["DONE", "event", "to_json"]

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def to_json(value: Any) -> bytes:
    """A value as compact JSON; whatever strings it holds, the result is valid UTF-8."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def event(value: Any) -> bytes:
    """A value as a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"
