"""Runs a DSpark or DFlash module on packed weights: context, block and branches in one call each.

What the module's own layers compute, with the fused decoder's kernels: a block is a span of rows
that all see each other behind the request's context. Keys and values of all layers lie in one
buffer per request, [layers, kv_heads, positions, head_dim].

Letters: B requests, S slots of a block, G depths wanted, n rows, D hidden size, V vocabulary,
Vd draft vocabulary, R nodes, K rank of the sequential head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dspark.adapters.fused import structures
from dspark.adapters.fused.draft_growth import Growth, Heads
from dspark.adapters.fused.layout import NotFused
from dspark.adapters.fused.library import Library
from dspark.adapters.fused.linear import PackedLinear, can_pack
from dspark.adapters.fused.packing import PackedMatrix, pack_gated, pack_stacked
from dspark.adapters.quantise import GROUP
from dspark.draft.backbone import DraftLayer
from dspark.draft.block_runner import Ask, Found, NewRows, Wanted
from dspark.draft.draft_cache import ContextCache
from dspark.draft.dspark_config import BackboneConfig
from dspark.draft.dspark_module import DSparkModule
from dspark.tree_build import TreeGrower

__all__ = ["FusedRunner", "check_fused"]

_ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
_LEAST_POSITIONS = 1024  # rows of the rotary table to begin with; it doubles
_NO_HEAD = structures.Matrix()

_Confidence: TypeAlias = tuple[np.ndarray, np.float32, np.ndarray | None]
"""Of a confidence head, all float32: weights of the hidden state [D], bias, weights of the head's
row of the token before [K]."""


def check_fused(module: DSparkModule, lanes: int, quant: str) -> None:
    """Refuse a module that the kernels do not run.

    Args:
        module: The module, its layers not replaced yet.
        lanes: Floats of a vector of the kernels.
        quant: What its weights will be rounded to.

    Raises:
        NotFused: If anything about it is not what they compute.
    """
    config, backbone = module.config, module.config.backbone
    weight = module.fc.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        raise NotFused(f"a draft in {weight.dtype} on {weight.device.type} is not fused")
    if backbone.activation not in _ACTIVATIONS:
        raise NotFused(f"the activation {backbone.activation} is not fused")
    if backbone.has_v_norm or backbone.shares_kv or backbone.has_layer_scalar:
        raise NotFused("layers with norms of values, shared values or scalars are not fused")
    if any(window is not None and (window.moves or window.is_causal) for window in module.windows):
        raise NotFused("windows that move within a block are not fused")
    _check_sizes(backbone, lanes)
    inputs = len(config.target_layer_ids) * config.target_hidden_size
    if inputs % 2:
        raise NotFused(f"its combiner has {inputs} inputs, no even number")
    if quant != "none":
        heads = backbone.num_heads * backbone.head_dim
        for size in (inputs, heads, backbone.hidden_size, backbone.intermediate_size):
            if size % GROUP:
                raise NotFused(f"its {quant} weights have {size} inputs, no multiple of {GROUP}")


def _check_sizes(backbone: BackboneConfig, lanes: int) -> None:
    for size in (backbone.hidden_size, backbone.intermediate_size, backbone.head_dim):
        if size % lanes:
            raise NotFused(f"its size {size} is no multiple of {lanes}")
    if backbone.num_heads // backbone.num_kv_heads > 32:
        raise NotFused("more than 32 query heads to a key head are not fused")


class FusedRunner:
    """Runs a module with the kernels; see `dspark.draft.block_runner.BlockRunner`.

    Calls must not run at the same time. There are no gradients.

    Args:
        module: The module, in eval mode, its layers not replaced yet; `check_fused` passed. The
            weights of its layers and combiner are let go.
        library: The kernels.
        quant: What to round the weights to: "none" or "int8".
    """

    def __init__(self, module: DSparkModule, library: Library, quant: str) -> None:
        config, backbone = module.config, module.config.backbone
        self._module, self._library = module, library
        self._dtype = module.fc.weight.dtype
        self._like = torch.empty(0, dtype=self._dtype)
        self._slots, self._first = config.block_size, config.first_slot
        self._cache_heads = backbone.num_layers * backbone.num_kv_heads
        self._head_dim = backbone.head_dim
        self._kept: list[Tensor | PackedMatrix | None] = []
        lanes = library.lanes
        layers = [layer for layer in module.layers if isinstance(layer, DraftLayer)]
        packed = [self._pack(layer, backbone, lanes, quant) for layer in layers]
        self._layers = (structures.Layer * len(packed))(*(layer for layer, _ in packed))
        self._keys_values = (structures.Matrix * len(packed))(*(kv for _, kv in packed))
        self._combine = self._keep(pack_stacked([module.fc], lanes, quant))
        self._norms = [_floats(norm.weight) for norm in (module.hidden_norm, module.norm)]
        self._head: PackedMatrix | None = None
        self._bias: PackedMatrix | None = None
        self._ids = None if module.vocab.ids is None else module.vocab.ids.contiguous()
        is_half = int(self._dtype == torch.bfloat16)
        self._model = structures.Model(
            layers=len(packed),
            hidden=backbone.hidden_size,
            inner=backbone.intermediate_size,
            heads=backbone.num_heads,
            kv_heads=backbone.num_kv_heads,
            head_dim=backbone.head_dim,
            activation=_ACTIVATIONS[backbone.activation],
            is_rounded=is_half,
            keeps_half=is_half,
            rounds_unit_norm=0,
            eps=backbone.norm_eps,
            layer=ctypes.addressof(self._layers),
            norm=structures.address(self._norms[1]),
        )
        module.fc.weight = nn.Parameter(self._like, requires_grad=False)
        self._captures = (ctypes.c_void_p * len(packed))()
        self._work = torch.empty(0)
        self._rope = torch.empty(0, 2, self._head_dim // 2)
        self._base = self._hidden = torch.empty(0)
        self._growth: Growth | None = None
        self._confidence = _confidence_of(module)

    def use_heads(self) -> None:
        """Take the module's heads as they are packed now; what is not packed is left to torch."""
        module, markov = self._module, self._module.markov_head
        head, cap = module.packed_head()
        if isinstance(head, PackedLinear):
            self._head = head.packed
            self._model.head = structures.matrix(head.packed)
            self._model.logit_softcap = cap or 0.0
        second: nn.Module | None = None if markov is None else markov.markov_w2
        if isinstance(second, PackedLinear):
            self._bias = second.packed
        elif isinstance(second, nn.Linear) and can_pack(second, "none"):
            self._bias = self._keep(pack_stacked([second], self._library.lanes))
        if markov is None or (markov.kind == "vanilla" and self._bias is not None):
            first = None if markov is None else markov.markov_w1.weight.detach().contiguous()
            is_half = bool(self._model.is_rounded)
            self._growth = Growth(self._library, Heads(first, self._bias, self._ids, is_half))

    @property
    def stored(self) -> dict[str, int]:
        """Weights by how they are stored (packing.KINDS)."""
        stored: dict[str, int] = {}
        for item in self._kept:
            if isinstance(item, PackedMatrix):
                stored[item.kind] = stored.get(item.kind, 0) + item.inputs * item.outputs
        return stored

    def _keep(self, packed: PackedMatrix) -> PackedMatrix:
        self._kept.append(packed)
        return packed

    def _pack(
        self, layer: DraftLayer, backbone: BackboneConfig, lanes: int, quant: str
    ) -> tuple[structures.Layer, structures.Matrix]:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj]
        if attention.v_proj is not None:  # check_fused has seen to it
            projections.append(attention.v_proj)
        block = [
            pack_stacked(projections, lanes, quant),
            pack_stacked([attention.o_proj], lanes, quant),
            pack_gated(mlp.gate_proj, mlp.up_proj, lanes, quant),
            pack_stacked([mlp.down_proj], lanes, quant),
        ]
        # Context rows have no queries: the panels behind those are what they need.
        queries = attention.q_proj.out_features
        context = (
            _panels_from(block[0], queries // (2 * lanes), lanes)
            if queries % (2 * lanes) == 0
            else pack_stacked(projections[1:], lanes, quant)
        )
        post = layer.post_attention_layernorm
        norms: list[nn.Module | None] = [layer.input_layernorm, None, post, None]
        if layer.has_four_norms:
            before, after = layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
            norms = [layer.input_layernorm, post, before, after]
        weights = [_norm(norm) for norm in (*norms, attention.q_norm, attention.k_norm)]
        self._kept.extend((*block, context, *weights))
        window = backbone.windows[layer.index]
        for linear in (*projections, attention.o_proj, *mlp.children()):
            if isinstance(linear, nn.Linear):
                linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        made = structures.Layer(
            *(structures.matrix(item) for item in block),
            *(structures.address(weight) for weight in weights),
            0 if window is None else window.size + self._slots,  # counted from the block's end
            0,
            attention.scale,
            0.0,
        )
        return made, structures.matrix(context)

    # -- forwards -----------------------------------------------------------------------------

    def new_cache(self) -> ContextCache:
        """A cache whose one layer holds the heads of all layers."""
        return ContextCache([None])

    def take(self, parts: Sequence[NewRows]) -> None:
        """See `BlockRunner.take`."""
        counts = [int(rows.shape[0]) for _, _, rows in parts]
        total, shape = sum(counts), self._model
        given = [rows for _, _, rows in parts]
        features = given[0] if len(given) == 1 else torch.cat(given)
        features = features.to(self._dtype).float().contiguous()
        positions = np.concatenate(
            [
                np.arange(len(tokens) - count, len(tokens))
                for (_, tokens, _), count in zip(parts, counts, strict=True)
            ]
        )
        width = 2 * shape.kv_heads * shape.head_dim
        c, made = torch.empty(total, shape.hidden), torch.empty(shape.layers * total, width)
        step, keeps = self._step([cache for cache, _, _ in parts], counts, positions)
        context = structures.Context(
            structures.matrix(self._combine),
            structures.address(self._norms[0]),
            ctypes.addressof(self._keys_values),
            structures.address(features),
            structures.address(c),
            structures.address(made),
        )
        self._library.context(
            ctypes.addressof(self._model), ctypes.addressof(context), ctypes.addressof(step)
        )
        del keeps
        for (cache, tokens, _), count in zip(parts, counts, strict=True):
            cache.advance(tokens[len(tokens) - count :])

    def run(
        self, anchors: Sequence[int], caches: Sequence[ContextCache], depth: int
    ) -> tuple[Tensor, Tensor]:
        """See `BlockRunner.run`."""
        module, slots, count = self._module, self._slots, len(caches)
        tokens = np.full((count, slots), module.config.mask_token_id, dtype=np.int64)
        tokens[:, 0] = anchors
        starts = np.array([cache.length for cache in caches])
        positions = (starts[:, None] + np.arange(slots)).reshape(-1)
        outputs = np.arange(count)[:, None] * slots + np.arange(self._first, self._first + depth)
        outputs = np.ascontiguousarray(outputs.reshape(-1), dtype=np.int64)
        x = module.embed(torch.from_numpy(tokens.reshape(-1))).to(torch.float32, copy=True)
        hidden = torch.empty_like(x)
        step, keeps = self._step(caches, [slots] * count, positions)
        columns = max(cache.kept for cache in caches) + slots
        wanted = 0 if self._head is None else len(outputs)
        base = torch.empty(len(outputs), 0 if self._head is None else self._head.outputs)
        step.outputs, step.output_rows = wanted, outputs.ctypes.data
        step.x, step.normed = structures.address(x), structures.address(hidden)
        step.capture, step.logits = ctypes.addressof(self._captures), structures.address(base)
        step.work = self._room(count * slots, wanted, columns, step.threads)
        self._library.forward(ctypes.addressof(self._model), ctypes.addressof(step))
        del keeps
        rows = hidden.view(count, slots, -1)
        self._hidden = rows[:, self._first : self._first + depth]
        if self._head is None:
            base = module.base_logits(self._hidden.flatten(0, 1).to(self._dtype))
        self._base = base.view(count, depth, -1).contiguous()
        return rows.to(self._dtype), self._base

    def find(self, wanted: Sequence[Wanted], latent: Tensor | None) -> Found | None:
        """See `BlockRunner.find`."""
        base = self._base
        if latent is not None and self._bias is None:
            return None
        count, columns = len(wanted), int(base.shape[2])
        most = min(max(one.count for one in wanted), columns)
        depths = base.shape[1]
        rows = np.array([one.request * depths + one.depth for one in wanted], dtype=np.int64)
        temperature = np.array([one.temperature for one in wanted], dtype=np.float32)
        noise = (ctypes.c_void_p * count)(
            *(None if one.noise is None else one.noise.ctypes.data for one in wanted)
        )
        logits = np.empty((count, columns), dtype=np.float32)
        found = np.empty((count, most), dtype=np.int64)
        values = np.empty((count, most), dtype=np.float32)
        log_sum = np.empty(count, dtype=np.float32)
        numbers = None if latent is None else latent.to(self._dtype).float().contiguous()
        bias = None if numbers is None else self._bias
        step = structures.Branches(
            count,
            columns,
            most,
            torch.get_num_threads(),
            _NO_HEAD if bias is None else structures.matrix(bias),
            structures.address(numbers),
            base.data_ptr(),
            rows.ctypes.data,
            temperature.ctypes.data,
            ctypes.addressof(noise),
            structures.address(self._ids),
            *(array.ctypes.data for array in (logits, found, values, log_sum)),
        )
        self._library.branches(ctypes.addressof(step), self._model.is_rounded)
        if self._ids is not None:
            found = np.where(found < 0, -1, self._ids.numpy()[found])
        return Found(found, values, log_sum)

    def grow(self, asks: Sequence[Ask]) -> list[TreeGrower] | None:
        """See `BlockRunner.grow`; heads that read more than the last token are not grown here."""
        if self._growth is None:
            return None
        sure, of_token = None, None
        is_read = any(ask.rating is not None and ask.rating.reads_confidence for ask in asks)
        if is_read and self._confidence is not None:
            weight, bias, of_token = self._confidence
            # numpy, as in the decoder: operations of torch are slow to begin after a forward.
            sure = np.ascontiguousarray(self._hidden.numpy() @ weight + bias)
        return self._growth.grow(asks, self._base, sure, of_token)

    # -- parts --------------------------------------------------------------------------------

    def _step(
        self, caches: Sequence[ContextCache], counts: Sequence[int], positions: np.ndarray
    ) -> tuple[structures.Step, object]:
        """The spans of new rows behind contexts, and what must outlive the call."""
        spans: list[structures.Span] = []
        pieces: list[structures.Piece] = []
        row = 0
        for cache, count in zip(caches, counts, strict=True):
            keys, values = cache.room(count, (self._cache_heads, self._head_dim), self._like)
            size = int(keys.shape[1])
            spans.append(structures.Span(row, count, cache.kept, len(pieces), 1, structures.BLOCK))
            pieces.append(structures.Piece(0, size, size, keys.data_ptr(), values.data_ptr()))
            row += count
        span = (structures.Span * len(spans))(*spans)
        piece = (structures.Piece * len(pieces))(*pieces)
        where = np.ascontiguousarray(positions, dtype=np.int64)
        table = (ctypes.c_void_p * 1)(self._table(int(where.max()) + 1).data_ptr())
        step = structures.Step(
            rows=row,
            spans=len(spans),
            threads=torch.get_num_threads(),
            span=ctypes.addressof(span),
            piece=ctypes.addressof(piece),
            positions=where.ctypes.data,
            parent=where.ctypes.data,  # blocks have no parents
            rope=ctypes.addressof(table),
        )
        return step, (span, piece, where, table)

    def _table(self, positions: int) -> Tensor:
        """Cosines and sines [at least `positions`, 2, head_dim / 2]."""
        have = self._rope.shape[0]
        if have < positions:
            size = max(_LEAST_POSITIONS, 2 * have, positions)
            angles = self._module.rotary.angles(torch.arange(have, size), self._dtype)
            halves = [part[:, 0, : self._head_dim // 2].float() for part in angles]
            self._rope = torch.cat([self._rope, torch.stack(halves, dim=1)]).contiguous()
        return self._rope

    def _room(self, rows: int, outputs: int, columns: int, threads: int) -> int:
        floats = self._library.work_floats(
            ctypes.addressof(self._model), rows, outputs, columns, threads
        )
        if self._work.numel() < floats:
            self._work = torch.empty(floats + floats // 4)
        return self._work.data_ptr()


def _panels_from(packed: PackedMatrix, first: int, lanes: int) -> PackedMatrix:
    """The outputs of a packed weight from a panel on; views."""
    start = first * 2 * lanes
    return PackedMatrix(
        packed.data[first:],
        None if packed.bias is None else packed.bias[start:],
        None if packed.scale is None else packed.scale[start:],
        packed.inputs,
        packed.outputs - start,
        packed.panels - first,
        packed.kind,
    )


def _confidence_of(module: DSparkModule) -> _Confidence | None:
    head = module.confidence_head
    if head is None:
        return None
    bias = 0.0 if head.proj.bias is None else float(head.proj.bias)
    weight = head.proj.weight.detach()[0].float().numpy()
    size = len(weight) - head.rank
    return weight[:size], np.float32(bias), weight[size:].copy() if head.rank else None


def _norm(norm: nn.Module | None) -> Tensor | None:
    weight = getattr(norm, "weight", None)
    return None if weight is None else _floats(weight)


def _floats(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().contiguous()
