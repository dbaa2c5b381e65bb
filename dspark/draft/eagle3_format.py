"""EAGLE-3 checkpoints: reading and writing tensors; eagle3_config.py has the three layouts.

Only safetensors and JSON are read, and every tensor must have its place: a name or a shape that
does not fit is refused by name, before anything is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.draft.eagle3_config import Layout, is_eagle3, read_config, write_config
from dspark.draft.eagle3_module import Eagle3Config, Eagle3Module
from dspark.draft.grow import GrowthConfig
from dspark.errors import CapabilityError, CheckpointError
from dspark.target import Target, TargetInfo

if TYPE_CHECKING:
    from dspark.draft.eagle3 import Eagle3Drafter

__all__ = ["Layout", "is_eagle3", "load_eagle3", "read_module", "save_eagle3", "save_tensors"]

_WEIGHTS = "model.safetensors"
_UNUSED = ("verifier_norm.weight", "verifier_lm_head.weight")  # the target's, for training


def load_eagle3(
    folder: Path, target: Target, *, config: GrowthConfig | None = None
) -> Eagle3Drafter:
    """Load an EAGLE-3 draft for a target.

    Args:
        folder: With config.json and *.safetensors.
        target: What it drafts for; lends its embedding if the checkpoint has none.
        config: Settings of the drafter.

    Returns:
        The drafter, in the target's dtype and on its device.

    Raises:
        CheckpointError: If a file is missing, broken or pickled, or tensors are missing, unknown or
            of the wrong shape.
        ConfigError: If the draft was made for another kind of target.
        CapabilityError: If it needs what this code or the target does not have.
    """
    from dspark.draft.eagle3 import Eagle3Drafter  # which offers this function to its users

    module = read_module(folder, target.info)
    shape = module.config
    device = target.info.device.rpartition(", ")[2]  # a split target's head is on the last one
    module.to(device=device, dtype=getattr(torch, target.info.dtype))
    embed = getattr(target, "embed", None)
    if embed is None and not shape.has_embedding:
        raise CapabilityError(
            f"the EAGLE-3 draft {folder.name} has no embedding of its own, and {target.info.name} "
            "does not lend its.",
            hint="use a draft whose checkpoint holds embed_tokens.weight",
        )
    return Eagle3Drafter(module.requires_grad_(False), embed=embed, config=config)


def read_module(folder: Path, info: TargetInfo) -> Eagle3Module:
    """Read a draft as it is stored; see `load_eagle3`.

    Args:
        folder: With config.json and *.safetensors.
        info: What it drafts for.
    """
    raw = _read_json(folder / "config.json")
    tensors = _read_tensors(folder)
    shape = read_config(raw, info, has_embedding="embed_tokens.weight" in tensors)
    return _build(shape, tensors, folder, tied=raw.get("tie_word_embeddings") is True)


# -- tensors ----------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror}.") from exc
    except ValueError as exc:
        raise CheckpointError(f"{path} is not valid JSON ({exc}).") from exc
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return raw


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, by the names that `Eagle3Module` uses."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / (_WEIGHTS + ".index.json")
    if index.exists():
        listed = _read_json(index).get("weight_map")
        named = set(listed.values()) if isinstance(listed, dict) else set()
        if absent := named - {path.name for path in files}:
            raise CheckpointError(f"{folder} lacks {min(absent)}, which {index.name} names.")
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = "holds only pickled weights, which can run code" if pickled else "holds no weights"
        raise CheckpointError(f"{folder} {why}; only *.safetensors are read.")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensors[_canonical(name)] = file.get_tensor(name)
        except (SafetensorError, OSError) as exc:
            raise CheckpointError(f"{path} is not a whole safetensors file ({exc}).") from exc
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in _UNUSED and not name.endswith("rotary_emb.inv_freq")
    }


def _canonical(name: str) -> str:
    name = name.removeprefix("model.")
    for old, new in (("midlayer.", "layers.0."), ("fc_norms.", "fc_norm.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _build(
    config: Eagle3Config, tensors: dict[str, Tensor], folder: Path, *, tied: bool
) -> Eagle3Module:
    """The module with these weights; every tensor must have its place."""
    _settle_vocabulary(config, tensors, folder)
    embedding = tensors.get("embed_tokens.weight")
    if tied and embedding is not None and config.draft_vocab_size == config.vocab_size:
        tensors.setdefault("lm_head.weight", embedding)
    with torch.device("meta"):
        module = Eagle3Module(config)
    wanted = module.state_dict()
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(f"the draft {folder} lacks {_listed(missing)}.")
    if extra := [name for name in tensors if name not in wanted]:
        raise CheckpointError(f"the draft {folder} holds unknown {_listed(extra)}.")
    for name, tensor in tensors.items():
        expected = wanted[name]
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"tensor {name} of the draft {folder} has shape {list(tensor.shape)}, but must "
                f"have {list(expected.shape)}."
            )
        if tensor.is_floating_point() != expected.is_floating_point():
            raise CheckpointError(
                f"tensor {name} of the draft {folder} is of type {tensor.dtype}, which cannot "
                "be used."
            )
    module.load_state_dict(tensors, assign=True)
    return module


def _settle_vocabulary(config: Eagle3Config, tensors: dict[str, Tensor], folder: Path) -> None:
    """Check `d2t` and `t2d`, which must tell of the same tokens, and leave what the module needs.

    A wrong map would cost nearly all acceptance and give no other sign.
    """
    known = tensors.pop("t2d", None)
    offsets = tensors.get("d2t")
    size = config.draft_vocab_size
    if offsets is None or offsets.shape != (size,) or offsets.is_floating_point():
        return  # reported with the other tensors, where it is needed
    ids = offsets.to(torch.int64) + torch.arange(size)
    tensors["d2t"] = offsets.to(torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or len(ids.unique()) < size:
        raise CheckpointError(
            f"tensor d2t of the draft {folder} must map to distinct tokens within 0 to "
            f"{config.vocab_size - 1}; it holds offsets, not ids."
        )
    if known is not None and bool(known.any()):  # a t2d never filled in says nothing
        marked = known.flatten().nonzero().flatten()
        if not torch.equal(marked, ids.sort().values):
            raise CheckpointError(
                f"tensors d2t and t2d of the draft {folder} contradict each other."
            )
    if size == config.vocab_size:
        if bool(offsets.any()):
            raise CapabilityError(f"the draft {folder} reorders the whole vocabulary (tensor d2t).")
        del tensors["d2t"]


def _listed(names: Sequence[str]) -> str:
    head = ", ".join(sorted(names)[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {head}{more}"


# -- writing ----------------------------------------------------------------------------------


def save_eagle3(
    folder: Path,
    module: Eagle3Module,
    *,
    layout: Layout = "eagle3",
    num_target_layers: int | None = None,
    verifier: str | None = None,
) -> None:
    """Write a draft in one of the layouts.

    Args:
        folder: Where to; made if need be.
        module: The draft.
        layout: Which one.
        num_target_layers: Decoder layers of the target; noted in DeepSpec's layout.
        verifier: Name of the target; noted in speculators' layout.

    Raises:
        ConfigError: If the layout cannot say what the draft is.
    """
    raw = write_config(module.config, layout, num_target_layers, verifier)
    save_tensors(folder, module.config, module.state_dict(), raw, layout=layout)


def save_tensors(
    folder: Path,
    config: Eagle3Config,
    tensors: Mapping[str, Tensor],
    raw: Mapping[str, Any],
    *,
    layout: Layout,
) -> None:
    """Write a draft's tensors, and then its config.json, each whole or not at all.

    Args:
        folder: Where to; made if need be.
        config: The draft's.
        tensors: By the names that `Eagle3Module` uses.
        raw: Contents of config.json.
        layout: What `raw` is in.
    """
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if layout == "eagle3":
        stored = {name.replace("layers.0.", "midlayer."): t for name, t in stored.items()}
    if config.draft_vocab_size < config.vocab_size:  # vLLM refuses a map of the whole vocabulary
        ids = torch.arange(config.draft_vocab_size)
        offsets = stored.setdefault("d2t", torch.zeros_like(ids))
        stored["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
        stored["t2d"][ids + offsets.cpu()] = True
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / (_WEIGHTS + ".part")
    save_file(stored, half, metadata={"format": "pt"})
    half.replace(folder / _WEIGHTS)
    half = folder / "config.json.part"
    half.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    half.replace(folder / "config.json")
