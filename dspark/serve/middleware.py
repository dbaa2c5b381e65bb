"""What stands before the endpoints: the log and its guard, host names, keys."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.serve.failures import ApiError, error_response, internal_error
from dspark.serve.metrics import Metrics

__all__ = ["Guard", "HostCheck", "KeyCheck"]

_log = logging.getLogger("dspark.serve")

_OTHER = "(other)"


class Guard:
    """Outermost: turns errors into responses, counts and logs every request.

    Args:
        app: What it guards.
        metrics: What counts.
        paths: Paths that are named in the log; what strangers make up is not.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except ApiError as exc:
            if not status:
                await error_response(exc)(scope, receive, note)
        except (ClientDisconnect, OSError):
            scope["dspark.status"] = 499
        except Exception:  # noqa: BLE001 - the last net: clients get one sentence, the log the rest
            _log.exception("a request failed")
            if not status:
                await error_response(internal_error())(scope, receive, note)
        finally:
            self._note(scope, int(scope.get("dspark.status", status)), start)

    def _note(self, scope: Scope, status: int, start: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else _OTHER
        self._metrics.note_http(path, status)
        milliseconds = 1000 * (time.perf_counter() - start)
        figures = scope.get("dspark.figures", "")
        line = f"{scope['method']} {path} {status} {figures}".rstrip()
        _log.info("%s ms=%.0f", line, milliseconds)


class HostCheck:
    """Refuses requests that call the server by another name.

    A web page can have its own name lead to this machine and then talk to a server that asks for
    no key; it cannot change the name it does that by.

    Args:
        app: What it guards.
        hosts: Names that are allowed, without ports.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "").lower()
            name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
            if name not in self._hosts:
                raise ApiError(403, "this server is not known by that host name.")
        await self._app(scope, receive, send)


class KeyCheck:
    """Asks for a key.

    Args:
        app: What it guards.
        keys: Keys that are good.
        open_paths: Paths that need none.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = [_digest(key) for key in keys]
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and scope["path"] not in self._open:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._is_good(key.strip()):
                raise ApiError(
                    401,
                    "this server asks for an API key: send it as a bearer token.",
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)

    def _is_good(self, key: str) -> bool:
        """Compare with every key, whichever fits, in the same time for all keys."""
        own = _digest(key)
        return sum(hmac.compare_digest(own, good) for good in self._keys) > 0


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that not even that can be told from the time it takes."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
