"""Small drafts, samples and features for training tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dspark.mtp_head import DraftVocab
from dspark.target import HeadRows
from dspark.training.features import Features
from dspark.training.samples import Sample
from tests.draft.dspark_models import HIDDEN, VOCAB, make_module

LAYERS = 3


class ToyTeacher:
    """A target's embedding and head: all that a module and its loss ask for."""

    def __init__(self, seed: int = 5, softcap: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(VOCAB, HIDDEN, generator=generator) * 0.3
        self.softcap = softcap

    def embed(self, token_ids):
        return self.weight[token_ids]

    def unembed(self, hidden):
        logits = hidden @ self.weight.T
        cap = self.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def head_rows(self, ids=None):
        return HeadRows(self.weight if ids is None else self.weight[ids], None, self.softcap)


def make_sample(index: int, prompt: int, response: int, seed: int = 0) -> Sample:
    rng = np.random.default_rng([seed, index])
    tokens = rng.integers(0, VOCAB, prompt + response).astype(np.int64)
    return Sample(index, tokens, prompt, "toy")


def make_features(sample: Sample, teacher: ToyTeacher, temperature: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(sample.index)
    rows = sample.length - 1
    hidden = torch.randn(rows, LAYERS * HIDDEN, generator=generator)
    final = torch.randn(rows - sample.start, HIDDEN, generator=generator)
    logits = teacher.unembed(final)
    total = torch.logsumexp(logits / temperature, dim=-1)
    return Features(hidden, final, total, logits.argmax(dim=-1))


def make_trainable(style: str = "qwen3", head: str = "vanilla", **options: Any):
    """A module in training mode that shares a toy teacher's embedding and head."""
    teacher = options.pop("teacher", None) or ToyTeacher()
    ids = options.pop("ids", None)
    options.setdefault("owns_embedding", False)
    options.setdefault("owns_head", False)
    vocab = DraftVocab.build(VOCAB, ids) if ids is not None else None
    module = make_module(style, head, vocab=vocab, shares=teacher, **options)
    module.requires_grad_(True).train()
    module.take_head_rows()
    return module, teacher
