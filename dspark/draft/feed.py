"""From a draft's raw logits to the children of a tree's nodes, as the target would shape them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from dspark.draft.base import DraftContext
from dspark.draft.grow import Growth
from dspark.errors import DsparkError
from dspark.mtp_head import DraftVocab
from dspark.tree import BoolArray
from dspark.verify import sampling

__all__ = ["WarnOnce", "feed", "history_of"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class WarnOnce:
    """Says once, per kind, what keeps a drafter from drafting.

    Args:
        name: Of the drafter.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[str] = set()

    def __call__(self, what: str, detail: str) -> None:
        """Log a warning unless this was said before."""
        if what not in self._said:
            self._said.add(what)
            _log.warning("%s: %s: %s", self._name, what, detail)


def history_of(context: DraftContext) -> sampling.History | None:
    """What penalties and bad words look at, None where nothing does."""
    if not sampling.has_history(context.params):
        return None
    tokens, prompt = context.tokens, context.prompt_length
    return sampling.History(tokens[:prompt], tokens[prompt:])


def feed(
    growth: Growth,
    context: DraftContext,
    history: sampling.History | None,
    nodes: Sequence[int],
    logits: torch.Tensor,
    warn: WarnOnce,
    confidence: Sequence[float] | None = None,
    *,
    vocab: DraftVocab | None = None,
) -> None:
    """Shape the rows of a request's nodes and hand them to its tree.

    Nodes whose logits are not finite, or cannot be shaped, or leave nothing that the request's
    grammar allows, are left without children; that asks only what was known before these are drawn.

    Args:
        growth: The tree.
        context: The request.
        history: From `history_of`.
        nodes: Nodes to expand, -1 for the anchor.
        logits: float [R, V], one row each, not shaped yet; [R, Vd] if there is a `vocab`.
        warn: Where to complain.
        confidence: Confidence logit of every node, None without such a head.
        vocab: The draft's own vocabulary, which the columns are; None for the target's.
    """
    ids = None
    if vocab is not None:
        if growth.needs_all_tokens or _looks_at_tokens(context):
            logits = vocab.widen(logits)
        else:  # a quarter of the columns is a quarter of the work
            ids = vocab.ids
    is_sound = [math.isfinite(top) for top in logits.amax(dim=1).tolist()]
    if not all(is_sound):
        warn("the draft's logits are not finite", "no tokens are drafted after them.")
    paths: list[Sequence[int]] = [()] * len(nodes)
    if history is not None or context.allowed is not None:
        paths = [growth.tree.path_tokens(node) for node in nodes]
    try:
        masks: list[BoolArray | None] | None = None
        is_open = is_sound
        if context.allowed is not None:
            masks = [context.allowed(path) for path in paths]
            is_open = _open_rows(logits, masks, is_sound)
        if not all(is_open):
            nodes, paths = _picked(nodes, is_open), _picked(paths, is_open)
            masks = None if masks is None else _picked(masks, is_open)
            logits = logits[torch.tensor(is_open, device=logits.device)]
            confidence = None if confidence is None else _picked(confidence, is_open)
        if not nodes:
            return
        params = [context.params] * len(nodes)
        histories = None if history is None else [history] * len(nodes)
        shaped = sampling.shape_logits(logits, params, histories, paths, masks=masks)
    except DsparkError as error:  # the target will meet it too, and report it
        warn("the draft's logits cannot be shaped", error.message)
        return
    growth.take(nodes, shaped, confidence, ids)


def _looks_at_tokens(context: DraftContext) -> bool:
    """Whether shaping a request's logits needs to know which column is which token."""
    params = context.params
    has_edits = bool(params.logit_bias) or sampling.has_history(params)
    return has_edits or context.allowed is not None


def _picked(values: Sequence[_T], flags: Sequence[bool]) -> list[_T]:
    return [value for value, flag in zip(values, flags, strict=True) if flag]


def _open_rows(
    logits: torch.Tensor, masks: Sequence[BoolArray | None], is_sound: Sequence[bool]
) -> list[bool]:
    """Whether a draft's logits [R, V] give mass to a token that the row's mask, if any, allows."""
    host = logits.detach().to("cpu", torch.float32).numpy()
    return [
        ok and (mask is None or bool((row[mask] > -math.inf).any()))
        for row, mask, ok in zip(host, masks, is_sound, strict=True)
    ]
