"""`dspark serve` as a user runs it."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark.cli import app, main
from dspark.commands import serve as serve_command
from dspark.errors import ConfigError, DsparkError
from tests.conftest import random_model
from tests.serve.toys import tokenizer


def fault(*args: str) -> DsparkError:
    """The error that the command ends with."""
    result = CliRunner().invoke(app, ["serve", *args])
    assert isinstance(result.exception, DsparkError), result.output
    return result.exception


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = fault()
    assert isinstance(error, ConfigError)
    assert "uvicorn" in error.message
    assert error.hint == "pip install 'dspark[serve]'"


def test_a_port_in_use_is_told_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = fault("--port", str(port), "--target", "no/such-model")
    assert f"port {port}" in error.message
    assert error.hint


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--api-key", " "], "API key"),
        (["--request-timeout", "0"], "request_timeout"),
        (["--max-body", "much"], "much"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ],
)
def test_settings_out_of_range(args: list[str], word: str) -> None:
    assert word in fault(*args).message


def ask_and_stop(url: str, stop: Callable[[], object]) -> str:
    """Stream an answer of the server, tell it to stop in the middle of it, and read on."""
    link = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    body = {"messages": [{"role": "user", "content": "Rumpelstiltskin"}], "stream": True}
    body |= {"max_tokens": 150, "ignore_eos": True, "model": "tiny"}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer two"}
    try:
        link.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = link.getresponse()
        assert answer.status == 200
        answer.readline()
    finally:
        stop()
    text = answer.read().decode()
    link.close()
    return text


def check_told(text: str, log: str) -> None:
    """The answer is whole, and the log tells one request and nothing of what was said."""
    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")
    lines = [line for line in log.splitlines() if "POST" in line]
    assert len(lines) == 1
    for word in ("POST /v1/chat/completions 200", "tokens=150", "tau=", "ms="):
        assert word in lines[0]
    assert "Rumpelstiltskin" not in log
    assert "Traceback" not in log


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command, for a tiny model in a folder."""
    folder = tmp_path / "tiny"
    random_model("llama", layers=2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    options = ["--draft", "none", "--port", "0", "--no-exact", "--threads", "1"]
    return ["serve", "--target", str(folder), *options]


def test_it_serves_a_folder_under_its_last_name_and_drains_on_sigterm(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real signal to this process, once the server has said where it is."""
    monkeypatch.setenv("DSPARK_API_KEY", "one two")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["dspark", *words])
    log = logging.getLogger("dspark.serve")
    for name, value in (("handlers", []), ("level", log.level), ("propagate", log.propagate)):
        monkeypatch.setattr(log, name, value)  # what they are afterwards
    found: list[str] = []

    def talk(url: str) -> None:
        found.append(ask_and_stop(url, lambda: os.kill(os.getpid(), signal.SIGTERM)))

    def say(line: str, **_: object) -> None:
        found.append(line)
        threading.Thread(target=talk, args=(line.split()[2],)).start()

    monkeypatch.setattr(serve_command, "print", say, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert signal.getsignal(signal.SIGTERM) is before
    line, text = found
    assert line.startswith("tiny at http://127.0.0.1:")
    check_told(text, capsys.readouterr().err)


@pytest.mark.slow  # starts a process that imports torch
def test_it_does_so_in_a_process_of_its_own(words: list[str], tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "dspark", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DSPARK_API_KEY": "one two", "XDG_CACHE_HOME": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("tiny at http://127.0.0.1:"), line
        url = line.split()[2]
        with urllib.request.urlopen(url + "/health", timeout=20) as reply:  # noqa: S310
            assert reply.status == 200
        text = ask_and_stop(url, lambda: process.send_signal(signal.SIGTERM))
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
    check_told(text, log)
