"""A small cut of benchmarks/lossless.py: real models, token by token against plain decoding."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dspark
from dspark.registry import LoadOptions, load_target
from dspark.text import TextCodec, load_codec
from tests.real.conftest import exact_target, fetched, make_drafter

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

TOKENS = 12
TEXTS = [
    "Copy this list of cities exactly, three times: Lisbon, Porto, Braga, Coimbra, Faro, Evora.\n"
    "Lisbon, Porto, Braga,",
    "def average(values):\n    total = 0.0\n    for value in values:\n        total =",
    "A fox who wanted to learn to sail went down to the harbour and",
    "The committee met on Tuesday. The treasurer reported that the fees had been paid. The",
]
SAMPLING = {
    "T0": {},
    "T0.7 top": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "T1": {"temperature": 1.0},
}
SHAPES = {"chain": {"width": 1, "tree_budget": 5, "depth": 5}, "tree": {"tree_budget": 7}}
CELLS = [
    ("lookup", "tree", 4, "T0"),
    ("model", "chain", 1, "T0"),
    ("lookup", "chain", 1, "T0.7 top"),
    ("model", "tree", 4, "T0.7 top"),
    ("lookup", "chain", 4, "T1"),
    ("model", "tree", 1, "T1"),
]
"""Draft, shape, batch, sampling: they hold every pair of settings of every two factors."""


def generate(
    name: str,
    prompts: list[list[int]],
    *,
    seeds: Sequence[int] = range(4),
    draft: str = "none",
    shape: str = "tree",
    batch: int = 4,
    sampling: str = "T0",
    dtype: str = "float32",
) -> list[dspark.GenerationResult]:
    """Generate in exact mode; every prompt has a seed of its own."""
    engine = dspark.Engine(
        exact_target(name, dtype).target,
        drafter=make_drafter(draft, name, dtype),
        config=dspark.EngineConfig(max_batch=batch, auto_off=False),
    )
    base = dspark.SamplingParams(
        max_tokens=TOKENS, ignore_eos=True, **SAMPLING[sampling], **SHAPES[shape]
    )
    return engine.generate(prompts, [replace(base, seed=seeds[i]) for i in range(len(prompts))])


@functools.cache
def codec_of(name: str) -> TextCodec:
    codec = load_codec(fetched(name))
    assert codec is not None
    return codec


def encode(name: str, texts: list[str]) -> list[list[int]]:
    return [codec_of(name).encode(text) for text in texts]


@functools.cache
def plain(name: str, sampling: str) -> list[list[int]]:
    results = generate(name, encode(name, TEXTS), sampling=sampling)
    return [result.token_ids for result in results]


@pytest.mark.parametrize(("draft", "shape", "batch", "sampling"), CELLS)
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_tokens_are_those_of_plain_decoding(
    name: str, draft: str, shape: str, batch: int, sampling: str
) -> None:
    chosen = [0, 1, 2, 3] if batch == 4 else [0]
    prompts, expected = encode(name, TEXTS), plain(name, sampling)
    results = generate(
        name,
        [prompts[i] for i in chosen],
        seeds=chosen,
        draft=draft,
        shape=shape,
        batch=batch,
        sampling=sampling,
    )
    assert [result.token_ids for result in results] == [expected[i] for i in chosen]
    verified = sum(result.stats.verified for result in results)
    accepted = sum(result.stats.accepted for result in results)
    assert verified > 0
    if draft == "model":
        assert 0 < accepted < verified


def long_prompt() -> list[int]:
    """Over 600 tokens that repeat with changes, so that lookup often guesses wrong."""
    towns = ["Almen", "Brook", "Carden", "Dorne", "Eldham", "Farrow", "Gant", "Holt"]
    things = ["bridge", "mill", "school", "library", "market hall", "harbour", "mint", "bath"]
    parts = [
        f"In the year {1700 + 13 * i} the council of {towns[i % 8]} decided to build a "
        f"{things[i % 5]} beside the river. Some people of {towns[(3 * i) % 8]} feared for the old "
        f"{things[(i + 3) % 8]}, but the {things[i % 5]} was opened in the spring. "
        for i in range(15)
    ]
    (tokens,) = encode("gemma3-270m", ["".join(parts)])
    assert len(tokens) > 600
    return tokens


@pytest.mark.parametrize(("draft", "sampling"), [("lookup", "T0"), ("model", "T1")])
def test_rejected_drafts_across_gemmas_window_leave_no_trace(draft: str, sampling: str) -> None:
    """A row that a rejected draft would have evicted from the window of 512 must still be there."""
    config = json.loads((fetched("gemma3-270m") / "config.json").read_text())
    assert config["sliding_window"] == 512
    (expected,), (result,) = (
        generate("gemma3-270m", [long_prompt()], draft=kind, sampling=sampling)
        for kind in ("none", draft)
    )
    assert result.stats.verified - result.stats.accepted > 0
    assert result.token_ids == expected.token_ids


@pytest.mark.parametrize("name", ["gemma3-270m", "smollm2-135m"])
def test_greedy_is_transformers_generate_but_for_named_near_ties(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """Sums in another order may flip a near-tie; its logit gap must be under 1e-3."""
    model = AutoModelForCausalLM.from_pretrained(fetched(name), dtype=torch.float32)
    for prompt, ours in list(zip(encode(name, TEXTS), plain(name, "T0"), strict=True))[:2]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        theirs = out[0, len(prompt) :].tolist()
        if ours == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        with torch.no_grad():
            row = model(torch.tensor([prompt + theirs[:at]])).logits[0, -1]
        gap = abs(float(row[ours[at]] - row[theirs[at]]))
        near_tie = f"token {at}: {ours[at]} or {theirs[at]}, logit gap {gap:.1e}"
        record_property("near-tie", near_tie)
        assert gap < 1e-3, near_tie


def test_bfloat16_in_exact_mode_is_lossless() -> None:
    prompts = encode("smollm2-135m", TEXTS)[:2]
    run = functools.partial(generate, "smollm2-135m", prompts, dtype="bfloat16", sampling="T1")
    results = run(draft="lookup", batch=2)
    assert exact_target("smollm2-135m", "bfloat16").target.exactness.enabled
    assert sum(r.stats.verified - r.stats.accepted for r in results) > 0
    assert [r.token_ids for r in results] == [r.token_ids for r in run(batch=1)]


def test_the_default_model_chats() -> None:
    fetched("smollm2-135m")
    engine = dspark.Engine.load()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (result,) = engine.generate([messages], dspark.SamplingParams(max_tokens=12))
    assert "Paris" in result.text
    assert result.error is None
    assert engine.drafter.name == "lookup:smollm2-135m"  # the corpus that comes with dspark
    chunks = list(engine.stream(messages, dspark.SamplingParams(max_tokens=6)))
    assert result.text.startswith("".join(chunk.text for chunk in chunks))
    assert len(chunks[-1].result.token_ids) == 6


def test_the_probe_of_exact_mode_is_kept_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspark import exactness

    options = LoadOptions(
        name="m", dtype="float32", exact=True, probe_folder=tmp_path / "probes", path="plain"
    )
    first = load_target(fetched("smollm2-135m"), options).target.exactness
    (record,) = (tmp_path / "probes").iterdir()
    assert json.loads(record.read_text())["holds"]
    assert first.enabled
    monkeypatch.setattr(exactness, "check_trees", lambda *_: pytest.fail("probed again"))
    again = load_target(fetched("smollm2-135m"), options).target.exactness
    assert again == first
    assert list((tmp_path / "probes").iterdir()) == [record]
