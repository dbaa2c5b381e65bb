"""DeepSeek-V4 as a Target: what the engine, the drafters and the commands see of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from dspark.base_model.cache import V4Cache
from dspark.base_model.dspark_module import V4DSparkModule
from dspark.base_model.model import V4Model
from dspark.base_model.mtp import MTPModule
from dspark.base_model.mtp_drafter import MTPDrafter
from dspark.base_model.numerics import EXACT_ROWS
from dspark.cache import Cache
from dspark.draft.base import Drafter
from dspark.draft.dspark import DSparkDrafter
from dspark.errors import CapabilityError
from dspark.target import ExactnessReport, TargetInfo, TargetOutput, TokenBatch

__all__ = ["V4Target"]


class V4Target:
    """Target (dspark.target) over a V4 model.

    Hidden states: layer k is the mean over the streams behind decoder layer k, -1 the embeddings;
    the number of layers stands for all streams behind the last one, [n, N * D].

    Args:
        model: The model.
        name: What the user called it.
        eos_token_ids: Tokens that end a text.
    """

    def __init__(self, model: V4Model, *, name: str, eos_token_ids: Sequence[int]) -> None:
        config = model.config
        self.model = model
        self._info = TargetInfo(
            name=name,
            family="deepseek_v4",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            max_positions=config.max_position_embeddings,
            eos_token_ids=tuple(eos_token_ids),
            dtype=str(model.numerics.dtype).removeprefix("torch."),
            device=", ".join(dict.fromkeys(str(device) for device in model.devices)),
        )
        self._exactness = ExactnessReport(
            enabled=False,
            holds=False,
            min_rows=1,
            backend="torch",
            cost=None,
            reason="not probed",
        )

    @property
    def info(self) -> TargetInfo:
        """Facts about the model."""
        return self._info

    @property
    def exactness(self) -> ExactnessReport:
        """What the probe at load found."""
        return self._exactness

    @property
    def min_rows(self) -> int:
        """Rows of every matrix product in exact mode."""
        return EXACT_ROWS

    def set_exactness(self, report: ExactnessReport) -> None:
        """Record the probe's finding, and switch exact mode on or off with it."""
        self._exactness = report
        self.switch_exact(report.enabled)

    def switch_exact(self, on: bool) -> None:
        """Run forwards in exact mode or not; caches made before must not be used after."""
        self.model.numerics.exact = on

    def new_cache(self, *, memory_limit: int | None = None) -> V4Cache:
        """Make an empty cache."""
        return self.model.new_cache(memory_limit)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings [n, D] of token ids int64 [n]; see `dspark.target.SharesHead`."""
        return self.model.embed(token_ids).to(self.model.devices[-1])

    @torch.inference_mode()
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of normed hidden states [n, D]; see `dspark.target.SharesHead`."""
        return self.model.head(hidden.to(self.model.devices[-1]))

    @contextmanager
    def watch_experts(self, note: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Report routing; see `dspark.expert_reuse.TellsExperts`."""
        blocks = self.model.blocks
        for layer, block in enumerate(blocks):
            block.experts.on_route = partial(note, layer)
        try:
            yield
        finally:
            for block in blocks:
                block.experts.on_route = None

    def own_drafter(self) -> Drafter | None:
        """The drafter over the checkpoint's own `mtp.*` blocks, None if it has none.

        DSpark where the config describes a DSpark module, else MTP-1.
        """
        config = self.model.config
        if config.draft_stages == 0:
            return None
        if config.is_dspark:
            return DSparkDrafter(V4DSparkModule(self.model))
        return MTPDrafter(MTPModule(self.model), streams_layer=config.num_hidden_layers)

    def forward(
        self, batch: TokenBatch, cache: Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        """Run one ragged batch; see `dspark.target.Target.forward`.

        Raises:
            CapabilityError: If the cache was made by another kind of target, a position is past the
                model's longest context, or there is no such layer to capture.
        """
        name, layers = self._info.name, self._info.num_layers
        if not isinstance(cache, V4Cache):
            raise CapabilityError(f"{name} cannot use a {type(cache).__name__}.")
        if batch.num_rows and int(batch.positions.max()) >= self._info.max_positions:
            raise CapabilityError(
                f"position {int(batch.positions.max())} is past the longest context of {name}, "
                f"{self._info.max_positions} tokens."
            )
        strange = [layer for layer in capture if not -1 <= layer <= layers]
        if strange:
            raise CapabilityError(
                f"layer {strange[0]} cannot be captured: {name} has layers -1 (embeddings) to "
                f"{layers - 1}, and {layers} for all streams of the last one."
            )
        return self.model.forward(batch, cache, capture=capture)
