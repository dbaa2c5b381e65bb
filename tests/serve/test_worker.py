"""The engine's thread among many clients: those that go, stay, wait, come too late or crowd in."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import dspark
from dspark.serve.worker import EngineWorker
from tests.serve.toys import Running, llama_engine, serving, toy_engine, wait_for

CHAT = "/v1/chat/completions"


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@contextlib.contextmanager
def asking(running: Running, **fields: Any) -> Iterator[http.client.HTTPResponse]:
    """A stream that is read by hand; leaving closes the connection, read or not."""
    link = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    body = {"messages": messages("Hello"), "stream": True, "temperature": 0, **fields}
    link.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    reply = link.getresponse()
    try:
        yield reply
    finally:
        reply.close()
        link.close()


def read_event(reply: http.client.HTTPResponse) -> Any:
    """The next event; None for [DONE]."""
    while not (line := reply.readline().decode().strip()):
        pass
    data = line.removeprefix("data: ")
    return None if data == "[DONE]" else json.loads(data)


def test_eight_streams_at_once_say_what_each_says_alone(toy: Running) -> None:
    bodies = [
        {
            "messages": messages("abcdefgh"[: n + 1]),
            "max_tokens": 8 + n,
            "temperature": 0.9 * (n % 2),
            "seed": n,
        }
        for n in range(8)
    ]

    def text_of(body: dict[str, Any]) -> str:
        events = toy.events(CHAT, body)
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(text_of, bodies))
    engine = toy_engine()
    for body, text in zip(bodies, together, strict=True):
        fields = {key: body[key] for key in ("max_tokens", "temperature", "seed")}
        (result,) = engine.generate([body["messages"]], dspark.SamplingParams(**fields))
        assert text == result.text


def test_a_client_that_goes_gives_its_pages_back() -> None:
    engine = llama_engine()
    with serving(engine) as running:
        fields = {"max_tokens": 6, "messages": messages("Hello")}
        assert running.ask(CHAT, fields)[0] == 200
        running.wait_idle()
        before = engine.cache_pages  # what is kept of the prompt, for others that begin alike
        with asking(running, max_tokens=1500, ignore_eos=True) as reply:
            for _ in range(3):
                assert read_event(reply)["choices"]
            assert engine.num_unfinished == 1
        running.wait_idle()
        assert engine.stats.cancelled == 1
        engine._cache.forget_kept()
        assert engine.cache_pages <= before
        assert engine.cache_pages == 0


def test_a_client_that_goes_before_its_turn_leaves_the_queue() -> None:
    engine = toy_engine(max_batch=1)
    engine.target.pause = 0.02  # type: ignore[attr-defined]
    with serving(engine) as running, asking(running, max_tokens=400, ignore_eos=True) as first:
        read_event(first)
        body = json.dumps({"messages": messages("Hi"), "max_tokens": 5}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as link:
            link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(lambda: running.desk.worker.num_waiting == 1)
        wait_for(lambda: running.desk.worker.num_waiting == 0)
        assert engine.stats.cancelled == 1
        assert running.desk.worker.num_running == 1


def test_a_slow_reader_holds_up_nobody() -> None:
    fields = {"messages": messages("Hello"), "stream": True, "temperature": 0}
    # Log-probabilities make the answer larger than what the network keeps for such a reader.
    large = {**fields, "max_tokens": 120, "n": 2, "ignore_eos": True, "logprobs": True}
    with serving(toy_engine(), send_buffer=4096) as running, socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        own.connect(("127.0.0.1", running.port))
        own.settimeout(30)
        link = http.client.HTTPConnection("127.0.0.1")
        link.sock = own
        body = json.dumps({**large, "top_logprobs": 20})
        link.request("POST", CHAT, body, {"Content-Type": "application/json"})
        reply = link.getresponse()
        read_event(reply)
        answer = running.chat(max_tokens=20, temperature=0)
        assert answer["usage"]["completion_tokens"] == 20
        running.wait_idle(60)  # the engine is through with all of it, read or not
        assert running.desk._jobs  # while the response still waits for its reader
        texts = ["", ""]
        while event := read_event(reply):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
        link.close()
    params = dspark.SamplingParams(max_tokens=120, ignore_eos=True)
    (alone,) = toy_engine().generate([messages("Hello")], params)
    assert texts == [alone.text] * 2


def test_a_full_queue_says_so_and_when_to_come_again() -> None:
    engine = toy_engine(max_batch=1)
    engine.target.pause = 0.02  # type: ignore[attr-defined]
    with serving(engine, max_queue=1) as running:
        long = {"max_tokens": 300, "ignore_eos": True}
        with asking(running, **long) as first, asking_later(running, **long):
            read_event(first)
            wait_for(lambda: running.desk.worker.num_waiting == 1)
            status, answer, headers = running.ask(CHAT, {"messages": messages("Hi")})
            assert status == 429
            assert answer["error"]["code"] == "queue_full"
            assert int(headers["retry-after"]) >= 1
            assert 'running{engine="0",model_name="toy"} 1.0' in running.ask("/metrics")[1]
            assert 'waiting{engine="0",model_name="toy"} 1.0' in running.ask("/metrics")[1]
        running.wait_idle()
        assert running.ask(CHAT, {"messages": messages("Hi"), "max_tokens": 2})[0] == 200


@contextlib.contextmanager
def asking_later(running: Running, **fields: Any) -> Iterator[None]:
    """A stream that waits in the queue, and whose client goes at the end."""
    link = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    body = {"messages": messages("Later"), "stream": True, **fields}
    link.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    try:
        yield
    finally:
        link.close()


def test_a_request_that_takes_too_long_is_ended() -> None:
    engine = toy_engine()
    engine.target.pause = 0.02  # type: ignore[attr-defined]
    with serving(engine, request_timeout=0.2) as running:
        long = {"messages": messages("Hi"), "max_tokens": 400, "ignore_eos": True}
        status, answer, headers = running.ask(CHAT, long)
        assert status == 504
        assert answer["error"]["code"] == "request_timeout"
        assert headers["x-should-retry"] == "false"
        with asking(running, max_tokens=400, ignore_eos=True) as reply:
            events = []
            while event := read_event(reply):
                events.append(event)
        assert events[-1]["error"]["code"] == "request_timeout"
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        running.wait_idle()
        assert engine.stats.cancelled == 2


def test_a_broken_round_fails_those_in_it_and_nobody_else() -> None:
    engine = toy_engine(max_batch=1)
    engine.target.pause = 0.01  # type: ignore[attr-defined]
    with serving(engine) as running, ThreadPoolExecutor(1) as pool:
        with asking(running, max_tokens=400, ignore_eos=True) as reply:
            read_event(reply)
            waiting = pool.submit(running.chat, max_tokens=8, temperature=0)
            wait_for(lambda: running.desk.worker.num_waiting == 1)
            engine.target.broken.append(RuntimeError("/secret/path"))  # type: ignore[attr-defined]
            events = []
            while event := read_event(reply):
                events.append(event)
        assert events[-1]["error"]["type"] == "server_error"
        assert "secret" not in json.dumps(events)
        assert waiting.result()["usage"]["completion_tokens"] == 8
        engine.target.broken.append(MemoryError())  # type: ignore[attr-defined]
        status, answer, _ = running.ask(CHAT, {"messages": messages("Hi")})
        assert status == 500
        assert answer["error"]["type"] == "server_error"
        assert running.ask("/health")[0] == 200
        running.wait_idle()
        assert not engine.target.cache.pages  # type: ignore[attr-defined]
        first = running.chat(max_tokens=8, temperature=0)["choices"]
        assert first == waiting.result()["choices"]


def test_an_error_of_one_request_in_a_round_is_told_to_it_alone() -> None:
    engine = toy_engine()
    table = engine.target.table  # type: ignore[attr-defined]
    engine.target.table = table.clone()  # type: ignore[attr-defined]
    codec = engine.codec
    assert codec is not None
    # After "!\"" the model breaks down, which only one of two clients says.
    first, second = codec.encode_plain('!"')
    engine.target.table[first * 96 + second] = float("nan")  # type: ignore[attr-defined]
    with serving(engine) as running, ThreadPoolExecutor(2) as pool:
        fields = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
        bad = pool.submit(running.ask, "/v1/completions", {"prompt": '!"', **fields})
        good = pool.submit(running.ask, "/v1/completions", {"prompt": "ab", **fields})
        status, answer, _ = bad.result()
        assert status == 500
        assert answer["error"]["type"] == "server_error"
        assert "secret" not in answer["error"]["message"]
        assert good.result()[0] == 200
        assert running.ask("/health")[0] == 200


class _FallingEngine(dspark.Engine):
    """Its thread cannot go on."""

    def step(self) -> None:
        raise SystemExit


def test_a_dead_engine_is_unhealthy_and_leaves_nobody_waiting() -> None:
    whole = toy_engine()
    engine = _FallingEngine(whole.target, codec=whole.codec)
    with serving(engine) as running:
        assert running.ask("/health")[0] == 200
        status, answer, _ = running.ask(CHAT, {"messages": messages("Hi")})
        assert status == 500
        assert answer["error"]["type"] == "server_error"
        status, answer, _ = running.ask("/health")
        assert (status, answer) == (503, {"status": "failed"})
        assert running.ask(CHAT, {"messages": messages("Hi")})[0] == 503
        assert "dspark:engine_alive" in running.ask("/metrics")[1]


def test_a_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    engine = toy_engine()
    engine.target.pause = 0.02  # type: ignore[attr-defined]
    with serving(engine, drain_seconds=30) as running:
        with asking(running, max_tokens=30, ignore_eos=True) as reply:
            read_event(reply)
            loop = running.server._loop
            assert loop is not None
            loop.call_soon_threadsafe(running.server.begin_drain)
            wait_for(lambda: running.desk.is_draining)
            status, _, headers = running.ask(CHAT, {"messages": messages("Hi")})
            assert status == 503
            assert "retry-after" in headers
            assert running.ask("/health")[1] == {"status": "stopping"}
            events = []
            while event := read_event(reply):
                events.append(event)
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        wait_for(lambda: running.server.should_exit)
    assert engine.stats.finished == 1


def test_a_drain_that_takes_too_long_ends_what_runs() -> None:
    engine = toy_engine()
    engine.target.pause = 0.05  # type: ignore[attr-defined]
    with (
        serving(engine, drain_seconds=0.1) as running,
        asking(running, max_tokens=400, ignore_eos=True) as reply,
    ):
        read_event(reply)
        loop = running.server._loop
        assert loop is not None
        loop.call_soon_threadsafe(running.server.begin_drain)
        events = []
        while event := read_event(reply):
            events.append(event)
        assert events[-1]["error"]["message"] == "the server is stopping."


def test_a_job_for_a_thread_that_has_ended_fails() -> None:
    from dspark.serve.failures import ApiError
    from dspark.serve.jobs import Job

    async def scenario() -> None:
        worker = EngineWorker(toy_engine())
        worker.start()
        worker.stop(5.0)
        job = Job([[5, 6]], dspark.SamplingParams(max_tokens=2))
        worker.submit(job)
        with pytest.raises(ApiError):
            await asyncio.wait_for(job.next(), 5)

    asyncio.run(scenario())
    assert not [t for t in threading.enumerate() if t.name == "dspark-engine" and not t.daemon]
