"""The DSpark draft module: context combiner, backbone, output head, sequential head, confidence.

Its parameters carry the names of DeepSpec's checkpoints, so `state_dict` is the file. Plain torch:
`draft/dspark.py` drafts with it, training differentiates it.

Letters: N rows, D hidden size, Dt hidden size of the target, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.draft.backbone import Attend, DraftLayer, RMSNorm, Rotary, attend_rows
from dspark.draft.block_runner import BlockRunner
from dspark.draft.dspark_config import DSparkConfig, Window
from dspark.errors import CapabilityError, ConfigError
from dspark.mtp_head import ConfidenceHead, DraftVocab, MarkovHead, build_head, few_rows, project
from dspark.target import HeadRows, SharesHead, SharesHeadRows

__all__ = ["DSparkModule"]


class DSparkModule(nn.Module):
    """A draft module.

    Args:
        config: What it is made of.
        vocab: Its vocabulary; None is the target's.
        shares: The target, where the module uses its embedding or head.

    Raises:
        ConfigError: If a shared part is needed and there is no target, or the vocabulary has
            another size than the config says.
        CapabilityError: If rows of the target's head are needed, and it does not give them away.
    """

    def __init__(
        self,
        config: DSparkConfig,
        vocab: DraftVocab | None = None,
        shares: SharesHead | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab or DraftVocab(config.vocab_size)
        if self.vocab.draft_size != config.draft_vocab_size:
            raise ConfigError(
                f"draft_vocab_size is {config.draft_vocab_size}, but the draft's vocabulary has "
                f"{self.vocab.draft_size} tokens."
            )
        if shares is None and not (config.owns_embedding and config.owns_head):
            raise ConfigError("the draft has no embedding or head of its own, and no target.")
        if config.needs_head_rows and not isinstance(shares, SharesHeadRows):
            raise CapabilityError(
                "the draft uses rows of the target's head, but the target does not share them.",
                hint="give the draft a head of its own",
            )
        self.shares = shares  # not a module: its weights are the target's
        self.head_rows: HeadRows | None = None
        self.runner: BlockRunner | None = None  # a faster one than its own layers
        self._head: nn.Module | None = None  # in place of the rows, with their bias
        backbone = config.backbone
        hidden, eps = backbone.hidden_size, backbone.norm_eps
        if config.owns_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        inputs = len(config.target_layer_ids) * config.target_hidden_size
        self.fc = nn.Linear(inputs, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.layers = nn.ModuleList(DraftLayer(backbone, i) for i in range(backbone.num_layers))
        self.norm = RMSNorm(hidden, eps)
        if config.owns_head:
            self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.markov_head: MarkovHead | None = build_head(
            config.markov_head_type,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.draft_vocab_size,
            rank=config.markov_rank,
            hidden_size=hidden,
        )
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            rank = config.markov_rank if config.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(hidden, rank)
        self.rotary = Rotary(backbone)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.fc.weight.device

    @property
    def windows(self) -> tuple[Window | None, ...]:
        """What each layer sees of the context."""
        return self.config.backbone.windows

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [N, D] of token ids int64 [N]."""
        if self.config.owns_embedding:
            rows: Tensor = self.embed_tokens(tokens)
            return rows if self.config.embed_scale == 1 else rows * self.config.embed_scale
        if self.shares is None:
            raise ConfigError("the draft has no embedding of its own, and no target.")
        return self.shares.embed(tokens).to(self.fc.weight.dtype)

    def combine(self, features: Tensor) -> Tensor:
        """Context vectors c [N, D] of the captured hidden states [N, layers * Dt]."""
        c: Tensor = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        return c

    def context(self, c: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [N, J, E] of every layer for context vectors c [N, D]."""
        angles = self.rotary.angles(positions, c.dtype)
        return [layer.context(c, angles) for layer in self._draft_layers()]

    def block(self, rows: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [N, D], final norm applied, of block rows [N, D]."""
        angles = self.rotary.angles(positions, rows.dtype)
        for layer in self._draft_layers():
            rows = layer(rows, angles, attend)
        out: Tensor = self.norm(rows)
        return out

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of one request's slots, the same in every layer; see `attend_rows`."""
        return attend_rows(queries, keys, values, mask)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Base logits U, float32 [N, Vd], of hidden states [N, D]."""
        if self.config.owns_head:
            logits = project(hidden, self.lm_head)
            return _soft_capped(logits.float(), self.config.logit_softcap)
        if self.head_rows is None:
            if self.shares is None:
                raise ConfigError("the draft has no head of its own, and no target.")
            if not self.config.needs_head_rows:
                return self.shares.unembed(hidden).float()
            self.take_head_rows()
        return self._shared_logits(hidden, self.head_rows)

    def take_head_rows(self) -> None:
        """Copy the rows of the target's head that this module predicts with.

        Drafting does so at first need, where the vocabulary is reduced; training always, since
        gradients must flow through them.

        Raises:
            CapabilityError: If the target does not give its head's rows away.
        """
        if self.config.owns_head or self.head_rows is not None:
            return
        if not isinstance(self.shares, SharesHeadRows):
            raise CapabilityError("the target does not give away the rows of its output head.")
        rows = self.shares.head_rows(self.vocab.ids)
        weight = self.fc.weight
        bias = None if rows.bias is None else rows.bias.to(weight.device, weight.dtype)
        self.head_rows = HeadRows(rows.weight.to(weight.device, weight.dtype), bias, rows.softcap)

    def take_head(self) -> nn.Linear | None:
        """The rows of the target's head that drafting predicts with, as a layer with their bias.

        Returns:
            The layer, for `use_head`; None where the module has a head of its own or uses all of
            the target's.

        Raises:
            CapabilityError: If the target does not give its head's rows away.
        """
        if not self.config.needs_head_rows:
            return None
        self.take_head_rows()
        rows = self.head_rows
        if rows is None:
            return None
        outputs, inputs = rows.weight.shape
        layer = nn.Linear(inputs, outputs, bias=rows.bias is not None, device="meta")
        layer.weight = nn.Parameter(rows.weight, requires_grad=False)
        if rows.bias is not None:
            layer.bias = nn.Parameter(rows.bias, requires_grad=False)
        return layer

    def use_head(self, layer: nn.Module) -> None:
        """Predict with a layer in place of the rows that `take_head` gave, which are let go."""
        softcap = None if self.head_rows is None else self.head_rows.softcap
        self.head_rows = HeadRows(self.fc.weight.new_empty(0), None, softcap)
        self._head = layer

    def packed_head(self) -> tuple[nn.Module | None, float | None]:
        """The layer in place of a stock head, if there is one, and the soft-cap of its logits."""
        if self.config.owns_head:
            return self.lm_head, self.config.logit_softcap
        return self._head, None if self.head_rows is None else self.head_rows.softcap

    def _shared_logits(self, hidden: Tensor, rows: HeadRows | None) -> Tensor:
        if rows is None:
            raise ConfigError("the rows of the target's head have not been taken.")
        if self._head is not None:
            logits: Tensor = self._head(hidden)
        else:
            logits = few_rows(hidden, rows.weight)
            if rows.bias is not None:
                logits = logits + rows.bias
        return _soft_capped(logits.float(), rows.softcap)

    def confidence(self, hidden: Tensor, tokens: Tensor) -> Tensor | None:
        """Confidence logits float32 [N], or None without a confidence head.

        Args:
            hidden: [N, D], hidden state of the slot that predicts.
            tokens: int64 [N], token before the predicted one.
        """
        if self.confidence_head is None:
            return None
        previous = None
        if self.confidence_head.rank and self.markov_head is not None:
            previous = self.markov_head.embed(tokens)
        logits: Tensor = self.confidence_head(hidden, previous)
        return logits

    def _draft_layers(self) -> list[DraftLayer]:
        return [layer for layer in self.layers if isinstance(layer, DraftLayer)]


def _soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)
