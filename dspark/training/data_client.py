"""A small client for servers that speak the OpenAI protocol: text in, text out, retries.

**Source:** the OpenAI API reference, `POST /v1/chat/completions` and `POST /v1/completions`.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.errors import CapabilityError, ConfigError, DataError

__all__ = ["Completion", "RefusedError", "ServerClient", "UnreachableError"]

_ATTEMPTS = 4  # the first and three more
_BACK_OFF = 1.0  # seconds before the second attempt; doubled each time
_LONGEST_WAIT = 60.0  # seconds, whatever the server asks for
_TIMEOUT = 600.0  # seconds without a byte
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # worth another attempt
_SHORT = 200  # characters of a server's own words


class RefusedError(DataError):
    """The server refused this request; it may take others."""


class UnreachableError(DataError):
    """The server could not be reached, or failed, several times in a row."""


class _Passing(Exception):  # noqa: N818 - not an error yet: another attempt may succeed
    """An attempt failed in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a server answered.

    Attributes:
        text: The text.
        finish: "stop" or "length".
        has_reasoning: True if the server took reasoning out of the text.
    """

    text: str
    finish: str
    has_reasoning: bool = False


class ServerClient:
    """Asks one model of one server.

    Args:
        url: Address up to and with /v1.
        model: The model's name there.
        key: API key, None to send none.
        sleep: Waits between attempts; tests replace it.

    Raises:
        ConfigError: If the address is not http or https.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"url is {url!r}, but must begin with http:// or https://.",
                hint="for example: --url http://localhost:8000/v1",
            )
        self.url = url.rstrip("/")
        self.model = model
        self._key = key
        self._sleep = sleep

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> Completion:
        """Answer chat messages.

        Args:
            messages: The messages.
            sampling: Keys of the protocol: max_tokens, temperature, top_p, seed.

        Raises:
            RefusedError: If the server refuses the request.
            UnreachableError: If it cannot be reached or fails, four times.
            CapabilityError: If it does not know the key, the model or the endpoint.
        """
        choice = self._post("chat/completions", {"messages": list(messages), **sampling})
        message = choice.get("message")
        if not isinstance(message, dict):
            raise RefusedError(f"{self.url} answered without a message.")
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        return Completion(text=str(text), finish=_finish(choice), has_reasoning=bool(reasoning))

    def complete(self, prompt: Sequence[int], sampling: Mapping[str, Any]) -> Completion:
        """Continue token ids; errors as in `chat`."""
        choice = self._post("completions", {"prompt": list(prompt), **sampling})
        return Completion(text=str(choice.get("text") or ""), finish=_finish(choice))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request until it succeeds; returns the first choice."""
        wait = _BACK_OFF
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._attempt(path, body)
            except _Passing as exc:
                if attempt == _ATTEMPTS:
                    raise UnreachableError(f"{self.url} fails: {exc}.") from exc
                self._sleep(min(_LONGEST_WAIT, max(wait, exc.wait or 0.0)))
                wait *= 2
        raise UnreachableError(f"{self.url} was not asked.")

    def _attempt(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        data = json.dumps({"model": self.model, **body}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers=headers)  # noqa: S310 - http or https, checked above
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:  # noqa: S310 - the same
                answer = json.loads(response.read())
            choice = answer["choices"][0]
            if not isinstance(choice, dict):
                raise TypeError("a choice is no object")
        except urllib.error.HTTPError as exc:
            raise self._explain(exc, path) from exc
        except (urllib.error.URLError, http.client.HTTPException, OSError) as exc:
            reason = getattr(exc, "reason", None) or exc
            raise _Passing(str(reason) or type(exc).__name__) from exc
        except (ValueError, KeyError, IndexError, TypeError) as exc:
            raise _Passing("its answer is not one of the OpenAI protocol") from exc
        return choice

    def _explain(self, error: urllib.error.HTTPError, path: str) -> Exception:
        status, said = error.code, _said(error)
        if status in _AGAIN:
            asked = error.headers.get("Retry-After", "")
            return _Passing(f"{status} {said}", float(asked) if asked.isdigit() else None)
        if status in (401, 403):
            return CapabilityError(
                f"{self.url} refuses the API key ({status} {said}).",
                hint="name the variable that holds the key with --api-key-env",
            )
        if status in (404, 405):
            return CapabilityError(
                f"{self.url} has no /{path} for model {self.model!r} ({status} {said}).",
                hint="check --url (it ends in /v1) and --url-model",
            )
        return RefusedError(f"{self.url} refuses the request ({status} {said}).")


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says about an error, in one short line."""
    try:
        text = error.read(1 << 16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    text = " ".join(text.split()) or str(error.reason)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


def _finish(choice: Mapping[str, Any]) -> str:
    return "length" if choice.get("finish_reason") == "length" else "stop"
