"""The fused decoder: packed weights, rotary tables and working memory around one C call."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dspark.adapters.fused import structures
from dspark.adapters.fused.layout import DecoderParts, LayerParts
from dspark.adapters.fused.library import Library
from dspark.adapters.fused.packing import KINDS, PackedMatrix, pack_gated, pack_stacked
from dspark.adapters.hf.store import StoreCache
from dspark.adapters.quantise import head_quant
from dspark.native import address_of
from dspark.target import TokenBatch

__all__ = ["FusedDecoder"]

_LEAST_POSITIONS = 1024
"""Rows of a rotary table to begin with; it doubles as longer contexts come."""


class FusedDecoder:
    """Runs the layers and the head of a decoder over the K/V store.

    Args:
        parts: The model, taken apart.
        library: The kernels.
        quant: What to round the weights to (dspark.registry.QUANTS).
        lets_go: Empty the weights of the stock modules as they are packed, so that a model is never
            in memory twice. The modules cannot be used afterwards.

    Attributes:
        bytes_read: Bytes of weights that a step reads.
        stored: How the weights of the layers are stored (packing.KINDS).
        kept: Type that keys and values are kept in: the model's, to which they are rounded anyway.
    """

    def __init__(
        self, parts: DecoderParts, library: Library, *, quant: str = "none", lets_go: bool
    ) -> None:
        self._library = library
        self._embedding = parts.embedding
        self._rotary = parts.rotary
        self.dtype = self.kept = parts.dtype
        self.hidden = int(parts.norm.shape[0])
        self.num_layers = len(parts.layers)
        self._kept: list[Tensor | PackedMatrix | None] = [parts.norm]
        self._rope_keys = sorted({layer.rope for layer in parts.layers})
        self._rope: dict[str, Tensor] = {}
        self._head_dim = parts.head_dim
        layers = []
        for layer in parts.layers:
            layers.append(self._pack_layer(layer, library.lanes, quant))
            if lets_go:
                _let_go((*layer.qkv, layer.out, layer.gate, layer.up, layer.down))
        self._layers = (structures.Layer * len(layers))(*layers)
        self.head = pack_stacked([parts.head], library.lanes, head_quant(quant))
        if lets_go and parts.head.weight is not parts.embedding.weight:
            _let_go([parts.head])
        self._model = structures.Model(
            layers=len(layers),
            hidden=self.hidden,
            inner=parts.layers[0].down.in_features,
            heads=parts.heads,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            activation=parts.activation,
            is_rounded=int(parts.dtype == torch.bfloat16),
            keeps_half=int(self.kept == torch.bfloat16),
            rounds_unit_norm=int(not parts.layout.is_norm_offset),
            eps=parts.eps,
            logit_softcap=parts.logit_softcap,
            layer=ctypes.addressof(self._layers),
            norm=structures.address(parts.norm),
            head=structures.matrix(self.head),
        )
        packed = [item for item in (*self._kept, self.head) if isinstance(item, PackedMatrix)]
        self.bytes_read = sum(item.data.nbytes for item in packed)
        kinds = {item.kind for item in packed[:-1]}
        self.stored = KINDS[min(KINDS.index(kind) for kind in kinds)]
        self._work = torch.empty(0)
        self._work_for: tuple[int, ...] = (0, 0, 0, 0)
        self._no_capture = (ctypes.c_void_p * len(layers))()
        self._table = _table_of(parts.embedding)
        self._reach = 0
        self._pointers = (ctypes.c_void_p * len(self._rope_keys))()

    def _pack_layer(self, layer: LayerParts, lanes: int, quant: str) -> structures.Layer:
        matrices = (
            pack_stacked(layer.qkv, lanes, quant),
            pack_stacked([layer.out], lanes, quant),
            pack_gated(layer.gate, layer.up, lanes, quant),
            pack_stacked([layer.down], lanes, quant),
        )
        norms = (*layer.norms, *layer.head_norms)
        self._kept.extend((*matrices, *norms))
        return structures.Layer(
            *(structures.matrix(item) for item in matrices),
            *(structures.address(norm) for norm in norms),
            layer.window,
            self._rope_keys.index(layer.rope),
            layer.scale,
            layer.softcap,
        )

    def keep_in(self, dtype: torch.dtype) -> None:
        """Keep keys and values in another type than the model's, for comparison.

        Args:
            dtype: float32, or bfloat16 for a model that rounds to it.
        """
        self.kept = dtype
        self._model.keeps_half = int(dtype == torch.bfloat16)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [n] -> what the first layer gets, [n, D], in the model's dtype."""
        rows: Tensor = self._embedding(token_ids)
        return rows

    def forward(
        self, batch: TokenBatch, cache: StoreCache, wanted: Sequence[int], reach: int
    ) -> tuple[Tensor, Mapping[int, Tensor], np.ndarray | None]:
        """Run a batch; its rows' K/V are written behind the slots' contexts.

        Args:
            batch: The rows; `cache.begin` was called with it.
            cache: A store in `kept`, without columns of sums.
            wanted: Layers whose outputs to keep, -1 to the number of layers.
            reach: One past the largest position of a row.

        Returns:
            Logits of the output rows, float32 [M, V] rounded to the model's dtype, and
            {layer: [N, D]} in that dtype, and `dspark.target.Largest.tokens`.
        """
        n, outputs = batch.num_rows, len(batch.output_rows)
        kept: dict[int, Tensor] = {}
        inner = [layer for layer in dict.fromkeys(wanted) if 0 <= layer < self.num_layers]
        # numpy where torch would do: its first touch of an operation between two forwards, which
        # leave nothing else in the caches, takes ten times as long as the operation.
        if self._table is None or -1 in wanted:
            with torch.no_grad():
                kept[-1] = self.embed(torch.from_numpy(batch.token_ids))
                x = kept[-1].to(torch.float32, copy=True).contiguous().numpy()
        else:
            x = _widened(self._table, batch.token_ids)
        states = torch.empty(len(inner), *x.shape)
        normed = np.empty_like(x)
        logits = torch.empty(outputs, self.head.outputs)
        spans, pieces, columns = _places(batch, cache)
        capture = self._no_capture
        if inner:
            capture = (ctypes.c_void_p * self.num_layers)()
            for place, layer in enumerate(inner):
                capture[layer] = states.data_ptr() + place * x.nbytes
        tables = self._tables(reach)
        arrays = [_int64(a) for a in (batch.positions, batch.parent, batch.output_rows)]
        threads = torch.get_num_threads()
        # A soft-cap may make logits equal that were not.
        best = None if self._model.logit_softcap else np.empty(outputs, dtype=np.int64)
        step = structures.Step(
            n,
            len(batch.spans),
            outputs,
            threads,
            ctypes.addressof(spans),
            ctypes.addressof(pieces),
            *(address_of(a) for a in arrays),
            ctypes.addressof(tables),
            address_of(x),
            ctypes.addressof(capture),
            address_of(normed),
            logits.data_ptr(),
            self._room(n, outputs, columns, threads),
            None if best is None else address_of(best),
        )
        self._library.forward(ctypes.addressof(self._model), ctypes.addressof(step))
        if self.num_layers in wanted:
            kept[self.num_layers] = torch.from_numpy(normed)
        kept = {layer: hidden.to(self.dtype) for layer, hidden in kept.items()}
        if inner:  # of all layers at once
            kept.update(zip(inner, states.to(self.dtype).unbind(), strict=True))
        return logits, kept, best

    def unembed(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [n, D] -> logits, float32 [n, V] rounded to the model's dtype."""
        rows = hidden.to(self.dtype).float().contiguous()
        n, threads = rows.shape[0], torch.get_num_threads()
        logits = torch.empty(n, self.head.outputs)
        step = structures.Step(
            outputs=n,
            threads=threads,
            normed=structures.address(rows),
            logits=structures.address(logits),
            work=self._room(0, n, 0, threads),
        )
        self._library.unembed(ctypes.addressof(self._model), ctypes.addressof(step))
        return logits

    def _room(self, rows: int, outputs: int, columns: int, threads: int) -> int:
        """Address of enough working memory, kept from call to call."""
        sizes = (rows, outputs, columns, threads)
        if any(size > room for size, room in zip(sizes, self._work_for, strict=True)):
            # A quarter more columns, which grow by the round.
            room = [max(pair) for pair in zip(sizes, self._work_for, strict=True)]
            room[2] += room[2] // 4
            floats = self._library.work_floats(ctypes.addressof(self._model), *room)
            self._work, self._work_for = torch.empty(floats), tuple(room)
        return self._work.data_ptr()

    def _tables(self, positions: int) -> ctypes.Array[ctypes.c_void_p]:
        """Rotary tables that reach at least so many positions, one address per key."""
        while self._reach < positions:
            reach = max(_LEAST_POSITIONS, 2 * self._reach)
            for place, key in enumerate(self._rope_keys):
                more = self._rotate(key, self._reach, reach)
                table = torch.cat([self._rope[key], more]) if self._reach else more
                self._rope[key], self._pointers[place] = table, table.data_ptr()
            self._reach = reach
        return self._pointers

    def _rotate(self, key: str, start: int, stop: int) -> Tensor:
        """Cosines and sines of positions start .. stop - 1: [stop - start, 2, d / 2]."""
        ids = torch.arange(start, stop)[None]
        parts = self._rotary(torch.zeros(1, dtype=self.dtype), ids, key)
        halves = [part[0, :, : self._head_dim // 2].float() for part in parts]
        return torch.stack(halves, dim=1).contiguous()


def _table_of(embedding: nn.Module) -> np.ndarray | None:
    """An embedding's rows, bfloat16 as words; None where it does more than look them up."""
    if type(embedding) is not nn.Embedding:
        return None
    weight = embedding.weight.detach()
    if weight.dtype == torch.bfloat16:
        words: np.ndarray = weight.view(torch.int16).numpy().view(np.uint16)
        return words
    return weight.numpy() if weight.dtype == torch.float32 else None


def _widened(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rows of a table in float32; torch takes ten times as long for a few of them."""
    rows: np.ndarray = table[ids]
    if rows.dtype != np.float32:
        wide = rows.astype(np.uint32)
        wide <<= 16
        rows = wide.view(np.float32)
    return rows


def _places(
    batch: TokenBatch, cache: StoreCache
) -> tuple[ctypes.Array[structures.Span], ctypes.Array[structures.Piece], int]:
    """Where the batch's slots lie, and the most columns of one."""
    spans: list[structures.Span] = []
    pieces: list[structures.Piece] = []
    columns = 0
    for span in batch.spans:
        state, rows = cache.state(span.slot), span.stop - span.start
        columns = max(columns, state.length + rows)
        shape = structures.CHAIN if span.is_chain else structures.TREE
        spans.append(
            structures.Span(span.start, rows, state.length, len(pieces), len(state.pieces), shape)
        )
        for piece in state.pieces:
            pieces.append(structures.Piece(piece.start, piece.columns, *piece.segment.places[0]))
    places = (structures.Span * len(spans))(*spans), (structures.Piece * len(pieces))(*pieces)
    return *places, columns


def _int64(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.int64)


def _let_go(linears: Sequence[nn.Linear]) -> None:
    for linear in linears:
        linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
