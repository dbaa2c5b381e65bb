"""The C structures of kernels/forward.cpp, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

from torch import Tensor

from dspark.adapters.fused.packing import KINDS, PackedMatrix

__all__ = ["Layer", "Matrix", "Model", "Piece", "Span", "Step", "address", "matrix"]


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
    """One slot's rows (target.RowSpan)."""

    _fields_ = (
        ("row", c_int64),
        ("rows", c_int64),
        ("length", c_int64),
        ("piece", c_int64),
        ("pieces", c_int64),
        ("is_chain", c_int64),
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
