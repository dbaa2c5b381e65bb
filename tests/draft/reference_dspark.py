"""A second, plain implementation of DSpark and DFlash: loops, no cache, no batch, no shared code.

Reads a module's config and `state_dict` and works token by token and head by head, from the paper
and the fact sheet of released checkpoints.
"""

from __future__ import annotations

import math

import torch


def rms(x, weight, eps):
    y = x / torch.sqrt((x * x).mean() + eps)
    return y if weight is None else y * weight


def act(name, x):
    if name == "silu":
        return x / (1 + torch.exp(-x))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rope(vector, position, theta, share=1.0):
    """Rotate pairs (i, i + half); of a `share` < 1 only the first frequencies turn."""
    half = len(vector) // 2
    out = vector.clone()
    for i in range(half):
        angle = position / theta ** (2 * i / len(vector)) if i < int(share * half) else 0.0
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


class Reference:
    """Drafts for one request from all its captured hidden states.

    Args:
        module: The module under test; only its config and weights are used.
        features: float [n, layers * Dt], captured hidden states of positions 0 .. n - 1.
        anchor: The token at position n.
    """

    def __init__(self, module, features, anchor):
        self.config, self.anchor = module.config, anchor
        self.weights = {name: value.double() for name, value in module.state_dict().items()}
        self.eps = self.config.backbone.norm_eps
        self.hidden = self._backbone(features.double(), anchor)

    def _norm(self, name, x):
        return rms(x, self.weights[f"{name}.weight"], self.eps)

    def _linear(self, name, x):
        y = self.weights[f"{name}.weight"] @ x
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _turn(self, vector, position):
        how = self.config.backbone.rope
        return rope(vector, position, how["rope_theta"], how.get("partial_rotary_factor", 1.0))

    def _keys_values(self, layer, x, position):
        b, name = self.config.backbone, f"layers.{layer}.self_attn"
        raw = self._linear(f"{name}.k_proj", x)
        value = raw if b.shares_kv else self._linear(f"{name}.v_proj", x)
        keys, values = [], []
        for j in range(b.num_kv_heads):
            part = slice(j * b.head_dim, (j + 1) * b.head_dim)
            key, own = raw[part], value[part]
            if b.has_qk_norm:
                key = self._norm(f"{name}.k_norm", key)
            if b.has_v_norm:
                own = rms(own, None, self.eps)
            keys.append(self._turn(key, position))
            values.append(own)
        return keys, values

    def _sees(self, window, slot, position, anchor_position):
        """Whether a slot of the block sees an absolute position (context or block)."""
        if position >= anchor_position:
            causal = window is not None and window.is_causal
            return not causal or position <= anchor_position + slot
        if window is None:
            return True
        if window.moves:
            return anchor_position + slot - position < window.size
        return anchor_position - position <= window.size

    def _backbone(self, features, anchor):
        config, b = self.config, self.config.backbone
        size = len(features)
        context = [self._norm("hidden_norm", self._linear("fc", row)) for row in features]
        ids = [anchor] + [config.mask_token_id] * (config.block_size - 1)
        rows = [self.weights["embed_tokens.weight"][i] * config.embed_scale for i in ids]
        for layer in range(b.num_layers):
            rows = self._layer(layer, rows, context, size)
        return [self._norm("norm", row) for row in rows]

    def _layer(self, layer, rows, context, size):
        b, name = self.config.backbone, f"layers.{layer}"
        normed = [self._norm(f"{name}.input_layernorm", row) for row in rows]
        seen = [self._keys_values(layer, c, p) for p, c in enumerate(context)]
        seen += [self._keys_values(layer, x, size + i) for i, x in enumerate(normed)]
        scale = b.head_dim**-0.5 if b.attention_scale is None else b.attention_scale
        out = []
        for slot, (row, x) in enumerate(zip(rows, normed, strict=True)):
            query = self._linear(f"{name}.self_attn.q_proj", x)
            heads = []
            for h in range(b.num_heads):
                q = query[h * b.head_dim : (h + 1) * b.head_dim]
                if b.has_qk_norm:
                    q = self._norm(f"{name}.self_attn.q_norm", q)
                q = self._turn(q, size + slot)
                j = h // (b.num_heads // b.num_kv_heads)
                window = b.windows[layer]
                ok = [p for p in range(len(seen)) if self._sees(window, slot, p, size)]
                scores = torch.stack([(q @ seen[p][0][j]) * scale for p in ok])
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                heads.append(sum(w * seen[p][1][j] for w, p in zip(weights, ok, strict=True)))
            attended = self._linear(f"{name}.self_attn.o_proj", torch.cat(heads))
            out.append(self._rest(name, row, attended))
        return out

    def _rest(self, name, row, attended):
        b = self.config.backbone

        def mlp(x):
            gate = act(b.activation, self._linear(f"{name}.mlp.gate_proj", x))
            return self._linear(
                f"{name}.mlp.down_proj", gate * self._linear(f"{name}.mlp.up_proj", x)
            )

        if not b.has_four_norms:
            row = row + attended
            return row + mlp(self._norm(f"{name}.post_attention_layernorm", row))
        row = row + self._norm(f"{name}.post_attention_layernorm", attended)
        inner = mlp(self._norm(f"{name}.pre_feedforward_layernorm", row))
        row = row + self._norm(f"{name}.post_feedforward_layernorm", inner)
        return row * self.weights[f"{name}.layer_scalar"]

    def slot(self, path):
        """The slot that predicts the token after a path."""
        return len(path) + (0 if self.config.sample_from_anchor else 1)

    def logits(self, path):
        """float64 [Vd] of the token after anchor + path."""
        config = self.config
        u = self._linear("lm_head", self.hidden[self.slot(path)])
        if config.logit_softcap is not None:
            u = config.logit_softcap * torch.tanh(u / config.logit_softcap)
        return u if not config.markov_rank else u + self._bias(path)

    def _bias(self, path):
        config, w = self.config, self.weights
        w1, w2 = w["markov_head.markov_w1.weight"], w["markov_head.markov_w2.weight"]
        last = (path[-1:] or [self.anchor])[0]
        hidden = self.hidden[self.slot(path)]
        if config.markov_head_type == "vanilla":
            return w2 @ w1[last]
        if config.markov_head_type == "gated":
            gate = self._linear("markov_head.gate_proj", torch.cat([hidden, w1[last]]))
            return w2 @ (w1[last] / (1 + torch.exp(-gate)))
        state = torch.zeros(config.markov_rank, dtype=torch.float64)
        branch = [self.anchor, *path]
        slots = list(range(self.slot([]), self.slot(path) + 1))
        if not config.sample_from_anchor:  # trained with a step at the anchor's own slot
            branch, slots = [self.anchor, *branch], [0, *slots]
        for token, slot in zip(branch, slots, strict=True):
            joint = self._linear(
                "markov_head.joint_proj", torch.cat([state, w1[token], self.hidden[slot]])
            )
            g, c, o = joint.chunk(3)
            g = 1 / (1 + torch.exp(-g))
            state = g * state + (1 - g) * torch.tanh(c)
        return w2 @ torch.tanh(o)

    def confidence(self, path):
        """Probability that the first candidate after anchor + path is accepted."""
        x = self.hidden[self.slot(path)]
        if self.config.confidence_head_with_markov:
            last = (path[-1:] or [self.anchor])[0]
            x = torch.cat([x, self.weights["markov_head.markov_w1.weight"][last]])
        return float(1 / (1 + torch.exp(-self._linear("confidence_head.proj", x))))
