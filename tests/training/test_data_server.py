"""Answers from a server of the OpenAI protocol: a small one of our own in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer

from dspark.commands.data import data_command
from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.training.data_answers import AnswerPlan
from dspark.training.data_client import ServerClient
from dspark.training.data_manifest import read_manifest
from dspark.training.data_run import Watcher
from dspark.training.data_server import ServerAnswerer
from dspark.training.data_spec import SelfPlan
from dspark.training.data_target import load_tokenizer
from tests.training.data_toys import (
    EOS,
    TURNS,
    all_rows,
    chat_codec,
    make_run,
    make_spec,
    prompt_set,
    shard_bytes,
    write_prompts,
)

Reply = tuple[int, dict[str, Any] | str]
"""Status and body."""


def said(text: str, finish: str = "stop", **message: Any) -> Reply:
    """A reply that fits both endpoints."""
    content = {"role": "assistant", "content": text, **message}
    return 200, {"choices": [{"message": content, "text": text, "finish_reason": finish}]}


@dataclass
class Server:
    """What the server was asked, and how it replies."""

    reply: Callable[[str, dict[str, Any]], Reply]
    url: str = ""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    state = Server(lambda path, body: said(f"Echo of {len(str(body))}"))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.asked.append((self.path, body))
                state.keys.add(self.headers.get("Authorization"))
                status, answer = state.reply(self.path, body)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@dataclass
class Clock:
    """Waits of the client, without waiting."""

    waits: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(server: Server, clock: Clock, tmp_path: Path) -> Callable[..., Path]:
    """Make a set through the server; returns its folder."""

    def make(name: str = "set", *, watcher: Watcher | None = None, **changes: Any) -> Path:
        client = ServerClient(server.url, "big", key="secret", sleep=clock.sleep)
        answerer = ServerAnswerer(client, chat_codec(), concurrency=3)
        own = {"url": server.url, "url_model": "big"}
        spec = make_spec(**{"server": own, **changes})
        make_run(tmp_path / name, spec, answerer=answerer, watcher=watcher).run()
        return tmp_path / name

    return make


def test_the_servers_text_becomes_rows(run: Callable[..., Path], server: Server) -> None:
    folder = run()
    rows = all_rows(folder)
    assert len(rows) == 12
    assert len(server.asked) == 12
    assert {path for path, _ in server.asked} == {"/v1/chat/completions"}
    assert server.keys == {"Bearer secret"}
    for row in rows:
        *text, end = row["response_ids"]
        assert chat_codec().decode(text).startswith("Echo of")
        assert (end, row["finish"]) == (EOS, "stop")
    greedy, sampled = server.asked[0][1], rows[1]
    assert {"model": "big", "max_tokens": 8}.items() <= greedy.items()
    asked = [body for _, body in server.asked if body["temperature"] == 1.0]
    assert sampled["seed"] in [body["seed"] for body in asked]
    assert all("seed" not in body for _, body in server.asked if body["temperature"] == 0)
    (later,) = [row for row in rows if isinstance(row["prompt"], list)][:1]
    assert later["prompt"] in [body["messages"] for _, body in server.asked]
    manifest = read_manifest(folder)
    assert manifest["server"] == {"url": server.url, "url_model": "big"}
    assert "may differ from the tokens that were sampled" in manifest["notes"][0]


def test_an_answer_that_was_cut_off_has_no_end_token(
    run: Callable[..., Path], server: Server
) -> None:
    server.reply = lambda path, body: said("and so on", "length")
    row = all_rows(run())[0]
    assert row["finish"] == "length"
    assert chat_codec().decode(row["response_ids"]) == "and so on"
    assert row["response_ids"][-1] != EOS


def test_errors_that_pass_are_tried_again(
    run: Callable[..., Path], server: Server, clock: Clock
) -> None:
    bad: list[Reply] = [(503, "busy"), (200, "no json"), (429, {"error": {"message": "slow down"}})]
    server.reply = lambda path, body: bad.pop() if bad else said("fine, thanks")
    folder = run(sets=(prompt_set(TURNS[:1]),))
    assert len(all_rows(folder)) == 2
    assert len(server.asked) == 5
    assert len(clock.waits) == 3
    assert read_manifest(folder)["counts"]["answers"]["dropped"] == {}


def test_an_answer_that_fails_four_times_is_dropped_and_counted(
    run: Callable[..., Path], server: Server, clock: Clock
) -> None:
    class Noter(Watcher):
        def note(self, text: str) -> None:
            notes.append(text)

    def reply(path: str, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        return (500, "out of memory") if text == TURNS[2][0] else said("fine, thanks")

    notes: list[str] = []
    server.reply = reply
    folder = run(watcher=Noter())
    assert read_manifest(folder)["counts"]["answers"]["dropped"] == {"failed": 2}
    assert {row["prompt"] for row in all_rows(folder) if isinstance(row["prompt"], str)} == {
        turns[0] for turns in TURNS if turns != TURNS[2]
    }
    assert len([1 for _, b in server.asked if b["messages"][0]["content"] == TURNS[2][0]]) == 8
    assert sorted(clock.waits) == [1, 1, 2, 2, 4, 4]
    assert len(notes) == 2
    assert "500 out of memory" in notes[0]


def test_a_refused_request_is_not_tried_again(
    run: Callable[..., Path], server: Server, clock: Clock
) -> None:
    def reply(path: str, body: dict[str, Any]) -> Reply:
        too_long = len(body["messages"]) > 1
        return (400, {"error": "too long"}) if too_long else said("fine, thanks")

    server.reply = reply
    folder = run()
    assert read_manifest(folder)["counts"]["answers"]["dropped"] == {"failed": 2}
    assert len(all_rows(folder)) == 10  # the first turns of that prompt are kept
    assert clock.waits == []


def test_a_server_that_goes_away_ends_the_run_and_costs_no_answer(
    run: Callable[..., Path], server: Server
) -> None:
    plan = AnswerPlan(temperatures=(0.0, 0.5, 1.0), max_tokens=8)
    sets = (prompt_set(TURNS[:1] + TURNS[2:]),)
    changes = {"sets": sets, "plan": plan, "shard_rows": 20}
    whole = run("whole", **changes)
    works = iter(range(3))  # threads ask at the same time: each takes one for itself

    def reply(path: str, body: dict[str, Any]) -> Reply:
        is_there = next(works, None) is not None
        return said(f"Echo of {len(str(body))}") if is_there else (502, "gone")

    server.reply = reply
    with pytest.raises(DataError, match="answers in a row failed, the last one because") as caught:
        run("set", **changes)
    assert "\n" not in caught.value.message
    server.reply = lambda path, body: said(f"Echo of {len(str(body))}")
    server.asked.clear()
    folder = run("set", **changes)
    assert shard_bytes(folder) == shard_bytes(whole)
    # Threads of the first run may still have been trying: what they ask for is asked again.
    assert len({json.dumps(body) for _, body in server.asked}) == 12 - 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": {"message": "bad key"}}), r"refuses the API key \(401 bad key\)"),
        ((404, "no such model"), r"has no /chat/completions for model 'big' \(404 no such model\)"),
    ],
)
def test_a_wrong_key_or_model_ends_the_run_at_once(
    run: Callable[..., Path], server: Server, clock: Clock, reply: Reply, message: str
) -> None:
    server.reply = lambda path, body: reply
    with pytest.raises(CapabilityError, match=message) as caught:
        run()
    assert caught.value.hint
    assert clock.waits == []


def test_an_address_that_nobody_answers_is_one_sentence(tmp_path: Path, clock: Clock) -> None:
    client = ServerClient("http://127.0.0.1:9/v1", "big", sleep=clock.sleep)
    answerer = ServerAnswerer(client, chat_codec())
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/v1 fails: .*refused") as caught:
        make_run(tmp_path / "set", make_spec(), answerer=answerer).run()
    assert "\n" not in caught.value.message


def test_an_answer_whose_reasoning_was_cut_out_is_dropped(
    run: Callable[..., Path], server: Server
) -> None:
    server.reply = lambda path, body: (
        said("42", reasoning_content="hm") if body["temperature"] else said("fine, thanks")
    )
    folder = run()
    assert {row["temperature"] for row in all_rows(folder)} == {0.0}
    assert read_manifest(folder)["counts"]["answers"]["dropped"] == {"reasoning": 5}


def test_the_server_writes_questions_too(run: Callable[..., Path], server: Server) -> None:
    numbers = iter(range(100))

    def reply(path: str, body: dict[str, Any]) -> Reply:
        if path == "/v1/chat/completions":
            return said("An answer.")
        number = next(numbers)
        return said(
            f" What is number {number} times {number}? ", "length" if number % 3 else "stop"
        )

    server.reply = reply
    plan = AnswerPlan(temperatures=(0.0,), max_tokens=12)
    folder = run(sets=(), own=SelfPlan(count=4), plan=plan)
    asked = [body for path, body in server.asked if path == "/v1/completions"]
    prefix = chat_codec().decode(asked[0]["prompt"])
    assert prefix == "s:be briefu:"
    assert {body["stop"][0] for body in asked} == {"<eos>"}
    assert len({body["seed"] for body in asked}) == len(asked)
    rows = all_rows(folder)
    assert len(rows) == 4
    assert all(row["prompt"].startswith("What is number") for row in rows)
    assert read_manifest(folder)["counts"]["prompts"]["dropped"]["self"]["unfinished"] > 0


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must begin with http"):
        ServerClient(url, "big")


def test_the_command_needs_no_weights_with_a_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "tokenizer-only", tmp_path / "set"
    chat_codec().tokenizer.save_pretrained(folder)
    monkeypatch.setenv("MY_KEY", "from the environment")
    app = typer.Typer()
    app.command()(data_command)
    options = ["--url", server.url, "--url-model", "big", "--api-key-env", "MY_KEY", "--quiet"]
    prompts = str(write_prompts(tmp_path / "tiny.jsonl"))
    app([str(out), "--target", str(folder), "--prompts", prompts, *options], standalone_mode=False)
    assert server.keys == {"Bearer from the environment"}
    assert len(all_rows(out)) == 12
    manifest = read_manifest(out)
    assert manifest["target"]["id"] == "tokenizer-only"
    assert manifest["engine"] == {}


def test_a_target_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path), is_remote=True)
