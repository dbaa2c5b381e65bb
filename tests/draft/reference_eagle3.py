"""EAGLE-3 a second time: one row at a time, no cache, no batch, float64, straight from the paper.

Nothing here is shared with dspark.draft.eagle3_module but the names of the tensors.
"""

from __future__ import annotations

import math

import torch


def rms(x, weight, eps):
    y = x / torch.sqrt((x * x).mean() + eps)
    return y if weight is None else y * weight


def rotate(vector, position, theta):
    """One head: pairs (i, i + d/2) turned by position / theta^(2i/d)."""
    out, half = vector.clone(), len(vector) // 2
    for i in range(half):
        angle = position / theta ** (2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


class Reference:
    """Logits after a context and a drafted path."""

    def __init__(self, config, weights, embed=None):
        self.c = config
        self.w = {name: t.double() for name, t in weights.items() if t.is_floating_point()}
        self.d2t = weights.get("d2t")
        self.lent = embed

    def linear(self, name, x):
        bias = self.w.get(f"{name}.bias")
        y = self.w[f"{name}.weight"] @ x
        return y if bias is None else y + bias

    def norm(self, name, x):
        return rms(x, self.w[f"{name}.weight"], self.c.rms_norm_eps)

    def embedding(self, token):
        if self.lent is not None:
            return self.lent(torch.tensor([token]))[0].double()
        return self.w["embed_tokens.weight"][token] * self.c.embed_scale

    def fuse(self, hidden, position):
        rows = [hidden[layer][position].double() for layer in self.c.target_layers]
        if self.c.fc_norm:
            rows = [self.norm(f"fc_norm.{i}", row) for i, row in enumerate(rows)]
        wide = torch.cat(rows)
        if self.c.norm_before_fc:
            wide = self.norm("input_norm", wide)
        return self.linear("fc", wide)

    def heads(self, name, x, normed):
        rows = self.linear(f"layers.0.self_attn.{name}_proj", x).reshape(-1, self.c.head_dim)
        if normed:
            rows = torch.stack([self.norm(f"layers.0.self_attn.{name}_norm", r) for r in rows])
        return rows

    def key_value(self, x, position):
        theta = self.c.rope["rope_theta"]
        keys = self.heads("k", x, self.c.qk_norm)
        keys = torch.stack([rotate(k, position, theta) for k in keys])
        values = self.heads("k" if self.c.key_is_value else "v", x, False)
        if self.c.v_norm:
            values = torch.stack([rms(v, None, self.c.rms_norm_eps) for v in values])
        return keys, values

    def layer(self, x, residual, position, seen):
        """`seen`: (keys, values) of every row that this one may see, itself last."""
        scale = self.c.attention_scale or 1 / math.sqrt(self.c.head_dim)
        mixed = []
        for h, query in enumerate(self.heads("q", x, self.c.qk_norm)):
            query = rotate(query, position, self.c.rope["rope_theta"])
            kv = h * self.c.num_kv_heads // self.c.num_heads
            scores = torch.stack([query @ keys[kv] for keys, _ in seen]) * scale
            shares = torch.softmax(scores, 0)
            mixed.append(sum(s * v[kv] for s, (_, v) in zip(shares, seen, strict=True)))
        out = self.linear("layers.0.self_attn.o_proj", torch.cat(mixed))
        act = torch.nn.functional.silu
        if self.c.activation != "silu":
            act = lambda t: torch.nn.functional.gelu(t, approximate="tanh")  # noqa: E731

        def mlp(y):
            gate = act(self.linear("layers.0.mlp.gate_proj", y))
            return self.linear(
                "layers.0.mlp.down_proj", gate * self.linear("layers.0.mlp.up_proj", y)
            )

        after = "layers.0.post_attention_layernorm"
        if self.c.sandwich_norms:
            hidden = residual + self.norm(after, out)
            changed = mlp(self.norm("layers.0.pre_feedforward_layernorm", hidden))
            hidden = hidden + self.norm("layers.0.post_feedforward_layernorm", changed)
        else:
            hidden = residual + out
            hidden = hidden + mlp(self.norm(after, hidden))
        return hidden * self.w["layers.0.layer_scalar"] if self.c.layer_scalar else hidden

    def logits(self, tokens, hidden, path=()):
        """float64 [V] after `tokens` and `path`; `hidden` is {layer: [len(tokens) - 1, E]}."""
        text = [*tokens, *path]
        seen, feature = [], None
        for position in range(len(text) - 1):
            is_drafted = position >= len(tokens) - 1
            if not is_drafted:
                feature = self.fuse(hidden, position)
            # The row at `position` pairs the feature of `position` with the token after it.
            normed = self.norm("layers.0.hidden_norm", feature)
            embedded = self.norm("layers.0.input_layernorm", self.embedding(text[position + 1]))
            x = torch.cat([embedded, normed])
            seen.append(self.key_value(x, position))
            if position >= len(tokens) - 2:
                residual = normed if self.c.norm_before_residual else feature
                out = self.layer(x, residual, position, seen)
                final = self.norm("norm", out)
                feature = final if self.c.norm_output else out
        logits = self.linear("lm_head", final)
        if self.c.logit_softcap:
            logits = self.c.logit_softcap * torch.tanh(logits / self.c.logit_softcap)
        if self.d2t is None:
            return logits
        wide = torch.full((self.c.vocab_size,), -math.inf, dtype=torch.float64)
        for draft_id, value in enumerate(logits):
            wide[draft_id + int(self.d2t[draft_id])] = value
        return wide
