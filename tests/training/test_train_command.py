"""`dspark train`: what it prints, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from dspark.cli import app
from dspark.commands.train_view import open_view
from dspark.errors import ConfigError, DsparkError
from dspark.training.metrics import Figures
from dspark.training.progress import SilentReporter, StepReport, ValidationReport
from dspark.training.tensorboard import with_tensorboard
from tests.training.runs import write_recipe


def run(*arguments: str):
    return CliRunner().invoke(app, ["train", *arguments])


def figures(loss: float = 2.5) -> Figures:
    return Figures(
        loss=loss,
        ce=1.0,
        l1=1.5,
        bce=0.5,
        acceptance=(0.75, 0.5),
        agreement=(0.8, 0.4),
        conditional=(0.8, 0.6),
        tau_greedy=2.25,
        tau_sampling=2.0,
        positions=40,
    )


def step(number: int, total: int = 50, *, is_skipped: bool = False) -> StepReport:
    return StepReport(
        step=number,
        total=total,
        epoch=0,
        figures=figures(),
        rate=1e-3,
        gradient=1.0,
        is_skipped=is_skipped,
        tokens=300,
        responses=200,
        seconds=2.0,
        target_seconds=0.5,
    )


def test_a_run_says_what_it_does_and_where_the_draft_is(tmp_path):
    recipe = write_recipe(tmp_path)
    result = run(str(recipe), "--out", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout)
    assert outcome["is_done"]
    assert outcome["step"] == outcome["total"] == 4
    shown = " ".join(result.stderr.split())
    assert "draft.block_size = 4" in shown
    assert "step 1 of 4: loss" in shown
    assert "held out at step 4" in shown
    assert "--draft" in shown


def test_time_may_be_limited(tmp_path):
    recipe = write_recipe(tmp_path)
    out = str(tmp_path / "out")
    result = run(str(recipe), "--out", out, "--max-minutes", "0")
    assert result.exit_code == 0
    assert "time is up after step 1 of 4; run the same command again" in result.stderr
    result = run(str(recipe), "--out", out, "--resume", "must", "--json", "--quiet")
    assert json.loads(result.stdout)["is_done"]
    assert result.stderr == ""
    result = run(str(recipe), "--out", out, "--resume", "never")
    assert isinstance(result.exception, ConfigError)
    assert "holds a run, up to step-00000004" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "must"], "holds no checkpoint"),
        (["--resume", "perhaps"], "--resume is 'perhaps'"),
        (["--set", "run.stops=3"], r"no key run\.stops"),
        (["--set", "draft.mask_token_id=96"], "mask_token_id is 96"),
        (["--set", "draft.target_layer_ids=[3]"], "target_layer_ids"),
        (["--set", 'data.shards=["none.jsonl"]'], r"none\.jsonl cannot be read"),
        (["--set", "target=nothing-like-it"], "not a known model"),
        (["--set", "draft.kind=mtp"], "draft.block_size is 4, but a draft of kind mtp has no use"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, arguments, message):
    result = run(str(write_recipe(tmp_path)), "--out", str(tmp_path / "out"), *arguments)
    assert isinstance(result.exception, DsparkError)
    assert message.replace("\\", "") in str(result.exception)


def test_a_v4_target_is_pointed_at_its_own_page(tmp_path):
    folder = tmp_path / "v4"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
    save_file({"embed.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    recipe = write_recipe(tmp_path)
    result = run(str(recipe), "--out", str(tmp_path / "out"), "--set", f"target={folder}")
    assert isinstance(result.exception, DsparkError)
    assert "DeepSeek-V4, whose drafts are part of its checkpoint" in str(result.exception)
    assert "docs/v4-mini.md" in result.exception.hint


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is not None, reason="TensorBoard is installed"
)
def test_tensorboard_must_be_there_if_asked_for(tmp_path):
    recipe = write_recipe(tmp_path, run_tensorboard=True)
    result = run(str(recipe), "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, ConfigError)
    assert result.exception.hint == "pip install 'dspark[train]'"


def test_figures_go_to_tensorboard_too(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, log_dir):
            written.append(log_dir)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with with_tensorboard(SilentReporter(), tmp_path, is_on=True) as reporter:
        reporter.step(step(7))
        reporter.validation(
            ValidationReport(step=7, figures=figures(1.25), is_best=True, seconds=1.0)
        )
    assert written[0] == str(tmp_path / "tensorboard")
    assert written[-1] == "closed"
    assert ("train/loss", 2.5, 7) in written
    assert ("train/learning_rate", 1e-3, 7) in written
    assert ("held_out/loss", 1.25, 7) in written
    assert ("held_out/acceptance_2", 0.5, 7) in written


def test_lines_come_now_and_then(capsys):
    console = Console(width=200, force_terminal=False)
    with open_view(console, is_quiet=False) as view:
        for number in range(1, 31):
            view.step(step(number, is_skipped=number == 12))
        view.validation(ValidationReport(step=30, figures=figures(1.25), is_best=True, seconds=1.0))
    lines = capsys.readouterr().out.splitlines()
    numbers = [line.split()[1].strip(":") for line in lines if line.startswith("step")]
    assert numbers == ["1", "2", "3", "10", "12", "20", "30"]
    last = "step 30 of 50: loss 2.5000, tau 2.250, acceptance 0.75 0.50, 100 tok/s, 1 min left"
    assert lines[-2] == last
    assert lines[-1] == (
        "held out at step 30: loss 1.2500, tau 2.250 greedy, 2.000 sampling, the best so far"
    )


def test_a_terminal_shows_a_table():
    console = Console(width=200, force_terminal=True, record=True)
    with open_view(console, is_quiet=False) as view:
        for number in range(1, 5):
            view.step(step(number, total=500))
        view.note("a word")
    text = console.export_text()
    assert "a word" in text
    assert "4 of 500" in text
    assert "17 min" in text
