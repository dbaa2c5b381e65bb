"""The C structures of kernels/forward.cpp, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int64, c_void_p

from torch import Tensor

from dspark.adapters.fused.packing import KINDS, PackedMatrix

__all__ = [
    "BLOCK",
    "CHAIN",
    "TREE",
    "Branches",
    "Context",
    "Growing",
    "Grown",
    "Layer",
    "Matrix",
    "Model",
    "Piece",
    "Rating",
    "Span",
    "Step",
    "address",
    "matrix",
]

TREE, CHAIN, BLOCK = range(3)
"""What a row sees of its span's rows: its ancestors; those before it; all."""


class Matrix(ctypes.Structure):
    """A packed weight (packing.PackedMatrix)."""

    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("panels", c_int64),
        ("kind", c_int64),
    )


class Layer(ctypes.Structure):
    """One decoder layer (layout.LayerParts)."""

    _fields_ = (
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("norm_in", c_void_p),
        ("norm_attention", c_void_p),
        ("norm_mlp", c_void_p),
        ("norm_output", c_void_p),
        ("norm_query", c_void_p),
        ("norm_key", c_void_p),
        ("window", c_int64),
        ("rope", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    )


class Model(ctypes.Structure):
    """A whole decoder (layout.DecoderParts)."""

    _fields_ = (
        ("layers", c_int64),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("activation", c_int64),
        ("is_rounded", c_int64),
        ("keeps_half", c_int64),
        ("rounds_unit_norm", c_int64),
        ("eps", c_float),
        ("logit_softcap", c_float),
        ("layer", c_void_p),
        ("norm", c_void_p),
        ("head", Matrix),
    )


class Piece(ctypes.Structure):
    """A slot's part of one segment of the K/V store (store.Piece)."""

    _fields_ = (
        ("start", c_int64),
        ("columns", c_int64),
        ("tokens", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class Span(ctypes.Structure):
    """One slot's rows (target.RowSpan); `shape` is one of TREE, CHAIN, BLOCK."""

    _fields_ = (
        ("row", c_int64),
        ("rows", c_int64),
        ("length", c_int64),
        ("piece", c_int64),
        ("pieces", c_int64),
        ("shape", c_int64),
    )


class Step(ctypes.Structure):
    """One forward."""

    _fields_ = (
        ("rows", c_int64),
        ("spans", c_int64),
        ("outputs", c_int64),
        ("threads", c_int64),
        ("span", c_void_p),
        ("piece", c_void_p),
        ("positions", c_void_p),
        ("parent", c_void_p),
        ("output_rows", c_void_p),
        ("rope", c_void_p),
        ("x", c_void_p),
        ("capture", c_void_p),
        ("normed", c_void_p),
        ("logits", c_void_p),
        ("work", c_void_p),
        ("best", c_void_p),
    )


class Context(ctypes.Structure):
    """Keys and values of a draft's context (kernels/draft.h)."""

    _fields_ = (
        ("combine", Matrix),
        ("norm", c_void_p),
        ("keys_values", c_void_p),
        ("features", c_void_p),
        ("c", c_void_p),
        ("made", c_void_p),
    )


class Branches(ctypes.Structure):
    """A level of a draft's tree (kernels/draft.h)."""

    _fields_ = (
        ("rows", c_int64),
        ("columns", c_int64),
        ("most", c_int64),
        ("threads", c_int64),
        ("bias", Matrix),
        ("latent", c_void_p),
        ("base", c_void_p),
        ("base_row", c_void_p),
        ("temperature", c_void_p),
        ("noise", c_void_p),
        ("ids", c_void_p),
        ("logits", c_void_p),
        ("column", c_void_p),
        ("value", c_void_p),
        ("log_sum", c_void_p),
    )


class Rating(ctypes.Structure):
    """A survival map (kernels/grow.h)."""

    _fields_ = tuple(
        (name, c_void_p) for name in ("bias", "share", "lift", "confidence", "depth", "temperature")
    )


class Grown(ctypes.Structure):
    """One request's draft tree (kernels/grow.h)."""

    _fields_ = (
        *(
            (name, c_int64)
            for name in ("block", "budget", "depth", "width", "most", "beams", "anchor", "room")
        ),
        ("min_survival", c_double),
        ("temperature", c_float),
        ("noise", c_void_p),
        ("rating", c_void_p),
        ("count", c_int64),
        ("token", c_void_p),
        ("parent", c_void_p),
        ("level", c_void_p),
        ("survival", c_void_p),
    )


class Growing(ctypes.Structure):
    """Trees behind blocks (kernels/grow.h)."""

    _fields_ = (
        *((name, c_int64) for name in ("requests", "columns", "depths", "threads", "rank")),
        ("grown", c_void_p),
        ("bias", Matrix),
        ("first", c_void_p),
        ("is_half", c_int64),
        ("base", c_void_p),
        ("ids", c_void_p),
        ("sure", c_void_p),
        ("sure_of_token", c_void_p),
        ("rows", c_int64),
        ("latent", c_void_p),
        ("logits", c_void_p),
    )


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor's numbers lie; None for none."""
    return None if tensor is None else tensor.data_ptr()


def matrix(packed: PackedMatrix) -> Matrix:
    """The structure of a packed weight; it holds no reference to it."""
    return Matrix(
        address(packed.data),
        address(packed.bias),
        address(packed.scale),
        packed.inputs,
        packed.outputs,
        packed.panels,
        KINDS.index(packed.kind),
    )
