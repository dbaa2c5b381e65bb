"""Gemma family: Gemma 2, 3 and 4 (text): sliding and global layers, soft-caps, shared K/V."""

from __future__ import annotations

from typing import Any

from dspark.adapters.base import FamilyAdapter

__all__ = ["ADAPTER"]


def _kv_source(config: Any) -> tuple[int, ...]:
    """Layers that share K/V read those of the last layer of their type that makes its own."""
    count = config.num_hidden_layers
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    source = list(range(count))
    for layer in range(count - shared, count):
        kind = config.layer_types[layer]
        own = [i for i in range(count - shared) if config.layer_types[i] == kind]
        source[layer] = own[-1]
    return tuple(source)


def _check(config: Any) -> str | None:
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its attention looks ahead (use_bidirectional_attention)"
    return None


ADAPTER = FamilyAdapter(
    family="gemma",
    model_types=("gemma2", "gemma3_text", "gemma4_text"),
    kv_source=_kv_source,
    check=_check,
)
