"""What goes with a converted draft: servers' scripts, survival maps; and the command."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dspark.cli import app
from dspark.draft import calibration_file
from dspark.draft.formats.deepspec import save_draft
from dspark.draft.formats.detect import load_module
from dspark.draft.formats.native import KEY
from dspark.draft.formats.programs import ENGINES, Program
from dspark.errors import CheckpointError, ConfigError, DsparkError
from dspark.eval.calibrate_sglang import map_of, read_sglang
from tests.conftest import random_model
from tests.draft.convert_drafts import (
    DFLASH,
    REDUCED,
    SHARED,
    Target,
    assert_same_draft,
    native,
    option,
    run,
    started,
)
from tests.draft.dspark_models import make_module


@pytest.mark.parametrize(("anchor", "count"), [(True, 5), (False, 4)])
def test_vllm_is_started_with_the_blocks_length(tmp_path, anchor, count):
    source = native(tmp_path / "a", **SHARED, sample_from_anchor=anchor)
    made = run(source, tmp_path / 'it\'s "here"', "vllm", target="org/it's")
    moved = tmp_path / "moved $HOME"
    made.folder.rename(moved)
    arguments, _ = started(moved, tmp_path)
    assert arguments[:2] == ["serve", "org/it's"]
    assert json.loads(option(arguments, "--speculative-config")) == {
        "method": "dspark",
        "model": str(moved),
        "num_speculative_tokens": count,
    }
    assert arguments[-2:] == ["--port", "8001"]


@pytest.mark.parametrize(
    ("head", "options", "expected"),
    [
        ("rnn", SHARED, {"algorithm": "DSPARK", "dspark-block-size": "5", "num-draft-tokens": "6"}),
        (
            "none",
            {**SHARED, **DFLASH},
            {"algorithm": "DFLASH", "dflash-block-size": "5", "num-draft-tokens": "5"},
        ),
    ],
    ids=["dspark", "dflash"],
)
def test_sglang_is_started_with_the_blocks_length(tmp_path, head, options, expected):
    made = run(native(tmp_path / "a", head=head, **options), tmp_path / "b", "sglang")
    arguments, out = started(made.folder, tmp_path)
    assert out.returncode != 0
    assert "set TARGET" in out.stderr
    arguments, _ = started(made.folder, tmp_path, TARGET="org/other")
    assert option(arguments, "--model-path") == "org/other"
    assert option(arguments, "--speculative-draft-model-path") == str(made.folder)
    for name, value in expected.items():
        assert option(arguments, f"--speculative-{name}") == value


def test_only_engines_get_a_script(tmp_path):
    source = native(tmp_path / "a", **SHARED)
    for to in Program:
        made = run(source, tmp_path / to, to)
        assert (made.folder / "serve.sh").exists() is (to in ENGINES)


# -- survival maps ----------------------------------------------------------------------------


def calibrate(folder, draft=None):
    """A calibration.json beside a draft, of one chain and one tree."""
    sts = {
        "temperatures": [1.5] * 5,
        "dataset": "dspark",
        "num_samples": 40,
        "ece_before": [0.1] * 5,
        "ece_after": [0.05] * 5,
    }
    curve = map_of(sts["temperatures"]).to_json()
    common = {"rule": "greedy", "temperature": 0.0, "map": curve}
    document = {
        "schema": calibration_file.SCHEMA,
        "version": calibration_file.VERSION,
        "draft": {"fingerprint": draft or calibration_file.fingerprint(folder)},
        "target": {"name": "toy", "fingerprint": None},
        "maps": [
            {**common, "shape": "chain", "sts": sts},
            {**common, "shape": "tree", "sts": None},
        ],
    }
    (folder / calibration_file.FILE_NAME).write_text(json.dumps(document))
    return sts


def test_survival_maps_go_along_to_dspark(tmp_path):
    source = native(tmp_path / "a", **SHARED)
    calibrate(source)
    folder = run(source, tmp_path / "b", "dspark").folder
    document = calibration_file.read_calibration(folder / "calibration.json")
    assert document["draft"]["fingerprint"] == calibration_file.fingerprint(folder)
    assert len(calibration_file.read_maps(document).maps) == 2
    made = run(source, tmp_path / "c", "deepspec")
    assert not (made.folder / "calibration.json").exists()
    assert "calibration.json is dspark's and was left out." in made.notes


def test_temperatures_go_along_to_sglang(tmp_path):
    source = native(tmp_path / "a", **SHARED)
    sts = calibrate(source)
    folder = run(source, tmp_path / "b", "sglang", target="t").folder
    arguments, _ = started(folder, tmp_path)
    file = option(arguments, "--speculative-dspark-confidence-sts-path")
    assert read_sglang(file, depth=5) == sts


def test_maps_of_another_draft_are_left_out(tmp_path):
    source = native(tmp_path / "a", **SHARED)
    calibrate(source, draft="of another")
    made = run(source, tmp_path / "b", "dspark")
    assert not (made.folder / "calibration.json").exists()
    assert any("another draft" in note for note in made.notes)


# -- the command ------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, ["convert-draft", *map(str, arguments)])


def test_the_command_prints_the_folder_and_says_what_it_did(tmp_path):
    source = native(tmp_path / "a")
    result = command(source, tmp_path / "b", "--to", "vllm")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [str(tmp_path / "b")]
    assert "the block has its trained length, 5 tokens" in result.stderr
    assert load_module(tmp_path / "b", Target()).config.block_size == 5


def test_the_command_takes_parts_from_the_named_target(tmp_path):
    model = random_model("qwen3", layers=4)
    model.save_pretrained(tmp_path / "target")
    source = native(tmp_path / "a", **SHARED, vocab=REDUCED)
    arguments = (source, tmp_path / "b", "--to", "speculators", "--target", tmp_path / "target")
    result = command(*arguments)
    assert result.exit_code == 0, result.exception
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], model.lm_head.weight[REDUCED.ids])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    verifier = config["speculators_config"]["verifier"]["name_or_path"]
    assert verifier == str(tmp_path / "target")


def test_a_target_that_is_not_the_drafts_is_refused(tmp_path):
    random_model("qwen3", layers=4).save_pretrained(tmp_path / "target")
    path = tmp_path / "target" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    source = native(tmp_path / "a")
    result = command(source, tmp_path / "b", "--to", "vllm", "--target", tmp_path / "target")
    assert isinstance(result.exception, ConfigError)
    assert "num_target_layers is 4" in result.exception.message


@pytest.mark.parametrize(
    ("change", "arguments", "kind", "message"),
    [
        ({}, ("--to", "tensorrt"), None, "tensorrt"),
        ({}, (), None, "--to"),
        ({}, ("--to", "sglang", "--dtype", "int8"), ConfigError, "dtype"),
        ({"draft": {"block_size": 0}}, ("--to", "vllm"), CheckpointError, "block_size"),
        ({"version": 9}, ("--to", "vllm"), CheckpointError, "version"),
    ],
    ids=str,
)
def test_wrong_input_is_one_sentence(tmp_path, change, arguments, kind, message):
    source = native(tmp_path / "a")
    path = source / "config.json"
    config = json.loads(path.read_text())
    for name, value in change.items():
        place = config[KEY]
        place[name] = {**place[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    result = command(source, tmp_path / "b", *arguments)
    if kind is None:
        assert result.exit_code == 2
        assert message in result.stderr
    else:
        assert isinstance(result.exception, kind)
        assert message in result.exception.message
    assert not (tmp_path / "b").exists()


def test_a_draft_that_does_not_know_its_target_asks_for_it(tmp_path):
    folder = run(native(tmp_path / "a"), tmp_path / "b", "speculators").folder
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["num_target_layers"]
    path.write_text(json.dumps(config))
    result = command(folder, tmp_path / "c", "--to", "vllm")
    assert isinstance(result.exception, DsparkError)
    assert result.exception.hint == "name the target: --target NAME"


def test_a_release_of_deepspec_is_read_as_it_is(tmp_path):
    """Without the fields that only dspark writes."""
    folder = save_draft(tmp_path / "a", make_module())
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("sample_from_anchor", "shares_target_embedding", "shares_target_head"):
        del config[name]
    path.write_text(json.dumps(config))
    assert command(folder, tmp_path / "b", "--to", "vllm").exit_code == 0
    assert_same_draft(folder, tmp_path / "b")
