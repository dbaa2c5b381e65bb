"""One HTTP server: JSON, text, and streams of server-sent events, with a limit on silence.

The standard library's client is enough: one connection a request, nothing is retried, since a
retried request would be measured wrong.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from dspark.errors import ConfigError
from dspark.eval.runners.base import one_sentence

__all__ = ["Endpoint", "ServerError"]

_ERROR_BYTES = 1 << 16
_END = "[DONE]"


class ServerError(Exception):
    """A request that did not get its answer.

    Args:
        message: One sentence.
        is_silent: True if the server did not answer at all: refused, broke off or hung.
    """

    def __init__(self, message: str, *, is_silent: bool = False) -> None:
        super().__init__(message)
        self.is_silent = is_silent


class Endpoint:
    """Where an OpenAI-compatible server is.

    Args:
        url: With or without /v1 at the end.
        api_key: Sent as a bearer token, None to send none.
        timeout: Seconds that the server may be silent, at the start and between two events.

    Raises:
        ConfigError: If it is no http or https URL, or holds a password.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float) -> None:
        parts = urlsplit(url if "://" in url else f"//{url}")
        try:
            port = parts.port
        except ValueError as exc:
            raise ConfigError(f"the URL {url!r} has no valid port.") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"the URL is {url!r}, but must be one of http or https.",
                hint="such as --url vllm=http://127.0.0.1:8000/v1",
            )
        if parts.username or parts.password:
            raise ConfigError(
                "the URL holds a user name or password, which would end up in result files.",
                hint="put the key into an environment variable and name that: --api-key-env",
            )
        self._is_secure = parts.scheme == "https"
        self._address = (parts.hostname, port)
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._timeout = timeout
        host = parts.netloc
        self.url = f"{parts.scheme}://{host}{self._root}/v1"

    def get_json(self, path: str) -> Any:
        """GET a JSON value.

        Args:
            path: Below /v1.

        Raises:
            ServerError: If there is no answer, or another one.
        """
        text = self._get(f"{self._root}/v1{path}")
        try:
            return json.loads(text)
        except ValueError as exc:
            raise ServerError(f"the answer to {path} is not JSON.") from exc

    def get_text(self, path: str) -> str:
        """GET a text.

        Args:
            path: Beside /v1.

        Raises:
            ServerError: If there is no answer, or another status than 200.
        """
        return self._get(f"{self._root}{path}")

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[tuple[float, Any]]:
        """POST JSON and yield the events of the answer as they come.

        Args:
            path: Below /v1.
            body: What to send.

        Yields:
            (time.perf_counter when it came, JSON of its data).

        Raises:
            ServerError: If the server answers with an error, falls silent, or breaks off.
        """
        connection = self._connect()
        try:
            content = json.dumps(body).encode()
            response = self._send(connection, "POST", f"{self._root}/v1{path}", content)
            yield from self._events(response)
        except TimeoutError as exc:
            raise self._silence() from exc
        except (OSError, http.client.HTTPException) as exc:
            raise _broken(exc) from exc
        finally:
            connection.close()

    def _get(self, path: str) -> str:
        connection = self._connect()
        try:
            data: bytes = self._send(connection, "GET", path, None).read()
        except TimeoutError as exc:
            raise self._silence() from exc
        except (OSError, http.client.HTTPException) as exc:
            raise _broken(exc) from exc
        finally:
            connection.close()
        return data.decode("utf-8", "replace")

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._address
        if self._is_secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=self._timeout, context=context)
        return http.client.HTTPConnection(host, port, timeout=self._timeout)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> http.client.HTTPResponse:
        headers = {} if body is None else {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise ServerError(_status_text(response))
        return response

    def _events(self, response: http.client.HTTPResponse) -> Iterator[tuple[float, Any]]:
        heard = time.perf_counter()
        data: list[str] = []
        while line := response.readline():
            now = time.perf_counter()
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if text.startswith("data:"):
                data.append(text.removeprefix("data:").removeprefix(" "))
            elif not text and data:
                whole, data, heard = "\n".join(data), [], now
                if whole == _END:
                    return
                yield now, _parse(whole)
            elif now - heard > self._timeout:  # comments that keep a connection open are no answer
                raise self._silence()

    def _silence(self) -> ServerError:
        return ServerError(f"no answer for {self._timeout:g} seconds.", is_silent=True)


def _parse(data: str) -> Any:
    try:
        value = json.loads(data)
    except ValueError as exc:
        raise ServerError("the server sent an event that is not JSON.") from exc
    if isinstance(value, dict) and value.get("error"):
        raise ServerError(f"the server reported: {_reason(value)}")
    return value


def _broken(exc: Exception) -> ServerError:
    """An error of the connection; what the library says of it is often only a class name."""
    if isinstance(exc, ConnectionRefusedError):
        return ServerError("the server refuses the connection.", is_silent=True)
    if isinstance(exc, ConnectionError | http.client.HTTPException):
        return ServerError("the server broke off the connection.", is_silent=True)
    reason = getattr(exc, "strerror", None) or one_sentence(exc).rstrip(".")
    return ServerError(f"the server cannot be reached: {reason}.", is_silent=True)


def _status_text(response: http.client.HTTPResponse) -> str:
    body = response.read(_ERROR_BYTES).decode("utf-8", "replace")
    try:
        reason = _reason(json.loads(body))
    except ValueError:
        reason = one_sentence(ValueError(body)) if body.strip() else f"{response.reason}."
    return f"HTTP {response.status}: {reason}"


def _reason(value: Any) -> str:
    """The message of an error as OpenAI, FastAPI and others lay it out."""
    while isinstance(value, dict):
        inner = next((value[k] for k in ("error", "message", "detail") if value.get(k)), None)
        if inner is None:
            break
        value = inner
    return one_sentence(ValueError(value if isinstance(value, str) else json.dumps(value)))
