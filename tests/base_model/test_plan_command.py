"""`dspark plan`: what it prints, as JSON and as a table, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from dspark.base_model.config import V4Config
from dspark.base_model.plan import (
    MILLION,
    PlanRequest,
    compare,
    plan_model,
    plan_v32,
    read_model,
)
from dspark.base_model.plan_devices import GPUS
from dspark.base_model.plan_v3 import v3_flops
from dspark.base_model.plan_v4 import v4_flops
from dspark.base_model.presets import preset
from dspark.commands import plan as command
from dspark.commands.plan_table import _TERM_NOTES, print_table
from dspark.errors import CheckpointError, ConfigError, DsparkError

TINY = preset("v4-tiny")


def _draft_parameters() -> int:
    return plan_model(preset("v4-tiny-dspark"), PlanRequest()).draft_parameters


def _run(*args: str) -> str:
    app = typer.Typer()
    app.command()(command.plan)
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_preset_is_shown_beside_the_released_models() -> None:
    record = json.loads(_run("v4-pro", "--context", "1M", "--json"))
    assert (record["schema"], record["context"]) == (1, MILLION)
    assert [model["name"] for model in record["models"]] == ["v4-pro", "v4-flash", "v3.2"]
    shares = {ratio["model"]: ratio for ratio in record["against_v3.2"]}
    assert shares["v4-pro"]["published_flops"] == 0.27
    assert shares["v3.2"]["flops"] == 1
    pro = record["models"][0]
    assert pro["flops"]["total"] == sum(term["flops"] for term in pro["flops"]["terms"])
    assert pro["weight_bytes"]["release"]["total"] == 864_704_792_696
    assert [gpu["name"] for gpu in pro["gpus"]] == [gpu.name for gpu in GPUS.values()]


def test_a_folder_is_shown_alone_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset("v4-tiny-dspark").to_official()))
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"x" * 100)
    (record,) = json.loads(_run(str(tmp_path), "--context", "64", "--json"))["models"]
    assert record["disk_bytes"] == 200
    assert record["parameters"]["draft_stages"] == _draft_parameters()
    (alone,) = json.loads(_run(str(tmp_path / "config.json"), "--json"))["models"]
    assert alone["disk_bytes"] is None


def test_v32_can_be_asked_for() -> None:
    record = json.loads(_run("v3.2", "--context", "64K", "--json"))
    assert [model["name"] for model in record["models"]] == ["v3.2", "v4-flash", "v4-pro"]
    assert record["context"] == 65536


def test_a_pipe_gets_tab_separated_lines() -> None:
    lines = [line.split("\t") for line in _run("v4-tiny", "--context", "64").splitlines()]
    assert lines[0] == ["64 tokens", "", "v4-tiny", "v4-flash", "v4-pro", "v3.2"]
    assert {len(line) for line in lines} == {6}


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_its_terminal(width: int) -> None:
    request = PlanRequest(expert_memory=32e9, disk_bandwidth=7e9)
    plans = command._plans("v4-flash-dspark", request)
    ratios = [compare(plan, plan_v32(request), context=MILLION) for plan in plans]
    out = io.StringIO()
    print_table(request, plans, ratios, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    header, *rest = lines
    assert header.split()[2:] == ["v4-flash-dspark", "v4-flash", "v4-pro", "v3.2"]
    share = next(line for line in rest if "FP8-equivalent" in line and "%" in line)
    assert share.split()[2:8:2] == ["10.3", "10.3", "27.4"]
    assert ("report, figure 1" in out.getvalue()) == (width == 120)


def test_the_table_has_a_line_for_every_term() -> None:
    terms = {term.name for plan in (v4_flops(TINY, 64), v3_flops(64)) for term in plan}
    assert terms == set(_TERM_NOTES)


@pytest.mark.parametrize(
    ("text", "tokens"), [("4096", 4096), ("64K", 65536), ("64k", 65536), ("1M", 1048576)]
)
def test_tokens_are_read(text: str, tokens: int) -> None:
    assert command.parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["0", "0K", "abc", "", "-1", "1.5M", "1G", "²"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--context"):
        command.parse_tokens(text)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["v4-flsh"], "'v4-flsh' is no preset"),
        ([""], "is no preset"),
        (["x" * 5000], "is no preset"),
        (["no/such/config.json"], "cannot be read"),
        (["v4-pro", "--batch", "0"], "--batch is 0"),
        (["v4-pro", "--gpu", "H900"], "no GPU 'H900'"),
        (["v4-pro", "--gpu-memory", "80"], "needs both"),
        (["v4-pro", "--gpu", "H100-80GB", "--gpu-memory", "nan"], "--gpu-memory is nan"),
        (["v4-pro", "--gpu", "H100-80GB", "--gpu-bandwidth", "0"], "--gpu-bandwidth is 0"),
        (["v4-pro", "--expert-memory", "64"], "go together"),
        (["v4-pro", "--expert-memory", "64", "--disk-bandwidth", "-1"], "--disk-bandwidth is -1"),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], message: str) -> None:
    with pytest.raises(DsparkError) as caught:
        _run(*args)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "llama"}', "'llama'"),
        ("{}", "lacks"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read_model(str(path))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_model(str(tmp_path))


def test_a_config_of_either_dialect_costs_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY.to_transformers()))
    config, _ = read_model(str(path))
    assert isinstance(config, V4Config)
    request = PlanRequest(context=64)
    assert plan_model(config, request) == plan_model(TINY, request)
