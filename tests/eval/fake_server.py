"""An OpenAI-compatible server in a thread, which misbehaves when the prompt says so.

A prompt that holds the word "hang", "die", "refuse", "cut", "error", "odd" or "silence" gets that;
all others get an answer of `chunks`. Its /metrics page counts like vLLM's.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    """What it does and what it saw.

    Attributes:
        chunks: Texts of an answer's events, with the tokens of each.
        has_usage: Tell the number of tokens at the end.
        has_chunk_usage: Tell it with every event, if asked to.
        metrics: Lines of /metrics besides the counters, or None for no such page.
        pause: Seconds before every event.
        bodies: What was asked.
        headers: Authorization of every request.
        paths: Paths of the requests.
        most_at_once: Requests under way at a time.
    """

    chunks: Sequence[tuple[str, int]] = (("ab", 2), ("c", 1), ("def", 3))
    has_usage: bool = True
    has_chunk_usage: bool = False
    metrics: str | None = ""
    pause: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_once: int = 0
    drafts: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def page(self) -> str:
        """The /metrics page: 3 drafts of 4 tokens an answer, 6 of which are accepted."""
        tail = '{engine="0",model_name="m"}'
        counts = {"num_drafts": 3, "num_draft_tokens": 12, "num_accepted_tokens": 6}
        lines = [
            f"vllm:spec_decode_{name}_total{tail} {100 + self.drafts * count}.0"
            for name, count in counts.items()
        ]
        return "\n".join([*lines, str(self.metrics)]) + "\n"


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    has_left: bool

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(json.dumps({"data": [{"id": "the-model"}]}))
        elif self.path == "/metrics" and self.fake.metrics is not None:
            self._send(self.fake.page())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake = self.fake
        with fake.lock:
            fake.bodies.append(body)
            fake.headers.append(self.headers["Authorization"])
            fake.paths.append(self.path)
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        self.has_left = False
        try:
            self._answer(body)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Count the answer, once, and before the client can know that it is over."""
        if not self.has_left:
            with self.fake.lock:
                self.fake.at_once -= 1
                self.fake.drafts += 1
        self.has_left = True

    def _answer(self, body: dict[str, Any]) -> None:
        text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        if "hang" in text:
            self.fake.released.wait(20)
            return
        if "die" in text:
            self.connection.close()
            return
        if "refuse" in text:
            self._send(json.dumps({"error": {"message": "no room\nfor it"}}), status=500)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._stream(text, body)

    def _stream(self, text: str, body: dict[str, Any]) -> None:
        fake, count = self.fake, 0
        wants_each = body["stream_options"].get("continuous_usage_stats", False)
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for index, (piece, tokens) in enumerate(fake.chunks):
            if index == 1 and "cut" in text:
                return
            if index == 1 and "error" in text:
                self._event({"error": {"message": "out of memory"}})
                return
            if index == 1 and "odd" in text:
                self._event({"choices": [7]})
            if index == 1 and "silence" in text:
                for _ in range(100):
                    self.wfile.write(b": still here\n\n")
                    self.wfile.flush()
                    if fake.released.wait(0.05):
                        return
            time.sleep(fake.pause)
            count += tokens
            choice = {"index": 0, "text": piece, "delta": {"content": piece}}
            event: dict[str, Any] = {"choices": [choice]}
            if fake.has_chunk_usage and wants_each:
                event["usage"] = {"prompt_tokens": 9, "completion_tokens": count}
            self._event(event)
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        if fake.has_usage:
            self._event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": count}})
        self._leave()
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _send(self, text: str, *, status: int = 200) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is part of the test."""


@contextmanager
def serving(**settings: Any) -> Iterator[FakeServer]:
    """A server, stopped at the end."""
    fake = FakeServer(**settings)
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = _QuietServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield fake
    finally:
        fake.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
