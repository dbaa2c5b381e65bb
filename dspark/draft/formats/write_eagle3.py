"""config.json of EAGLE-3 drafts for other programs.

What differs from the three layouts of dspark.draft.eagle3_config, by program:

| | |
|---|---|
| SpecForge | no `norm_output`: there it is the norm before the head, on unless said otherwise |
| SpecForge, SGLang | layer ids in `eagle_config` too, naming outputs; these alone are read |
| vLLM | `num_aux_hidden_states`, the number of layers; Qwen 3's class `Eagle3Qwen3ForCausalLM` |

SGLang 0.5.23 reads nested ids as outputs for targets of the families Llama, Qwen, Gemma, GLM and
MiniMax; for DeepSeek-V3 and its kin only if the first is 1, for gpt-oss unless one is the last.
"""

from __future__ import annotations

from typing import Any

from dspark.draft.eagle3_config import Layout, write_config
from dspark.draft.eagle3_module import Eagle3Config
from dspark.draft.formats.programs import Program
from dspark.draft.formats.write_blocks import SPECULATORS_VERSION

__all__ = ["DRAFTED", "write_unrolled_config"]

DRAFTED = 5
"""Tokens that are drafted a round where nobody says."""

_IDS = "eagle_aux_hidden_state_layer_ids"


def write_unrolled_config(
    config: Eagle3Config,
    layout: Layout,
    *,
    to: Program,
    num_target_layers: int,
    verifier: str | None,
) -> dict[str, Any]:
    """The config.json of an EAGLE-3 draft.

    Args:
        config: The draft's.
        layout: eagle3, deepspec or speculators.
        to: Who will read it.
        num_target_layers: Decoder layers of the target.
        verifier: Name of the target.

    Raises:
        ConfigError: If the layout cannot say what the draft is.
    """
    raw = write_config(config, layout, num_target_layers, verifier)
    raw["num_target_layers"] = num_target_layers
    if layout == "speculators":
        raw["architectures"] = ["Eagle3Speculator"]
        raw["speculators_version"] = SPECULATORS_VERSION
    if to is Program.SPECFORGE:
        raw.pop("norm_output")
    if to is Program.VLLM:
        raw["num_aux_hidden_states"] = len(config.target_layers)
        if config.qk_norm:
            raw["architectures"] = ["Eagle3Qwen3ForCausalLM"]
    if to in (Program.SGLANG, Program.SPECFORGE):
        outputs = list(config.target_layers)
        raw["eagle_config"] = {"use_aux_hidden_state": True, _IDS: outputs}
    return raw
