from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from dspark.base_model.checkpoint import Checkpoint, Layout
from dspark.base_model.checkpoint_write import random_checkpoint, save_checkpoint
from dspark.base_model.convert import WeightFormat, convert_checkpoint
from dspark.base_model.fp4 import quantise_fp4
from dspark.base_model.fp8 import quantise_fp8
from dspark.base_model.names import Storage, expected_tensors
from dspark.base_model.presets import preset
from dspark.base_model.random_weights import random_tensors
from dspark.commands.convert import convert
from dspark.errors import CheckpointError, ConfigError

CONFIG = replace(  # a layer of every kind, and few experts
    preset("v4-tiny-dspark"),
    num_hidden_layers=3,
    compress_ratios=(0, 4, 8),
    dspark_target_layer_ids=(0, 1, 2),
    n_routed_experts=4,
)
DTYPES = {WeightFormat.BF16: torch.bfloat16, WeightFormat.FLOAT32: torch.float32}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "source"
    random_checkpoint(folder, CONFIG, shard_bytes=400_000)
    return folder


@pytest.fixture
def source(written, tmp_path):
    """A copy of its own, to which a test may add files."""
    return Path(shutil.copytree(written, tmp_path / "source"))


def quantisable(config):
    for name, spec in expected_tensors(config).items():
        if spec.storage in (Storage.FP8, Storage.EXPERT):
            yield name.removesuffix(".weight"), spec.storage


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_same_files(a, b):
    assert set(a.names()) == set(b.names())
    for name in a.names():
        assert a.tensor(name).dtype == b.tensor(name).dtype
        assert torch.equal(raw(a.tensor(name)), raw(b.tensor(name))), name


def test_there_and_back_again_changes_no_byte(source, tmp_path):
    there = tmp_path / "there"
    result = convert_checkpoint(source, there, layout=Layout.TRANSFORMERS, shard_bytes=300_000)
    convert_checkpoint(there, tmp_path / "back", layout=Layout.OFFICIAL)
    checkpoint = Checkpoint.open(source)
    assert Checkpoint.open(there).layout is Layout.TRANSFORMERS
    assert_same_files(checkpoint, Checkpoint.open(there))
    assert_same_files(checkpoint, Checkpoint.open(tmp_path / "back"))
    assert (result.nbytes, result.tensors) == (checkpoint.nbytes(), len(checkpoint.names()))
    back = Checkpoint.open(tmp_path / "back")
    assert back.raw_config == checkpoint.raw_config
    assert Checkpoint.open(there).config == replace(CONFIG, draft_stages=3)


@pytest.mark.parametrize("weights", list(DTYPES))
def test_dequantised_weights_are_what_the_packed_ones_stand_for(source, tmp_path, weights):
    convert_checkpoint(source, tmp_path / "out", layout=Layout.OFFICIAL, weights=weights)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    after.check()
    assert "quantization_config" not in after.raw_config
    assert not any(name.endswith(".scale") for name in after.names())
    for name, _ in quantisable(CONFIG):
        wanted = before.stored(name).dequantise(DTYPES[weights])
        assert torch.equal(after.stored(name).weight, wanted)
    assert after.tensor("layers.0.hc_attn_fn").dtype == torch.float32
    assert after.tensor("norm.weight").dtype == DTYPES[weights]


def test_quantising_follows_the_rules_of_the_release(tmp_path):
    random_checkpoint(tmp_path / "source", CONFIG, quantised=False)
    convert_checkpoint(
        tmp_path / "source", tmp_path / "out", layout=Layout.OFFICIAL, weights=WeightFormat.FP4
    )
    before, after = Checkpoint.open(tmp_path / "source"), Checkpoint.open(tmp_path / "out")
    after.check()
    assert after.raw_config["quantization_config"]["scale_fmt"] == "ue8m0"
    for name, storage in quantisable(CONFIG):
        quantise = quantise_fp4 if storage is Storage.EXPERT else quantise_fp8
        weight, scale = quantise(before.stored(name).weight)
        assert torch.equal(raw(after.stored(name).weight), raw(weight))
        assert torch.equal(raw(after.stored(name).scale), raw(scale))
    kinds = {(n.removesuffix(".weight") + ".scale") in after for n in ("embed.weight", "norm")}
    assert kinds == {False}


def test_fp8_experts_hold_the_same_numbers_as_fp4_ones(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out", layout=Layout.OFFICIAL, weights=WeightFormat.FP8)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert after.config.expert_dtype == "fp8"
    for name, storage in quantisable(CONFIG):
        stored = after.stored(name)
        is_expert = storage is Storage.EXPERT
        wanted = torch.float32 if is_expert else torch.float8_e8m0fnu
        assert (stored.kind, stored.scale.dtype) == ("fp8", wanted)
        assert torch.equal(
            stored.dequantise(torch.float64), before.stored(name).dequantise(torch.float64)
        )


def test_what_goes_with_a_model_is_copied_and_its_code_is_not(source, tmp_path):
    (source / "encoding").mkdir()
    (source / "inference").mkdir()
    for name in ("tokenizer.json", "generation_config.json", "encoding/e.py", "inference/model.py"):
        (source / name).write_text(name)
    (source / "inference" / "config.json").write_text('{"n_mtp_layers": 3, "expert_dtype": "fp4"}')
    fp8 = WeightFormat.FP8
    result = convert_checkpoint(source, tmp_path / "out", layout=Layout.OFFICIAL, weights=fp8)
    copied = {"tokenizer.json", "generation_config.json", "encoding/e.py", "inference/config.json"}
    assert set(result.files) == copied
    assert (tmp_path / "out" / "encoding" / "e.py").read_text() == "encoding/e.py"
    inference = json.loads((tmp_path / "out" / "inference" / "config.json").read_text())
    assert inference == {"n_mtp_layers": 3, "expert_dtype": "fp8"}


def test_a_failure_leaves_no_folder(tmp_path):
    tensors = dict(random_tensors(CONFIG, quantised=False))
    tensors["layers.2.ffn.experts.3.w2.weight"][5, 5] = torch.inf
    save_checkpoint(tmp_path / "source", CONFIG, tensors.items())
    with pytest.raises(CheckpointError, match=r"layers\.2\S+ cannot be converted: a weight is inf"):
        convert_checkpoint(
            tmp_path / "source", tmp_path / "out", layout=Layout.OFFICIAL, weights=WeightFormat.FP4
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_used_folder_a_broken_source_and_an_unknown_dialect_are_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        convert_checkpoint(source, source, layout=Layout.OFFICIAL)
    tensors = [(n, t) for n, t in random_tensors(CONFIG) if n != "norm.weight"]
    save_checkpoint(tmp_path / "broken", CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"1 problem: norm\.weight is missing"):
        convert_checkpoint(tmp_path / "broken", tmp_path / "out", layout=Layout.OFFICIAL)
    two_rates = replace(CONFIG, compress_ratios=(4, 8, 16))
    random_checkpoint(tmp_path / "two", two_rates)
    with pytest.raises(ConfigError, match="knows one rate beside 0 and 4"):
        convert_checkpoint(tmp_path / "two", tmp_path / "out", layout=Layout.TRANSFORMERS)


def test_the_command_converts_and_prints_the_folder(source, tmp_path):
    app = typer.Typer()
    app.command()(convert)
    out = tmp_path / "out"
    args = [str(source), str(out), "--to", "transformers", "--weights", "bf16"]
    result = CliRunner().invoke(app, [*args, "--shard-size", "500KB"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.strip() == str(out)
    assert len(list(out.glob("*.safetensors"))) > 4
    Checkpoint.open(out).check()
    assert CliRunner().invoke(app, [*args[:3], "hf"]).exit_code == 2
    with pytest.raises(ConfigError, match="is no size"):
        CliRunner().invoke(app, [*args, "--shard-size", "x"], catch_exceptions=False)
