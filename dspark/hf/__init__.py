"""Speculative decoding behind transformers' own generate (docs/transformers.md)."""

from __future__ import annotations

from dspark.hf.accelerated import Accelerated, accelerate, generate, hub_generate, restore
from dspark.hf.refusal import FallbackWarning

__all__ = [
    "Accelerated",
    "FallbackWarning",
    "accelerate",
    "generate",
    "hub_generate",
    "restore",
]
