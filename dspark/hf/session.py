"""The engine that is kept for a model: made when first used, made anew when weights change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dspark.draft.base import Drafter
from dspark.draft.model import ModelDrafter
from dspark.engine import Engine
from dspark.engine_config import EngineConfig
from dspark.errors import ConfigError
from dspark.hf.processed import ProcessedTarget
from dspark.hf.refusal import Refusal
from dspark.hf.twin import signature_of, wrap_shared
from dspark.loading import build_drafter
from dspark.registry import LoadedTarget, LoadOptions
from dspark.request import RequestStats
from dspark.target import Target
from dspark.text import TextCodec

__all__ = ["Session", "Settings"]


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """How a model is accelerated; see `dspark.hf.accelerate` for the fields."""

    draft: Any = "auto"
    tokenizer: Any = None
    exact: bool = False
    pack: bool | None = None
    config: EngineConfig | None = None

    def is_same(self, other: Settings) -> bool:
        """True if both ask for the same engine."""
        draft = self.draft is other.draft or (
            isinstance(self.draft, str | Path) and self.draft == other.draft
        )
        return (
            draft
            and self.tokenizer is other.tokenizer
            and (self.exact, self.pack, self.config) == (other.exact, other.pack, other.config)
        )


class Session:
    """What dspark keeps for one model.

    Args:
        settings: How it is accelerated.

    Attributes:
        settings: The same.
        warned: Reasons for falling back that were given.
        stats: Statistics of the last call, one entry per row.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.warned: set[str] = set()
        self.stats: list[RequestStats] = []
        self._lock = threading.RLock()
        self._is_busy = False
        self._signature: tuple[object, ...] = ()
        self._engine: Engine | None = None
        self._target: ProcessedTarget | None = None

    @contextmanager
    def engine_of(self, model: Any) -> Iterator[tuple[Engine, ProcessedTarget]]:
        """The engine of a model, for one call at a time.

        Yields:
            The engine, and the target it runs on.

        Raises:
            Refusal: If the call comes from inside another one.
            CapabilityError: If the model cannot be tree-verified.
            ConfigError: If the draft does not fit it.
            CheckpointError: If the draft cannot be found or read.
        """
        with self._lock:
            if self._is_busy:
                raise Refusal("a call of generate inside another one of the same model.")
            engine, target = self._prepare(model)
            self._is_busy = True
            try:
                yield engine, target
            finally:
                self._is_busy = False

    def _prepare(self, model: Any) -> tuple[Engine, ProcessedTarget]:
        signature = signature_of(model)
        if self._engine is None or self._target is None or signature != self._signature:
            self._engine = self._target = None  # the old one goes before the new one comes
            settings = self.settings
            inner = wrap_shared(model, exact=settings.exact, pack=settings.pack)
            codec = None if settings.tokenizer is None else TextCodec(settings.tokenizer)
            drafter = _drafter(settings.draft, inner, codec)
            self._target = ProcessedTarget(inner)
            self._engine = Engine(
                self._target, drafter=drafter, codec=codec, config=settings.config
            )
            self._signature = signature
        return self._engine, self._target


def _drafter(draft: Any, target: Target, codec: TextCodec | None) -> Drafter | None:
    if isinstance(draft, PreTrainedModel):
        small = wrap_shared(draft)
        if small.info.vocab_size != target.info.vocab_size:
            raise ConfigError(
                f"the draft has a vocabulary of {small.info.vocab_size} tokens, but the model's "
                f"has {target.info.vocab_size}.",
                hint="use a draft made for this model, or 'lookup'",
            )
        return ModelDrafter(small, vocab_size=target.info.vocab_size)
    if draft is None or isinstance(draft, str | Path):
        info = target.info
        name = "none" if draft is None else str(draft)
        options = LoadOptions(name=info.name, dtype=info.dtype, device=info.device, exact=False)
        loaded = LoadedTarget(target=target, codec=codec, folder=Path(info.name))
        return build_drafter(name, loaded, options)
    if not all(hasattr(draft, name) for name in ("name", "capture", "propose", "release")):
        raise ConfigError(
            f"draft is of type {type(draft).__name__}, but must be a name, a transformers model or "
            "a drafter."
        )
    drafter: Drafter = draft
    return drafter
