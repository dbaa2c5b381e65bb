"""dspark: lossless tree-speculative decoding on plain PyTorch.

Names are resolved when first used: importing dspark does not import torch.

    engine = dspark.Engine.load(target="smollm2-135m")
    results = engine.generate(["The capital of France is"], dspark.SamplingParams(max_tokens=32))
    print(results[0].text, results[0].stats.accepted_length)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dspark._version import __version__

if TYPE_CHECKING:
    from dspark.engine import Engine, EngineConfig, StreamChunk
    from dspark.engine_stats import EngineStats
    from dspark.errors import (
        CapabilityError,
        CheckpointError,
        ConfigError,
        DataError,
        DsparkError,
        ShapeError,
    )
    from dspark.hf import accelerate, restore
    from dspark.request import (
        FinishReason,
        GenerationResult,
        RequestStats,
        RoundStats,
        Rule,
        SamplingParams,
        TokenLogprob,
    )
    from dspark.rounds import RoundLimits

_HOME = {
    "CapabilityError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DsparkError": "errors",
    "Engine": "engine",
    "EngineConfig": "engine",
    "EngineStats": "engine_stats",
    "FinishReason": "request",
    "GenerationResult": "request",
    "RequestStats": "request",
    "RoundLimits": "rounds",
    "RoundStats": "request",
    "Rule": "request",
    "SamplingParams": "request",
    "ShapeError": "errors",
    "StreamChunk": "engine",
    "TokenLogprob": "request",
    "accelerate": "hf",
    "restore": "hf",
}

__all__ = [
    "CapabilityError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DsparkError",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "GenerationResult",
    "RequestStats",
    "RoundLimits",
    "RoundStats",
    "Rule",
    "SamplingParams",
    "ShapeError",
    "StreamChunk",
    "TokenLogprob",
    "__version__",
    "accelerate",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name == "hf":  # dspark.hf.generate without another import
        return import_module("dspark.hf")
    if name not in _HOME:
        raise AttributeError(f"module 'dspark' has no attribute {name!r}")
    return getattr(import_module(f"dspark.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
