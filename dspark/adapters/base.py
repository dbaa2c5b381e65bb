"""What a family adapter says about a model that transformers implements.

An adapter holds differences only: how to tell that it is responsible, and what the shared machinery
(dspark.adapters.hf) must know that the stock modules do not say themselves. Third parties register
one under the entry-point group `dspark.adapters`; see docs/adapters.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["FamilyAdapter"]


def _own_kv(config: PreTrainedConfig) -> tuple[int, ...]:
    return tuple(range(config.num_hidden_layers))


def _no_softcap(config: PreTrainedConfig) -> float | None:
    return getattr(config, "final_logit_softcapping", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyAdapter:
    """One family of wrapped targets.

    Attributes:
        family: Its name, as `dspark models` shows it.
        model_types: transformers `model_type` values that it handles.
        kv_source: config -> for every layer, the layer whose K/V it reads.
        logit_softcap: config -> final soft-cap of the logits, or None.
        config_overrides: Fields set on the config before the model is built.
        check: config -> one sentence why this model cannot be tree-verified, or None.
    """

    family: str
    model_types: tuple[str, ...]
    kv_source: Callable[[Any], tuple[int, ...]] = _own_kv
    logit_softcap: Callable[[Any], float | None] = _no_softcap
    config_overrides: Mapping[str, object] = field(default_factory=dict)
    check: Callable[[Any], str | None] = lambda config: None
