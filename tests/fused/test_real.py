"""Both paths on real weights."""

from __future__ import annotations

import pytest

import dspark
from dspark.adapters.fused.target import FusedTarget
from dspark.models import cache_root, resolve_model
from dspark.registry import LoadedTarget, LoadOptions, load_target
from tests.fused.models import needs_compiler

PROMPTS = ("Why is the sky blue?", "Write a Python function that adds two fractions.")


def load(path: str) -> LoadedTarget:
    options = LoadOptions(
        name="smollm2-135m",
        dtype="float32",  # in bfloat16 exact ties at the top are common, and go either way
        path=path,
        exact=True,
        probe_folder=cache_root() / "probes",
    )
    return load_target(resolve_model("smollm2-135m"), options)


@pytest.mark.real
@needs_compiler
def test_greedy_texts_of_both_paths_are_the_same() -> None:
    params = dspark.SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    texts = []
    for path in ("fused", "plain"):
        loaded = load(path)
        assert isinstance(loaded.target, FusedTarget) == (path == "fused")
        assert loaded.codec is not None
        ids = [loaded.codec.encode_chat([{"role": "user", "content": text}]) for text in PROMPTS]
        results = dspark.Engine(loaded.target).generate(ids, params)
        texts.append([result.token_ids for result in results])
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[0]] == [100, 100]
