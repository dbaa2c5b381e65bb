"""From a GGUF file to a folder in the Hugging Face layout.

Quantised weights are dequantised and stored as bfloat16: float32 and bfloat16 runs then use the
same weights, and the folder takes two bytes a weight. Files that hold their matrices as float32 or
float16 are stored as float32, which is exact.

Source of the layouts: llama.cpp, convert_hf_to_gguf.py (LlamaModel.permute, Gemma norm_shift).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dspark.errors import CheckpointError
from dspark.models.gguf_config import Architecture, build_config, get_architecture
from dspark.models.gguf_reader import GGUFFile, read_gguf
from dspark.models.gguf_tokenizer import save_tokenizer
from dspark.models.progress import SILENT, ProgressSink

__all__ = ["import_gguf"]

_SHARD_BYTES = 4 << 30
_EXACT_TYPES = (0, 1)  # ggml F32, F16
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IGNORED = frozenset({"rope_freqs.weight"})  # read into the config
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def import_gguf(path: Path, folder: Path, *, progress: ProgressSink = SILENT) -> None:
    """Convert a GGUF file.

    Args:
        path: The file.
        folder: An existing folder to write to; incomplete if this raises.
        progress: Told how many bytes of the file are converted.

    Raises:
        CheckpointError: If the file is damaged or lacks something.
        CapabilityError: If its architecture or tokenizer is not supported.
    """
    file = read_gguf(path)
    architecture = get_architecture(file)
    fields = build_config(file)
    names = {name: _hf_name(file, architecture, name) for name in file.tensors}
    dtype = _storage_dtype(file)
    config = _make_config(fields, dtype)
    _check_shapes(file, names, config)
    save_tokenizer(file, folder)
    config.save_pretrained(folder)
    _save_generation_config(fields, folder)
    _save_weights(_converted(file, architecture, fields, names, dtype, progress), folder)


def _hf_name(file: GGUFFile, architecture: Architecture, name: str) -> str | None:
    if name in _IGNORED:
        return None
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in architecture.layer_names:
        raise CheckpointError(
            f"{file.path} holds the tensor {name}, which is no part of a "
            f"{architecture.model_type} model."
        )
    return f"model.layers.{match[1]}.{architecture.layer_names[match[2]]}.{match[3]}"


def _storage_dtype(file: GGUFFile) -> torch.dtype:
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    is_exact = all(tensor.type_id in _EXACT_TYPES for tensor in matrices)
    return torch.float32 if is_exact else torch.bfloat16


def _make_config(fields: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import AutoConfig

    arguments = {key: value for key, value in fields.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(fields["model_type"], **arguments)
    except (ValueError, TypeError, KeyError) as exc:
        raise CheckpointError(f"the GGUF metadata makes no valid config ({exc}).") from exc
    config.dtype = dtype
    return config


def _check_shapes(file: GGUFFile, names: dict[str, str | None], config: Any) -> None:
    """Compare names and shapes with what transformers will look for."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    found = {hf: file.tensors[name].shape for name, hf in names.items() if hf is not None}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{file.path} holds {name} with shape {found.get(name)}, "
                f"but its config needs {wanted.get(name)}."
            )


def _converted(
    file: GGUFFile,
    architecture: Architecture,
    fields: dict[str, Any],
    names: dict[str, str | None],
    dtype: torch.dtype,
    progress: ProgressSink,
) -> Iterator[tuple[str, torch.Tensor]]:
    progress.stage("converting", sum(t.stop - t.start for t in file.tensors.values()))
    done = 0
    for name, hf_name in names.items():
        if hf_name is not None:
            values = torch.from_numpy(file.load(name))
            if architecture.interleaves_rope:
                values = _order_halves(name, values, fields)
            if architecture.norm_offset and name.endswith("norm.weight"):
                values = values - architecture.norm_offset
            yield hf_name, values.to(dtype).contiguous()
        done += file.tensors[name].stop - file.tensors[name].start
        progress.advance_to(done)


def _order_halves(name: str, values: torch.Tensor, fields: dict[str, Any]) -> torch.Tensor:
    """Put the rows of q and k from pairs (x0 y0 x1 y1 ...) back into halves (x0 x1 ... y0 y1 ...).

    Args:
        name: GGUF name; others than q and k are left alone.
        values: [heads * head_dim, ...].
        fields: The config.

    Returns:
        The same shape.
    """
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return values
    heads = fields["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    tail = values.shape[1:]
    pairs = values.reshape(heads, -1, 2, *tail)  # [heads, head_dim / 2, 2, ...]
    return pairs.transpose(1, 2).reshape(values.shape)


def _save_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def write() -> None:
        path = folder / f"model-{len(shards) + 1:05d}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        # The writer makes files that only their owner can read; follow the other files.
        path.chmod((folder / "config.json").stat().st_mode & 0o777)
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > _SHARD_BYTES:
            write()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    _name_shards(shards, total, folder)


def _name_shards(shards: list[list[str]], total: int, folder: Path) -> None:
    count = len(shards)
    if count == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{count:05d}.safetensors"
        (folder / f"model-{number:05d}.safetensors").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _save_generation_config(fields: dict[str, Any], folder: Path) -> None:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = {key: fields[key] for key in keys if fields[key] is not None}
    text = json.dumps(config, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
