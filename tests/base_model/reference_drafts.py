"""Second, slow and plain draft modules of DeepSeek-V4, to check the real ones against.

MTP-1 (one layer, recursive) and DSpark (a block of slots at once, then a Markov chain). Like the
oracle of the target, whose per-layer arithmetic this borrows: one sequence that starts at position
0, no cache, no batch, everything recomputed for every question, independent of the package.

Tensors carry the official names (`mtp.0.attn.wq_a.weight`), unquantised; `weights` holds these and
the target's `embed.weight` and `head.weight`, which both modules share. The configuration carries
the fields of the official config.json. The arithmetic is in the widest dtype among the weights,
float32 at least; nothing is rounded in between.

Positions: tokens x_0, x_1, ... sit at positions 0, 1, ... MTP row t takes the streams that leave
the target at position t and the token x_{t+1}, is rotated to position t, and predicts x_{t+2}.
A DSpark block whose anchor is x_q has its slots at q, q + 1, ...; slot i predicts x_{q+i+1}.

Shape letters: n committed positions, N streams, D hidden, H heads, c head width, K attended rows,
G block slots (gamma), R Markov rank, L captured layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tests.base_model import oracle
from tests.base_model.oracle import Config, Weights, below, in_working_dtype, rms_norm

Stages = Literal["mtp", "dspark"]

USUAL_STAGES = 3  # of DSpark, where the configuration does not say

# -------------------------------------------------------------------------------------------- MTP-1


def mtp_logits(
    config: Config,
    weights: Weights,
    target_streams: Tensor,
    tokens: Sequence[int],
    drafted: Sequence[int] = (),
) -> Tensor:
    """Logits [1 + len(drafted), V] after x_n, and after every drafted token x_{n+1}, ...

    Args:
        config: The fields of config.json.
        weights: The `mtp.0.*` tensors, `embed.weight` and `head.weight`.
        target_streams: What leaves the target's last layer [n, N, D] at positions 0..n-1, before
            its `hc_head`; n is at least 1.
        tokens: x_0..x_n. x_0 is in no row.
        drafted: Tokens behind x_n, fed one at a time with the streams of the row before.

    Row 0 predicts x_{n+1}: it is MTP row n-1, of the target's streams there and x_n. Row k is MTP
    row n-1+k, of the streams that leave MTP row n-2+k and of drafted[k-1].
    """
    if len(tokens) != len(target_streams) + 1 or not len(target_streams):
        raise ValueError("one token more than streams, and at least one row of these")
    weights = in_working_dtype(weights)
    part = below(weights, "mtp.0.")
    rows = [
        mtp_input(config, weights, streams.to(weights["embed.weight"]), token)
        for streams, token in zip(target_streams, tokens[1:], strict=True)
    ]
    left = mtp_last_row(config, part, rows)
    logits = [predict(config, weights, part, left)]
    for token in drafted:
        rows.append(mtp_input(config, weights, left, token))
        left = mtp_last_row(config, part, rows)
        logits.append(predict(config, weights, part, left))
    return torch.stack(logits)


def mtp_input(config: Config, weights: Weights, streams: Tensor, token: int) -> Tensor:
    """One row's streams [N, D] into the MTP layer: the token's part is the same in each."""
    part = below(weights, "mtp.0.")
    embedded = rms_norm(config, weights["embed.weight"][token], part["enorm.weight"])
    from_token = part["e_proj.weight"] @ embedded
    mixed = []
    for stream in streams:
        normed = rms_norm(config, stream, part["hnorm.weight"])
        mixed.append(from_token + part["h_proj.weight"] @ normed)
    return torch.stack(mixed)


def mtp_last_row(config: Config, part: Weights, rows: Sequence[Tensor]) -> Tensor:
    """What leaves the MTP layer [N, D] at the last of its rows [N, D], which start at position 0.

    The rows before matter by their keys and values alone, so only the last has a second half.
    """

    def attention(x: Tensor) -> Tensor:
        y, _ = oracle.attention(config, below(part, "attn."), x, ratio=0)
        return y

    streams = attention_half(config, part, torch.stack(list(rows)), attention)
    return expert_half(config, part, streams[-1:])[0]


def predict(config: Config, weights: Weights, part: Weights, streams: Tensor) -> Tensor:
    """Logits [V] of one row of streams [N, D], with the module's own collapse and norm."""
    z = oracle.head_collapse(config, streams[None], below(part, "hc_head_"))[0]
    return weights["head.weight"] @ rms_norm(config, z, part["norm.weight"])


# ------------------------------------------------------------------------------------------- DSpark


def captured_hidden(config: Config, hidden: Sequence[Tensor]) -> Tensor:
    """The target's share [n, L D] in a draft, of the streams [n, N, D] that leave every layer."""
    means = [hidden[layer].mean(dim=1) for layer in config["dspark_target_layer_ids"]]
    return torch.cat(means, dim=-1)


def dspark_block(
    config: Config, weights: Weights, main_hidden: Tensor, anchor: int
) -> tuple[Tensor, Tensor]:
    """The hidden states z [G, D] (before the norm) and base logits U [G, V] of one block.

    Args:
        config: The fields of config.json.
        weights: The `mtp.*` tensors, `embed.weight` and `head.weight`.
        main_hidden: What was captured [n, L D] at positions 0..n-1; n may be 0.
        anchor: x_n, which the target has not seen yet.
    """
    weights = in_working_dtype(weights)
    stages = [below(weights, f"mtp.{i}.") for i in range(stages_present(weights))]
    context = main_hidden.to(weights["embed.weight"]) @ stages[0]["main_proj.weight"].T
    context = rms_norm(config, context, stages[0]["main_norm.weight"])  # [n, D], for all stages

    noise = config["dspark_noise_token_id"]
    slots = [anchor] + [noise] * (config["dspark_block_size"] - 1)
    streams = weights["embed.weight"][slots][:, None, :].repeat(1, config["hc_mult"], 1)
    for part in stages:
        streams = dspark_stage(config, part, streams, context)

    last = stages[-1]
    z = oracle.head_collapse(config, streams, below(last, "hc_head_"))
    logits = [weights["head.weight"] @ rms_norm(config, row, last["norm.weight"]) for row in z]
    return z, torch.stack(logits)


def dspark_stage(config: Config, part: Weights, streams: Tensor, context: Tensor) -> Tensor:
    """What leaves one stage [G, N, D]; every stage has its own keys of the same context [n, D]."""

    def attention(x: Tensor) -> Tensor:
        return block_attention(config, below(part, "attn."), x, context)

    return expert_half(config, part, attention_half(config, part, streams, attention))


def block_attention(config: Config, part: Weights, x: Tensor, context: Tensor) -> Tensor:
    """Attention of normed slots x [G, D] over the newest context and all slots; [G, D].

    The context rows are projected as they are: no `attn_norm`, no hyper-connection. As many as the
    window is wide are there, the same for every slot: the last slot also sees the oldest.
    """
    heads, width = config["num_attention_heads"], config["head_dim"]
    start = len(context)  # the position of the anchor, one behind the newest context row
    rows = []
    for position in range(max(0, start - config["sliding_window"]), start):
        rows.append(key_row(config, part, context[position], position))
    for slot in range(len(x)):
        rows.append(key_row(config, part, x[slot], start + slot))

    outputs = []
    for slot in range(len(x)):
        latent = rms_norm(config, part["wq_a.weight"] @ x[slot], part["q_norm.weight"])
        queries = rms_norm(config, (part["wq_b.weight"] @ latent).view(heads, width))
        queries = turn(config, queries, start + slot)
        found = oracle.attend(queries, torch.stack(rows), part["attn_sink"])  # [H, c]
        outputs.append(turn(config, found, -(start + slot)))
    return oracle.project_out(config, torch.stack(outputs), part)


def key_row(config: Config, part: Weights, x: Tensor, position: int) -> Tensor:
    """One row [c], key and value at once, of one input [D]."""
    row = rms_norm(config, part["wkv.weight"] @ x, part["kv_norm.weight"])
    return turn(config, row, position)


def turn(config: Config, x: Tensor, position: int) -> Tensor:
    """Rotate x [..., c] to one position, with the frequencies of a sliding layer."""
    theta = oracle.plain_frequencies(config["rope_theta"], config["qk_rope_head_dim"])
    return oracle.rotate(x[None], torch.tensor([position]), theta)[0]


def dspark_chain(
    weights: Weights, hidden: Tensor, base_logits: Tensor, anchor: int, tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Corrected logits [k, V] and confidence logits [k] along given tokens t_1, t_2, ...

    Slot i follows the token before it: the anchor, then t_i. So t_G is never read and may be left
    off, and fewer tokens answer fewer slots: k = min(1 + len(tokens), G). Row i are the logits of
    t_{i+1} and how sure the module is that t_{i+1} will be accepted, t_1..t_i given.
    """
    weights = in_working_dtype(weights)
    last = below(weights, f"mtp.{stages_present(weights) - 1}.")
    corrected, confidence = [], []
    for slot, before in enumerate([anchor, *tokens][: len(base_logits)]):
        state = last["markov_head.markov_w1.weight"][before]  # [R]
        change = last["markov_head.markov_w2.weight"] @ state
        corrected.append(base_logits[slot] + change)
        both = torch.cat([hidden[slot], state])
        confidence.append((last["confidence_head.proj.weight"] @ both)[0])
    return torch.stack(corrected), torch.stack(confidence)


def dspark_greedy(config: Config, weights: Weights, main_hidden: Tensor, anchor: int) -> list[int]:
    """The tokens t_1..t_G that greedy decoding drafts."""
    hidden, base_logits = dspark_block(config, weights, main_hidden, anchor)
    tokens: list[int] = []
    for _ in range(len(base_logits)):
        corrected, _ = dspark_chain(weights, hidden, base_logits, anchor, tokens)
        tokens.append(int(corrected[-1].argmax()))
    return tokens


def stages_present(weights: Weights) -> int:
    """How many stages there are, by their tensors: config.json says 1 even when 3 are shipped."""
    count = 0
    while f"mtp.{count}.attn_norm.weight" in weights:
        count += 1
    return count


# ------------------------------------------------------------------------------ halves of one layer


def attention_half(
    config: Config, part: Weights, streams: Tensor, attention: Callable[[Tensor], Tensor]
) -> Tensor:
    """Streams [n, N, D] past the attention of one layer, which maps normed [n, D] to [n, D]."""
    pre, post, comb = oracle.mixing(config, streams, below(part, "hc_attn_"))
    x = rms_norm(config, oracle.collapse(streams, pre), part["attn_norm.weight"])
    return oracle.expand(streams, attention(x), post, comb)


def expert_half(config: Config, part: Weights, streams: Tensor) -> Tensor:
    """Streams [n, N, D] past the experts of one layer, which are always chosen by their scores."""
    pre, post, comb = oracle.mixing(config, streams, below(part, "hc_ffn_"))
    x = rms_norm(config, oracle.collapse(streams, pre), part["ffn_norm.weight"])
    ids = [-1] * len(x)  # no table, so no id is looked at
    y, _ = oracle.experts(config, below(part, "ffn."), x, ids)
    return oracle.expand(streams, y, post, comb)


# ----------------------------------------------------------------------------------------- material


def tiny_draft_config(stages: Stages, **changes: Any) -> dict[str, Any]:
    """The oracle's tiny configuration as a checkpoint with this module has it.

    `changes` replace its fields or those of DSpark (which captures the last three layers unless
    told otherwise); `compress_ratios` there are those of the target alone.
    """
    own: dict[str, Any] = {}
    if stages == "dspark":
        own["dspark_block_size"] = changes.pop("dspark_block_size", 5)
        own["dspark_noise_token_id"] = changes.pop("dspark_noise_token_id", 95)
        own["dspark_target_layer_ids"] = changes.pop("dspark_target_layer_ids", None)
        own["dspark_markov_rank"] = changes.pop("dspark_markov_rank", 12)
    config = oracle.tiny_config(num_nextn_predict_layers=1, **changes) | own
    layers, count = config["num_hidden_layers"], 1 if stages == "mtp" else USUAL_STAGES
    config["compress_ratios"] = config["compress_ratios"][:layers] + [0] * count
    if stages == "dspark" and own["dspark_target_layer_ids"] is None:
        config["dspark_target_layer_ids"] = list(range(max(0, layers - 3), layers))
    return config


def stage_count(config: Config, stages: Stages) -> int:
    """How many draft layers a checkpoint with this configuration has."""
    if stages == "mtp":
        return 1
    return max(len(config["compress_ratios"]) - config["num_hidden_layers"], 0) or USUAL_STAGES


def draft_shapes(config: Config, stages: Stages) -> dict[str, tuple[int, ...]]:
    """Every `mtp.*` tensor by its official name."""
    count = stage_count(config, stages)
    like = oracle.tensor_shapes(_as_target(config, count))
    shapes = {_renamed(k, count): v for k, v in like.items() if _renamed(k, count)}
    return shapes | _own_shapes(config, stages)


def random_draft_weights(
    config: Config, stages: Stages, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Draw every `mtp.*` tensor so that every branch matters; the same numbers in every dtype.

    Nothing equals what the oracle draws for the target from the same seed.
    """
    count = stage_count(config, stages)
    like = oracle.random_weights(_as_target(config, count), 7_000_000 + seed, dtype)
    weights = {_renamed(k, count): w for k, w in like.items() if _renamed(k, count)}
    draws = torch.Generator().manual_seed(8_000_000 + seed)
    for name, shape in _own_shapes(config, stages).items():
        if name.endswith("norm.weight"):
            value = 0.5 + torch.rand(shape, generator=draws, dtype=torch.float64)
        else:
            value = torch.randn(shape, generator=draws, dtype=torch.float64)
            if not name.endswith("markov_w1.weight"):  # whose rows are looked up
                value = value * 1.5 * shape[-1] ** -0.5
        if name.endswith("confidence_head.proj.weight"):
            value[:, : config["hidden_size"]] *= 0.1  # unlike the rest, of a state without norm
        weights[name] = value.to(dtype)
    return weights


def _as_target(config: Config, count: int) -> dict[str, Any]:
    """A target made of layers like those of the draft module."""
    plain = {"num_hidden_layers": count, "compress_ratios": [0] * count, "num_hash_layers": 0}
    return {**config, **plain}


def _renamed(name: str, count: int) -> str:
    """Where such a target's tensor is in the draft module; "" for what is the target's alone."""
    if name in ("embed.weight", "head.weight"):
        return ""
    if name.startswith("layers."):
        return "mtp." + name.removeprefix("layers.")
    return f"mtp.{count - 1}.{name}"  # norm and hc_head


def _own_shapes(config: Config, stages: Stages) -> dict[str, tuple[int, ...]]:
    """The tensors that no target has."""
    hidden = config["hidden_size"]
    if stages == "mtp":
        return {
            "mtp.0.enorm.weight": (hidden,),
            "mtp.0.hnorm.weight": (hidden,),
            "mtp.0.e_proj.weight": (hidden, hidden),
            "mtp.0.h_proj.weight": (hidden, hidden),
        }
    vocab, rank = config["vocab_size"], config["dspark_markov_rank"]
    last = f"mtp.{stage_count(config, stages) - 1}."
    return {
        "mtp.0.main_proj.weight": (hidden, len(config["dspark_target_layer_ids"]) * hidden),
        "mtp.0.main_norm.weight": (hidden,),
        last + "markov_head.markov_w1.weight": (vocab, rank),
        last + "markov_head.markov_w2.weight": (vocab, rank),
        last + "confidence_head.proj.weight": (1, hidden + rank),
    }
