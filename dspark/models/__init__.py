"""Where weights come from: aliases, downloads, checksums, GGUF files, folders, hub ids.

Everything ends as a local folder in the Hugging Face layout (config.json, safetensors weights,
tokenizer files). Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from dspark.models.aliases import ALIASES, DEFAULT_ALIAS, Alias
from dspark.models.check import check_checkpoint
from dspark.models.resolve import ModelListing, find_cached, list_models, resolve_model
from dspark.models.store import cache_root, remove_model

__all__ = [
    "ALIASES",
    "DEFAULT_ALIAS",
    "Alias",
    "ModelListing",
    "cache_root",
    "check_checkpoint",
    "find_cached",
    "list_models",
    "remove_model",
    "resolve_model",
]
