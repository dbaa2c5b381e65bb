"""From a folder to a drafter: which layout it has, and whether it fits the target.

A layout is told by config.json alone. Seams: EAGLE-3 modules go to dspark/draft/eagle3.py; a
DeepSeek-V4 target brings its own draft and needs no folder (loading.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dspark.draft.base import Drafter
from dspark.draft.dspark import DSparkDrafter, DSparkDrafterConfig
from dspark.draft.dspark_config import DSparkConfig
from dspark.draft.dspark_module import DSparkModule
from dspark.draft.formats import deepspec, native, specforge, speculators
from dspark.draft.formats.fields import read_config, read_tensors, reading
from dspark.errors import CapabilityError, CheckpointError, ConfigError
from dspark.mtp_head import DraftVocab
from dspark.target import SharesHead, SharesHeadRows, Target, TargetInfo

__all__ = ["check_tensors", "is_draft", "load_draft", "load_module", "read_stored"]

_LAYOUTS = (native, speculators, deepspec, specforge)
_IGNORED = ("verifier_lm_head.weight", "verifier_norm.weight")  # copies of the target's
_OLD_PREFIX = "logit_head."  # early SpecForge checkpoints
_INTEGERS = (torch.int64, torch.int32)


def is_draft(config: Mapping[str, Any]) -> bool:
    """True for the config.json of a draft module, readable or not; false for a model's."""
    if "speculators_model_type" in config or any(layout.handles(config) for layout in _LAYOUTS):
        return True
    names = config.get("architectures")
    first = str(names[0]) if isinstance(names, list) and names else ""
    if any(kind in first for kind in ("DSpark", "DFlash")):
        # A V4 target with drafts inside names DSpark fields, but is a causal language model.
        return "ForCausalLM" not in first
    return _is_eagle3(config)


def _eagle3() -> ModuleType | None:
    try:
        from dspark.draft import eagle3
    except ImportError:
        return None
    return eagle3


def _is_eagle3(config: Mapping[str, Any]) -> bool:
    eagle3 = _eagle3()
    return eagle3 is not None and bool(eagle3.is_eagle3(dict(config)))


def load_draft(
    folder: Path, target: Target, *, config: DSparkDrafterConfig | None = None
) -> Drafter:
    """Load the draft module in a folder for a target.

    Args:
        folder: With config.json and safetensors.
        target: The target that will verify.
        config: Settings of the drafter.

    Returns:
        The drafter.

    Raises:
        CheckpointError: If a file is missing or damaged, or a field or tensor does not fit.
        ConfigError: If the module was made for another target.
        CapabilityError: If the module needs the target's head and the target does not share it.
    """
    fields = read_config(folder)
    if _is_eagle3(fields):
        eagle3 = _eagle3()
        if eagle3 is not None:
            drafter: Drafter = eagle3.load_eagle3(folder, target)
            return drafter
    module = load_module(folder, target)
    name = "dspark" if module.config.markov_rank else "dflash"
    return DSparkDrafter(module, config=config, name=name)


def load_module(folder: Path, target: Target) -> DSparkModule:
    """Load a DSpark or DFlash module; see `load_draft`."""
    config, vocab, tensors = read_stored(folder, target.info)
    return _build(config, vocab, tensors, target, folder)


def read_stored(
    folder: Path, info: TargetInfo
) -> tuple[DSparkConfig, DraftVocab, dict[str, torch.Tensor]]:
    """Read a DSpark or DFlash module as it is stored: nothing of its target is needed but facts.

    Args:
        folder: With config.json and safetensors.
        info: The target that it is for.

    Returns:
        Settings, vocabulary and tensors by the names that `DSparkModule` uses, in their own dtype
        (int8 matrices multiplied out); names and shapes are not checked.

    Raises:
        CheckpointError: If a file is missing or damaged, or a field does not fit.
        ConfigError: If the module was made for another target.
    """
    where = folder / "config.json"
    fields = read_config(folder)
    layout = next((layout for layout in _LAYOUTS if layout.handles(fields)), None)
    if layout is None:
        kind = fields.get("speculators_model_type") or fields.get("architectures")
        raise CheckpointError(
            f"{where}: draft modules of kind {kind!r} are not supported.",
            hint="dspark's own, DeepSpec, speculators and SpecForge layouts are",
        )
    tensors = read_tensors(folder)
    tensors = {
        name.removeprefix(_OLD_PREFIX): tensor
        for name, tensor in tensors.items()
        if name not in _IGNORED
    }
    if layout is native:
        tensors = native.unpack(tensors, where)
    with reading(where):
        config = layout.read(fields, where, info, tensors)
        vocab = _vocab(config, tensors)
    _check_target(config, info, where)
    return config, vocab, tensors


def _vocab(config: DSparkConfig, tensors: dict[str, torch.Tensor]) -> DraftVocab:
    """The draft's vocabulary from d2t and t2d, which are taken out of `tensors`."""
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if config.draft_vocab_size == config.vocab_size:
        return DraftVocab(config.vocab_size)  # maps, if any, say nothing
    if d2t is None:
        raise ConfigError(
            f"draft_vocab_size is {config.draft_vocab_size} of {config.vocab_size}, but there is "
            "no tensor d2t."
        )
    if d2t.dtype not in _INTEGERS or d2t.shape != (config.draft_vocab_size,):
        raise ConfigError(
            f"d2t is {d2t.dtype} {list(d2t.shape)}, but must be int64 [{config.draft_vocab_size}]."
        )
    ids = torch.arange(config.draft_vocab_size) + d2t.to(torch.int64)
    vocab = DraftVocab.build(config.vocab_size, ids)
    if t2d is None:
        return vocab
    if t2d.dtype is not torch.bool or t2d.shape != (config.vocab_size,):
        raise ConfigError(
            f"t2d is {t2d.dtype} {list(t2d.shape)}, but must be bool [{config.vocab_size}]."
        )
    if not torch.equal(torch.nonzero(t2d)[:, 0], ids):
        raise ConfigError("t2d and d2t name different tokens.")
    return vocab


def _check_target(config: DSparkConfig, info: TargetInfo, where: Path) -> None:
    pairs = (
        ("vocab_size", config.vocab_size, info.vocab_size),
        ("num_target_layers", config.num_target_layers, info.num_layers),
        ("target_hidden_size", config.target_hidden_size, info.hidden_size),
    )
    for name, mine, theirs in pairs:
        if mine != theirs:
            raise ConfigError(
                f"{where}: {name} is {mine}, but the target {info.name} has {theirs}.",
                hint="use a draft made for this target, or --draft lookup",
            )
    shared = not (config.owns_embedding and config.owns_head)
    if shared and config.backbone.hidden_size != info.hidden_size:
        raise ConfigError(
            f"{where}: hidden_size is {config.backbone.hidden_size}, but the embedding or head of "
            f"the target {info.name}, which the draft uses, has {info.hidden_size}."
        )


def _build(
    config: DSparkConfig,
    vocab: DraftVocab,
    tensors: Mapping[str, torch.Tensor],
    target: Target,
    folder: Path,
) -> DSparkModule:
    shares = target if isinstance(target, SharesHead) else None
    if shares is None and not (config.owns_embedding and config.owns_head):
        raise CapabilityError(
            f"the draft in {folder} uses the target's embedding or head, but {target.info.name} "
            "does not share them."
        )
    if config.needs_head_rows and not isinstance(target, SharesHeadRows):
        raise CapabilityError(
            f"the draft in {folder} uses rows of the target's head, but {target.info.name} does "
            "not give them away."
        )
    with reading(folder / "config.json"), torch.device("meta"):
        module = DSparkModule(config, vocab, shares)
    check_tensors(module.state_dict(), tensors, folder)
    dtype = getattr(torch, target.info.dtype)
    device = target.info.device.rpartition(", ")[2]  # a split target's head is on the last one
    ready = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    module.load_state_dict(ready, assign=True)
    return module.eval().requires_grad_(False)


def check_tensors(
    wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Refuse tensors that do not fit a module's.

    Raises:
        CheckpointError: If one is missing, unknown, misshapen or of integers.
    """
    for problem, names in (
        ("lacks", wanted.keys() - given.keys()),
        ("has, unexpectedly,", given.keys() - wanted.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise CheckpointError(f"the draft in {folder} {problem} tensors: {shown}.")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name} of the draft in {folder} has shape {list(given[name].shape)}, "
                f"but its config asks for {list(tensor.shape)}."
            )
        if not given[name].is_floating_point():
            raise CheckpointError(
                f"tensor {name} of the draft in {folder} is {given[name].dtype}, but must be "
                "floating point."
            )
