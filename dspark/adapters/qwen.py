"""Qwen family: Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from dspark.adapters.base import FamilyAdapter

__all__ = ["ADAPTER"]

ADAPTER = FamilyAdapter(family="qwen", model_types=("qwen2", "qwen3", "qwen3_moe"))
