"""`dspark serve` as a user runs it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark.cli import app
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


def test_it_serves_a_folder_under_its_last_name_and_drains_on_sigterm(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    random_model("llama", layers=2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    command = [sys.executable, "-c", "from dspark.cli import main; main()", "serve"]
    command += ["--target", str(folder), "--draft", "none", "--port", "0", "--no-exact"]
    command += ["--threads", "1"]
    environment = {**os.environ, "DSPARK_API_KEY": "one two", "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("tiny at http://127.0.0.1:"), line
        url = line.split()[2]
        with urllib.request.urlopen(url + "/health", timeout=20) as reply:  # noqa: S310
            assert reply.status == 200
        link = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        body = {"messages": [{"role": "user", "content": "Rumpelstiltskin"}], "stream": True}
        body |= {"max_tokens": 150, "ignore_eos": True, "model": "tiny"}
        headers = {"Content-Type": "application/json", "Authorization": "Bearer two"}
        link.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = link.getresponse()
        assert answer.status == 200
        answer.readline()
        process.send_signal(signal.SIGTERM)
        text = answer.read().decode()
        link.close()
        assert '"finish_reason":"length"' in text
        assert text.endswith("data: [DONE]\n\n")
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
    lines = [line for line in log.splitlines() if "POST" in line]
    assert len(lines) == 1
    for word in ("POST /v1/chat/completions 200", "tokens=150", "tau=", "ms="):
        assert word in lines[0]
    assert "Rumpelstiltskin" not in log
    assert "Traceback" not in log
