"""Stock transformers models with their own caches, for plain decoding only.

`--target hf:FOLDER` runs a model exactly as transformers does, request by request: a reference to
compare with. Nothing can be rolled back, so drafts are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dspark.adapters.hf.load import load_stock_model
from dspark.cache import Cache, CacheUsage
from dspark.devices import pick_device, pick_dtype
from dspark.errors import CapabilityError, ConfigError
from dspark.model_folder import sampling_defaults
from dspark.registry import LoadedTarget, LoadOptions
from dspark.target import ExactnessReport, TargetInfo, TargetOutput, TokenBatch
from dspark.text import load_codec

__all__ = ["LOADER", "PlainCache", "PlainLoader", "PlainTarget"]


@dataclass(slots=True)
class _Slot:
    tokens: list[int] = field(default_factory=list)
    past: Any = None
    pending: list[int] | None = None


class PlainCache:
    """Cache (dspark.cache) over transformers' own: rows can be added, never taken back."""

    def __init__(self) -> None:
        self._slots: dict[int, _Slot] = {}
        self._next_slot = 0

    def open(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Open a slot; nothing is shared."""
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        self._slots[slot] = _Slot()
        return slot, 0

    def reserve(self, slot: int, rows: int) -> None:
        """Nothing to do: transformers allocates as it goes."""

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep all rows of the last forward.

        Raises:
            CapabilityError: If some are to be left out.
        """
        state = self._slots[slot]
        if state.pending is None or list(path) != list(range(len(state.pending))):
            raise CapabilityError("a cache of transformers' own cannot take rows back.")
        state.tokens.extend(state.pending)
        state.pending = None

    def length(self, slot: int) -> int:
        """Committed tokens of the slot."""
        return len(self._slots[slot].tokens)

    def release(self, slot: int) -> None:
        """Close the slot."""
        del self._slots[slot]

    def scrub(self, slot: int) -> None:
        """Nothing to do: there are no rejected rows."""

    def forget_kept(self) -> None:
        """Nothing to do: nothing is kept."""

    def usage(self) -> CacheUsage:
        """Slots in use; memory is transformers' own affair."""
        return CacheUsage(pages=0, page_tokens=1, bytes=0, limit=None, slots=len(self._slots))

    def page_bytes(self) -> int:
        """Unknown, so 0."""
        return 0

    def state(self, slot: int) -> _Slot:
        """A slot's state."""
        return self._slots[slot]


class PlainTarget:
    """Target (dspark.target) that decodes plainly with a stock model.

    Args:
        model: A causal LM.
        name: What the user called it.
        eos_token_ids: Tokens that end a text.
    """

    def __init__(self, model: Any, *, name: str, eos_token_ids: Sequence[int]) -> None:
        self._model = model.eval()
        config = model.config.get_text_config()
        parameter = next(model.parameters())
        self._info = TargetInfo(
            name=name,
            family=f"transformers {config.model_type}",
            vocab_size=int(config.vocab_size),
            hidden_size=int(config.hidden_size),
            num_layers=int(config.num_hidden_layers),
            max_positions=int(config.max_position_embeddings),
            eos_token_ids=tuple(eos_token_ids),
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            can_verify_trees=False,
        )

    @property
    def info(self) -> TargetInfo:
        """Facts about the model."""
        return self._info

    @property
    def exactness(self) -> ExactnessReport:
        """Off: it is what others are compared with."""
        return ExactnessReport(
            enabled=False,
            holds=False,
            min_rows=1,
            backend="transformers",
            cost=None,
            reason="off: transformers' own decoding, as a reference",
        )

    def new_cache(self, *, memory_limit: int | None = None) -> PlainCache:
        """Make an empty cache.

        Raises:
            ConfigError: If a limit is given, which transformers' caches cannot keep.
        """
        if memory_limit is not None:
            raise ConfigError(f"{self._info.name} cannot keep a memory limit.")
        return PlainCache()

    @torch.inference_mode()
    def forward(
        self, batch: TokenBatch, cache: Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        """Run every request of a batch by itself; see `dspark.target.Target.forward`.

        Raises:
            CapabilityError: If a request brings a tree, or hidden states are wanted.
        """
        if capture or not isinstance(cache, PlainCache):
            raise CapabilityError(f"{self._info.name} can only decode plainly.")
        wanted = set(batch.output_rows.tolist())
        rows = []
        for span in batch.spans:
            if not span.is_chain:
                raise CapabilityError(f"{self._info.name} cannot verify a draft.")
            state = cache.state(span.slot)
            ids = torch.from_numpy(batch.token_ids[span.start : span.stop])[None]
            output = self._model(
                input_ids=ids.to(self._info.device), past_key_values=state.past, use_cache=True
            )
            state.past = output.past_key_values
            state.pending = ids[0].tolist()
            kept = [row - span.start for row in range(span.start, span.stop) if row in wanted]
            rows.append(output.logits[0, kept])
        return TargetOutput(torch.cat(rows))


class PlainLoader:
    """Loader (dspark.registry) for `hf:FOLDER`."""

    priority = 0
    is_reference = True

    def handles(self, config: Mapping[str, Any]) -> bool:
        """True for every config that names a model type."""
        return "model_type" in config

    def load(self, folder: Path, options: LoadOptions) -> LoadedTarget:
        """Load a model folder with transformers' own class.

        Raises:
            CheckpointError: If transformers cannot read it.
            CapabilityError: If exact mode was asked for.
        """
        if options.exact:
            raise CapabilityError(
                "exact mode was asked for, but hf: runs transformers' own decoding.",
                hint="leave out --exact",
            )
        device = pick_device(options.device)
        model, eos = load_stock_model(folder, pick_dtype(options.dtype, device), device)
        codec = load_codec(folder)
        eos = (*eos, *(codec.eos_token_ids if codec else ()))
        target = PlainTarget(model, name=options.name, eos_token_ids=tuple(dict.fromkeys(eos)))
        sampling = sampling_defaults(folder)
        return LoadedTarget(target=target, codec=codec, sampling=sampling, folder=folder)


LOADER = PlainLoader()
