"""Everything a run needs, made from its recipe: target, samples, module, source of features."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dspark.devices import pick_dtype
from dspark.draft.formats.fields import read_config
from dspark.errors import CapabilityError
from dspark.models.store import cache_root
from dspark.registry import LoadOptions, load_target
from dspark.target import SharesHeadRows, Target
from dspark.training.build import build_module, draft_config
from dspark.training.build_unrolled import build_unrolled, unrolled_config
from dspark.training.feature_cache import STORED, FeatureCache, weights_checksum
from dspark.training.features import Features, TargetRunner
from dspark.training.kinds import BlockDraft, TrainedDraft, UnrolledDraft
from dspark.training.recipe import Recipe
from dspark.training.samples import Sample, Samples, read_samples
from dspark.training.world import ALONE, World

__all__ = ["FeatureSource", "Setup", "autocast", "prepare"]


class FeatureSource:
    """Features of samples, from the cache or the target.

    Args:
        runner: Runs the target.
        cache: Where features are kept, None to compute them every time.
    """

    def __init__(self, runner: TargetRunner, cache: FeatureCache | None) -> None:
        self._runner = runner
        self._cache = cache

    def get(self, samples: Sequence[Sample]) -> list[Features]:
        """Features of samples, in order; those that are missing are computed together."""
        cache = self._cache
        if cache is None:
            return self._runner.run(samples)
        keys = [sample.key for sample in samples]
        found = {key: cache.get(key) for key in keys}
        missing = {k: s for k, s in zip(keys, samples, strict=True) if found[k] is None}
        computed = self._runner.run(list(missing.values()))
        for key, features in zip(missing, computed, strict=True):
            cache.put(key, features)
            found[key] = features
        every = [found[key] for key in keys]
        return [features for features in every if features is not None]

    def flush(self) -> None:
        """Write what the cache holds in memory."""
        if self._cache is not None:
            self._cache.flush()


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What a run works with.

    Attributes:
        recipe: The recipe.
        target: The target.
        draft: What is trained, float32, in training mode.
        samples: What it is trained on.
        source: Features of samples.
        described: The target: id, revision, source, fingerprint.
        template: Checksum of the target's chat template, None without one.
        dtype: What is computed in.
        device: Where.
    """

    recipe: Recipe
    target: Target
    draft: TrainedDraft
    samples: Samples
    source: FeatureSource
    described: dict[str, Any]
    template: str | None
    dtype: torch.dtype
    device: torch.device

    @property
    def module(self) -> nn.Module:
        """The draft's module."""
        return self.draft.module

    @property
    def head(self) -> SharesHeadRows:
        """The target, as it shares its head."""
        if not isinstance(self.target, SharesHeadRows):
            raise CapabilityError(f"{self.target.info.name} does not share its output head.")
        return self.target


def prepare(recipe: Recipe, *, device: str = "auto", world: World = ALONE) -> Setup:
    """Load the target, read the data, make the module.

    Args:
        recipe: The recipe.
        device: "auto" or a torch device.
        world: The processes of the run.

    Raises:
        CheckpointError: If the target or a draft to start from cannot be used.
        ConfigError: If the recipe does not fit the target.
        CapabilityError: If the target cannot be trained for.
        DataError: If the shards cannot be used.
    """
    from dspark.eval.results import describe_model
    from dspark.models.resolve import resolve_model

    run = recipe.run
    folder = resolve_model(recipe.target)
    _refuse_v4(recipe.target, folder)
    options = LoadOptions(
        name=recipe.target,
        dtype=run.target_dtype,
        device=device,
        exact=False,
        # The kernels for rounded weights keep their lead with hundreds of rows; the others do not.
        has_many_rows=run.target_quant == "none",
        probe_folder=cache_root() / "probes",
        quant=run.target_quant,
    )
    target = load_target(folder, options).target
    draft, samples = _draft_and_samples(recipe, target, folder)
    place = torch.device(target.info.device.rpartition(", ")[2])
    draft.to(place)
    draft.module.train()
    described = describe_model(recipe.target)
    about = {**described, "weights": None if run.cache is None else weights_checksum(folder)}
    source = _feature_source(recipe, target, about, draft.target_layers, world)
    return Setup(
        recipe=recipe,
        target=target,
        draft=draft,
        samples=samples,
        source=source,
        described=described,
        template=_template_checksum(folder),
        dtype=pick_dtype(run.dtype, place),
        device=place,
    )


def _refuse_v4(name: str, folder: Path) -> None:
    if read_config(folder).get("model_type") == "deepseek_v4":
        raise CapabilityError(
            f"{name} is a DeepSeek-V4, whose drafts are part of its checkpoint and are not trained "
            "here.",
            hint="for a small one, see docs/v4-mini.md: python -m dspark.training.pretrain draft",
        )


def _draft_and_samples(
    recipe: Recipe, target: Target, folder: Path
) -> tuple[TrainedDraft, Samples]:
    section, info = recipe.draft, target.info
    if not isinstance(target, SharesHeadRows):
        raise CapabilityError(
            f"{recipe.target} cannot be trained for: it does not give away its output head."
        )
    # What the recipe says is checked before the data are read.
    if not section.is_unrolled:
        config = draft_config(section, info, folder)
        samples = read_samples(recipe.data, vocab_size=info.vocab_size)
        module = build_module(
            section,
            config,
            target=target,
            folder=folder,
            samples=samples.train,
            seed=recipe.run.seed,
        )
        return BlockDraft(module), samples
    shape = unrolled_config(section, info, folder)
    samples = read_samples(recipe.data, vocab_size=info.vocab_size)
    unrolled, rows = build_unrolled(
        section,
        shape,
        target=target,
        info=info,
        folder=folder,
        samples=samples.train,
        seed=recipe.run.seed,
    )
    draft = UnrolledDraft(unrolled, rows, steps=section.unroll, num_target_layers=info.num_layers)
    return draft, samples


def _feature_source(
    recipe: Recipe,
    target: Target,
    described: dict[str, Any],
    layer_ids: tuple[int, ...],
    world: World,
) -> FeatureSource:
    temperature = recipe.loss.temperature
    folder = recipe.run.cache
    stored = None if folder is None else STORED
    runner = TargetRunner(target, layer_ids, temperature=temperature, stored=stored)
    if folder is None:
        return FeatureSource(runner, None)
    about = {
        "version": 2,
        "target": described,
        "dtype": target.info.dtype,
        "quant": target.info.quant,
        "layers": list(layer_ids),
        "temperature": temperature,
    }
    return FeatureSource(runner, FeatureCache(folder, about, world=world))


def _template_checksum(folder: Path) -> str | None:
    import hashlib
    import json

    path = folder / "chat_template.jinja"
    if path.exists():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    template = fields.get("chat_template") if isinstance(fields, dict) else None
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()


def autocast(dtype: torch.dtype, device: torch.device) -> Any:
    """The context that forwards run in: autocast for bfloat16, nothing for float32."""
    if dtype is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)
