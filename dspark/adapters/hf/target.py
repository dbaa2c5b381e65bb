"""A Target over a stock transformers model.

The modeling code is transformers' own. Our attention function writes K/V into our store and masks
trees; linear layers are swapped for ones with a chosen kernel (linear.py); the backbone runs on
the flattened batch [1, N] with explicit positions, and the head on the chosen rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspark.adapters.base import FamilyAdapter
from dspark.adapters.hf.attention import QUERY_ROWS, Step
from dspark.adapters.hf.experts import watch_routing
from dspark.adapters.hf.linear import RowStableLinear, RowWindow, replace_linears
from dspark.adapters.hf.store import SUM_COLUMNS, LayerShape, StoreCache
from dspark.cache import Cache
from dspark.errors import CapabilityError
from dspark.target import ExactnessReport, HeadRows, TargetInfo, TargetOutput, TokenBatch

__all__ = ["HFTarget"]


class HFTarget:
    """Target (dspark.target) over a transformers causal LM.

    Args:
        model: The model, in eval mode, its attention set to ours.
        adapter: Its family.
        name: What the user called it.
        kernel: Linear kernel (linear.KERNELS).
        windows: Row windows by layer shape, or None without exact mode.
        eos_token_ids: Tokens that end a text.
        quant: What the weights were rounded to before.
    """

    def __init__(
        self,
        model: Any,
        adapter: FamilyAdapter,
        *,
        name: str,
        kernel: str,
        windows: dict[tuple[int, int], RowWindow] | None,
        eos_token_ids: Sequence[int],
        quant: str = "none",
    ) -> None:
        config = model.config.get_text_config()
        self._backbone: nn.Module = model.get_decoder()
        self._head: nn.Module = model.get_output_embeddings()
        self._softcap = adapter.logit_softcap(config)
        self._kv_source = adapter.kv_source(config)
        self._device: torch.device = next(model.parameters()).device
        self._dtype: torch.dtype = next(model.parameters()).dtype
        self.kv_layers = _kv_shapes(self._backbone, self._kv_source)
        self.query_heads = int(config.num_attention_heads)
        self.query_rows = QUERY_ROWS[0]
        self._capture: dict[int, Tensor] = {}
        self._hooked: set[int] = set()
        self._head_bias, self._tied = _own_head_parts(self._backbone, self._head)
        replace_linears(self._backbone, kernel, windows)
        holder = nn.ModuleDict({"head": self._head})
        replace_linears(holder, kernel, windows)
        self._head = holder["head"]
        self.kernel = kernel
        self.min_rows = max((w.least for w in windows.values()), default=1) if windows else 1
        self._linears = [
            m for m in (*self._backbone.modules(), self._head) if isinstance(m, RowStableLinear)
        ]
        self.exact = False
        self.switch_exact(windows is not None)
        self._exactness = ExactnessReport(
            enabled=self.exact,
            holds=False,
            min_rows=self.min_rows,
            backend=kernel,
            cost=None,
            reason="not probed",
        )
        self._info = TargetInfo(
            name=name,
            family=adapter.family,
            vocab_size=int(self._head.out_features),  # type: ignore[arg-type]
            hidden_size=int(config.hidden_size),
            num_layers=int(config.num_hidden_layers),
            max_positions=int(config.max_position_embeddings),
            eos_token_ids=tuple(eos_token_ids),
            dtype=str(self._dtype).removeprefix("torch."),
            device=str(self._device),
            quant=quant,
        )

    @property
    def info(self) -> TargetInfo:
        """Facts about the model."""
        return self._info

    @property
    def exactness(self) -> ExactnessReport:
        """What the probe at load found."""
        return self._exactness

    def set_exactness(self, report: ExactnessReport) -> None:
        """Record the probe's finding, and switch exact mode on or off with it."""
        self._exactness = report
        self.switch_exact(report.enabled)

    def switch_exact(self, on: bool) -> None:
        """Run forwards in exact mode or not; caches made before must not be used after."""
        self.exact = on
        for linear in self._linears:
            linear.is_windowed = on

    def new_cache(self, *, memory_limit: int | None = None) -> StoreCache:
        """Make an empty cache; in exact mode it keeps K/V in float32."""
        dtype = torch.float32 if self.exact else self._dtype
        return StoreCache(
            self.kv_layers, dtype=dtype, device=self._device, memory_limit=memory_limit
        )

    @torch.inference_mode()
    def forward(
        self, batch: TokenBatch, cache: Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        """Run one ragged batch; see `dspark.target.Target.forward`.

        Raises:
            CapabilityError: If the cache was made by another kind of target, or a position is past
                the model's longest context.
        """
        if not isinstance(cache, StoreCache) or cache.layout[1] != SUM_COLUMNS:
            raise CapabilityError(f"{self._info.name} cannot use a {type(cache).__name__}.")
        if batch.num_rows and int(batch.positions.max()) >= self._info.max_positions:
            raise CapabilityError(
                f"position {int(batch.positions.max())} is past the longest context of "
                f"{self._info.name}, {self._info.max_positions} tokens."
            )
        cache.begin(batch)
        step = Step.plan(
            batch,
            cache,
            exact=self.exact,
            kv_source=self._kv_source,
            device=self._device,
            least_rows=self.query_rows,
        )
        hidden = self._run_backbone(batch, step, capture)
        rows = hidden[torch.from_numpy(batch.output_rows).to(self._device)]
        self._capture[self._info.num_layers] = hidden
        captured = {layer: self._capture[layer][: batch.num_rows] for layer in capture}
        self._capture.clear()
        return TargetOutput(self._run_head(rows), captured)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embed tokens; see `dspark.target.SharesHead.embed`."""
        embedding: nn.Module = self._backbone.get_input_embeddings()  # type: ignore[operator]
        rows: Tensor = embedding(token_ids.to(self._device))
        return rows

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits of normed hidden states; see `dspark.target.SharesHead.unembed`."""
        return self._run_head(hidden.to(self._device, self._dtype))

    @torch.no_grad()
    def head_rows(self, ids: Tensor | None = None) -> HeadRows:
        """Rows of the output head; see `dspark.target.SharesHeadRows.head_rows`."""
        wanted = slice(None) if ids is None else ids.to(self._device)
        weight = self._tied[wanted] if self._tied is not None else self._unpack_head(wanted)
        bias = None if self._head_bias is None else self._head_bias[wanted]
        return HeadRows(weight.detach().clone(), bias, self._softcap)

    def _unpack_head(self, wanted: Tensor | slice) -> Tensor:
        """Rows of a head whose weights are packed: its products with unit vectors, exact."""
        parts = []
        for unit in torch.eye(self._info.hidden_size, device=self._device).split(256):
            logits = self._head(unit.to(self._dtype))
            if self._head_bias is not None:
                logits = logits - self._head_bias
            parts.append(logits[:, wanted].T)
        return torch.cat(parts, dim=1)

    def watch_experts(self, note: Callable[[int, Tensor], None]) -> AbstractContextManager[None]:
        """Report routing; see `dspark.expert_reuse.TellsExperts`."""
        return watch_routing(self._backbone, note)

    def _run_backbone(self, batch: TokenBatch, step: Step, capture: Sequence[int]) -> Tensor:
        for layer in capture:
            if layer != self._info.num_layers:  # that one needs no hook
                self._hook(layer)
        # Rows may be too few for every layer's row window: pad once, not in every layer.
        padding = max(0, self.min_rows - batch.num_rows) if self.exact else 0
        ids = torch.from_numpy(np.pad(batch.token_ids, (0, padding)))
        positions = torch.from_numpy(np.pad(batch.positions, (0, padding)))
        output = self._backbone(
            input_ids=ids[None].to(self._device),
            position_ids=positions[None].to(self._device),
            use_cache=False,
            dspark_step=step,
        )
        hidden: Tensor = output[0][0]
        return hidden[: batch.num_rows]

    def _run_head(self, rows: Tensor) -> Tensor:
        if rows.shape[0] == 0:
            return rows.new_zeros(0, self._info.vocab_size)
        logits: Tensor = self._head(rows)
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def _hook(self, layer: int) -> None:
        """Keep the output of decoder layer `layer` (-1: the embeddings) of every forward."""
        if layer in self._hooked:
            return
        if not -1 <= layer < self._info.num_layers:
            raise CapabilityError(
                f"layer {layer} cannot be captured: {self._info.name} has layers -1 "
                f"(embeddings) to {self._info.num_layers - 1}, and {self._info.num_layers} for "
                "what the output head gets."
            )
        layers: Any = self._backbone.layers
        if layer < 0:
            layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
        else:
            layers[layer].register_forward_hook(self._keeper(layer))
        self._hooked.add(layer)

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._capture[-1] = hidden[0]

    def _keeper(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._capture[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        return keep


def _own_head_parts(backbone: Any, head: Any) -> tuple[Tensor | None, Tensor | None]:
    """The head's bias, and its weight if that is the embedding's, which is not packed."""
    embedding: Tensor = backbone.get_input_embeddings().weight
    is_tied = head.weight is embedding or head.weight.data_ptr() == embedding.data_ptr()
    bias = None if head.bias is None else head.bias.detach().clone()
    return bias, embedding if is_tied else None


def _kv_shapes(backbone: nn.Module, kv_source: tuple[int, ...]) -> list[LayerShape]:
    """K/V heads and head size of every layer that owns K/V, read off its projections."""
    shapes = []
    layers: Any = backbone.layers
    for index, layer in enumerate(layers):
        if kv_source[index] != index:
            continue
        attention = layer.self_attn
        dim = int(attention.head_dim)
        key = getattr(attention, "k_proj", None)
        if key is None:  # phi3 keeps q, k and v in one projection
            heads = int(attention.config.num_key_value_heads)
        else:
            heads = int(key.out_features) // dim
        shapes.append(LayerShape(layer=index, heads=heads, head_dim=dim))
    return shapes
