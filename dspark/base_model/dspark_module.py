"""The DSpark module of a V4 checkpoint (`mtp.0`, `mtp.1`, ...), behind the DSpark drafter.

Stages are V4 blocks without compression. Context vectors are made once from the target's hidden
states and give every stage its keys; a block of [anchor, noise, ...] runs through the stages, its
slots seeing the newest `sliding_window` context positions and each other without causality. Base
logits then get a Markov head's bias. Source: DSpark, arXiv 2607.05147, Eq. 2-8; the released
checkpoints' layout.

Letters: n rows, S slots, N streams, D hidden, c head size, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.base_model.block import Block
from dspark.base_model.hyper import HyperHead
from dspark.base_model.model import V4Model
from dspark.base_model.numerics import Linear, Numerics, rms_norm
from dspark.base_model.rotary import Rotation, frequencies
from dspark.base_model.weights import ExpertsOnDevice, OnDevice
from dspark.mtp_head import ConfidenceHead, DraftVocab, MarkovHead

__all__ = ["V4DSparkModule", "V4DSparkSettings"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class V4DSparkSettings:
    """What the drafter asks of a module's settings.

    Attributes:
        target_layer_ids: Layers of the target that it reads.
        block_size: Slots of a block; another number changes all outputs.
        mask_token_id: Token of the slots behind the anchor.
        window: Context positions that every slot sees.
    """

    target_layer_ids: tuple[int, ...]
    block_size: int
    mask_token_id: int
    window: int

    @property
    def gamma(self) -> int:
        """Drafted tokens of a block: the anchor's slot predicts as well."""
        return self.block_size

    @property
    def first_slot(self) -> int:
        """Slot that predicts the first token."""
        return 0


class V4DSparkModule:
    """DSpark on V4's own parts.

    Args:
        model: The target; its embedding, head and weights are used.
    """

    def __init__(self, model: V4Model) -> None:
        config, device = model.config, model.devices[-1]
        source = OnDevice(model.source, device)
        experts = ExpertsOnDevice(model.experts, device)
        # A draft never decides about the text, so exact mode would only slow it down.
        self._numerics = numerics = Numerics.of(model.numerics.dtype, device)
        self.device = device
        self.vocab = DraftVocab(config.vocab_size)
        self.config = V4DSparkSettings(
            target_layer_ids=config.dspark_target_layer_ids,
            block_size=config.dspark_block_size,
            mask_token_id=config.dspark_noise_token_id,
            window=config.sliding_window,
        )
        last = f"mtp.{config.draft_stages - 1}"
        self._stages = [
            Block(source, f"mtp.{i}", config, numerics, config.num_hidden_layers + i, experts)
            for i in range(config.draft_stages)
        ]
        self._model, self._eps, self._streams = model, config.rms_norm_eps, config.hc_mult
        self._project = Linear(source.stored("mtp.0.main_proj"), numerics)
        self._project_norm = source.tensor("mtp.0.main_norm.weight").to(numerics.wide)
        self._norm = source.tensor(f"{last}.norm.weight").to(numerics.wide)
        self._collapse = HyperHead(source, f"{last}.hc_head", config, numerics)
        self._theta = frequencies(config, is_compressed=False, dtype=numerics.wide).to(device)
        self.markov_head = self._load_markov(source, f"{last}.markov_head", config.vocab_size)
        self.confidence_head = self._load_confidence(source, f"{last}.confidence_head.proj")

    @property
    def windows(self) -> tuple[int, ...]:
        """Context positions that the slots of every stage see."""
        return (self.config.window,) * len(self._stages)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [n, D] of token ids int64 [n]."""
        return self._model.embed(tokens).to(self.device)

    def combine(self, features: Tensor) -> Tensor:
        """Context vectors [n, D] of captured hidden states [n, layers * D]."""
        rows = self._project(features.to(self._numerics.dtype))
        return rms_norm(rows, self._project_norm, self._eps, self._numerics.wide)

    def context(self, c: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys, which are the values too, [n, 1, c] of every stage, for context vectors [n, D].

        They get no norm of the block's: the vectors are shared by all stages.
        """
        rotation = Rotation.at(positions, self._theta)
        rows = [stage.attention.keys(c, rotation)[:, None] for stage in self._stages]
        return [(row, row) for row in rows]

    def block(self, rows: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [n, D], before the final norm, of block rows [n, D].

        Args:
            rows: Embedded slots.
            positions: int64 [n].
            attend: (stage, queries [n, H, c], keys [n, 1, c], values) -> [n, H, c].
        """
        rotation = Rotation.at(positions, self._theta)
        streams = rows[:, None].repeat(1, self._streams, 1)
        for index, stage in enumerate(self._stages):

            def attention(x: Tensor, index: int = index, stage: Block = stage) -> Tensor:
                _, query = stage.attention.queries(x, rotation)
                keys = stage.attention.keys(x, rotation)[:, None]
                return stage.attention.output(attend(index, query, keys, keys), rotation)

            # Draft stages never choose experts by token id, so these do not matter.
            streams = stage.run(streams, positions, attention)
        return self._collapse(streams)

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of one request's slots with the stage's sink.

        Args:
            layer: Stage.
            queries: [S, H, c].
            keys: [1, L, c].
            values: [1, L, c].
            mask: bool [S, L], True where seen; None for everywhere.

        Returns:
            [S, H, c].
        """
        wide = self._numerics.wide
        key, value = keys[0].to(wide), values[0].to(wide)
        scores = queries.to(wide) @ key.T * queries.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        sink = self._stages[layer].attention.sink[None, :, None].expand(scores.shape[0], -1, 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        return (weights @ value).to(queries.dtype)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Base logits [n, V] of hidden states [n, D]."""
        return self._model.head(rms_norm(hidden, self._norm, self._eps, self._numerics.wide))

    def confidence(self, hidden: Tensor, tokens: Tensor) -> Tensor | None:
        """Confidence logits float32 [n], None if the checkpoint has no such head.

        Args:
            hidden: [n, D], of the slot that predicts.
            tokens: int64 [n], token before the predicted one.
        """
        if self.confidence_head is None:
            return None
        rows = hidden.to(self._numerics.wide)
        logits: Tensor = self.confidence_head(rows, self.markov_head.embed(tokens))
        return logits

    def _load_markov(self, source: OnDevice, name: str, vocab: int) -> MarkovHead:
        w1, w2 = (
            source.tensor(f"{name}.markov_w1.weight"),
            source.tensor(f"{name}.markov_w2.weight"),
        )
        with torch.device("meta"):
            head = MarkovHead(vocab_size=vocab, draft_vocab_size=vocab, rank=w1.shape[1])
        wide = self._numerics.wide
        weights = {"markov_w1.weight": w1.to(wide), "markov_w2.weight": w2.to(wide)}
        head.load_state_dict(weights, assign=True)
        return head.requires_grad_(False)

    def _load_confidence(self, source: OnDevice, name: str) -> ConfidenceHead | None:
        if f"{name}.weight" not in source:
            return None
        weight = source.tensor(f"{name}.weight").to(self._numerics.wide)
        rank = self.markov_head.rank
        with torch.device("meta"):
            head = ConfidenceHead(weight.shape[1] - rank, rank, has_bias=False)
        head.load_state_dict({"proj.weight": weight}, assign=True)
        return head.requires_grad_(False)
