"""dspark.accelerate: plain model.generate gives what it gave before, and restore undoes it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers

import dspark
from dspark.errors import ConfigError
from dspark.hf import FallbackWarning
from tests.conftest import random_model
from tests.hf.toys import (
    CountingCriterion,
    Favour,
    RecordingStreamer,
    accepted,
    character_tokenizer,
    drafted,
    plain,
    ragged_prompts,
)

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model() -> Any:
    return drafted("llama")


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        pytest.param("qwen3", marks=pytest.mark.slow),
        pytest.param("gemma3", marks=pytest.mark.slow),
        "qwen3_moe",
    ],
)
def test_greedy_text_is_that_of_the_model_itself(family: str) -> None:
    own = drafted(family)
    for rows in (1, 5):
        prompts = ragged_prompts(rows)
        expected = plain(own, **prompts, **GREEDY)
        assert torch.equal(own.generate(**prompts, **GREEDY), expected), rows
        assert accepted(own) > 0, rows


def test_rows_end_at_their_end_token_and_are_padded(model: Any) -> None:
    prompts = ragged_prompts()
    text = plain(model, **prompts, **GREEDY)[:, prompts["input_ids"].shape[1] :]
    ends = [int(text[0, 5]), int(text[1, 9])]
    for options in ({"eos_token_id": ends}, {"eos_token_id": ends[0], "pad_token_id": 77}):
        expected = plain(model, **prompts, **GREEDY, **options)
        assert torch.equal(model.generate(**prompts, **GREEDY, **options), expected)
    no_end = {"eos_token_id": None}
    expected = plain(model, **prompts, **GREEDY, **no_end)
    assert torch.equal(model.generate(**prompts, **GREEDY, **no_end), expected)


def _by_row(row: int, ids: torch.Tensor) -> list[int]:
    last = int(ids[-1])
    return [(last * 5 + k * 11 + row) % 96 for k in range(6)]


OPTIONS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(3, 60))},
    "min_length": {"min_length": 17, "eos_token_id": list(range(3, 60))},
    "ngram": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.1},
    "bad_words": {"bad_words_ids": [[5], [7, 8], [20, 21, 22]]},
    "suppress": {"suppress_tokens": list(range(30, 60)), "begin_suppress_tokens": [61, 62]},
    "bias": {"sequence_bias": [[[9], 2.5], [[10, 11], -4.0]]},
    "forced_end": {"forced_eos_token_id": 2},
    "decay": {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": [2, 5, 6]},
    "prefix": {"prefix_allowed_tokens_fn": _by_row},
    "renormalise": {"renormalize_logits": True, "remove_invalid_values": True},
}


# Processors that take the way of another one: of the same kind, or with nothing to remember.
_ALIKE = ("min_length", "suppress", "renormalise")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in _ALIKE)) for name in OPTIONS],
)
def test_processors_act_on_drafted_tokens_as_in_plain_decoding(model: Any, name: str) -> None:
    prompts, options = ragged_prompts(), OPTIONS[name]
    expected = plain(model, **prompts, **GREEDY, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert torch.equal(model.generate(**prompts, **GREEDY, **options), expected)


def test_a_processor_that_may_keep_state_sends_the_call_to_the_model_itself() -> None:
    own, prompts = drafted("llama"), ragged_prompts()
    expected = plain(own, **prompts, **GREEDY, logits_processor=[Favour()])
    with pytest.warns(FallbackWarning, match="Favour") as record:
        first = own.generate(**prompts, **GREEDY, logits_processor=[Favour()])
    assert len(record) == 1
    second = own.generate(**prompts, **GREEDY, logits_processor=[Favour()])  # and never again
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert own.generate.stats == []
    marked = Favour()
    marked.dspark_stateless = True
    assert torch.equal(own.generate(**prompts, **GREEDY, logits_processor=[marked]), expected)
    assert accepted(own) > 0
    assert not torch.equal(expected, plain(own, **prompts, **GREEDY))


@pytest.mark.parametrize("rows", [1, 3])
def test_stopping_criteria_are_called_as_by_transformers(model: Any, rows: int) -> None:
    prompts = ragged_prompts(rows)
    theirs, ours = CountingCriterion(), CountingCriterion()
    greedy = {**GREEDY, "max_new_tokens": 16}
    expected = plain(model, **prompts, **greedy, stopping_criteria=[theirs])
    assert torch.equal(model.generate(**prompts, **greedy, stopping_criteria=[ours]), expected)
    assert ours.calls == theirs.calls
    assert expected.shape[1] < prompts["input_ids"].shape[1] + greedy["max_new_tokens"]


def test_a_streamer_gets_prompt_tokens_and_end(model: Any) -> None:
    prompts = ragged_prompts(1)
    theirs, ours = RecordingStreamer(), RecordingStreamer()
    plain(model, **prompts, **GREEDY, streamer=theirs)
    model.generate(**prompts, **GREEDY, streamer=ours)
    assert ours.seen == theirs.seen
    assert accepted(model) > 0


def test_stop_strings_end_the_text(model: Any) -> None:
    tokenizer, prompts = character_tokenizer(), ragged_prompts(2)
    text = tokenizer.batch_decode(plain(model, **prompts, **GREEDY)[:, 12:])
    stop = {"stop_strings": [text[0][6:8], text[1][9:11]], "tokenizer": tokenizer}
    expected = plain(model, **prompts, **GREEDY, **stop)
    assert expected.shape[1] < 12 + GREEDY["max_new_tokens"]
    assert torch.equal(model.generate(**prompts, **GREEDY, **stop), expected)
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(**prompts, **GREEDY, stop_strings="a")


def test_scores_logits_and_cache_are_those_of_plain_decoding(model: Any) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "eos_token_id": [40, 50, 60]}
    prompts = ragged_prompts()
    theirs = plain(model, **prompts, **GREEDY, **options)
    ours = model.generate(**prompts, **GREEDY, **options)
    assert type(ours) is type(theirs)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        for mine, other in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, atol=2e-5, rtol=1e-5)


REFUSED: dict[str, dict[str, Any]] = {
    "beam search": {"num_beams": 2},
    "assisted generation": {"prompt_lookup_num_tokens": 3},
    "output_hidden_states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "cache_implementation": {"cache_implementation": "static"},
    "output_scores": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "stopping_criteria": [CountingCriterion()],
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_kept_falls_back_with_a_warning(reason: str) -> None:
    own, prompts = (
        dspark.accelerate(random_model("llama", layers=2), draft="none"),
        ragged_prompts(1),
    )
    options = GREEDY | REFUSED[reason]
    expected = plain(own, **prompts, **copy.deepcopy(options))
    with pytest.warns(FallbackWarning, match=reason):
        found = own.generate(**prompts, **copy.deepcopy(options))
    assert type(found) is type(expected)
    mine, other = (getattr(x, "sequences", x) for x in (found, expected))
    assert torch.equal(mine, other)


def test_a_mask_with_holes_or_a_text_past_the_context_falls_back(model: Any) -> None:
    prompts = ragged_prompts(1)
    prompts["attention_mask"][0, 5] = 0
    with pytest.warns(FallbackWarning, match="attention mask"):
        found = model.generate(**prompts, **GREEDY)
    assert torch.equal(found, plain(model, **prompts, **GREEDY))
    prompts = ragged_prompts(1)
    with pytest.warns(FallbackWarning, match="longest context"):
        model.generate(**prompts, do_sample=False, max_length=4000, eos_token_id=list(range(96)))


def test_a_model_of_an_unknown_family_keeps_its_own_generate() -> None:
    config = transformers.GPT2Config(
        vocab_size=96,
        n_positions=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    own = transformers.GPT2LMHeadModel(config).eval()
    with pytest.warns(FallbackWarning, match="'gpt2'"):
        dspark.accelerate(own)
    prompt = {"inputs": torch.tensor([[5, 6, 7]]), "pad_token_id": 0}
    found = own.generate(**prompt, **GREEDY)  # no second warning
    assert torch.equal(found, plain(own, **prompt, **GREEDY))


def test_restore_gives_everything_back() -> None:
    own, prompts = random_model("qwen3_moe").train(), ragged_prompts()
    own.generation_config.temperature = None
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    parts = {name: (type(part), part.training) for name, part in own.named_modules()}
    settings = own.config.to_dict()
    logits = own(**prompts).logits
    dspark.accelerate(own, pack=True)
    own.generate(**prompts, **GREEDY)
    assert torch.equal(own(**prompts).logits, logits)  # the module works while it is accelerated
    assert dspark.restore(own) is own
    assert "generate" not in vars(own)
    assert own.generate == type(own).generate.__get__(own)
    assert {name: (type(part), part.training) for name, part in own.named_modules()} == parts
    assert own.config.to_dict() == settings
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert own.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert dspark.restore(own) is own  # once more does no harm


@pytest.mark.parametrize("pack", [False, True])
def test_changed_weights_are_noticed(pack: bool) -> None:
    own, prompts = random_model("llama", layers=2), ragged_prompts()
    dspark.accelerate(own, draft="lookup", pack=pack)
    before = own.generate(**prompts, **GREEDY)
    with torch.no_grad():
        own.model.layers[1].mlp.down_proj.weight.mul_(-1.5)
    expected = plain(own, **prompts, **GREEDY)
    assert not torch.equal(before, expected)
    assert torch.equal(own.generate(**prompts, **GREEDY), expected)
    own.to(torch.float64)
    assert torch.equal(own.generate(**prompts, **GREEDY), plain(own, **prompts, **GREEDY))


def test_hooks_on_the_model_are_not_passed_over() -> None:
    own, prompts = dspark.accelerate(random_model("llama", layers=2)), ragged_prompts()
    own.generate(**prompts, **GREEDY)
    handle = own.model.layers[0].register_forward_hook(lambda part, args, out: out * 0.5)
    with pytest.warns(FallbackWarning, match="hooks"):
        found = own.generate(**prompts, **GREEDY)
    assert torch.equal(found, plain(own, **prompts, **GREEDY))
    handle.remove()


def test_a_copy_of_the_model_generates_by_itself() -> None:
    model, prompts = dspark.accelerate(random_model("llama", layers=2)), ragged_prompts()
    model.generate(**prompts, **GREEDY)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.weight.neg_()
        expected = plain(twin, **prompts, **GREEDY)
        assert torch.equal(twin.generate(**prompts, **GREEDY), expected)
        assert not torch.equal(expected, plain(model, **prompts, **GREEDY))


def test_a_call_inside_a_call_runs_plainly(model: Any) -> None:
    prompts, inner = ragged_prompts(1), []

    class Nested(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if not inner:
                inner.append(model.generate(**ragged_prompts(1, seed=8), **GREEDY))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.warns(FallbackWarning, match="inside another"):
        found = model.generate(**prompts, **GREEDY, stopping_criteria=[Nested()])
    assert torch.equal(found, plain(model, **prompts, **GREEDY))
    assert torch.equal(inner[0], plain(model, **ragged_prompts(1, seed=8), **GREEDY))


def test_a_loaded_model_drafts() -> None:
    own, small = random_model("llama", layers=2), random_model("llama", layers=1)
    prompts = ragged_prompts()
    expected = own.generate(**prompts, **GREEDY)
    dspark.accelerate(own, draft=small)
    assert torch.equal(own.generate(**prompts, **GREEDY), expected)
    assert "generate" not in vars(small)


@pytest.mark.parametrize("exact", [False, True])
def test_a_pipeline_gives_the_same_text(exact: bool) -> None:
    own, tokenizer = drafted("gemma3", exact=exact), character_tokenizer()
    questions, options = ["abcabcab", "xyxyxyxyxyx"], {"do_sample": False, "max_new_tokens": 8}
    texts = []
    for model in (random_model("gemma3", layers=2), own):
        pipe = transformers.pipeline("text-generation", model, tokenizer=tokenizer, device="cpu")
        texts.append(pipe(questions, batch_size=2, **options))
    assert texts[0] == texts[1]
    assert accepted(own) > 0


def test_what_is_no_model_or_has_another_generate_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a transformers model"):
        dspark.accelerate(torch.nn.Linear(2, 2))
    own = random_model("llama", layers=2)
    own.generate = lambda **arguments: None
    with pytest.raises(ConfigError, match="replaced already"):
        dspark.accelerate(own)
    with pytest.raises(ConfigError, match="must be a name"):
        dspark.accelerate(random_model("llama", layers=2), draft=3)
