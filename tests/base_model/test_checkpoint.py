from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers import quantizer_finegrained_fp8

from dspark.base_model import checkpoint_write
from dspark.base_model.checkpoint import INDEX_NAME, Checkpoint, Layout
from dspark.base_model.checkpoint_write import random_checkpoint, save_checkpoint
from dspark.base_model.config import V4Config
from dspark.base_model.names import (
    Storage,
    expected_tensors,
    official_name,
    transformers_name,
)
from dspark.base_model.presets import preset
from dspark.base_model.random_weights import random_tensors
from dspark.errors import CheckpointError

# A layer of every kind, and few experts.
FEW = {"num_hidden_layers": 3, "compress_ratios": (0, 4, 8), "n_routed_experts": 4}


def small(name: str) -> V4Config:
    """A tiny preset with fewer layers and experts."""
    config = preset(name)
    if config.dspark_target_layer_ids:
        config = replace(config, dspark_target_layer_ids=(0, 1, 2))
    return replace(config, **FEW)


TINY = small("v4-tiny")
# The config dialect of the releases knows the rates 4 and 128 only, in transformers.
RELEASE_LIKE = replace(small("v4-tiny-dspark"), compress_ratios=(0, 4, 128))
QUANTISED = (Storage.FP8, Storage.EXPERT)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    views = [x.contiguous().flatten().view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*views)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "model"
    random_checkpoint(folder, TINY, shard_bytes=300_000)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of its own, which a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.mark.parametrize(("name", "count"), [("v4-flash", 69187), ("v4-flash-dspark", 72317)])
def test_a_release_has_as_many_tensors_as_we_expect(name, count):
    """The counts are those of the released checkpoints' indexes."""
    specs = expected_tensors(preset(name)).values()
    assert len(specs) + sum(spec.storage in QUANTISED for spec in specs) == count


@pytest.mark.parametrize("name", ["v4-tiny", "v4-tiny-mtp", "v4-tiny-dspark"])
def test_every_name_survives_the_way_to_transformers_and_back(name):
    names = set(expected_tensors(preset(name)))
    names |= {n.removesuffix("weight") + "scale" for n in names if n.endswith("weight")}
    for official in names:
        assert official_name(official) == official
        assert official_name(transformers_name(official)) == official


@pytest.mark.parametrize(
    ("name", "layout", "quantised"),
    [
        ("v4-tiny", Layout.OFFICIAL, True),
        ("v4-tiny", Layout.TRANSFORMERS, False),
        ("v4-tiny-mtp", Layout.OFFICIAL, False),
        ("v4-tiny-mtp", Layout.TRANSFORMERS, True),
        ("v4-tiny-dspark", Layout.OFFICIAL, True),
        ("v4-tiny-dspark", Layout.TRANSFORMERS, True),
        ("v4-tiny-dspark", Layout.TRANSFORMERS, False),
    ],
)
def test_what_is_written_is_read(name, layout, quantised, tmp_path):
    config = small(name)
    random_checkpoint(
        tmp_path / "m", config, quantised=quantised, layout=layout, shard_bytes=300_000
    )
    checkpoint = Checkpoint.open(tmp_path / "m")
    checkpoint.check()
    assert (checkpoint.layout, checkpoint.config) == (layout, config)
    wanted = dict(random_tensors(config, quantised=quantised))
    assert set(wanted) == set(checkpoint.names())
    for key, tensor in wanted.items():
        assert same_bytes(tensor, checkpoint.tensor(key))
    assert checkpoint.nbytes() == sum(tensor.nbytes for tensor in wanted.values())
    assert checkpoint.nbytes("layers.0.attn.attn_sink") == 16
    # safetensors itself reads the files, too.
    read = [key for path in (tmp_path / "m").glob("*.safetensors") for key in load_file(path)]
    assert len(read) == len(wanted)


def test_fp8_experts_of_a_base_model_have_float_scales(tmp_path):
    random_checkpoint(tmp_path / "m", replace(TINY, expert_dtype="fp8"))
    checkpoint = Checkpoint.open(tmp_path / "m")
    checkpoint.check()
    stored = checkpoint.stored("layers.1.ffn.experts.2.w1")
    assert (stored.kind, stored.scale.dtype) == ("fp8", torch.float32)


def test_random_weights_keep_activations_in_size_and_ids_distinct(folder):
    checkpoint = Checkpoint.open(folder)
    for name in ("layers.0.attn.wq_b", "layers.2.ffn.experts.3.w1", "layers.1.attn.compressor.wkv"):
        weight = checkpoint.stored(name).dequantise(torch.float32)
        assert 0.5 < float(weight.std()) * weight.shape[1] ** 0.5 < 2
    table = checkpoint.tensor("layers.0.ffn.gate.tid2eid")
    assert all(len(set(row)) == TINY.num_experts_per_tok for row in table.tolist())


def test_tensors_are_views_of_the_files(folder):
    checkpoint = Checkpoint.open(folder)
    before = checkpoint.tensor("layers.0.attn.wq_a.weight")
    again = checkpoint.tensor("layers.0.attn.wq_a.weight")
    assert before.data_ptr() == again.data_ptr()
    content = before.clone()
    before.view(torch.uint8).zero_()  # private: neither a crash nor a changed file
    assert same_bytes(Checkpoint.open(folder).tensor("layers.0.attn.wq_a.weight"), content)


def peak() -> int:
    """The most memory that this process has had since the mark was last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_reading_all_weights_takes_their_packed_size_of_memory(tmp_path):
    config = replace(
        TINY, hidden_size=512, moe_intermediate_size=512, n_routed_experts=32, draft_stages=0
    )
    random_checkpoint(tmp_path / "m", config, shard_bytes=40_000_000)
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark to what is in use now
    before = peak()
    checkpoint = Checkpoint.open(tmp_path / "m")
    for name in checkpoint.names():
        checkpoint.tensor(name).flatten().view(torch.uint8).max()
    assert checkpoint.nbytes() > 30_000_000
    assert 0.5 * checkpoint.nbytes() < peak() - before < 1.1 * checkpoint.nbytes()


@pytest.fixture(scope="module")
def hf_model():
    values = replace(RELEASE_LIKE, draft_stages=0).to_transformers()
    known = {k: v for k, v in values.items() if k not in ("architectures", "model_type")}
    torch.manual_seed(3)
    return transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**known))


@pytest.mark.parametrize("is_stacked", [False, True], ids=["save_pretrained", "as in memory"])
def test_what_transformers_writes_is_read(hf_model, is_stacked, tmp_path):
    if is_stacked:
        hf_model.config.save_pretrained(tmp_path)
        save_file(hf_model.state_dict(), tmp_path / "model.safetensors")
    else:
        hf_model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check()
    assert checkpoint.layout is Layout.TRANSFORMERS
    assert checkpoint.config.compress_ratios == RELEASE_LIKE.compress_ratios
    assert_equals_transformers(checkpoint, hf_model, torch.float32)


def assert_equals_transformers(checkpoint, model, dtype):
    theirs = model.state_dict()
    inner = checkpoint.config.moe_intermediate_size
    seen = set()
    for name, spec in expected_tensors(replace(checkpoint.config, draft_stages=0)).items():
        if spec.storage in QUANTISED:
            ours = checkpoint.stored(name.removesuffix(".weight")).dequantise(dtype)
        else:
            ours = checkpoint.tensor(name)
        key, rows = transformers_name(name), slice(None)
        if spec.storage is Storage.EXPERT:
            layer, expert, matrix = name.split(".")[1], *name.split(".")[4:6]
            which = "down_proj" if matrix == "w2" else "gate_up_proj"
            key = f"model.layers.{layer}.mlp.experts.{which}"
            rows = {"w1": slice(0, inner), "w2": slice(None), "w3": slice(inner, None)}[matrix]
            got = theirs[key][int(expert)][rows]
        else:
            got = theirs[key]
        seen.add(key)
        assert torch.equal(got.double(), ours.double()), name
    assert seen == set(theirs)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_dequantises_our_files_to_the_same_weights(
    layout, expert_dtype, tmp_path, monkeypatch
):
    # It asks for accelerate before it loads FP8, and does not use it on a CPU.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    config = replace(RELEASE_LIKE, expert_dtype=expert_dtype)
    random_checkpoint(tmp_path / "m", config, layout=layout)
    # Each layout and each kind of expert in both dtypes.
    is_first = (layout is Layout.OFFICIAL) == (expert_dtype == "fp4")
    dtype = torch.float32 if is_first else torch.bfloat16
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    assert_equals_transformers(Checkpoint.open(tmp_path / "m"), model, dtype)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_header(path: Path, change) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def test_a_missing_shard_is_named(folder):
    shards(folder)[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+.safetensors is missing, which"):
        Checkpoint.open(folder)


def test_a_shard_that_is_cut_short_is_named(folder):
    path = shards(folder)[0]
    for size in (path.stat().st_size - 1, 1000, 3, 0):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=f"{path.name} is cut short"):
            Checkpoint.open(folder)


def test_an_index_that_names_what_is_not_there_is_refused(folder):
    index = folder / INDEX_NAME
    raw = json.loads(index.read_text())
    raw["weight_map"]["layers.9.x"] = shards(folder)[0].name
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"does not hold layers\.9\.x, but the index says so"):
        Checkpoint.open(folder)
    raw["weight_map"]["layers.9.x"] = "../other.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="which no shard is"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data_offsets", [0, 10**12], "takes 131072 bytes, but its offsets span"),
        ("data_offsets", [8, 131080], r"(norm|head|embed)\S* overlaps"),
        ("data_offsets", [10**12, 10**12 + 131072], "is cut short: embed.weight ends at byte"),
        ("data_offsets", [-8, 131064], "offsets that are no sizes"),
        ("shape", [512, 127], "takes 130048 bytes, but its offsets span 131072"),
        ("shape", "512", "no sizes"),
        ("dtype", "Q4", "embed.weight is of dtype 'Q4'; known: F64"),
    ],
)
def test_headers_that_cannot_be_true_are_refused(folder, field, value, message):
    edit_header(shards(folder)[0], lambda header: header["embed.weight"].update({field: value}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_a_header_that_is_no_json_is_refused(folder):
    path = shards(folder)[0]
    path.write_bytes(struct.pack("<Q", 4) + b"{{{{" + b"0" * 100)
    with pytest.raises(CheckpointError, match="header that is not JSON"):
        Checkpoint.open(folder)


def rewritten(tmp_path: Path, change) -> Checkpoint:
    tensors = dict(random_tensors(TINY))
    change(tensors)
    save_checkpoint(tmp_path / "m", TINY, tensors.items())
    return Checkpoint.open(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.attn.wq_a.weight", None, "layers.0.attn.wq_a.weight is missing"),
        ("layers.0.attn.wq_a.scale", None, "wq_a.weight in .*needs a scale, but has none"),
        ("layers.0.attn.wq_a.scale", torch.ones(2, 1), r"scale of \[2, 1\], but needs \[1, 1\]"),
        ("layers.0.attn.wq_c", torch.ones(2), r"wq_c in model-00001-of-00001.safetensors is not"),
        ("norm.weight", torch.ones(127), r"norm.weight in .* has shape \[127\], but needs \[128\]"),
        ("norm.weight", torch.ones(128, dtype=torch.int64), "int64, but must be a float"),
        ("layers.0.ffn.gate.tid2eid", torch.ones(512, 2), "float32, but must be an integer"),
        ("embed.scale", torch.ones(4, 1), "embed.weight in .* has a scale, but is not a quantised"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path, name, tensor, message):
    def change(tensors):
        tensors[name] = tensor
        if tensor is None:
            del tensors[name]

    with pytest.raises(CheckpointError, match=message):
        rewritten(tmp_path, change).check()


def test_many_problems_are_counted_and_five_are_listed(tmp_path):
    def change(tensors):
        for name in [n for n in tensors if n.startswith("layers.0.attn.")]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"8 problems: .*and 3 more") as caught:
        rewritten(tmp_path, change).check()
    assert caught.value.message.count("is missing") == 5


def test_a_wrong_scale_is_refused_where_it_is_read(tmp_path):
    def change(tensors):
        tensors["layers.0.attn.wq_a.scale"] = torch.ones(2, 1)

    with pytest.raises(CheckpointError, match=r"safetensors: layers.0.attn.wq_a.weight of shape"):
        rewritten(tmp_path, change).stored("layers.0.attn.wq_a")


def test_draft_stages_are_counted_not_believed(tmp_path):
    """The release's config.json says one stage where three are shipped."""
    random_checkpoint(tmp_path / "m", small("v4-tiny-dspark"))
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert raw["num_nextn_predict_layers"] == 1
    raw["compress_ratios"] = raw["compress_ratios"][:3]
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.config.draft_stages == 3
    (tmp_path / "m" / "inference").mkdir()
    (tmp_path / "m" / "inference" / "config.json").write_text('{"n_mtp_layers": 4}')
    with pytest.raises(CheckpointError, match="names 4 draft stages, but 3 are there"):
        checkpoint.check()


def test_an_odd_place_in_a_file_is_no_obstacle(tmp_path):
    """A bfloat16 tensor behind an odd number of bytes cannot be viewed where it lies."""
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "norm.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [3, 7]},
    }
    raw = json.dumps(header).encode()
    data = torch.tensor([1.5, -2.0]).bfloat16().view(torch.uint8).numpy().tobytes()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"abc" + data)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_official()))
    assert Checkpoint.open(tmp_path).tensor("norm.weight").tolist() == [1.5, -2.0]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def tensors():
        yield "embed.weight", torch.ones(4, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "m", TINY, tensors())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_in_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_write.os, "pwrite", full)
    with pytest.raises(CheckpointError, match="cannot be written: no space left"):
        random_checkpoint(tmp_path / "m", TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_and_a_double_name_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        random_checkpoint(folder, TINY)
    twice = [("norm.weight", torch.ones(2))] * 2
    with pytest.raises(CheckpointError, match="written twice"):
        save_checkpoint(tmp_path / "new", TINY, twice)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "config.json: the model's config lacks vocab_size"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(folder, content, message):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)
