"""transformers' own DeepSeek-V4 with the weights of an official-named checkpoint.

One change to what transformers computes: ties of its top-k are broken by the smaller index. Its
own choice depends on how many entries there are, so that prefill and decoding disagree. Float32
only: its norms compute in float32 whatever the weights are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

SPARSE, HEAVY, SLIDING = (
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "sliding_attention",
)

_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "sliding_window",
    "rope_theta",
    "compress_rope_theta",
    "max_position_embeddings",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "swiglu_limit",
    "hidden_act",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
    "num_nextn_predict_layers",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
)

# Applied in order to the part of a name after `layers.L.`.
_RENAMED = (
    (r"^attn\.indexer\.compressor\.", "attn.compressor.indexer."),
    (r"^attn\.indexer\.weights_proj\.", "attn.compressor.indexer.scorer.weights_proj."),
    (r"^attn\.indexer\.wq_b\.", "attn.compressor.indexer.q_b_proj."),
    (r"(compressor\.(?:indexer\.)?)norm\.", r"\1kv_norm."),
    (r"(compressor\.(?:indexer\.)?)ape$", r"\1position_bias"),
    (r"(compressor\.(?:indexer\.)?)wgate\.", r"\1gate_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.attn_sink$", ".sinks"),
    (r"^attn\.", "self_attn."),
    (r"^ffn\.gate\.bias$", "ffn.gate.e_score_correction_bias"),
    (r"shared_experts\.w1\.", "shared_experts.gate_proj."),
    (r"shared_experts\.w2\.", "shared_experts.down_proj."),
    (r"shared_experts\.w3\.", "shared_experts.up_proj."),
    (r"^ffn\.", "mlp."),
    (r"^attn_norm\.", "input_layernorm."),
    (r"^ffn_norm\.", "post_attention_layernorm."),
    (r"^hc_(attn|ffn)_", r"\1_hc."),
)
_OUTER = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.w([123])\.weight")


def to_hf_config(config: Mapping[str, Any]) -> DeepseekV4Config:
    """The same model as transformers describes it, with its plain kernels.

    Raises:
        ValueError: For two compression ratios besides 4; transformers has one number for them.
    """
    layers = config["num_hidden_layers"]
    ratios = config["compress_ratios"][:layers]
    heavy = {ratio for ratio in ratios if ratio not in (0, 4)}
    if len(heavy) > 1:
        raise ValueError(f"transformers knows one ratio besides 4, not {sorted(heavy)}")
    kinds = {0: SLIDING, 4: SPARSE}
    hashed = min(config["num_hash_layers"], layers)
    rotary = config["qk_rope_head_dim"] / config["head_dim"]
    main = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    compress = {"rope_type": "default", "rope_theta": config["compress_rope_theta"]}
    if scaling := config.get("rope_scaling"):
        fields = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        compress |= {"rope_type": "yarn", "attention_factor": 1.0}
        compress |= {field: scaling[field] for field in fields}
    hf_config = DeepseekV4Config(
        **{name: config[name] for name in _SAME_NAME},
        layer_types=[kinds.get(ratio, HEAVY) for ratio in ratios],
        compress_rates={SPARSE: 4, HEAVY: heavy.pop() if heavy else 128},
        mlp_layer_types=["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        partial_rotary_factor=rotary,
        rope_parameters={
            "main": {**main, "partial_rotary_factor": rotary},
            "compress": {**compress, "partial_rotary_factor": rotary},
        },
        dtype=torch.float32,
    )
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    return hf_config


def hf_name(name: str) -> str:
    """transformers' name of an official tensor that is not part of a routed expert."""
    if name in _OUTER:
        return _OUTER[name]
    _, layer, rest = name.split(".", 2)
    for pattern, replacement in _RENAMED:
        rest = re.sub(pattern, replacement, rest)
    return f"model.layers.{layer}.{rest}"


def to_hf_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename every tensor, and stack the routed experts of each layer."""
    state, routed = {}, {}
    for name, tensor in weights.items():
        if match := _EXPERT.fullmatch(name):
            layer, expert, matrix = map(int, match.groups())
            routed.setdefault(layer, {})[expert, matrix] = tensor
        else:
            state[hf_name(name)] = tensor
    for layer, parts in routed.items():
        count = 1 + max(expert for expert, _ in parts)
        both = [torch.cat([parts[e, 1], parts[e, 3]]) for e in range(count)]
        prefix = f"model.layers.{layer}.mlp.experts."
        state[prefix + "gate_up_proj"] = torch.stack(both)
        state[prefix + "down_proj"] = torch.stack([parts[e, 2] for e in range(count)])
    return state


def build(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> DeepseekV4ForCausalLM:
    """transformers' model in float32 that holds exactly these weights."""
    with torch.random.fork_rng():
        model = DeepseekV4ForCausalLM(to_hf_config(config)).float().eval()
    model.load_state_dict(to_hf_weights(weights), strict=True)
    return model


@contextlib.contextmanager
def stable_topk() -> Iterator[None]:
    """Within this, torch breaks ties of `topk` by the smaller index."""

    def topk(scores, k, dim=-1, largest=True, sorted=True):  # noqa: A002 - torch's own name
        ordered = torch.sort(scores, dim=dim, descending=largest, stable=True)
        kept = (ordered.values.narrow(dim, 0, k), ordered.indices.narrow(dim, 0, k))
        return torch.return_types.topk(kept)

    function, method = torch.topk, Tensor.topk
    torch.topk, Tensor.topk = topk, topk
    try:
        yield
    finally:
        torch.topk, Tensor.topk = function, method


@torch.no_grad()
def logits(model: DeepseekV4ForCausalLM, ids: Sequence[int]) -> Tensor:
    """Logits [n, V] of one sequence in one forward, without a cache."""
    with stable_topk():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.no_grad()
def decode(model: DeepseekV4ForCausalLM, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
    """Logits [n, V] through transformers' cache, in pieces of these sizes."""
    cache, rows, start = None, [], 0
    for size in chunks:
        piece = torch.tensor([list(ids[start : start + size])])
        with stable_topk():
            output = model(piece, past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + size
        rows.append(output.logits[0])
    return torch.cat(rows)


@torch.no_grad()
def hidden(model: DeepseekV4ForCausalLM, ids: Sequence[int]) -> list[Tensor]:
    """Streams [n, N, D] that leave every layer, taken with hooks.

    `output_hidden_states` replaces the last layer's by the normed output.
    """
    caught: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output: caught.append(output[0]))
        for layer in model.model.layers
    ]
    try:
        logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return caught
