"""From names on a command line to an engine: target, draft, tokenizers, device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dspark.draft.base import Drafter
from dspark.engine import Engine, EngineConfig
from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.models.shipped import CORPUS, SHIPPED, find_shipped, source_of
from dspark.payoff import StepSeconds
from dspark.registry import LoadedTarget, LoadOptions, load_target, pack_draft
from dspark.target import Target
from dspark.text import TextCodec
from dspark.verify.scheduler_setting import Schedule

if TYPE_CHECKING:
    from dspark.draft.corpus import Corpus

__all__ = ["StepCosts", "find_corpus", "load_engine"]

StepCosts: TypeAlias = Callable[[Target, TextCodec | None, int | None], StepSeconds | None]
"""Finds out what steps of a target cost: target, codec, bytes that its experts are held to."""

logger = logging.getLogger(__name__)


def load_engine(  # noqa: PLR0913 - one keyword per option of Engine.load
    target: str | Path,
    draft: str | Path | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    exact: bool | None = None,
    quant: str = "none",
    draft_quant: str = "auto",
    threads: int | None = None,
    expert_memory: int | str | None = None,
    think: bool | None = None,
    effort: str | None = None,
    config: EngineConfig | None = None,
    step_costs: StepCosts | None = None,
) -> Engine:
    """Load a target and a draft and make an engine of them; see `Engine.load`."""
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads is {threads}, but must be >= 1.")
        import torch

        torch.set_num_threads(threads)
    from dspark.models.fetch import cache_root

    options = LoadOptions(
        name=str(target),
        dtype=dtype,
        device=device,
        exact=exact,
        quant=quant,
        draft_quant=draft_quant,
        probe_folder=cache_root() / "probes",
        expert_memory=_bytes(expert_memory),
    )
    loaded = _load_model(str(target), options)
    drafter = build_drafter("none" if draft is None else str(draft), loaded, options)
    codec = _with_reasoning(loaded, think, effort)
    config = EngineConfig() if config is None else config
    asks = drafter is not None and Schedule.parse(config.schedule).asks_costs
    if step_costs is not None and asks and config.step_seconds is None:
        seconds = step_costs(loaded.target, loaded.codec, options.expert_memory)
        config = replace(config, step_seconds=seconds)
    return Engine(
        loaded.target,
        drafter=drafter,
        codec=codec,
        config=config,
        sampling_defaults=loaded.sampling,
    )


def _bytes(amount: int | str | None) -> int | None:
    if not isinstance(amount, str):
        return amount
    from dspark.models.text import parse_bytes

    return parse_bytes(amount)


def _with_reasoning(
    loaded: LoadedTarget, think: bool | None, effort: str | None
) -> TextCodec | None:
    if think is None and effort is None:
        return loaded.codec
    if loaded.codec is None:
        raise CapabilityError(
            f"{loaded.target.info.name} has no tokenizer, so it has no thinking mode.",
            hint="leave out --think, --no-think and --effort",
        )
    codec = loaded.codec.with_reasoning(think, effort)
    codec.check_context(loaded.target.info.max_positions)
    return codec


def _load_model(spec: str, options: LoadOptions) -> LoadedTarget:
    from dspark.models.resolve import REFERENCE, resolve_model

    is_reference = spec.startswith(REFERENCE)
    folder = resolve_model(spec.removeprefix(REFERENCE))
    loaded = load_target(folder, replace(options, is_reference=is_reference))
    if options.expert_memory is not None and loaded.target.info.family != "deepseek_v4":
        raise CapabilityError(
            f"expert memory was given, but {loaded.target.info.name} keeps all its weights in "
            "memory.",
            hint="leave out --expert-memory",
        )
    return loaded


def build_drafter(spec: str, loaded: LoadedTarget, options: LoadOptions) -> Drafter | None:
    """Build a drafter from its name.

    Args:
        spec: "auto", "none", "lookup", "lookup:FILE", a model, a draft module's folder or hub id,
            or two of these with "+" between.
        loaded: The target it is for.
        options: How the target was loaded; a draft model is loaded alike.

    Returns:
        The drafter, or None for plain decoding.

    Raises:
        ConfigError: If the draft does not fit the target.
    """
    if not loaded.target.info.can_verify_trees and spec not in ("none", "auto"):
        raise CapabilityError(
            f"{loaded.target.info.name} can only decode plainly, so it takes no draft.",
            hint="use --draft none",
        )
    if spec == "none" or not loaded.target.info.can_verify_trees:
        return None
    if spec == "auto":
        own = _own_drafter(loaded.target)
        if own is not None:
            return _calibrated(own, loaded.folder, loaded)
        return _shipped_drafter(loaded, options)
    head, plus, rest = spec.partition("+")
    if plus and not Path(spec).expanduser().exists():  # a folder may have a + in its name
        from dspark.draft.combined import CombinedDrafter

        first = build_drafter(head, loaded, options)
        second = build_drafter(rest, loaded, options)
        if first is None or second is None:
            raise ConfigError(f"draft {spec!r} combines with 'none', but needs two drafts.")
        if rest.startswith("lookup"):
            first, second = second, first  # lookup first: it costs nothing
        return CombinedDrafter(first, second)
    if spec == "lookup" or spec.startswith("lookup:"):
        path = spec.partition(":")[2]
        return _lookup(Path(path).expanduser() if path else None, loaded, options.path)
    return _draft_from_folder(spec, loaded, options)


def _shipped_drafter(loaded: LoadedTarget, options: LoadOptions) -> Drafter:
    """What comes with the package for a model: its corpus, else a draft module; else plain lookup.

    A corpus costs next to nothing, so where there is one a module has to be asked for.
    """
    corpus, shipped = find_corpus(loaded.folder), find_shipped(loaded.folder)
    if corpus is not None or shipped is None:
        return _lookup(corpus, loaded, options.path, None if corpus is None else corpus.parent.name)
    return _draft_from_folder(str(shipped), loaded, options)


def _own_drafter(target: Target) -> Drafter | None:
    """The draft that a target's checkpoint holds itself, None if it holds none."""
    make = getattr(target, "own_drafter", None)
    drafter: Drafter | None = make() if make is not None else None
    return drafter


def find_corpus(folder: Path, *, shipped: Path = SHIPPED) -> Path | None:
    """The lookup corpus that comes with the package for a model, None if there is none.

    Args:
        folder: The model's.
        shipped: Where corpora lie.
    """
    source = source_of(folder)
    if source is None:
        return None
    from dspark.draft.corpus_file import corpus_facts

    for path in sorted(shipped.glob(f"*/{CORPUS}")):
        if ((corpus_facts(path) or {}).get("target") or {}).get("source") == source:
            return path
    return None


def _lookup(file: Path | None, loaded: LoadedTarget, path: str, name: str | None = None) -> Drafter:
    """A lookup drafter on a path of `dspark.native.PATHS`, with a corpus if a file is given."""
    from dspark.draft.lookup import LookupDrafter

    if file is None:
        return LookupDrafter(path=path)
    name = f"lookup:{name or file.name}"
    return LookupDrafter(corpus=_corpus(file, loaded), name=name, path=path)


def _corpus(path: Path, loaded: LoadedTarget) -> Corpus:
    """A corpus from a file of token ids, or from a text."""
    from dspark.draft.corpus import Corpus
    from dspark.draft.corpus_file import SUFFIX, read_corpus
    from dspark.text import vocabulary_fingerprint

    codec = loaded.codec
    if path.suffix == SUFFIX:
        vocabulary = None if codec is None else vocabulary_fingerprint(codec)
        if not path.is_file():
            raise DataError(f"the lookup corpus {path} cannot be read: there is no such file.")
        return read_corpus(path, vocab_size=loaded.target.info.vocab_size, vocabulary=vocabulary)
    if codec is None:
        raise ConfigError("a lookup corpus of text needs a target with a tokenizer.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(f"the lookup corpus {path} is not UTF-8 text.") from exc
    except OSError as exc:
        raise DataError(f"the lookup corpus {path} cannot be read: {exc.strerror}.") from exc
    return Corpus([codec.encode_plain(text)])


def _draft_from_folder(spec: str, loaded: LoadedTarget, options: LoadOptions) -> Drafter:
    from dspark.draft.formats.detect import is_draft, load_draft
    from dspark.draft.formats.fields import read_config
    from dspark.models.resolve import resolve_model

    folder = resolve_model(spec)
    if is_draft(read_config(folder)):
        drafter = _packed(load_draft(folder, loaded.target), options)
    else:
        drafter = _model_drafter(spec, folder, loaded, options)
    return _calibrated(drafter, folder, loaded)


def _packed(drafter: Drafter, options: LoadOptions) -> Drafter:
    """The same drafter, its module's linear layers packed where that makes it faster."""
    from dspark.draft.dspark import DSparkDrafter
    from dspark.draft.eagle3 import Eagle3Drafter

    if isinstance(drafter, DSparkDrafter | Eagle3Drafter):
        drafter.weights = pack_draft(drafter.module, options)
    return drafter


def _calibrated(drafter: Drafter, folder: Path, loaded: LoadedTarget) -> Drafter:
    """Give a drafter the survival maps that lie beside its weights, if there are any."""
    from dspark.draft.calibration_file import calibration_beside
    from dspark.draft.grow import GrowsTrees, GrowthConfig

    if isinstance(drafter, GrowsTrees) and isinstance(drafter.config, GrowthConfig):
        found = calibration_beside(folder, loaded.folder)
        if found is not None:
            drafter.config = replace(drafter.config, calibration=found)
    return drafter


def _model_drafter(spec: str, folder: Path, loaded: LoadedTarget, options: LoadOptions) -> Drafter:
    from dspark.draft.model import ModelDrafter

    # A draft never decides about the text, so exact mode would only slow it down.
    device = options.device.split(",")[-1].strip()
    quant = options.quant if options.draft_quant == "auto" else options.draft_quant
    own = replace(options, name=spec, exact=False, device=device, expert_memory=None)
    draft = load_target(folder, replace(own, quant=quant))
    mine, theirs = loaded.target.info.vocab_size, draft.target.info.vocab_size
    if mine != theirs:
        raise ConfigError(
            f"draft {spec} has a vocabulary of {theirs} tokens, but the target's has {mine}.",
            hint="use a draft made for this target, or --draft lookup",
        )
    if loaded.codec is not None and draft.codec is not None:
        ours, other = loaded.codec.vocabulary(), draft.codec.vocabulary()
        if ours != other:
            differs = next(iter(set(ours.items()) ^ set(other.items())))[0]
            raise ConfigError(
                f"draft {spec} has another vocabulary than the target (token {differs!r} differs).",
                hint="use a draft made for this target, or --draft lookup",
            )
    return ModelDrafter(draft.target, vocab_size=mine)
