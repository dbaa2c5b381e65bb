"""Prompts, a tokenizer and recorders for the tests of dspark.hf."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models

import dspark
from dspark.draft.lookup import LookupDrafter
from tests.conftest import VOCAB, random_model

SPECIAL = ["<pad>", "<s>", "</s>"]


def drafted(family: str, **options: Any) -> Any:
    """An accelerated model whose draft knows the greedy answers to `ragged_prompts`.

    Other answers it follows in part, so that trees are accepted, cut and rejected.
    """
    model = random_model(family, layers=2)
    draft = LookupDrafter(corpus=_answers(family))
    config = dspark.EngineConfig(auto_off=False, schedule="fixed:8")
    return dspark.accelerate(model, draft, config=config, **options)


@functools.cache
def _answers(family: str) -> list[list[int]]:
    model = random_model(family, layers=2)
    found = model.generate(**ragged_prompts(5), do_sample=False, max_new_tokens=16)
    return found.tolist()


def ragged_prompts(rows: int = 3, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Left-padded prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL), VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : row % 4 * 2] = 0
        mask[row, : row % 4 * 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def character_tokenizer() -> Any:
    """A tokenizer whose tokens are single characters."""
    characters = [chr(32 + i) for i in range(VOCAB - len(SPECIAL))]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", **names
    )


class RecordingStreamer:
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append((tuple(value.shape), value.tolist()))

    def end(self) -> None:
        self.seen.append("end")


class CountingCriterion(transformers.StoppingCriteria):
    """Keeps state: stops a row at multiples of 3, but not at the first that its batch meets."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.met = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((input_ids.tolist(), scores))
        hits = input_ids[:, -1] % 3 == 0
        self.met += int(hits.sum())
        return hits & (self.met >= 2)


class Favour(transformers.LogitsProcessor):
    """A processor of a user's own: raises the token after the last one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = scores.clone()
        rows = torch.arange(len(out))
        out[rows, (input_ids[:, -1] + 1) % out.shape[1]] += 2.0
        return out


def plain(model: Any, **arguments: Any) -> Any:
    """What transformers itself generates, even while the model is accelerated."""
    return type(model).generate(model, **arguments)


def accepted(model: Any) -> int:
    """Draft tokens that the last accelerated call accepted."""
    return sum(stats.accepted for stats in model.generate.stats)
