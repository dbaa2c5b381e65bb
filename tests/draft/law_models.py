"""Small random targets of six tokens, and random drafts that read their hidden states."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.adapters.hf.target import HFTarget
from dspark.draft.base import Drafter
from dspark.draft.dspark import DSparkDrafter, DSparkDrafterConfig
from dspark.draft.dspark_config import Window
from dspark.draft.eagle3 import Eagle3Drafter
from dspark.draft.grow import GrowthConfig
from dspark.mtp_head import DraftVocab
from dspark.registry import LoadOptions
from tests.conftest import FAMILIES, probe_folder
from tests.draft import dspark_models, test_eagle3
from tests.draft.law_check import PROMPT, VOCAB, Array, Logits, Prefix

SPREAD = {"llama": 0.2, "qwen3": 0.15, "gemma3": 0.1}
"""Size of random weights with which laws are neither flat nor certain."""

REDUCED = (0, 1, 3, 4)  # of six tokens, what a reduced draft vocabulary has


@functools.cache
def plain_model(family: str, vocab: int = VOCAB) -> Any:
    """A transformers model of two layers, of which Gemma's first sees four positions."""
    config = FAMILIES[family]()
    config.vocab_size, config.num_hidden_layers = vocab, 2
    if family == "gemma3":
        config.sliding_window = 4
        config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=SPREAD[family])
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.eval().requires_grad_(False)


@functools.cache
def target_of(family: str, vocab: int = VOCAB, *, exact: bool = False) -> HFTarget:
    """The model, wrapped."""
    model = copy.deepcopy(plain_model(family, vocab))
    options = LoadOptions(name=f"small-{family}", exact=exact, probe_folder=probe_folder())
    adapter = adapter_for(model.config.model_type)
    return wrap_model(model, adapter, options, fingerprint=f"plain_model {family} {vocab}")


def logits_of(family: str) -> Logits:
    """Teacher-forced logits, by transformers itself in float64."""
    model = copy.deepcopy(plain_model(family)).double()

    def logits(texts: Sequence[Prefix]) -> Array:
        rows = torch.tensor([[*PROMPT, *text] for text in texts])
        return model(input_ids=rows).logits[:, len(PROMPT) - 1 :].numpy()

    return logits


def _dspark(head: str, *, vocab: int, window: Window | None = None, **options: Any) -> Drafter:
    backbone = replace(dspark_models.make_config("qwen3", head).backbone, windows=(window,))
    few = options.pop("few", None)
    module = dspark_models.make_module(
        head=head,
        vocab=None if few is None else DraftVocab.build(vocab, few),
        backbone=backbone,
        vocab_size=vocab,
        mask_token_id=VOCAB - 1,
        target_layer_ids=(-1, 0),
        num_target_layers=2,
        **{"draft_vocab_size": vocab, "block_size": 3, **options},
    )
    return DSparkDrafter(module, config=DSparkDrafterConfig(min_survival=0.0))


def _eagle3(*, vocab: int, few: Sequence[int] | None = None, **options: Any) -> Drafter:
    tokens = vocab if few is None else len(few)
    shape = {**test_eagle3.SMALL, "vocab_size": vocab, "draft_vocab_size": tokens}
    shape |= {"hidden_size": 64, "target_hidden_size": 64, "target_layers": (1, -1, 0)}
    module = test_eagle3.make_module(**{**shape, "has_embedding": True, **options})
    if few is not None:
        module.d2t.copy_(torch.tensor(few) - torch.arange(tokens))
    return Eagle3Drafter(module, config=GrowthConfig(min_survival=0.0))


MODULES: dict[str, Callable[..., Drafter]] = {
    "vanilla": partial(_dspark, "vanilla"),
    "gated": partial(_dspark, "gated", window=Window(size=3)),
    "rnn": partial(_dspark, "rnn", window=Window(size=3, moves=True, is_causal=True)),
    "dflash": partial(_dspark, "none", sample_from_anchor=False, block_size=4),
    "eagle3": _eagle3,
    "vanilla, few": partial(_dspark, "vanilla", few=REDUCED),
    "rnn, few": partial(_dspark, "rnn", few=REDUCED),
    "eagle3, few": partial(_eagle3, few=REDUCED, norm_output=True),
}
"""Drafts by kind; "few" ones have a reduced vocabulary."""

KINDS = tuple(MODULES)


def drafter_of(kind: str, vocab: int = VOCAB) -> Drafter:
    """A draft of a kind for any of the targets, without any state."""
    return MODULES[kind](vocab=vocab)
