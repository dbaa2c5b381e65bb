"""The recipe of a small V4: one TOML file, read into frozen dataclasses.

`[model]` holds fields of `V4Config` by their names, `[[stage]]` says what is trained after what.
Unknown keys and wrong types are refused by name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from dspark.base_model.config import V4Config
from dspark.errors import ConfigError

__all__ = [
    "DraftRecipe",
    "OptimizerRecipe",
    "Recipe",
    "RunRecipe",
    "ScheduleRecipe",
    "Stage",
    "TextRecipe",
    "draft_config",
    "make_recipe",
    "read_recipe",
]

INDEXERS = ("off", "learn", "select")
EXPERTS = ("float32", "fp4")

_T = TypeVar("_T")


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but must be {allowed}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """[text]: the tokenizer and the split.

    Attributes:
        vocabulary: Tokens, special ones included.
        holdout: Share of the documents, chosen by the hash of their names, that is held out.
    """

    vocabulary: int = 8192
    holdout: float = 0.02

    def __post_init__(self) -> None:
        # 16 bits a token in the file of tokens; 256 bytes and the special ones are the least.
        _check(320 <= self.vocabulary <= 65536, "text.vocabulary", self.vocabulary, "320 to 65536")
        _check(0 < self.holdout < 1, "text.holdout", self.holdout, "between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """[[stage]]: some steps of training in one way.

    Attributes:
        steps: Optimizer steps.
        length: Tokens of a sequence.
        sequences: Sequences of a step.
        indexer: "off" (CSA layers attend to every entry, the indexer rests), "learn" (the same,
            and the indexer learns which entries matter), "select" (they attend to what it
            selects, and it learns among these).
        experts: "float32", or "fp4" to train through the rounding of the packed experts.
    """

    steps: int
    length: int
    sequences: int
    indexer: str = "off"
    experts: str = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "length", "sequences"):
            _check(getattr(self, name) >= 1, f"stage.{name}", getattr(self, name), ">= 1")
        _check(self.indexer in INDEXERS, "stage.indexer", self.indexer, f"one of {INDEXERS}")
        _check(self.experts in EXPERTS, "stage.experts", self.experts, f"one of {EXPERTS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRecipe:
    """[optimizer]: Muon for matrices, AdamW for the rest.

    Attributes:
        muon_lr: Peak learning rate of matrices.
        adam_lr: Peak learning rate of embedding, head, norms, biases, sinks and scales.
        momentum: Of Muon.
        betas: Of AdamW.
        weight_decay: Per unit of learning rate, of matrices and of embedding and head.
        clip: Longest gradient.
        newton_schulz: Muon's steps towards an orthogonal update, quick ones and settling ones.
    """

    muon_lr: float = 4e-3
    adam_lr: float = 2e-3
    momentum: float = 0.95
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    newton_schulz: tuple[int, ...] = (8, 2)

    def __post_init__(self) -> None:
        for name in ("muon_lr", "adam_lr", "clip"):
            _check(getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "> 0")
        is_pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _check(is_pair, "optimizer.betas", list(self.betas), "two numbers from 0 to below 1")
        _check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "from 0 to below 1")
        _check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, ">= 0")
        steps = self.newton_schulz
        is_pair = len(steps) == 2 and steps[0] >= 1 and steps[1] >= 0
        _check(is_pair, "optimizer.newton_schulz", list(steps), "two numbers, from 1 and from 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRecipe:
    """[schedule]: warm-up, constant, linear fall, over the steps of all stages.

    Attributes:
        warmup: Steps of the warm-up.
        fall: Share of all steps over which it falls at the end.
        floor: Learning rate at the end over the peak.
    """

    warmup: int = 100
    fall: float = 0.3
    floor: float = 0.05

    def __post_init__(self) -> None:
        _check(self.warmup >= 0, "schedule.warmup", self.warmup, ">= 0")
        for name in ("fall", "floor"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"schedule.{name}", value, "from 0 to 1")

    def factor(self, step: int, total: int) -> float:
        """Learning rate over the peak at a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = self.fall * total
        if falling == 0 or step < total - falling:
            return rise
        left = max(0.0, (total - step) / falling)
        return rise * (self.floor + (1 - self.floor) * left)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecipe:
    """[run]: what goes on beside the steps.

    Attributes:
        seed: All randomness is derived from it.
        sequences_per_forward: A step's sequences are run in parts of so many, whose gradients add.
        balance: Weight of the sequence-wise balance loss of the router.
        bias_speed: By how much a step moves the router's biases towards an even load.
        index: Weight of the indexer's own loss, which reaches no other weights.
        validate_every: Steps between validations.
        validation_rows: Held-out sequences of each kind of text that a validation looks at.
        checkpoint_minutes: Minutes between checkpoints.
    """

    seed: int = 0
    sequences_per_forward: int = 4
    balance: float = 1e-4
    bias_speed: float = 1e-3
    index: float = 1.0
    validate_every: int = 100
    validation_rows: int = 8
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("sequences_per_forward", "validate_every", "validation_rows"):
            _check(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), ">= 1")
        for name in ("seed", "balance", "bias_speed", "index", "checkpoint_minutes"):
            _check(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), ">= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRecipe:
    """[dspark] or [mtp]: a draft module trained on the frozen target.

    Attributes:
        steps: Optimizer steps.
        length: Tokens of a sequence.
        sequences: Sequences of a step.
        anchors: Anchors of a sequence (DSpark).
        depth: Recursive steps that are trained (MTP-1).
        muon_lr: Peak learning rate of matrices.
        adam_lr: Peak learning rate of the rest.
        ce: Weight of the cross-entropy with the text's own token.
        l1: Weight of the distance between draft law and target law.
        confidence: Weight of the confidence head's loss (DSpark).
        decay: The loss at depth k weighs exp(-(k - 1) / decay).
    """

    steps: int
    length: int = 512
    sequences: int = 8
    anchors: int = 64
    depth: int = 3
    muon_lr: float = 4e-3
    adam_lr: float = 2e-3
    ce: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0

    def __post_init__(self) -> None:
        for name in ("steps", "length", "sequences", "anchors", "depth"):
            _check(getattr(self, name) >= 1, f"draft.{name}", getattr(self, name), ">= 1")
        for name in ("muon_lr", "adam_lr", "decay"):
            _check(getattr(self, name) > 0, f"draft.{name}", getattr(self, name), "> 0")
        for name in ("ce", "l1", "confidence"):
            _check(getattr(self, name) >= 0, f"draft.{name}", getattr(self, name), ">= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole recipe.

    Attributes:
        model: Shape of the target, DSpark fields included.
        stages: How the target is trained.
        text: Tokenizer and split.
        optimizer: Of the target.
        schedule: Of the target and, in shares, of the drafts.
        run: Seed, losses, validation, checkpoints.
        dspark: How the DSpark module is trained.
        mtp: How the MTP-1 module is trained.
    """

    model: V4Config
    stages: tuple[Stage, ...]
    text: TextRecipe = field(default_factory=TextRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)
    dspark: DraftRecipe | None = None
    mtp: DraftRecipe | None = None

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage of a step, counted from 0; the last one behind all."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        values: dict[str, Any] = asdict(self)
        return values


def draft_config(config: V4Config, kind: str) -> V4Config:
    """The config of a checkpoint with a draft module, of a recipe's.

    Args:
        config: Of the recipe.
        kind: "dspark", "mtp", or "none" for the target alone.

    Raises:
        ConfigError: If the recipe does not describe DSpark, or the kind is unknown.
    """
    if kind == "dspark":
        if not config.is_dspark or config.draft_stages < 1:
            raise ConfigError("the recipe's [model] has no dspark_block_size or no draft_stages.")
        return config
    if kind not in ("mtp", "none"):
        raise ConfigError(f"the draft is {kind!r}, but must be dspark, mtp or none.")
    plain: dict[str, Any] = {
        "dspark_noise_token_id": 0,
        "dspark_target_layer_ids": (),
        "dspark_markov_rank": 0,
    }
    stages = 1 if kind == "mtp" else 0
    return replace(config, draft_stages=stages, dspark_block_size=0, **plain)


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        ConfigError: If the file cannot be read, or a key or value is wrong.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"the recipe {path} cannot be read: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the recipe {path} is not TOML: {exc}.") from exc
    return make_recipe(values)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe of parsed values; see `read_recipe`."""
    kinds: dict[str, type] = {
        "text": TextRecipe,
        "optimizer": OptimizerRecipe,
        "schedule": ScheduleRecipe,
        "run": RunRecipe,
        "dspark": DraftRecipe,
        "mtp": DraftRecipe,
    }
    known = ("model", "stage", *kinds)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"the recipe has no section {unknown[0]}; known are {', '.join(known)}.")
    stages = values.get("stage")
    if not isinstance(stages, list) or not stages:
        raise ConfigError("the recipe lacks [[stage]].")
    parts: dict[str, Any] = {
        name: _section(kinds[name], values[name], name) for name in kinds if name in values
    }
    text = parts.get("text", TextRecipe())
    model = {"vocab_size": text.vocabulary, **_table(values.get("model"), "model")}
    return Recipe(
        model=_section(V4Config, model, "model"),
        stages=tuple(_section(Stage, stage, "stage") for stage in stages),
        **parts,
    )


def _table(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"the recipe lacks [{name}], or it is no section.")
    return value


def _section(kind: type[_T], values: object, where: str) -> _T:
    table = _table(values, where)
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ConfigError(
            f"the recipe has no key {where}.{unknown[0]}; known are {', '.join(known)}."
        )
    missing = [
        name
        for name, item in known.items()
        if name not in table and item.default is MISSING and item.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"the recipe lacks {where}.{missing[0]}.")
    return kind(**{name: _typed(hints[name], v, f"{where}.{name}") for name, v in table.items()})


def _typed(hint: Any, value: Any, name: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if hint in (int, float, str):
        if type(value) is not hint:
            raise ConfigError(f"{name} is {value!r}, but must be of type {hint.__name__}.")
        return value
    inner = int if hint == tuple[int, ...] else float
    if not isinstance(value, list):
        raise ConfigError(f"{name} is {value!r}, but must be a list.")
    return tuple(_typed(inner, item, name) for item in value)
