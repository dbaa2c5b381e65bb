"""Llama family: Llama 2 and 3, SmolLM2, Mistral and models of the same form."""

from __future__ import annotations

from dspark.adapters.base import FamilyAdapter

__all__ = ["ADAPTER"]

ADAPTER = FamilyAdapter(family="llama", model_types=("llama", "mistral", "phi3"))
