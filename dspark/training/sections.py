"""The sections of a recipe: every section is a dataclass, every key a field with its default.

Wrong values are refused here, by name. What the defaults of a kind of draft are where they differ
from those shown is in `KIND_DEFAULTS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dspark.draft.dspark_config import HEAD_TYPES
from dspark.draft.formats.native import STORAGES
from dspark.errors import ConfigError
from dspark.registry import QUANTS

__all__ = [
    "KINDS",
    "KIND_DEFAULTS",
    "DataSection",
    "DraftSection",
    "LossSection",
    "OptimizerSection",
    "RunSection",
    "ScheduleSection",
]

KINDS = ("dspark", "dflash", "eagle3", "mtp")
UNROLLED = ("eagle3", "mtp")
STYLES = ("llama", "qwen3")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
DTYPES = ("auto", "float32", "bfloat16")
LABELS = ("text", "target")

_STEP_DECAY = 4.481420117724551
"""1 / ln(1 / 0.8): each unrolled step weighs 0.8 times the one before."""

_UNROLLED_LOSS = {"ce": 1.0, "l1": 0.0, "labels": "target", "decay": _STEP_DECAY}
KIND_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "eagle3": {"draft": {"layers": 1, "target_layers": 3}, "loss": _UNROLLED_LOSS},
    "mtp": {"draft": {"layers": 1, "target_layers": 1}, "loss": _UNROLLED_LOSS},
}
"""By kind and section: defaults that differ from the fields' own.

**Source:** SafeAILab/EAGLE's EAGLE-3 trainer: the loss is the cross-entropy with the target's law,
weighed by 0.8 to the power of the step.
"""

_OF_BLOCKS = (
    "block_size",
    "sample_from_anchor",
    "mask_token_id",
    "window",
    "markov_rank",
    "markov_head",
    "confidence_head",
    "confidence_with_markov",
)
_FOREIGN: Mapping[str, tuple[str, ...]] = {
    "dspark": ("unroll",),
    "dflash": ("unroll",),
    "eagle3": _OF_BLOCKS,
    "mtp": (*_OF_BLOCKS, "target_layer_ids"),
}
"""Keys of [draft] that a kind has no use for."""


def _check(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}, but must be {allowed}.")


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    _check(value in allowed, name, value, f"one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSection:
    """[draft]: what is trained. A size left out is the target's.

    Attributes:
        kind: "dspark" (the anchor's slot predicts, with sequential and confidence head), "dflash"
            (neither head), "eagle3" (one layer, run step by step) or "mtp" (the same, reading the
            target's last layer alone).
        style: Norms of the layers: "llama" or "qwen3" (which norms queries and keys).
        layers: Decoder layers.
        hidden_size: D.
        intermediate_size: Width of the MLP.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Size of a head.
        window: Context positions that every layer sees, None for all.
        block_size: Slots of a block.
        unroll: Steps that an EAGLE-3 or MTP draft is run on by itself in training.
        sample_from_anchor: The anchor's slot predicts the first token; None: as the kind says.
        target_layer_ids: Layers of the target that it reads; None spreads `target_layers` of them.
        target_layers: How many, if `target_layer_ids` does not say which.
        mask_token_id: Token of the slots behind the anchor's, one that texts do not use.
        vocabulary: Size of a reduced vocabulary, the most frequent tokens of the training
            responses; None keeps the target's.
        owns_embedding: Bring an embedding; else the target's is used.
        owns_head: Bring an output head; else the target's is used.
        markov_rank: Rank of the sequential head, 0 for none.
        markov_head: Its type: vanilla, gated or rnn.
        confidence_head: Train a confidence head.
        confidence_with_markov: Which reads the sequential head's W1 too.
        init_from_target: Start from weights of the target: None, "first", "last", or the layers
            to copy, one per layer.
        init_from_draft: Start from a draft folder of this layout, None not to.
        storage: How matrices are stored: bfloat16, float32 or int8.
    """

    kind: str = "dspark"
    style: str = "llama"
    layers: int = 3
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    block_size: int = 7
    unroll: int = 5
    sample_from_anchor: bool | None = None
    target_layer_ids: tuple[int, ...] | None = None
    target_layers: int = 5
    mask_token_id: int = 0
    vocabulary: int | None = None
    owns_embedding: bool = False
    owns_head: bool = False
    markov_rank: int | None = None
    markov_head: str = "vanilla"
    confidence_head: bool | None = None
    confidence_with_markov: bool = True
    init_from_target: str | tuple[int, ...] | None = None
    init_from_draft: str | None = None
    storage: str = "bfloat16"

    def __post_init__(self) -> None:
        _one_of("draft.kind", self.kind, KINDS)
        _one_of("draft.style", self.style, STYLES)
        _one_of("draft.markov_head", self.markov_head, HEAD_TYPES)
        _one_of("draft.storage", self.storage, STORAGES)
        for name in ("layers", "block_size", "unroll", "target_layers"):
            _check(getattr(self, name) >= 1, f"draft.{name}", getattr(self, name), ">= 1")
        if isinstance(self.init_from_target, str):
            _one_of("draft.init_from_target", self.init_from_target, ("first", "last"))
        if isinstance(self.init_from_target, tuple):
            _check(
                len(self.init_from_target) == self.layers,
                "draft.init_from_target",
                list(self.init_from_target),
                f"one layer of the target for each of {self.layers}",
            )
        if self.kind == "dflash":
            _check(not self.markov_rank, "draft.markov_rank", self.markov_rank, "0 for dflash")
        self._check_kind()

    def _check_kind(self) -> None:
        """Refuse keys that the kind has no use for, and what its module cannot do."""
        defaults = {item.name: item.default for item in fields(self)}
        for name in _FOREIGN[self.kind]:
            value = getattr(self, name)
            if value != defaults[name]:
                raise ConfigError(
                    f"draft.{name} is {value!r}, but a draft of kind {self.kind} has no use for "
                    "it; leave it out."
                )
        if self.is_unrolled:
            _check(self.layers == 1, "draft.layers", self.layers, f"1 for {self.kind}")
            allowed = [storage for storage in STORAGES if storage != "int8"]
            _one_of("draft.storage", self.storage, allowed)
        if self.kind == "mtp":
            layers = self.target_layers
            _check(layers == 1, "draft.target_layers", layers, "1 for mtp: the last one")

    @property
    def is_unrolled(self) -> bool:
        """It drafts step by step, and is trained by running it so."""
        return self.kind in UNROLLED

    @property
    def anchor_predicts(self) -> bool:
        """The anchor's slot predicts."""
        if self.sample_from_anchor is None:
            return self.kind == "dspark"
        return self.sample_from_anchor

    @property
    def rank(self) -> int:
        """Rank of the sequential head."""
        if self.markov_rank is None:
            return 256 if self.kind == "dspark" else 0
        return self.markov_rank

    @property
    def has_confidence(self) -> bool:
        """A confidence head is trained."""
        return self.kind == "dspark" if self.confidence_head is None else self.confidence_head


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """[data]: what it is trained on.

    Attributes:
        shards: Files *.jsonl or *.jsonl.gz, patterns, or folders of `dspark data`, relative to the
            recipe.
        max_tokens: Prompt and response are cut to this many tokens.
        validation_share: Share of the prompts, chosen by their hash, that is held out.
        validation_sequences: Held-out sequences that a validation looks at.
        loss_on: "response", or "all" for a loss on the prompt's tokens too.
    """

    shards: tuple[str, ...]
    max_tokens: int = 4096
    validation_share: float = 0.02
    validation_sequences: int = 64
    loss_on: str = "response"

    def __post_init__(self) -> None:
        _check(len(self.shards) > 0, "data.shards", list(self.shards), "a list of files")
        _check(self.max_tokens >= 4, "data.max_tokens", self.max_tokens, ">= 4")
        share = self.validation_share
        _check(0 <= share < 1, "data.validation_share", share, "from 0 to below 1")
        count = self.validation_sequences
        _check(count >= 0, "data.validation_sequences", count, ">= 0")
        _one_of("data.loss_on", self.loss_on, ("response", "all"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSection:
    """[loss]: what is minimised (DSpark, arXiv 2607.05147, equations 9 to 12).

    Attributes:
        ce: Weight of the cross-entropy.
        labels: What it is taken with: "text", the text's own token, or "target", the target's law.
        l1: Weight of the distance between draft law and target law.
        confidence: Weight of the confidence head's cross-entropy.
        decay: The loss at depth k weighs exp(-(k - 1) / decay); None is gamma.
        temperature: Both laws are taken at this temperature.
    """

    ce: float = 0.1
    labels: str = "text"
    l1: float = 0.9
    confidence: float = 1.0
    decay: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ce", "l1", "confidence"):
            _check(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), ">= 0")
        _one_of("loss.labels", self.labels, LABELS)
        _check(self.ce + self.l1 > 0, "loss.ce and loss.l1", [self.ce, self.l1], "not both 0")
        _check(self.decay is None or self.decay > 0, "loss.decay", self.decay, "> 0")
        _check(self.temperature > 0, "loss.temperature", self.temperature, "> 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection:
    """[optimizer].

    Attributes:
        kind: "adamw", or "muon" for the layers' matrices with AdamW for the rest.
        lr: Peak learning rate.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of matrices.
        clip: Longest gradient, None for any.
    """

    kind: str = "adamw"
    lr: float = 6e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        _one_of("optimizer.kind", self.kind, OPTIMIZERS)
        _check(self.lr > 0, "optimizer.lr", self.lr, "> 0")
        is_pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _check(is_pair, "optimizer.betas", list(self.betas), "two numbers from 0 to below 1")
        _check(self.eps > 0, "optimizer.eps", self.eps, "> 0")
        decay = self.weight_decay
        _check(decay >= 0, "optimizer.weight_decay", decay, ">= 0")
        _check(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "> 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSection:
    """[schedule]: the learning rate over the run's steps.

    Attributes:
        kind: "cosine" down to `floor`, or "wsd": constant, then a linear fall.
        warmup: Share of the steps over which it rises.
        fall: Share of the steps over which "wsd" falls at the end.
        floor: Learning rate at the end over the peak.
    """

    kind: str = "cosine"
    warmup: float = 0.04
    fall: float = 0.2
    floor: float = 0.0

    def __post_init__(self) -> None:
        _one_of("schedule.kind", self.kind, SCHEDULES)
        for name in ("warmup", "fall", "floor"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"schedule.{name}", value, "from 0 to 1")
        both = self.warmup + self.fall
        _check(both <= 1, "schedule.warmup + schedule.fall", both, "at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """[run]: how long, how much at a time, where things go.

    Attributes:
        epochs: Passes over the data; give this or `steps`.
        steps: Optimizer steps.
        sequences_per_step: Sequences that make a step.
        tokens_per_step: Tokens that make a step, in place of `sequences_per_step`.
        tokens_per_forward: A step's sequences are run in parts of about this many tokens, whose
            gradients add up.
        anchors: Anchors of a sequence: a share (below or equal 1.0) of its positions, or a number.
        dtype: "auto" is bfloat16 (autocast over float32 weights) where it is computed natively,
            else float32.
        target_dtype: The same for the target.
        target_quant: What the target's weights are rounded to: "none", "int8" or "int4". Its
            forward is faster then where there are kernels for it, and the draft learns from
            what the rounded target says.
        seed: All randomness is derived from it.
        checkpoint_every: Steps between checkpoints.
        validate_every: Steps between validations, 0 for none but the last.
        keep: Checkpoints to keep.
        cache: Folder for the target's features, None to compute them every time.
        tensorboard: Write TensorBoard logs as well.
    """

    epochs: float | None = None
    steps: int | None = None
    sequences_per_step: int | None = None
    tokens_per_step: int | None = None
    tokens_per_forward: int = 4096
    anchors: float = 0.25
    dtype: str = "auto"
    target_dtype: str = "auto"
    target_quant: str = "none"
    seed: int = 0
    checkpoint_every: int = 100
    validate_every: int = 100
    keep: int = 2
    cache: str | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        both = [self.epochs, self.steps]
        _check(both.count(None) == 1, "run.epochs and run.steps", both, "one of them")
        sizes = [self.sequences_per_step, self.tokens_per_step]
        names = "run.sequences_per_step and run.tokens_per_step"
        _check(None in sizes, names, sizes, "one of them")
        _check(self.epochs is None or self.epochs > 0, "run.epochs", self.epochs, "> 0")
        for name in ("steps", "sequences_per_step", "tokens_per_step"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"run.{name}", value, ">= 1")
        for name in ("tokens_per_forward", "checkpoint_every", "keep"):
            _check(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), ">= 1")
        for name in ("validate_every", "seed"):
            _check(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), ">= 0")
        is_count = self.anchors > 1 and self.anchors == int(self.anchors)
        is_share = 0 < self.anchors <= 1
        allowed = "a share up to 1.0, or a whole number above 1"
        _check(is_share or is_count, "run.anchors", self.anchors, allowed)
        _one_of("run.dtype", self.dtype, DTYPES)
        _one_of("run.target_dtype", self.target_dtype, DTYPES)
        _one_of("run.target_quant", self.target_quant, QUANTS)
