"""What a client is told when it gets no answer: OpenAI's shape, one sentence, no paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from dspark.serve.wire import to_json

__all__ = ["ApiError", "bad_request", "error_response", "internal_error", "scrub"]

_LONGEST = 400
_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[\\/][\w.@+\-]+){2,}[\\/]?")


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: One sentence.
        kind: OpenAI's `type`.
        param: The field at fault.
        code: OpenAI's `code`.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The body of the response."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error of the client's."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """An error of ours; what went wrong stands in the server's log, not in the response."""
    return ApiError(500, "the server failed while it worked on this request.", kind="server_error")


def error_response(error: ApiError) -> Response:
    """The HTTP response of an error."""
    return Response(
        to_json(error.to_dict()),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )


def scrub(message: str, names: Mapping[str, str] | None = None) -> str:
    """Make an error's message fit for strangers.

    Args:
        message: What the engine or a library said.
        names: Texts to put in the place of others (the model's name for its folder).

    Returns:
        One line without paths of this machine.
    """
    for old, new in (names or {}).items():
        message = message.replace(old, new)
    return _PATH.sub("(a path)", " ".join(message.split()))
