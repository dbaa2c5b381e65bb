"""custom_generate=dspark.hf.generate, the hub folder, and the law of sampled text."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy import stats

import dspark
from dspark.errors import ConfigError
from dspark.hf import FallbackWarning
from tests.conftest import random_model
from tests.hf.toys import RecordingStreamer, accepted, drafted, plain, ragged_prompts

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", layers=2)


def ours(model: Any, **arguments: Any) -> Any:
    return model.generate(
        custom_generate=dspark.hf.generate, **{"dspark_draft": "lookup", **arguments}
    )


def test_greedy_text_is_that_of_the_model_itself(model: Any) -> None:
    prompts = ragged_prompts()
    expected = model.generate(**prompts, **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for draft in ("lookup", "none", random_model("llama", layers=1)):
            assert torch.equal(ours(model, **prompts, **GREEDY, dspark_draft=draft), expected)


def test_a_streamer_gets_prompt_tokens_and_end(model: Any) -> None:
    prompts, theirs, mine = ragged_prompts(1), RecordingStreamer(), RecordingStreamer()
    model.generate(**prompts, **GREEDY, streamer=theirs)
    ours(model, **prompts, **GREEDY, dspark_streamer=mine)
    assert mine.seen == theirs.seen


def test_a_call_that_cannot_be_kept_is_decoded_by_transformers() -> None:
    model, prompts = random_model("llama", layers=2), ragged_prompts(2)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(**prompts, **GREEDY, **beams)
    with pytest.warns(FallbackWarning, match="beam search") as record:
        found = ours(model, **prompts, **GREEDY, **beams)
    assert len(record) == 1
    assert torch.equal(found, expected)
    assert torch.equal(ours(model, **prompts, **GREEDY, **beams), expected)  # no second warning
    with pytest.raises(ConfigError, match="streamer"):
        ours(model, **prompts, **GREEDY, **beams, dspark_streamer=RecordingStreamer())


def test_a_refused_call_still_streams() -> None:
    model, prompts = random_model("llama", layers=2), ragged_prompts(1)
    theirs, mine = RecordingStreamer(), RecordingStreamer()
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    model.generate(**prompts, **GREEDY, streamer=theirs)
    with pytest.warns(FallbackWarning, match="output_hidden_states"):
        found = ours(model, **prompts, **GREEDY, **options, dspark_streamer=mine)
    assert mine.seen == theirs.seen
    assert found.hidden_states is not None


def _modules_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers keep the code of `custom_generate` folders below `folder`."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))


def test_the_folder_runs_as_a_custom_generate_repository(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _modules_at(tmp_path / "modules", monkeypatch)
    folder = Path(dspark.hf.__file__).parent
    prompts, streamer = ragged_prompts(1), RecordingStreamer()
    expected = model.generate(**prompts, **GREEDY)
    found = model.generate(
        **prompts,
        **GREEDY,
        custom_generate=str(folder),
        trust_remote_code=True,
        dspark_draft="lookup",
        streamer=streamer,
    )
    assert torch.equal(found, expected)
    assert len(streamer.seen) == GREEDY["max_new_tokens"] + 2
    beams = {"num_beams": 2}
    with pytest.warns(FallbackWarning, match="beam search"):
        found = model.generate(
            **prompts, **GREEDY, **beams, custom_generate=str(folder), trust_remote_code=True
        )
    assert torch.equal(found, model.generate(**prompts, **GREEDY, **beams))


def test_a_model_repository_may_hold_the_folder(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _modules_at(tmp_path / "modules", monkeypatch)
    folder, prompts = tmp_path / "repository", ragged_prompts()
    model.save_pretrained(folder)
    source = Path(dspark.hf.__file__).parent / "custom_generate"
    (folder / "custom_generate").mkdir()
    for name in ("generate.py", "requirements.txt"):
        (folder / "custom_generate" / name).write_bytes((source / name).read_bytes())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert "generate" in vars(loaded)
    found = loaded.generate(
        prompts["input_ids"], attention_mask=prompts["attention_mask"], **GREEDY
    )
    assert torch.equal(found, model.generate(**prompts, **GREEDY))


SAMPLED: dict[str, dict[str, Any]] = {
    "parameters": {"temperature": 1.3, "top_k": 4, "repetition_penalty": 1.5},
    "nodes": {"top_k": 4, "top_p": 0.9, "min_p": 0.1, "no_repeat_ngram_size": 1},
}


def _law(model: Any, prompt: dict[str, torch.Tensor], options: dict[str, Any]) -> dict[Any, float]:
    """Probability of every text of three tokens, from transformers' own processed scores."""
    kept: dict[Any, float] = {(): 1.0}
    for _ in range(3):
        texts = torch.tensor(list(kept), dtype=torch.long)
        ids = torch.cat([prompt["input_ids"].expand(len(kept), -1), texts], dim=1)
        seen = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        settings = {**options, "do_sample": True, "max_new_tokens": 1, "output_scores": True}
        out = plain(model, **seen, **settings, return_dict_in_generate=True)
        laws = out.scores[0].double().softmax(-1)
        kept = {
            (*text, token): mass * float(law[token])
            for (text, mass), law in zip(kept.items(), laws, strict=True)
            for token in law.nonzero().flatten().tolist()
        }
    return kept


def _p_value(texts: list[Any], law: dict[Any, float]) -> float:
    """Chi-square test of texts against a law; rare texts share a cell."""
    count = len(texts)
    assert set(texts) <= set(law)
    common = [text for text, mass in law.items() if mass * count >= 8]
    observed = [texts.count(text) for text in common]
    expected = [law[text] * count for text in common]
    if (rest := count - sum(expected)) > 1:
        observed.append(count - sum(observed))
        expected.append(rest)
    scale = sum(observed) / sum(expected)
    return float(stats.chisquare(observed, [e * scale for e in expected]).pvalue)


@pytest.mark.parametrize("samples", [160, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_text_follows_the_law_of_the_model_itself(name: str, samples: int) -> None:
    model, options, prompt = drafted("llama"), SAMPLED[name], ragged_prompts(1)
    law = _law(model, prompt, options)
    assert sum(law.values()) == pytest.approx(1, abs=1e-6)
    torch.manual_seed(5)
    sampled = {"do_sample": True, "max_new_tokens": 3, "num_return_sequences": samples}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        out = model.generate(**prompt, **options, **sampled)
    assert out.shape == (samples, prompt["input_ids"].shape[1] + 3)
    texts = [tuple(row) for row in out[:, -3:].tolist()]
    assert _p_value(texts, law) > 1e-3
    assert accepted(model) > 0
    other = _law(model, prompt, {**options, "temperature": 0.4})
    assert not set(texts) <= set(other) or _p_value(texts, other) < 1e-4


def test_samples_follow_the_generator_of_torch(model: Any) -> None:
    prompts = ragged_prompts(2)
    sampled = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3, "top_k": 0}
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(ours(model, **prompts, **sampled))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len({tuple(row) for row in runs[0].tolist()}) == 6
    length = prompts["input_ids"].shape[1]
    assert torch.equal(runs[0][:, :length], prompts["input_ids"].repeat_interleave(3, 0))
    second = ours(model, **prompts, **sampled)
    assert not torch.equal(second, runs[2])
    state = torch.random.get_rng_state()
    ours(model, **prompts, **GREEDY)
    assert torch.equal(torch.random.get_rng_state(), state)  # greedy decoding draws nothing


def test_the_draft_does_not_change_a_sampled_text(model: Any) -> None:
    prompts = ragged_prompts(2)
    texts = []
    for draft in ("none", "lookup", random_model("llama", layers=2)):
        torch.manual_seed(9)
        texts.append(ours(model, **prompts, do_sample=True, max_new_tokens=8, dspark_draft=draft))
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(texts))


def test_sampled_scores_belong_to_the_text(model: Any) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "top_k": 4}
    out = ours(model, **ragged_prompts(2), do_sample=True, max_new_tokens=8, **options)
    chosen = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert chosen.shape == (2, 8)
    assert bool(torch.isfinite(chosen).all())  # a token outside the top 4 would have -inf
    assert all(int(torch.isfinite(step).sum()) == 8 for step in out.scores)


def test_the_public_names_are_those_of_the_package() -> None:
    assert dspark.accelerate is dspark.hf.accelerate
    assert dspark.restore is dspark.hf.restore
    requirements = Path(dspark.hf.__file__).parent / "custom_generate" / "requirements.txt"
    assert requirements.read_text(encoding="utf-8").split() == ["dspark"]
