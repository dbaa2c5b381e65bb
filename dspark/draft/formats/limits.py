"""What layouts and engines can hold: a draft that does not fit is refused by the field's name.

Two guards. The limits below are what other programs do with a file, read from their sources (vLLM
0.33, SGLang 0.5.23, speculators 0.9, SpecForge 0.2, DeepSpec). `refuse_changes` is about ours: a
config.json that is about to be written is read back, and a field that does not come back as it was
has no place in the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from dspark.draft.dspark_config import HEAD_TYPES, DSparkConfig, Window
from dspark.draft.eagle3_module import Eagle3Config
from dspark.errors import CapabilityError

__all__ = ["BlockLimits", "UnrolledLimits", "check_block", "check_unrolled", "refuse_changes"]

_HINTS = {"family": 'train it with draft.style = "qwen3" in the recipe'}

_Finding = tuple[str, object, bool, str]
"""Field, value, is wrong, what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLimits:
    """What a program can do with a DSpark or DFlash module.

    Attributes:
        families: Kinds of layers.
        has_reduced_vocabulary: Drafts with a smaller vocabulary than the target's.
        has_other_width: Modules of another width than the target's hidden states.
        anchors: Values of `sample_from_anchor`.
        heads: Sequential heads, where there is one.
        has_confidence: A confidence head is read or passed over, not refused.
        window: Sliding windows: None has none, "fixed" those that end at the anchor, "moving" those
            that end at the slot and are causal.
        activations: Of the MLPs; empty allows all.
        first_layer: The lowest layer of the target that can be read; -1 is the embeddings.
        has_values: Gemma's layers may have values of their own, not only their keys'.
    """

    families: tuple[str, ...] = ("qwen3",)
    has_reduced_vocabulary: bool = False
    has_other_width: bool = False
    anchors: tuple[bool, ...] = (True, False)
    heads: tuple[str, ...] = HEAD_TYPES
    has_confidence: bool = True
    window: str | None = None
    activations: tuple[str, ...] = ()
    first_layer: int = -1
    has_values: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class UnrolledLimits:
    """What a program can do with an EAGLE-3 draft.

    Attributes:
        refused: Options of `Eagle3Config` that must be off.
        needed: Options that must be on.
        has_reduced_vocabulary: Drafts with a smaller vocabulary than the target's.
        has_other_width: Drafts of another width than the target's hidden states.
        num_layers: Layers of the target that are read; None is any number.
        least_layers: The fewest.
        first_layer: The lowest of them; -1 is the embeddings.
        reads_last: The target's last layer can be read.
        is_sorted: They must ascend, since they arrive in the target's order.
    """

    refused: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    has_reduced_vocabulary: bool = True
    has_other_width: bool = True
    num_layers: int | None = None
    least_layers: int = 1
    first_layer: int = -1
    reads_last: bool = True
    is_sorted: bool = False


def check_block(config: DSparkConfig, limits: BlockLimits, where: str) -> None:
    """Refuse a DSpark or DFlash module that a program cannot hold.

    Raises:
        CapabilityError: Naming the first field that does not fit.
    """
    _raise(_block_findings(config, limits), where)


def _block_findings(config: DSparkConfig, limits: BlockLimits) -> Iterator[_Finding]:
    backbone = config.backbone
    families = " or ".join(limits.families)
    yield "family", config.family, config.family not in limits.families, families
    is_reduced = config.draft_vocab_size != config.vocab_size
    yield (
        "draft_vocab_size",
        config.draft_vocab_size,
        is_reduced and not limits.has_reduced_vocabulary,
        f"the target's, {config.vocab_size}",
    )
    yield (
        "hidden_size",
        backbone.hidden_size,
        backbone.hidden_size != config.target_hidden_size and not limits.has_other_width,
        f"the target's, {config.target_hidden_size}",
    )
    anchor = config.sample_from_anchor
    allowed = " or ".join(str(value).lower() for value in limits.anchors)
    yield "sample_from_anchor", anchor, anchor not in limits.anchors, allowed
    kind = config.markov_head_type
    is_strange = bool(config.markov_rank) and kind not in limits.heads
    yield "markov_head_type", kind, is_strange, " or ".join(limits.heads)
    confidence = config.enable_confidence_head
    yield "enable_confidence_head", confidence, confidence and not limits.has_confidence, "false"
    yield from _window_findings(backbone.windows, limits.window)
    names = limits.activations
    is_strange = bool(names) and backbone.activation not in names
    yield "hidden_act", backbone.activation, is_strange, " or ".join(names)
    shares = backbone.shares_kv
    yield "attention_k_eq_v", shares, not shares and not limits.has_values, "true"
    ids = list(config.target_layer_ids)
    yield "target_layer_ids", ids, ids[0] < limits.first_layer, f">= {limits.first_layer}"


def _window_findings(windows: tuple[Window | None, ...], allowed: str | None) -> Iterator[_Finding]:
    found = [window for window in windows if window is not None]
    if not found:
        return
    sizes = sorted({window.size for window in found})
    yield "sliding_window", sizes, allowed is None, "absent"
    yield "sliding_window", sizes, len(set(found)) > 1, "the same in all sliding layers"
    moves, is_causal = found[0].moves, found[0].is_causal
    fits = not moves if allowed == "fixed" else moves and is_causal
    ends = "the anchor" if allowed == "fixed" else "the slot, in causal layers"
    place = "the slot" if moves else "the anchor"
    yield "sliding_window", f"{sizes[0]} up to {place}", not fits, f"one that ends at {ends}"


def check_unrolled(
    config: Eagle3Config, limits: UnrolledLimits, num_target_layers: int, where: str
) -> None:
    """Refuse an EAGLE-3 draft that a program cannot hold.

    Raises:
        CapabilityError: Naming the first field that does not fit.
    """
    _raise(_unrolled_findings(config, limits, num_target_layers), where)


def _unrolled_findings(
    config: Eagle3Config, limits: UnrolledLimits, num_target_layers: int
) -> Iterator[_Finding]:
    for name in limits.refused:
        value = getattr(config, name)
        is_set = value not in (None, False) and not (name == "embed_scale" and value == 1)
        yield name, value, is_set, "off"
    for name in limits.needed:
        yield name, getattr(config, name), not getattr(config, name), "on"
    is_reduced = config.draft_vocab_size != config.vocab_size
    yield (
        "draft_vocab_size",
        config.draft_vocab_size,
        is_reduced and not limits.has_reduced_vocabulary,
        f"the target's, {config.vocab_size}",
    )
    yield (
        "hidden_size",
        config.hidden_size,
        config.hidden_size != config.target_hidden_size and not limits.has_other_width,
        f"the target's, {config.target_hidden_size}",
    )
    ids = list(config.target_layers)
    count, least = limits.num_layers, limits.least_layers
    yield "target_layers", ids, count is not None and len(ids) != count, f"{count} layers"
    yield "target_layers", ids, len(ids) < least, f"at least {least} layers"
    yield "target_layers", ids, min(ids) < limits.first_layer, f">= {limits.first_layer}"
    last = num_target_layers - 1
    yield "target_layers", ids, max(ids) == last and not limits.reads_last, f"< {last}"
    yield "target_layers", ids, limits.is_sorted and ids != sorted(ids), "ascending"


def _raise(findings: Iterator[_Finding], where: str) -> None:
    for name, value, is_wrong, allowed in findings:
        if is_wrong:
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            raise CapabilityError(
                f"{name} of the draft is {shown}, but for {where} it must be {allowed}.",
                hint=_HINTS.get(name),
            )


def refuse_changes(config: Any, read_back: Any, where: str) -> None:
    """Refuse a draft whose settings a layout does not keep.

    Args:
        config: What is to be written.
        read_back: What reading it gives.
        where: What errors call the layout.

    Raises:
        CapabilityError: Naming the first field that changes.
    """
    for item in fields(config):
        value, found = getattr(config, item.name), getattr(read_back, item.name)
        if is_dataclass(value):
            refuse_changes(value, found, where)
        elif item.name == "rope":
            value, found = ({"rope_type": "default", **rope} for rope in (value, found))
        if not is_dataclass(value) and value != found:
            raise CapabilityError(
                f"{item.name} of the draft is {value!r}, which {where} cannot say: it would be "
                f"read as {found!r}."
            )
