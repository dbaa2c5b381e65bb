"""From names on a command line to an engine: target, draft, tokenizers, device."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from dspark.draft.base import Drafter
from dspark.engine import Engine, EngineConfig
from dspark.errors import ConfigError, DataError
from dspark.registry import LoadedTarget, LoadOptions, load_target

__all__ = ["load_engine"]

logger = logging.getLogger(__name__)


def load_engine(
    target: str | Path,
    draft: str | Path | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    exact: bool | None = None,
    threads: int | None = None,
    config: EngineConfig | None = None,
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
        probe_folder=cache_root() / "probes",
    )
    loaded = _load_model(str(target), options)
    drafter = build_drafter("none" if draft is None else str(draft), loaded, options)
    return Engine(
        loaded.target,
        drafter=drafter,
        codec=loaded.codec,
        config=config,
        sampling_defaults=loaded.sampling,
    )


def _load_model(spec: str, options: LoadOptions) -> LoadedTarget:
    from dspark.models.resolve import resolve_model

    return load_target(resolve_model(spec), options)


def build_drafter(spec: str, loaded: LoadedTarget, options: LoadOptions) -> Drafter | None:
    """Build a drafter from its name.

    Args:
        spec: "auto", "none", "lookup", "lookup:FILE", a model, or one of these with "+lookup".
        loaded: The target it is for.
        options: How the target was loaded; a draft model is loaded alike.

    Returns:
        The drafter, or None for plain decoding.

    Raises:
        ConfigError: If the draft does not fit the target.
    """
    if spec == "none":
        return None
    if spec == "auto":
        spec = "lookup"
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
        from dspark.draft.lookup import LookupDrafter

        return LookupDrafter(corpus=_corpus(spec.partition(":")[2], loaded))
    return _model_drafter(spec, loaded, options)


def _corpus(path: str, loaded: LoadedTarget) -> list[list[int]]:
    if not path:
        return []
    if loaded.codec is None:
        raise ConfigError("a lookup corpus needs a target with a tokenizer.")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(f"the lookup corpus {path} is not UTF-8 text.") from exc
    except OSError as exc:
        raise DataError(f"the lookup corpus {path} cannot be read: {exc.strerror}.") from exc
    return [loaded.codec.encode_plain(text)]


def _model_drafter(spec: str, loaded: LoadedTarget, options: LoadOptions) -> Drafter:
    from dspark.draft.model import ModelDrafter

    # A draft never decides about the text, so exact mode would only slow it down.
    draft = _load_model(spec, replace(options, name=spec, exact=False))
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
