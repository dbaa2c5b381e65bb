"""The endpoints that answer: from an HTTP request to a response, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from dspark.serve.answers import Answer
from dspark.serve.body import read_object
from dspark.serve.desk import Desk
from dspark.serve.failures import ApiError
from dspark.serve.fields import ChatFields, CompletionFields, parse_fields
from dspark.serve.jobs import ClientGoneError, Job
from dspark.serve.usage import metrics_json
from dspark.serve.wire import DONE, event, to_json

__all__ = ["ChatEndpoint", "CompletionEndpoint"]

_LAST_WORDS = 2.0
"""Seconds that a client has to take in the news that its time is over."""

_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class _Endpoint:
    """What both endpoints share.

    Args:
        desk: Takes the requests in.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        make: Callable[[], Awaitable[Answer]],
        is_stream: bool,
    ) -> None:
        try:
            async with asyncio.timeout(self._desk.config.request_timeout) as clock:
                answer = await make()
                await self._run(answer, scope, receive, send, is_stream=is_stream)
        except TimeoutError:
            if not clock.expired():
                raise
            await self._give_up(scope, send)

    async def _run(
        self, answer: Answer, scope: Scope, receive: Receive, send: Send, *, is_stream: bool
    ) -> None:
        job = answer.job
        watch = asyncio.create_task(_watch(receive, job))
        try:
            self._desk.submit(job)
            if is_stream:
                scope["dspark.is_streaming"] = False
                await _send_stream(answer.stream(), scope, send)
            else:
                await _send_json(await answer.collect(), send)
        except ClientGoneError:
            scope["dspark.status"] = 499
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
            self._desk.release(job)
            scope["dspark.figures"] = _figures(job)

    async def _give_up(self, scope: Scope, send: Send) -> None:
        error = ApiError(
            504,
            f"the request took longer than {self._desk.config.request_timeout:g} seconds.",
            kind="server_error",
            code="request_timeout",
            headers={"x-should-retry": "false"},  # OpenAI's clients would ask again
        )
        if "dspark.is_streaming" not in scope or not scope["dspark.is_streaming"]:
            raise error
        scope["dspark.status"] = 504
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await _send_body(send, event(error.to_dict()) + DONE, more=False)


class ChatEndpoint(_Endpoint):
    """POST /v1/chat/completions."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        body = await read_object(Request(scope, receive), self._desk.config.max_body)
        fields = parse_fields(ChatFields, body)
        choices = self._desk.check(fields, 1)
        async with self._desk.place(choices):
            await self._answer(
                scope,
                receive,
                send,
                make=lambda: self._desk.chat(fields),
                is_stream=bool(fields.stream),
            )


class CompletionEndpoint(_Endpoint):
    """POST /v1/completions."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        body = await read_object(Request(scope, receive), self._desk.config.max_body)
        fields = parse_fields(CompletionFields, body)
        choices = self._desk.check(fields, len(fields.prompt))
        async with self._desk.place(choices):
            await self._answer(
                scope,
                receive,
                send,
                make=lambda: self._desk.completion(fields),
                is_stream=bool(fields.stream),
            )


async def _watch(receive: Receive, job: Job) -> None:
    """Wait for the client to go."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            job.abandon()
            return


async def _send_json(value: dict[str, Any], send: Send) -> None:
    body = to_json(value)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await _send_body(send, body, more=False)


async def _send_stream(events: AsyncIterator[bytes], scope: Scope, send: Send) -> None:
    """Send events; nothing is sent before there is one, so that an error can have its status."""
    async for data in events:
        if not scope["dspark.is_streaming"]:
            scope["dspark.is_streaming"] = True
            headers = list(_STREAM_HEADERS)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send_body(send, data, more=True)
    await _send_body(send, b"", more=False)


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _figures(job: Job) -> str:
    """What the log says of a request."""
    results = list(job.results.values())
    text = f"prompt={sum(len(prompt) for prompt in job.prompts)}"
    if results:
        tau = metrics_json(results)["dspark"]["tau"]
        tokens = sum(result.stats.output_tokens for result in results)
        text += f" tokens={tokens}" + (f" tau={tau:.2f}" if tau else "")
    return text
