"""From trained weights to a checkpoint in the release's layout: FP4 experts, FP8 linears.

A plain checkpoint is written first and packed by `dspark.base_model.convert`, so that no number is
quantised by other code than that of `dspark convert`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dspark.base_model.checkpoint import Checkpoint, Layout
from dspark.base_model.checkpoint_write import refuse_used, save_checkpoint
from dspark.base_model.config import V4Config
from dspark.base_model.convert import WeightFormat, convert_checkpoint
from dspark.base_model.names import Storage, expected_tensors
from dspark.errors import CheckpointError
from dspark.training.pretrain.drafts import DSparkNetwork, MTPNetwork
from dspark.training.pretrain.legs import load_weights
from dspark.training.pretrain.network import official_tensors
from dspark.training.pretrain.state import find_state, load_state

__all__ = ["CARD", "add_draft", "draft_tensors", "pack"]

CARD = "README.md"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "eos_token_id": 1}


def pack(
    folder: Path, config: V4Config, tensors: Mapping[str, Tensor], tokenizer: Path, card: str
) -> int:
    """Write a packed checkpoint with tokenizer, sampling defaults and card.

    Args:
        folder: Where to; must not exist, or be empty.
        config: Of the checkpoint; `draft_stages` says how many `mtp.*` blocks there are.
        tensors: Every tensor by official name, float32, without scales.
        tokenizer: Folder with the tokenizer's files.
        card: Text of README.md.

    Returns:
        Bytes of all files.

    Raises:
        CheckpointError: If the folder is used, a tensor is missing or the tokenizer is.
    """
    refuse_used(folder)
    missing = [name for name in _TOKENIZER if not (tokenizer / name).is_file()]
    if missing:
        raise CheckpointError(f"{tokenizer} has no {missing[0]}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        plain = Path(work) / "plain"
        save_checkpoint(plain, config, _ordered(config, tensors))
        for name in _TOKENIZER:
            shutil.copyfile(tokenizer / name, plain / name)
        text = json.dumps(_SAMPLING, indent=2) + "\n"
        (plain / "generation_config.json").write_text(text, encoding="utf-8")
        convert_checkpoint(plain, folder, layout=Layout.OFFICIAL, weights=WeightFormat.FP4)
    (folder / CARD).write_text(card + _file_list(folder), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _file_list(folder: Path) -> str:
    """The card's list of all files but itself."""
    lines = ["", "## Files", "", "| file | bytes | SHA-256 |", "|---|---|---|"]
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"| {path.name} | {path.stat().st_size} | {digest} |")
    return "\n".join(lines) + "\n"


def add_draft(
    folder: Path, target: Path, config: V4Config, draft: Mapping[str, Tensor], card: str
) -> int:
    """Write a checkpoint of a packed target and a draft module, which is packed here.

    What is packed once is exact in float32 and packs to the same numbers again.

    Args:
        folder: Where to; must not exist, or be empty.
        target: The packed target, with its tokenizer.
        config: With the draft's fields.
        draft: The `mtp.*` tensors, float32.
        card: Text of README.md.

    Returns:
        Bytes of all files.

    Raises:
        CheckpointError: If the folder is used or the target cannot be read.
    """
    checkpoint = Checkpoint.open(target)
    tensors = dict(draft)
    for name in expected_tensors(checkpoint.config):
        base = name.removesuffix(".weight")
        is_packed = name.endswith(".weight") and f"{base}.scale" in checkpoint
        tensors[name] = (
            checkpoint.stored(base).dequantise(torch.float32)
            if is_packed
            else checkpoint.tensor(name)
        )
    return pack(folder, config, tensors, target, card)


def draft_tensors(run: Path, kind: str, config: V4Config) -> dict[str, Tensor]:
    """The trained `mtp.*` tensors of a draft's run, experts apart.

    Raises:
        CheckpointError: If the run has no state, or one of another draft.
    """
    path = find_state(run)
    if path is None:
        raise CheckpointError(f"{run} holds no state of training.")
    stored, note = load_state(path)
    if note.get("draft") != kind:
        raise CheckpointError(f"{run} trained {note.get('draft')!r}, but {kind!r} is wanted.")
    network = DSparkNetwork(config) if kind == "dspark" else MTPNetwork(config)
    load_weights(network, stored)
    return official_tensors(network)


def _ordered(config: V4Config, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the order of the specification, so that equal weights give equal files."""
    for name, spec in expected_tensors(config).items():
        if name not in tensors:
            raise CheckpointError(f"there is no tensor {name} to write.")
        tensor = tensors[name]
        yield name, tensor if spec.storage is Storage.I64 else tensor.float()
