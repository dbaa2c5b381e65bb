"""`dspark data` on a tiny model: files, output, exit codes, a process that is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.console import Console

from dspark.commands.data import data_command
from dspark.commands.data_progress import ProgressWatcher, print_table
from dspark.errors import CapabilityError, ConfigError, DataError, DsparkError
from dspark.training.data_manifest import read_manifest
from dspark.training.data_run import DataRun
from tests.test_cli import save_model
from tests.training.data_toys import all_rows, save_chat_model, shard_bytes, write_prompts

Run = Callable[..., int]
OPTIONS = ("--dtype", "float32", "--max-tokens", "8", "--exact", "--shard-rows", "4")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_chat_model(folder / "chatty")
    save_model(folder / "raw")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(module_cache: Path) -> Path:
    return module_cache


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return str(write_prompts(tmp_path / "tiny.jsonl"))


@pytest.fixture
def run(models: Path, prompts: str) -> Run:
    """Run the command; returns its exit status. Errors of ours are raised."""
    app = typer.Typer()
    app.command()(data_command)

    def invoke(*arguments: str, model: str = "chatty", files: bool = True) -> int:
        own = ["--prompts", prompts] if files else []
        try:
            call = ["--target", str(models / model), *OPTIONS, *own, *arguments]
            return int(app(call, standalone_mode=False) or 0)
        except typer.Exit as exc:
            return exc.exit_code

    return invoke


def test_a_set_is_made_and_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    assert run(str(out), "--json", "--quiet", "--self", "2", "--self-max-tokens", "32") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    figures = found.pop("run")
    assert figures["tokens"] == found["counts"]["answers"]["response_tokens"] > 0
    assert figures["tokens_per_second"] > 0
    assert found == read_manifest(out)
    assert found["is_complete"]
    assert found["target"]["id"] == "chatty"
    assert [item["name"] for item in found["exclude"]] == ["dspark"]
    assert found["settings"]["temperature"] == [0.0, 0.8]
    assert {row["source"] for row in all_rows(out)} == {"tiny", "self"}
    assert run(str(out), "--self", "2", "--self-max-tokens", "32") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "source\ttemperature\trows\tended"
    assert "tiny\t0.8\t6\t" in "\n".join(lines)
    assert lines[-1].endswith("all were there already")
    print_table(found, figures)
    assert "response tokens" in capsys.readouterr().out


def test_every_shard_is_a_line_where_there_is_no_terminal(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(tmp_path / "set"), "--temperature", "0") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("shard 1 of 2: 5 rows, ")
    assert "tok/s" in lines[0]
    assert lines[0].endswith(" left")
    assert lines[1].startswith("shard 2 of 2: 1 rows, ")


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, highlight=False)
    with ProgressWatcher(console, is_quiet=False) as watcher:
        watcher.stage("answers", 40, 10)
        watcher.advance(20.0, 500)
        watcher.note("answer 3 failed: no reason [at all]")
    shown = screen.getvalue()
    assert "20 of 40" in shown
    assert "tok/s" in shown
    assert "left" in shown
    assert "[at all]" in shown


def test_ctrl_c_exits_130_and_one_line_says_how_to_go_on(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(self: DataRun) -> None:
        self.planned, self.finished = 2000, 1234
        raise KeyboardInterrupt

    monkeypatch.setattr(DataRun, "run", interrupt)
    assert run(str(tmp_path / "set"), "--quiet") == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("interrupted; 1,234 of 2,000 answers are kept in")
    assert line.endswith("run the same command again to go on from there")


@pytest.mark.slow  # starts processes that import torch
def test_a_killed_run_goes_on_to_the_same_bytes(
    run: Run, models: Path, prompts: str, tmp_path: Path
) -> None:
    long = ("--responses", "4", "--temperature", "1", "--shard-rows", "8", "--batch", "2")
    assert run(str(tmp_path / "whole"), *long) == 0
    out = tmp_path / "set"
    target = ["--target", str(models / "chatty"), "--prompts", prompts]
    command = [sys.executable, "-m", "dspark.cli", "data", str(out), *target, *OPTIONS, *long]
    child = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    # Killed in the second shard, with answers of it in the journal.
    while not (out / ".00001.partial.jsonl").exists():
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not read_manifest(out)["is_complete"]
    before = (out / "00000.jsonl.gz").stat().st_mtime_ns
    assert run(str(out), *long) == 0
    assert (out / "00000.jsonl.gz").stat().st_mtime_ns == before
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_a_base_model_answers_raw_text(run: Run, tmp_path: Path) -> None:
    assert run(str(tmp_path / "set"), "--quiet", "--limit", "1", model="raw") == 0
    manifest = read_manifest(tmp_path / "set")
    assert manifest["template"] is None
    assert "raw text" in manifest["notes"][0]
    assert len(all_rows(tmp_path / "set")) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--prompts", "gone.jsonl"), DataError, "gone.jsonl cannot be read"),
        (("--url-model", "x"), ConfigError, "but no --url"),
        (("--url", "localhost/v1"), ConfigError, "must begin with http"),
        (("--url", "http://x/v1", "--api-key-env", "NO_SUCH"), ConfigError, "NO_SUCH, but"),
        (("--temperature", "0", "--temperature", "0"), ConfigError, "given twice"),
        (("--max-similarity", "2"), ConfigError, "max_similarity is 2"),
    ],
)
def test_bad_options_are_one_sentence(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], error: type[DsparkError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(str(tmp_path / "set"), *arguments)
    assert "\n" not in caught.value.message
    assert not (tmp_path / "set").exists()


def test_an_empty_prompt_file_and_no_prompts_at_all_are_refused(
    run: Run, prompts: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nothing to answer"):
        run(str(tmp_path / "set"), files=False)
    Path(prompts).write_text("\n")
    with pytest.raises(DataError, match="there is no prompt in it"):
        run(str(tmp_path / "set"))


def test_a_model_without_template_cannot_write_questions(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="no chat template"):
        run(str(tmp_path / "set"), "--self", "3", model="raw", files=False)
    assert not (tmp_path / "set").exists()
