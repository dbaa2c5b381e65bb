"""A second, slow and plain DeepSeek-V4 target, to check the real one against.

No cache, no batch, no fusion: one sequence from position 0, recomputed layer by layer. Whatever
couples tokens (windows, compressed entries, selections) and the routing are plain loops. Written
from the notes on the official inference code and checked against transformers; independent of
dspark.base_model.

Tensors carry the official checkpoint's names (`layers.0.attn.wq_a.weight`), unquantised, in any
float dtype; the configuration carries the fields of the official config.json. The arithmetic is
in the widest dtype among the weights, float32 at least. Where the official code rounds to
bfloat16 in between, or simulates quantisation, this does not.

Shape letters: n tokens, N streams, D hidden, H heads, c head width, E compressed entries,
V vocabulary, r rotated dimensions, m tokens to an entry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]

SPARSE_RATIO = 4  # the ratio that means overlapping entries and an indexer

# ------------------------------------------------------------------------------------ the questions


def path_logits(config: Config, weights: Weights, token_ids: Sequence[int]) -> Tensor:
    """Logits [n, V] after every token of one sequence that starts at position 0."""
    return run(config, weights, token_ids).logits


def path_hidden(config: Config, weights: Weights, token_ids: Sequence[int]) -> list[Tensor]:
    """Streams [n, N, D] that leave every layer, in order."""
    return run(config, weights, token_ids).hidden


def selection_margin(config: Config, weights: Weights, token_ids: Sequence[int]) -> Tensor:
    """How far every position [n] is from selecting other entries or experts, over all layers.

    The smallest gap between the last selected and the first unselected score; inf where nothing
    is left out. Entries that score exactly zero because every ReLU is off tie by design and are
    told apart by their index; there the gap is how far the nearest of these ReLUs is from opening.

    A flipped selection at a position also moves later positions: exclude by the running minimum
    (`torch.cummin`).
    """
    return run(config, weights, token_ids).margin


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one pass over a sequence leaves behind."""

    hidden: list[Tensor]  # per layer [n, N, D]
    logits: Tensor  # [n, V]
    margin: Tensor  # [n]


def run(config: Config, weights: Weights, token_ids: Sequence[int]) -> Run:
    """Run one whole sequence through every layer."""
    weights = in_working_dtype(weights)
    tokens = list(token_ids)
    embedded = weights["embed.weight"][tokens]  # [n, D]
    streams = embedded[:, None, :].repeat(1, config["hc_mult"], 1)  # [n, N, D]
    margin = torch.full((len(tokens),), math.inf, dtype=embedded.dtype)
    hidden = []
    for layer in range(config["num_hidden_layers"]):
        part = below(weights, f"layers.{layer}.")

        pre, post, comb = mixing(config, streams, below(part, "hc_attn_"))
        x = rms_norm(config, collapse(streams, pre), part["attn_norm.weight"])
        ratio = config["compress_ratios"][layer]
        y, gaps = attention(config, below(part, "attn."), x, ratio)
        streams = expand(streams, y, post, comb)
        margin = torch.minimum(margin, margin.new_tensor(gaps))

        pre, post, comb = mixing(config, streams, below(part, "hc_ffn_"))
        x = rms_norm(config, collapse(streams, pre), part["ffn_norm.weight"])
        y, gaps = experts(config, below(part, "ffn."), x, tokens)
        streams = expand(streams, y, post, comb)
        margin = torch.minimum(margin, margin.new_tensor(gaps))

        hidden.append(streams)
    z = head_collapse(config, streams, below(weights, "hc_head_"))
    z = rms_norm(config, z, weights["norm.weight"])
    return Run(hidden=hidden, logits=z @ weights["head.weight"].T, margin=margin)


def in_working_dtype(weights: Weights) -> dict[str, Tensor]:
    """The same tensors, the floating ones in their widest dtype, float32 at least."""
    floating = [w.dtype for w in weights.values() if w.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floating, torch.float32)
    return {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items()}


def below(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}


def rms_norm(config: Config, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Divide by the root mean square over the last axis; multiply by `weight` if there is one."""
    x = x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
    return x if weight is None else weight * x


# -------------------------------------------------------------------------------- hyper-connections


def mixing(config: Config, streams: Tensor, hc: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of one half layer: into it [n, N], out of it [n, N], between streams [n, N, N]."""
    count = config["hc_mult"]
    # transformers casts `post` and `comb` to the model's dtype; officially all of this is float32.
    mixes = rms_norm(config, streams.flatten(1)) @ hc["fn"].T  # [n, (2 + N) N]
    base, scale = hc["base"], hc["scale"]
    pre, post, comb = mixes.split([count, count, count * count], dim=-1)
    pre_base, post_base, comb_base = base.split([count, count, count * count])
    pre = torch.sigmoid(pre * scale[0] + pre_base) + config["hc_eps"]
    post = 2 * torch.sigmoid(post * scale[1] + post_base)
    comb = (comb * scale[2] + comb_base).view(-1, count, count)
    return pre, post, sinkhorn(config, comb)


def sinkhorn(config: Config, comb: Tensor) -> Tensor:
    """Make matrices [n, N, N] nearly doubly stochastic; the last step normalises the columns."""
    eps = config["hc_eps"]
    comb = torch.softmax(comb, dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(config["hc_sinkhorn_iters"] - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """Streams [n, N, D] weighted into the input of a half layer [n, D]."""
    return (pre[:, :, None] * streams).sum(dim=1)


def expand(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Mix the streams [n, N, D] and add the half layer's output y [n, D] to each.

    New stream k takes comb[j, k] of old stream j: the sum runs over the first index.
    """
    mixed = torch.einsum("njk,njd->nkd", comb, streams)
    return post[:, :, None] * y[:, None, :] + mixed


def head_collapse(config: Config, streams: Tensor, hc: Weights) -> Tensor:
    """Streams [n, N, D] weighted into the input of the final norm [n, D]."""
    mixes = rms_norm(config, streams.flatten(1)) @ hc["fn"].T  # [n, N]
    pre = torch.sigmoid(mixes * hc["scale"] + hc["base"]) + config["hc_eps"]
    return collapse(streams, pre)


# ----------------------------------------------------------------------------------------- rotation


def frequencies(config: Config, ratio: int) -> Tensor:
    """Radians per position [r / 2] of a layer with this ratio, in float64."""
    dim = config["qk_rope_head_dim"]
    if ratio == 0:
        return plain_frequencies(config["rope_theta"], dim)
    return yarn_frequencies(config, plain_frequencies(config["compress_rope_theta"], dim))


def plain_frequencies(theta: float, dim: int) -> Tensor:
    """Radians per position of unscaled rotary embeddings."""
    return torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)


def yarn_frequencies(config: Config, plain: Tensor) -> Tensor:
    """Slow the frequencies that turn rarely within the original context; no attention factor."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return plain
    dim, theta = config["qk_rope_head_dim"], config["compress_rope_theta"]

    def turning(rotations: float) -> float:
        """The (fractional) pair index that turns this often within the original context."""
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(turning(scaling["beta_fast"])), 0)
    high = min(math.ceil(turning(scaling["beta_slow"])), dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return plain * (1 - ramp) + plain / scaling["factor"] * ramp


def rotate(x: Tensor, positions: Tensor, theta: Tensor) -> Tensor:
    """Rotate the last r dimensions of x [n, ..., c], as pairs of neighbours, to its positions."""
    angles = positions[:, None] * theta  # [n, r / 2], float64
    angles = angles.view(len(x), *[1] * (x.dim() - 2), len(theta))
    # transformers rounds cos and sin to the model's dtype; here they have the working precision.
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    rest, turned = x[..., : -2 * len(theta)], x[..., -2 * len(theta) :]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([rest, pairs.flatten(-2)], dim=-1)


def rotate_back(x: Tensor, positions: Tensor, theta: Tensor) -> Tensor:
    """Undo `rotate`."""
    return rotate(x, -positions, theta)


# ---------------------------------------------------------------------------------------- attention


def attention(
    config: Config, weights: Weights, x: Tensor, ratio: int
) -> tuple[Tensor, list[float]]:
    """Attention of one layer over normed inputs x [n, D], and each token's selection gap."""
    heads, width = config["num_attention_heads"], config["head_dim"]
    theta, positions = frequencies(config, ratio), torch.arange(len(x))

    latent = rms_norm(config, x @ weights["wq_a.weight"].T, weights["q_norm.weight"])
    queries = (latent @ weights["wq_b.weight"].T).view(len(x), heads, width)
    queries = rotate(query_norm(config, queries), positions, theta)
    kv = rms_norm(config, x @ weights["wkv.weight"].T, weights["kv_norm.weight"])
    kv = rotate(kv, positions, theta)  # [n, c], keys and values at once

    entries, chosen, gaps = kv[:0], [[] for _ in x], [math.inf for _ in x]
    if ratio:
        entries = compress(config, below(weights, "compressor."), x, ratio)
        chosen = [list(range(visible_entries(t, ratio))) for t in range(len(x))]
    if ratio == SPARSE_RATIO:
        chosen, gaps = index(config, below(weights, "indexer."), x, latent)

    outputs = []
    for t in range(len(x)):
        # An entry is seen also while its own tokens are still in the window.
        rows = torch.cat([kv[first_in_window(config, t) : t + 1], entries[chosen[t]]])
        outputs.append(attend(queries[t], rows, weights["attn_sink"]))
    # The values were rotated with the keys: turn the sums back by the query's position.
    output = rotate_back(torch.stack(outputs), positions, theta)  # [n, H, c]
    return project_out(config, output, weights), gaps


def query_norm(config: Config, queries: Tensor) -> Tensor:
    """Normalise every head of the queries [n, H, c]; there is no weight."""
    return rms_norm(config, queries)


def first_in_window(config: Config, position: int) -> int:
    """The oldest position that a query here sees uncompressed."""
    return max(0, position - config["sliding_window"] + 1)


def visible_entries(position: int, ratio: int) -> int:
    """How many entries are complete once the token at this position is there."""
    return (position + 1) // ratio


def attend(queries: Tensor, rows: Tensor, sink: Tensor) -> Tensor:
    """One token's heads [H, c] over its rows [K, c]; the sink takes weight and adds nothing."""
    logits = queries @ rows.T * rows.shape[-1] ** -0.5  # [H, K]
    shares = torch.softmax(torch.cat([logits, sink[:, None]], dim=-1), dim=-1)
    return shares[:, :-1] @ rows


def project_out(config: Config, output: Tensor, weights: Weights) -> Tensor:
    """Heads [n, H, c] to the residual width [n, D], by groups of neighbouring heads first."""
    groups, rank = config["o_groups"], config["o_lora_rank"]
    grouped = output.reshape(len(output), groups, -1)
    matrices = weights["wo_a.weight"].view(groups, rank, -1)
    low = [grouped[:, g] @ matrices[g].T for g in range(groups)]
    return torch.cat(low, dim=-1) @ weights["wo_b.weight"].T


# -------------------------------------------------------------------------------------- compression


def compress(config: Config, weights: Weights, x: Tensor, ratio: int) -> Tensor:
    """The complete compressed entries [E, c] of a sequence x [n, D], rotated, oldest first."""
    width = len(weights["norm.weight"])
    values = x @ weights["wkv.weight"].T  # [n, c], sparse layers [n, 2 c]
    gates = x @ weights["wgate.weight"].T + weights["ape"][torch.arange(len(x)) % ratio]
    pooled = []
    for entry in range(len(x) // ratio):
        now = slice(entry * ratio, (entry + 1) * ratio)
        before = slice(entry * ratio - ratio, entry * ratio)
        if ratio != SPARSE_RATIO:
            pooled.append(pool(values[now], gates[now]))
        elif entry == 0:
            pooled.append(pool(values[now, width:], gates[now, width:]))
        else:
            # Tokens give the first half to the next entry and the second half to their own.
            overlap_values = torch.cat([values[before, :width], values[now, width:]])
            overlap_gates = torch.cat([gates[before, :width], gates[now, width:]])
            pooled.append(pool(overlap_values, overlap_gates))
    if not pooled:
        return x.new_zeros(0, width)
    entries = rms_norm(config, torch.stack(pooled), weights["norm.weight"])
    positions = torch.tensor([entry_position(entry, ratio) for entry in range(len(pooled))])
    return rotate(entries, positions, frequencies(config, ratio))


def pool(values: Tensor, gates: Tensor) -> Tensor:
    """Average rows [m, c] into [c] with shares that every channel has of its own."""
    return (torch.softmax(gates, dim=0) * values).sum(dim=0)


def entry_position(entry: int, ratio: int) -> int:
    """Where an entry is rotated to: the first token of its own, not of the overlap."""
    return entry * ratio


# ---------------------------------------------------------------------------------------- selection


def index(
    config: Config, weights: Weights, x: Tensor, latent: Tensor
) -> tuple[list[list[int]], list[float]]:
    """The entries that every token of a sparse layer attends to, and each token's gap."""
    heads, width = config["index_n_heads"], config["index_head_dim"]
    theta, positions = frequencies(config, SPARSE_RATIO), torch.arange(len(x))
    # Officially keys and queries also go through a Hadamard transform (which changes no product)
    # and through FP4 (left out).
    keys = compress(config, below(weights, "compressor."), x, SPARSE_RATIO)
    queries = (latent @ weights["wq_b.weight"].T).view(len(x), heads, width)
    queries = rotate(queries, positions, theta)  # not normed
    shares = x @ weights["weights_proj.weight"].T * (heads * width) ** -0.5  # [n, h], any sign
    chosen, gaps = [], []
    for t in range(len(x)):
        products = queries[t] @ keys[: visible_entries(t, SPARSE_RATIO)].T  # [h, E]
        scores = (shares[t][:, None] * rectify(products)).sum(dim=0)
        picked, gap = pick(scores, config["index_topk"])
        idle = (scores == 0) & (products <= 0).all(dim=0)
        if gap == 0 and idle[picked[-1]]:
            gap = (shares[t][:, None] * products)[:, idle].abs().min().item()
        chosen.append(picked)
        gaps.append(gap)
    return chosen, gaps


def rectify(products: Tensor) -> Tensor:
    """Drop the negative products of a query and the keys."""
    return products.relu()


def pick(scores: Tensor, count: int) -> tuple[list[int], float]:
    """Indices of the `count` largest scores, the smaller index first among equals, and the gap."""
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    gap = values[order[count - 1]] - values[order[count]] if count < len(order) else math.inf
    return order[:count], gap


# ------------------------------------------------------------------------------------------ experts


def experts(
    config: Config, weights: Weights, x: Tensor, tokens: list[int]
) -> tuple[Tensor, list[float]]:
    """Routed and shared experts over normed inputs x [n, D], and each token's routing gap."""
    shared = expert(config, weights, "shared_experts.", x)  # [n, D]
    # transformers routes in the model's dtype; officially this is float32.
    scores = F.softplus(x @ weights["gate.weight"].T).sqrt()  # [n, experts]
    routed = [route(config, weights, scores[t], token) for t, token in enumerate(tokens)]
    output = shared
    for which in range(config["n_routed_experts"]):
        rows = [t for t, (chosen, _) in enumerate(routed) if which in chosen]
        if rows:
            # transformers adds 1e-20 to the sum; officially nothing is added.
            sums = torch.stack([scores[t, routed[t][0]].sum() for t in rows])
            shares = scores[rows, which] / sums * config["routed_scaling_factor"]
            own = expert(config, weights, f"experts.{which}.", x[rows], shares[:, None])
            output = output.index_add(0, torch.tensor(rows), own)
    return output, [gap for _, gap in routed]


def route(config: Config, weights: Weights, scores: Tensor, token: int) -> tuple[list[int], float]:
    """One token's experts: by its id where the layer has a table, else by biased scores."""
    if "gate.tid2eid" in weights:
        return weights["gate.tid2eid"][token].tolist(), math.inf
    return pick(scores + weights["gate.bias"], config["num_experts_per_tok"])


def expert(
    config: Config, weights: Weights, prefix: str, x: Tensor, share: Tensor | float = 1.0
) -> Tensor:
    """One expert's output [..., D] for its inputs [..., D], weighted by `share`."""
    gate = x @ weights[prefix + "w1.weight"].T
    up = x @ weights[prefix + "w3.weight"].T
    # Officially the weight comes before W2; transformers multiplies after it.
    return share * swiglu(config, gate, up) @ weights[prefix + "w2.weight"].T


def swiglu(config: Config, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with `up` clipped on both sides and `gate` from above."""
    limit = config["swiglu_limit"]
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


# ----------------------------------------------------------------------------------------- material


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A configuration with a layer of every kind, small enough for tests; `changes` replace fields.

    A changed `compress_ratios` also sets the number of layers.
    """
    config: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": 97,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 24,
        "o_lora_rank": 16,
        "o_groups": 2,
        "sliding_window": 16,
        "compress_ratios": [0, 4, 8],
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 256,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 1024,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 3,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_hash_layers": 1,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "topk_method": "noaux_tc",
        "swiglu_limit": 1.5,
        "hidden_act": "silu",
        "hc_mult": 4,
        "hc_sinkhorn_iters": 3,  # of 20, which are most of the time
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    if unknown := set(changes) - {*config, "num_hidden_layers"}:
        raise KeyError(f"no such field: {sorted(unknown)}")
    config.update(changes)
    config.setdefault("num_hidden_layers", len(config["compress_ratios"]))
    return config


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the target by its official name."""
    hidden, streams = config["hidden_size"], config["hc_mult"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (config["vocab_size"], hidden),
        "head.weight": (config["vocab_size"], hidden),
        "norm.weight": (hidden,),
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
    }
    for layer in range(config["num_hidden_layers"]):
        here = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        for half in ("attn", "ffn"):
            here[f"hc_{half}_fn"] = ((2 + streams) * streams, streams * hidden)
            here[f"hc_{half}_base"] = ((2 + streams) * streams,)
            here[f"hc_{half}_scale"] = (3,)
        ratio = config["compress_ratios"][layer]
        here |= {f"attn.{k}": v for k, v in _attention_shapes(config, ratio).items()}
        here |= {f"ffn.{k}": v for k, v in _expert_shapes(config, layer).items()}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in here.items()}
    return shapes


def _attention_shapes(config: Config, ratio: int) -> dict[str, tuple[int, ...]]:
    hidden, heads, width = (config[k] for k in ("hidden_size", "num_attention_heads", "head_dim"))
    rank, out = config["q_lora_rank"], config["o_groups"] * config["o_lora_rank"]
    shapes = {
        "attn_sink": (heads,),
        "wq_a.weight": (rank, hidden),
        "q_norm.weight": (rank,),
        "wq_b.weight": (heads * width, rank),
        "wkv.weight": (width, hidden),
        "kv_norm.weight": (width,),
        "wo_a.weight": (out, heads * width // config["o_groups"]),
        "wo_b.weight": (hidden, out),
    }
    if ratio:
        shapes |= _compressor_shapes("compressor.", hidden, width, ratio)
    if ratio == SPARSE_RATIO:
        index_heads, index_width = config["index_n_heads"], config["index_head_dim"]
        shapes["indexer.wq_b.weight"] = (index_heads * index_width, rank)
        shapes["indexer.weights_proj.weight"] = (index_heads, hidden)
        shapes |= _compressor_shapes("indexer.compressor.", hidden, index_width, ratio)
    return shapes


def _compressor_shapes(
    prefix: str, hidden: int, width: int, ratio: int
) -> dict[str, tuple[int, ...]]:
    rows = 2 * width if ratio == SPARSE_RATIO else width
    return {
        f"{prefix}wkv.weight": (rows, hidden),
        f"{prefix}wgate.weight": (rows, hidden),
        f"{prefix}ape": (ratio, rows),
        f"{prefix}norm.weight": (width,),
    }


def _expert_shapes(config: Config, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, count = (
        config[k] for k in ("hidden_size", "moe_intermediate_size", "n_routed_experts")
    )
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (count, hidden)}
    if layer < config["num_hash_layers"]:
        shapes["gate.tid2eid"] = (config["vocab_size"], config["num_experts_per_tok"])
    else:
        shapes["gate.bias"] = (count,)
    for prefix in ("shared_experts.", *(f"experts.{e}." for e in range(count))):
        width = inner * config["n_shared_experts"] if prefix == "shared_experts." else inner
        shapes[f"{prefix}w1.weight"] = shapes[f"{prefix}w3.weight"] = (width, hidden)
        shapes[f"{prefix}w2.weight"] = (hidden, width)
    return shapes


# How many times 1/sqrt(inputs) a matrix is drawn with, where that is not 1: the clamp clips some
# activations, attention moves the streams as much as the experts do, the logits are spread.
_GAINS = {"w1": 1.5, "w3": 1.5, "wo_a": 2.0, "wo_b": 1.5, "head": 2.0}
# What the official checkpoint keeps in float32 whatever the rest is in.
_FLOAT32 = ("_fn", "_base", "_scale", "attn_sink", "ape", "gate.bias")


def random_weights(
    config: Config, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Draw every tensor so that every branch matters; the same numbers in every dtype.

    Tensors that the official checkpoint keeps in float32 are never narrower than that.
    """
    draws = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("tid2eid"):
            ranks = torch.rand(shape[0], config["n_routed_experts"], generator=draws)
            weights[name] = ranks.argsort(dim=-1)[:, : shape[1]].clone()
            continue
        wide = torch.promote_types(dtype, torch.float32)
        value = _draw(name, shape, draws)
        weights[name] = value.to(wide if name.endswith(_FLOAT32) else dtype)
    return weights


def _draw(name: str, shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=draws, dtype=torch.float64)
    uniform = torch.rand(shape, generator=draws, dtype=torch.float64)
    if name == "embed.weight" or name.endswith(("ape", "_base")):
        return normal
    if name.endswith("norm.weight") or name.endswith("_scale"):
        return 0.5 + uniform
    if name.endswith("attn_sink"):
        return 1.5 + normal  # against some twenty rows with logits around 0
    if name.endswith("gate.bias"):
        return 0.15 * normal  # scores are spread somewhat more: no expert is always or never taken
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return normal * _GAINS.get(module, 1.0) * shape[-1] ** -0.5
