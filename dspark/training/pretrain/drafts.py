"""The draft modules of a small V4 with gradients: MTP-1 and DSpark, under official names.

They compute what `dspark.base_model.mtp` and `dspark.base_model.dspark_module` compute (tests
compare them), for many positions of whole sequences at once, along the text itself. Letters:
B sequences, S tokens, n = B * S rows, A anchors, G slots, N streams, D hidden, H heads, c head
size, W window, K Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.base_model.config import V4Config
from dspark.base_model.rotary import frequencies
from dspark.mtp_head import ConfidenceHead, MarkovHead
from dspark.training.pretrain.attention import Attention, Notes, RMSNorm, Shape, turns_at
from dspark.training.pretrain.block import Block, collapse_streams
from dspark.training.pretrain.ops import attend

__all__ = ["BlockRows", "DSparkNetwork", "MTPNetwork"]


class _Stage(Block):
    """A block of a draft module, with what its first and last stage have beside.

    Args:
        config: The target's.
        layer: Its number, behind the target's layers.
        is_last: With norm and stream weights before the head.
    """

    def __init__(self, config: V4Config, layer: int, *, is_last: bool) -> None:
        super().__init__(config, layer)
        self.draft_config = config
        if is_last:
            streams, hidden = config.hc_mult, config.hidden_size
            self.norm = RMSNorm(hidden, config.rms_norm_eps)
            self.hc_head_fn = nn.Parameter(torch.empty(streams, streams * hidden))
            self.hc_head_base = nn.Parameter(torch.zeros(streams))
            self.hc_head_scale = nn.Parameter(torch.ones(1))

    def collapsed(self, streams: Tensor) -> Tensor:
        """Final hidden state [n, D], before the norm, of streams [n, N, D]."""
        fn, base, scale = self.hc_head_fn, self.hc_head_base, self.hc_head_scale
        return collapse_streams(streams, fn, base, scale, self.draft_config)


class _MTPStage(_Stage):
    """MTP-1's only stage, which joins tokens and streams.

    Args:
        config: The target's.
    """

    def __init__(self, config: V4Config) -> None:
        super().__init__(config, config.num_hidden_layers, is_last=True)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.e_proj = nn.Linear(hidden, hidden, bias=False)
        self.h_proj = nn.Linear(hidden, hidden, bias=False)

    def join(self, embedded: Tensor, streams: Tensor) -> Tensor:
        """Streams [n, N, D] of embedded tokens [n, D] and streams [n, N, D]."""
        from_streams: Tensor = self.h_proj(self.hnorm(streams))
        from_token: Tensor = self.e_proj(self.enorm(embedded))
        return from_streams + from_token[:, None]


class _DSparkStage(_Stage):
    """A stage of DSpark.

    Args:
        config: The target's.
        stage: Its number.
    """

    def __init__(self, config: V4Config, stage: int) -> None:
        is_last = stage == config.draft_stages - 1
        super().__init__(config, config.num_hidden_layers + stage, is_last=is_last)
        hidden, vocab, rank = config.hidden_size, config.vocab_size, config.dspark_markov_rank
        if stage == 0:
            width = hidden * len(config.dspark_target_layer_ids)
            self.main_proj = nn.Linear(width, hidden, bias=False)
            self.main_norm = RMSNorm(hidden, config.rms_norm_eps)
        if is_last:
            self.markov_head = MarkovHead(vocab_size=vocab, draft_vocab_size=vocab, rank=rank)
            self.confidence_head = ConfidenceHead(hidden, rank, has_bias=False)


class MTPNetwork(nn.Module):
    """MTP-1, one block, run recursively along the text.

    Args:
        config: The target's.
    """

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self.config = config
        self.mtp = nn.ModuleList([_MTPStage(config)])

    def forward(self, embedded: Tensor, streams: Tensor, depth: int, notes: Notes) -> list[Tensor]:
        """Hidden states for the head, [n, D], of steps 1 .. depth.

        Row t of step j stands at position t + j - 1, takes the token x_{t+j} and the streams that
        step j - 1 gave at row t (the target's own for step 1), and predicts x_{t+j+1}. It sees the
        keys of step 1 up to row t, those of its own steps since, and itself: what a drafter sees
        that has committed t + 1 pairs and drafted j - 1 tokens.

        Args:
            embedded: [B, S + depth - 1, D], the target's embeddings of x_1, x_2, ...
            streams: [B * S, N, D], the target's streams X_0, X_1, ...
            depth: Steps.
            notes: Collects the router's loads and balance.
        """
        batch, length = embedded.shape[0], embedded.shape[1] - depth + 1
        stage = cast(_MTPStage, self.mtp[0])
        shape = Shape(self.config, batch, length, embedded.dtype)
        chain = _Chain(self.config, shape)
        out = []
        for step in range(depth):
            tokens = embedded[:, step : step + length].reshape(batch * length, -1)
            joined = stage.join(tokens, streams)

            def attention(x: Tensor, step: int = step) -> Tensor:
                return chain.attend(stage.attn, x, step)

            # Routed by score: the token ids are not looked at.
            ids = torch.zeros(batch * length, dtype=torch.int64)
            streams = stage.run(joined, ids, batch, notes, attention)
            out.append(stage.norm(stage.collapsed(streams)))
        return out


class _Chain:
    """Attention of MTP-1's steps: keys of step 1 in a window, and those of a row's own steps."""

    def __init__(self, config: V4Config, shape: Shape) -> None:
        self._config, self._shape = config, shape
        self._theta = frequencies(config, is_compressed=False, dtype=shape.dtype)
        self._positions = torch.arange(shape.length).repeat(shape.batch)
        self._keys: list[Tensor] = []  # of step 1 by block, then of later steps [.., W, c]

    def attend(self, attention: Attention, x: Tensor, step: int) -> Tensor:
        """Attention output [n, D] of normed rows [n, D] of a step, counted from 0."""
        shape = self._shape
        turns = turns_at(self._positions + step, self._theta)
        _, query = attention.queries(x, turns)
        keys = attention.keys(x, turns)
        self._keys.append(shape.blocked(keys) if step else shape.near_keys(keys))
        seen = torch.cat(self._keys, dim=1)
        out, _ = attend(shape.blocked(query), seen, attention.attn_sink, self._bias(step))
        return attention.output(shape.unblocked(out), turns)

    def _bias(self, step: int) -> Tensor:
        """Bias [blocks, W, 2W + step * W]: the window moves on with the steps."""
        w = self._shape.window
        near = self._shape.bias(None).clone()
        row, column = torch.arange(w)[:, None], torch.arange(2 * w)
        near[:, column <= row + step] = -torch.inf
        own = torch.full((w, w), -torch.inf, dtype=near.dtype).fill_diagonal_(0.0)
        return torch.cat((near, own.repeat(len(near), 1, step)), dim=-1)


@dataclass(frozen=True, slots=True, eq=False)
class BlockRows:
    """What DSpark gives for the slots of all blocks.

    Attributes:
        hidden: [R, D], before the norm; R = blocks * G.
        normed: [R, D], what the head gets.
        previous: [R, K], Markov rows of the tokens before the predicted ones.
    """

    hidden: Tensor
    normed: Tensor
    previous: Tensor


class DSparkNetwork(nn.Module):
    """DSpark, all stages, at many anchors of whole sequences.

    Args:
        config: The target's, with DSpark's fields; `draft_stages` stages.
    """

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self.config = config
        self.mtp = nn.ModuleList(_DSparkStage(config, i) for i in range(config.draft_stages))
        self._theta = frequencies(config, is_compressed=False, dtype=torch.float32)

    @property
    def _last(self) -> _DSparkStage:
        return cast(_DSparkStage, self.mtp[-1])

    @property
    def markov_w2(self) -> Tensor:
        """Weights [V, K] of the Markov head's logits."""
        return self._last.markov_head.markov_w2.weight

    def forward(
        self, embed: Tensor, captured: Tensor, tokens: Tensor, anchors: Tensor, notes: Notes
    ) -> BlockRows:
        """Run a block at every anchor.

        Args:
            embed: [V, D], the target's embedding.
            captured: [B, S, layers * D], the target's captured hidden states.
            tokens: int64 [B, S + 1], the text; an anchor s is token s, its context the positions
                before s.
            anchors: int64 [B, A], each from 0 to S - G + 1.
            notes: Collects the router's loads and balance.
        """
        c, slots = self.config, self.config.dspark_block_size
        first, last = cast(_DSparkStage, self.mtp[0]), self._last
        context = first.main_norm(first.main_proj(captured))
        offsets = torch.arange(slots)
        ids = torch.full((anchors.numel(), slots), c.dspark_noise_token_id)
        ids[:, 0] = tokens.gather(1, anchors).flatten()
        view = _BlockView(c, context.shape[1], anchors, self._theta.to(embed.dtype))
        streams = embed[ids.flatten()][:, None].repeat(1, c.hc_mult, 1)
        for module in self.mtp:
            stage = cast(_DSparkStage, module)

            def attention(x: Tensor, attention: Attention = stage.attn) -> Tensor:
                return view.attend(attention, x, context)

            flat = ids.flatten()  # stages are routed by score, so it is not looked at
            streams = stage.run(streams, flat, anchors.shape[0], notes, attention)
        hidden = last.collapsed(streams)
        before = tokens.gather(1, (anchors[:, :, None] + offsets).flatten(1)).flatten()
        return BlockRows(hidden, last.norm(hidden), last.markov_head.embed(before))

    def confidence(self, rows: BlockRows) -> Tensor:
        """Confidence logits [R]."""
        logits: Tensor = self._last.confidence_head(rows.hidden, rows.previous)
        return logits


class _BlockView:
    """What the slots of every block see: the window before the anchor, and each other."""

    def __init__(self, config: V4Config, length: int, anchors: Tensor, theta: Tensor) -> None:
        self._window, slots = config.sliding_window, config.dspark_block_size
        batch, count = anchors.shape
        # Rows are padded by a window in front, so that position p is row p + W.
        reach = anchors[:, :, None] + torch.arange(self._window)
        base = torch.arange(batch)[:, None, None] * (length + self._window)
        self._rows = (base + reach).flatten()
        self._blocks = batch * count
        self._context = turns_at(torch.arange(length).repeat(batch), theta)
        positions = anchors.reshape(-1, 1) + torch.arange(slots)
        self._turns = turns_at(positions.flatten(), theta)
        seen = (reach >= self._window).flatten(0, 1)
        bias = torch.zeros(self._blocks, 1, self._window + slots, dtype=theta.dtype)
        bias[:, 0, : self._window].masked_fill_(~seen, -torch.inf)
        self._bias = bias.expand(-1, slots, -1)

    def attend(self, attention: Attention, x: Tensor, context: Tensor) -> Tensor:
        """Attention output [blocks * G, D] of normed slots.

        Args:
            attention: Of the stage.
            x: [blocks * G, D].
            context: [B, S, D].
        """
        rows = attention.keys(context.flatten(0, 1), self._context).view(*context.shape[:2], -1)
        padded = F.pad(rows, (0, 0, self._window, 0)).flatten(0, 1)
        near = padded[self._rows].view(self._blocks, self._window, -1)
        _, query = attention.queries(x, self._turns)
        own = attention.keys(x, self._turns).view(self._blocks, -1, near.shape[-1])
        keys = torch.cat((near, own), dim=1)
        query = query.view(self._blocks, -1, *query.shape[1:])
        out, _ = attend(query, keys, attention.attn_sink, self._bias)
        return attention.output(out.flatten(0, 1), self._turns)
