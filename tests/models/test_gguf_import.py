from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from dspark.errors import CapabilityError, CheckpointError, DsparkError
from dspark.models.gguf_config import build_config
from dspark.models.gguf_import import import_gguf
from dspark.models.gguf_reader import GGUFFile, GGUFTensor, read_gguf

HEADS, KV_HEADS, LAYERS, THETA, EPS = 4, 2, 2, 10_000.0, 1e-5


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def rotate_pairs(x: np.ndarray) -> np.ndarray:
    """Rope as llama.cpp applies it to llama: dimensions 2i and 2i + 1 turn together."""
    t, _, d = x.shape
    angle = np.arange(t)[:, None] / THETA ** (np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def llama_logits(weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The llama forward in float64, straight from the GGUF tensors in their own order."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = w["token_embd.weight"][ids]
    t, hidden = x.shape
    d = hidden // HEADS
    mask = np.triu(np.full((t, t), -np.inf), 1)
    for layer in range(LAYERS):
        b = {name: w[f"blk.{layer}.{name}.weight"] for name in BLOCK}
        h = norm(x, b["attn_norm"])
        q = rotate_pairs((h @ b["attn_q"].T).reshape(t, HEADS, d))
        k = rotate_pairs((h @ b["attn_k"].T).reshape(t, KV_HEADS, d))
        v = (h @ b["attn_v"].T).reshape(t, KV_HEADS, d)
        k, v = (np.repeat(z, HEADS // KV_HEADS, axis=1) for z in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d) + mask
        law = np.exp(scores - scores.max(-1, keepdims=True))
        law /= law.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", law, v).reshape(t, hidden) @ b["attn_output"].T
        h = norm(x, b["ffn_norm"])
        gate = h @ b["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ b["ffn_up"].T)) @ b["ffn_down"].T
    return norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T


BLOCK = [
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
]


def convert(path: Path, folder: Path) -> Path:
    folder.mkdir()
    import_gguf(path, folder)
    return folder


def hf_logits(folder: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def test_logits_equal_a_forward_written_for_the_gguf_layout(gguf_writer, tmp_path):
    weights = gguf_writer(tmp_path / "tiny.gguf")
    folder = convert(tmp_path / "tiny.gguf", tmp_path / "out")
    ids = [7, 99, 3, 3, 260, 41, 12]
    expected = llama_logits(weights, ids)
    np.testing.assert_allclose(hf_logits(folder, ids), expected, rtol=1e-4, atol=1e-4)


def test_the_check_above_sees_a_missing_permutation(gguf_writer, tmp_path, monkeypatch):
    from dspark.models import gguf_import

    weights = gguf_writer(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_import, "_order_halves", lambda name, values, fields: values)
    folder = convert(tmp_path / "tiny.gguf", tmp_path / "out")
    ids = [7, 99, 3, 3, 260, 41, 12]
    assert np.abs(hf_logits(folder, ids) - llama_logits(weights, ids)).max() > 0.1


def test_several_shards_hold_the_same_weights(tiny_gguf, tmp_path, monkeypatch):
    from dspark.models import check_checkpoint, gguf_import

    whole = convert(tiny_gguf, tmp_path / "whole")
    monkeypatch.setattr(gguf_import, "_SHARD_BYTES", 20_000)
    parts = convert(tiny_gguf, tmp_path / "parts")
    assert len(list(parts.glob("*.safetensors"))) > 1
    check_checkpoint(parts)
    np.testing.assert_array_equal(hf_logits(parts, [1, 2, 3]), hf_logits(whole, [1, 2, 3]))


def test_the_tokenizer_survives_and_splits_digits(tiny_gguf, tmp_path):
    from transformers import AutoTokenizer

    folder = convert(tiny_gguf, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tricky = ["the  12 the", " \n\t\r\n", "日本語 🙂", "<|im_start|>the<|im_end|>", ""]
    for text in tricky:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Plain GPT-2 splitting would give one space to the digit and leave 'Ġ', 'Ġ'.
    assert tokenizer.tokenize("the  1") == ["the", "ĠĠ", "1"]
    assert tokenizer("the").input_ids == tokenizer.convert_tokens_to_ids(["the"])
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 261


def test_an_unknown_way_to_split_text_is_refused(gguf_writer, tmp_path):
    gguf_writer(tmp_path / "odd.gguf", pre="of-the-future")
    with pytest.raises(CapabilityError, match="'of-the-future'"):
        convert(tmp_path / "odd.gguf", tmp_path / "out")


def test_another_architecture_is_refused_and_the_supported_ones_are_listed(gguf_writer, tmp_path):
    gguf_writer(tmp_path / "odd.gguf", arch="mamba")
    with pytest.raises(CapabilityError, match=r"'mamba'.*llama, qwen2, qwen3, gemma2, gemma3"):
        convert(tmp_path / "odd.gguf", tmp_path / "out")


def test_a_file_cut_anywhere_or_of_random_bytes_is_refused(tiny_gguf, tmp_path):
    data = tiny_gguf.read_bytes()
    rng = np.random.default_rng(5)
    cuts = [0, 3, 4, 23, 24, 300, len(data) // 2, len(data) - 40]
    pieces = [data[:cut] for cut in cuts] + [rng.bytes(4096), b"GGUF" + rng.bytes(4096)]
    for piece in pieces:
        (tmp_path / "bad.gguf").write_bytes(piece)
        with pytest.raises(DsparkError, match=r"bad\.gguf"):
            read_gguf(tmp_path / "bad.gguf")


def test_a_header_with_flipped_bytes_never_escapes_as_another_error(tiny_gguf, tmp_path):
    data = bytearray(tiny_gguf.read_bytes())
    rng = np.random.default_rng(7)
    for _ in range(200):
        copy = bytearray(data)
        copy[int(rng.integers(4, 1200))] ^= int(rng.integers(1, 256))
        (tmp_path / "bad.gguf").write_bytes(copy)
        try:
            build_config(read_gguf(tmp_path / "bad.gguf"))
        except DsparkError:
            continue


def header(arch: str, **entries: object) -> GGUFFile:
    file = GGUFFile(Path("model.gguf"))
    required = {
        "block_count": 12,
        "context_length": 1024,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    }
    merged = required | {key.replace("__", "."): value for key, value in entries.items()}
    file.metadata = {f"{arch}.{key}": value for key, value in merged.items()}
    file.metadata["general.architecture"] = arch
    file.tensors["token_embd.weight"] = GGUFTensor("token_embd.weight", (100, 64), 0, 0, 0)
    return file


def test_gemma3_gets_its_layer_pattern_ropes_and_query_scale():
    file = header("gemma3", attention__key_length=256, attention__sliding_window=512)
    config = build_config(file)
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    assert config["layer_types"] == kinds * 2
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000.0
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 1_000_000.0
    assert config["query_pre_attn_scalar"] == 256
    assert config["rms_norm_eps"] == 1e-6
    assert config["tie_word_embeddings"]


def test_gemma2_alternates_and_caps():
    config = build_config(header("gemma2", attention__key_length=256))
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 6
    assert config["attn_logit_softcapping"] == 50.0
    assert config["final_logit_softcapping"] == 30.0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"rope__dimension_count": 8, "attention__key_length": 16}, "rotates 8 of 16"),
        ({"attention__head_count_kv": np.array([1, 2])}, "for each layer"),
    ],
)
def test_what_cannot_be_read_faithfully_is_refused(entries, message):
    with pytest.raises(CapabilityError, match=message):
        build_config(header("llama", **entries))


def test_a_missing_entry_is_named():
    file = header("llama")
    del file.metadata["llama.block_count"]
    with pytest.raises(CheckpointError, match=r"lacks the entry llama\.block_count"):
        build_config(file)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_every_architecture_converts_back_to_the_weights_it_was_made_from(arch, tmp_path):
    """A random transformers model, renamed by gguf's own tables, must come back bit for bit."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model_type = "gemma3_text" if arch == "gemma3" else arch
    config = AutoConfig.for_model(
        model_type, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=16,
        query_pre_attn_scalar=8, tie_word_embeddings=True, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for value in model.parameters():  # biases and norms begin as constants
        torch.nn.init.normal_(value, std=0.2)
    write_from_hf(tmp_path / "x.gguf", arch, model)
    folder = convert(tmp_path / "x.gguf", tmp_path / "out")
    ids = list(range(40))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(hf_logits(folder, ids), expected, rtol=1e-4, atol=1e-4)


def write_from_hf(path: Path, arch: str, model) -> None:
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, 6)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(6)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    theta = model.config.rope_parameters
    writer.add_rope_freq_base(theta.get("full_attention", theta)["rope_theta"])
    if "gemma" in arch:
        writer.add_sliding_window(16)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = value.numpy()
        if "gemma" in arch and name.endswith("norm.weight"):
            array = array + 1
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_quantised_weights_are_stored_as_bfloat16_of_their_dequantised_values(
    gguf_writer, tmp_path
):
    import torch
    from safetensors.torch import load_file

    quant = gguf.GGMLQuantizationType.Q8_0
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(100, 64)).astype(np.float32)
    packed = gguf.quants.quantize(matrix, quant)
    writer = gguf.GGUFWriter(str(tmp_path / "q.gguf"), "llama")
    writer.add_tensor("token_embd.weight", packed, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "q.gguf")
    np.testing.assert_array_equal(
        file.load("token_embd.weight"), gguf.quants.dequantize(packed, quant)
    )
    from dspark.models import gguf_import

    assert gguf_import._storage_dtype(file) is torch.bfloat16
    gguf_writer(tmp_path / "f.gguf")
    folder = convert(tmp_path / "f.gguf", tmp_path / "out")
    held = load_file(folder / "model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.float32}
